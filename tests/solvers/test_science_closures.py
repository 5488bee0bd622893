"""Learned growth laws: what holds by construction, their flow against SciPy's, in networks and tumours."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from inverse.optimizers import quasi_newton
from inverse.problem import LeastSquares
from inverse.stopping import GradientTolerance, MaxIterations
from inverse.verification import check_gradient
from solvers.errors import Diverged, GliodeError
from solvers.node.collocation import Perceptron
from solvers.node.models import Node
from solvers.node.science.activated import ScienceActivated, Stepped, Unknown
from solvers.node.science.closures import Decreasing, GrowthFlow, Law, Positive
from solvers.node.weights import Parameters

F64 = torch.float64
LAWS: dict[str, Callable[[int], Law]] = {
    "decreasing": lambda seed: Decreasing(6, seed=seed),
    "positive": lambda seed: Positive(5, at=0.3, seed=seed),
}


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


def shaken(law: Law, seed: int, size: float = 1.0) -> Law:
    """The law with random parameters, as a training might leave them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in law.parameters():
            p.add_(size * torch.randn(p.shape, dtype=F64, generator=generator))
    return law


def fitted(model: nn.Module, forward: Callable[[], Tensor], data: Tensor, iterations: int) -> None:
    """Least squares by quasi-Newton, to noise of 1e-3."""

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return forward()

    called = Called()
    parameters = Parameters(called)
    problem = LeastSquares(
        parameters.space, lambda m: functional_call(called, dict(parameters.unpack(m)), ()), data, 1e-3
    )
    stopping = (GradientTolerance(1e-7), MaxIterations(iterations))
    parameters.load(quasi_newton.minimise(problem, parameters.pack(), stopping=stopping).m)


# ---- By construction --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAWS)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_bounds_hold_for_any_parameters(kind: str, seed: int) -> None:
    law = shaken(LAWS[kind](seed), seed)
    u = torch.linspace(0, 1, 401, dtype=F64)
    with torch.no_grad():
        g = law(u)
    assert float(g[0]) == 0.0
    assert abs(float(g[-1])) < 1e-14
    assert bool((g[1:-1] > 0).all())
    at = number(law.at)
    assert float(law(at)) == pytest.approx(law.at * (1 - law.at), rel=1e-12)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_crowding_slows_the_decreasing_law(seed: int) -> None:
    law = shaken(Decreasing(6, seed=seed), seed)
    u = torch.linspace(-0.2, 1.4, 201, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(law.per_capita(u).sum(), u)
    assert bool((slope < 0).all())
    with torch.no_grad():
        assert bool((law(torch.linspace(1.01, 2, 20, dtype=F64)) < 0).all())
    rising = shaken(Positive(5, seed=seed), seed, 3.0).per_capita(u)
    assert bool((rising.diff() > 0).any())  # as the other law may


def test_laws_keep_the_shape_of_what_they_are_given() -> None:
    for make in LAWS.values():
        law, u = make(0), torch.rand(2, 3, 4, dtype=F64)
        torch.testing.assert_close(law(u), torch.stack([law(row) for row in u.reshape(-1)]).view(2, 3, 4))


@pytest.mark.parametrize("kind", LAWS)
@pytest.mark.parametrize("name", ["logistic", "gompertz", "theta"])
def test_known_laws_can_be_learned(kind: str, name: str) -> None:
    """From values of rho g, rho unknown: to 1 %, with the truth's own rho at the reference density."""
    truths = {
        "logistic": lambda u: 0.4 * u * (1 - u),
        "gompertz": lambda u: 0.4 * u * torch.log(1.01 / (u + 0.01)),
        "theta": lambda u: 0.4 * u * (1 - u**3),
    }
    u = torch.linspace(0, 1, 61, dtype=F64)
    data = truths[name](u)
    law, rho = LAWS[kind](4), Unknown(1.0, positive=True)

    def rate(u: Tensor) -> Tensor:
        return rho.weights.values[0].exp() * law(u)

    fitted(nn.ModuleList([law, rho]), lambda: rate(u), data, 100)
    v = torch.linspace(0, 1, 200, dtype=F64)
    with torch.no_grad():
        off = (rate(v) - truths[name](v)).norm() / truths[name](v).norm()
    assert float(off) < 0.01
    at = number(law.at)
    assert float(rho.value()) == pytest.approx(float(truths[name](at) / (at * (1 - at))), rel=0.01)


# ---- The flow ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAWS)
@pytest.mark.parametrize("rho_dt", [0.1, 1.0, 8.0])
def test_the_flow_solves_its_equation(kind: str, rho_dt: float) -> None:
    law = shaken(LAWS[kind](1), 1, 0.3)
    u = torch.tensor([0.0, 1e-8, 1e-3, 0.04, 0.2, 0.5, 0.93, 1.0], dtype=F64)

    def rate(_: float, u: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return rho_dt / 5 * law(torch.from_numpy(u)).numpy()

    exact = solve_ivp(rate, (0, 5), u.numpy(), method="DOP853", rtol=1e-11, atol=1e-15).y[:, -1]
    with torch.no_grad():
        found = GrowthFlow(law)(u, 5.0, number(rho_dt / 5))
    np.testing.assert_allclose(found, exact, rtol=3e-4, atol=1e-14)
    assert float(found[0]) == 0.0 and float(found[-1]) == pytest.approx(1.0, abs=1e-14)
    assert bool((found.diff() >= 0).all()) and float(found.max()) <= 1 + 1e-12


def test_the_flow_of_the_logistic_law_is_its_closed_form() -> None:
    """A law whose network is constant is the logistic one."""
    law = Positive(3)
    with torch.no_grad():
        for p in law.parameters():
            p.zero_()
    u, dt, rho = torch.linspace(0, 1, 21, dtype=F64), number(3.0), number(0.2)
    grown = torch.exp(rho * dt)
    torch.testing.assert_close(
        GrowthFlow(law)(u, dt, rho), u * grown / (1 + u * (grown - 1)), rtol=0, atol=1e-5
    )


def test_the_flow_has_all_derivatives() -> None:
    """By the state, the time, the rate and the law's parameters, both modes against differences."""
    flow = GrowthFlow(Decreasing(4, seed=2))
    names = [name for name, _ in flow.named_parameters()]
    u = torch.linspace(0.05, 0.9, 5, dtype=F64)
    at = [u, number(2.0), number(0.3), *(p.detach() for p in flow.parameters())]
    generator = torch.Generator().manual_seed(0)
    ways = [torch.randn(v.shape, dtype=F64, generator=generator) for v in at]

    def f(*v: Tensor) -> Tensor:
        out: Tensor = functional_call(flow, dict(zip(names, v[3:], strict=True)), v[:3])
        return out.square().sum()

    h = 1e-6
    ends = [float(f(*(v + s * h * d for v, d in zip(at, ways, strict=True)))) for s in (1, -1)]
    difference = (ends[0] - ends[1]) / (2 * h)
    leaves = [v.clone().requires_grad_() for v in at]
    grads = torch.autograd.grad(f(*leaves), leaves)
    assert sum(float((g * d).sum()) for g, d in zip(grads, ways, strict=True)) == pytest.approx(
        difference, rel=1e-7
    )
    with torch.no_grad(), forward_ad.dual_level():
        duals = [forward_ad.make_dual(v, d) for v, d in zip(at, ways, strict=True)]
        tangent = forward_ad.unpack_dual(f(*duals)).tangent
    assert float(tangent) == pytest.approx(difference, rel=1e-7)


# ---- In networks ------------------------------------------------------------------------------------------


def test_a_law_inside_the_physics_is_learned_from_states() -> None:
    """x' = rho g(x), truth logistic: one closed form a state; gradients checked on the way."""
    field = ScienceActivated(
        lambda t, x, rho, g: rho * g(x),
        {"rho": Unknown(0.7, positive=True), "g": Decreasing(5, seed=1)},
    )
    model = Node(field, duration=3.0, steps=6)
    x0 = torch.tensor([0.02, 0.1, 0.3, 0.5, 0.7], dtype=F64)
    times = torch.linspace(0, 3, 7, dtype=F64)[:, None]
    grown = torch.exp(0.5 * times)
    data = x0 * grown / (1 + x0 * (grown - 1))
    parameters = Parameters(model)

    def forward(m: Tensor) -> Tensor:
        return functional_call(model, dict(parameters.unpack(m)), (x0,), {"trajectory": True})

    problem = LeastSquares(parameters.space, forward, data, 0.01)
    direction = torch.linspace(-1, 1, parameters.space.size, dtype=F64)
    assert check_gradient(problem, parameters.pack(), direction).passed
    stopping = (GradientTolerance(1e-6), MaxIterations(60))
    parameters.load(quasi_newton.minimise(problem, parameters.pack(), stopping=stopping).m)
    unknowns, u = field.unknowns.all, torch.linspace(0.02, 0.9, 100, dtype=F64)
    with torch.no_grad():
        learned = unknowns["rho"].value() * unknowns["g"](u)  # type: ignore[operator]
    off = (learned - 0.5 * u * (1 - u)).norm() / (0.5 * u * (1 - u)).norm()
    assert float(off) < 0.02


def test_a_closure_added_to_the_physics_finds_the_missing_term() -> None:
    """Known: logistic growth; missing: a predator's -0.4 x / (1 + 4 x)."""
    missing = _Entrywise()
    field = ScienceActivated(lambda t, x: x * (1 - x), {}, closure=missing)
    model = Node(field, duration=2.0, steps=8)
    x0 = torch.linspace(0.05, 0.95, 8, dtype=F64)

    def truth(_: float, x: np.ndarray) -> np.ndarray:
        return x * (1 - x) - 0.4 * x / (1 + 4 * x)

    seen = solve_ivp(truth, (0, 2), x0.numpy(), t_eval=np.linspace(0, 2, 9), rtol=1e-10, atol=1e-12).y.T
    fitted(model, lambda: model(x0, trajectory=True), torch.from_numpy(seen.copy()), 80)
    x = torch.linspace(float(seen.min()), float(seen.max()), 50, dtype=F64)
    with torch.no_grad():
        torch.testing.assert_close(missing(x), -0.4 * x / (1 + 4 * x), rtol=0, atol=2e-3)


class _Entrywise(nn.Module):
    """A small network of each entry by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Perceptron((0.0,), (1.0,), width=6, layers=1, seed=2, gain=0.1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x.reshape(-1, 1)).view(x.shape)
        return out


# ---- In a tumour on a mesh --------------------------------------------------------------------------------


def test_a_learned_law_grows_a_tumour_on_a_mesh() -> None:
    """A law fitted to Gompertz's in torch alone does in TumourModel what Gompertz's does."""
    from mpi4py import MPI

    from solvers.fem.mesh import Domain, box
    from tumour.growth import GrowthLaw, gompertz
    from tumour.model import Seed, TumourModel

    plain = box((24.0, 24.0, 2.0), (12, 12, 1), MPI.COMM_SELF)
    ones = torch.ones(plain.n_cells).double()
    domain = Domain(plain.mesh, plain.V, {"white": ones, "grey": 0 * ones}, plain.grid)
    exact, law = gompertz(0.01), Decreasing(8, seed=3)
    rho = 2 * float(exact.rate(number(0.5)) / 0.5)  # so that g(1/2) is 1/4, as the learned law has it
    u = torch.linspace(0, 1, 81, dtype=F64).square()
    fitted(law, lambda: law(u), exact.rate(u) / rho, 200)
    learned = GrowthLaw("learned", GrowthFlow(law), law, closed_form=True)
    values = {"D_white": 0.2, "D_grey": 0.1, "rho": 0.02, "x": 11.0, "y": 12.0, "z": 1.0, "age": 60.0}

    def grown(law: GrowthLaw, factor: float) -> Tensor:
        model = TumourModel(domain, law, Seed(0.3, 3.0), step=10.0)
        m = {k: number(v * factor if k == "rho" else v) for k, v in values.items()}
        return model.states(m)[0]

    with torch.no_grad():
        truth, found = grown(exact, 1.0), grown(learned, rho)
    assert float(truth.max()) > 0.4
    assert float((found - truth).norm() / truth.norm()) < 2e-3
    # The density reaches the law's own parameters through the mesh's steps.
    weight = law.network.layers[0].weight
    assert isinstance(weight, Tensor)
    (slope,) = torch.autograd.grad(grown(learned, rho).sum(), weight)
    h, way = 1e-5, torch.linspace(-1, 1, 8, dtype=F64)[:, None]
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * h * way)
            ends.append(float(grown(learned, rho).sum()))
            weight.sub_(sign * h * way)
    assert float((slope * way).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-5)


def test_a_flow_is_an_unknown_of_a_stepped_network() -> None:
    """Blocks that are run again for the gradient give the same one as the whole tape."""
    flow = GrowthFlow(Positive(3, seed=1))
    u = torch.linspace(0.1, 0.8, 4, dtype=F64)
    found = []
    for checkpoint in (None, 2):
        unknowns = {"rho": Unknown(0.3, positive=True), "grow": flow}
        model = Stepped(lambda u, dt, rho, grow: grow(u, dt, rho), unknowns, 4.0, 4, checkpoint=checkpoint)
        out = model(u)
        torch.testing.assert_close(out, flow(u, 4.0, 0.3), rtol=1e-4, atol=0)
        trained = [p for p in model.parameters() if p.requires_grad]
        found.append(torch.autograd.grad(out.sum(), trained))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
        assert float(a.abs().max()) > 0


def test_bad_input_is_named() -> None:
    with pytest.raises(GliodeError, match="at is a density"):
        Positive(at=1.0)


@pytest.mark.parametrize("kind", LAWS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_network_or_rate_that_is_no_number_has_no_flow(kind: str, value: float) -> None:
    """A trial point without an answer, not a crash; and a rate that would take a week."""
    u, law = torch.linspace(0, 1, 5, dtype=F64), LAWS[kind](1)
    for rho in (value, 1e8):
        with pytest.raises(Diverged, match="steps in one dt"):
            GrowthFlow(law)(u, 1.0, number(rho))
    with torch.no_grad():
        for p in law.parameters():
            p.fill_(value)
    with pytest.raises(Diverged, match="nan steps in one dt"):
        GrowthFlow(law)(u, 1.0, 0.3)
