"""Science-activated networks: closed forms, gradients against differences, the stepped form, stability."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from inverse.optimizers import conjugate_gradients, gauss_newton, quasi_newton
from inverse.problem import LeastSquares
from inverse.stopping import MaxIterations
from solvers.errors import Diverged, GliodeError
from solvers.node.models import Node
from solvers.node.science.activated import ScienceActivated, Stepped, Unknown, fastest_rate
from solvers.node.weights import Parameters
from solvers.ode.integrate import integrate
from solvers.ode.tableaux import TABLEAUX, chebyshev, real_interval
from solvers.spaces import DepthSobolev, Diagonal, Euclidean, GramSpace

F64 = torch.float64


class Closure(nn.Module):
    """A small network of the state."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.one, self.two = nn.Linear(1, 4).to(F64), nn.Linear(4, 1).to(F64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(torch.tanh(self.one(x[..., None])))[..., 0]
        return out


def physics(t: Tensor, x: Tensor, k: Tensor, source: Tensor, c: Tensor, g: Callable[..., Tensor]) -> Tensor:
    """Numbers, fields, functions of depth, and a network in one right-hand side."""
    return -k * x + source * torch.cos(t) + c * x.roll(1, -1) + 0.3 * g(x)


def everything() -> ScienceActivated:
    unknowns = {
        "k": Unknown(0.7, positive=True),
        "source": Unknown(torch.linspace(0.1, 0.5, 3, dtype=F64), space=Diagonal(torch.ones(3, dtype=F64))),
        "c": Unknown(0.2, depth="linear", knots=4, duration=1.5),
        "g": Closure(),
    }
    torch.manual_seed(5)
    added = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).to(F64)
    return ScienceActivated(physics, unknowns, added)


def test_decay_with_a_rate_of_time_has_its_closed_form() -> None:
    """x' = -k(t) x, k linear from 1 to 3 on [0, 2]: x(2) = x(0) exp(-4)."""
    k = Unknown(1.0, depth="linear", knots=2, duration=2.0)
    with torch.no_grad():
        k.weights.values[1] = 3.0
    net = Node(ScienceActivated(lambda t, x, k: -k * x, {"k": k}), duration=2.0, steps=200)
    x0 = torch.tensor([[1.0], [2.0]], dtype=F64)
    torch.testing.assert_close(net(x0), x0 * math.exp(-4), rtol=1e-7, atol=0)


@pytest.mark.parametrize("gradient", ["adjoint", "checkpointed"])
def test_gradients_by_every_kind_of_unknown_are_those_of_differences(gradient: str) -> None:
    net = Node(everything(), duration=1.5, steps=6, gradient=gradient)
    parameters = Parameters(net, length=0.5)
    x0 = torch.tensor([[0.3, -0.2, 0.5], [1.0, 0.1, -0.4]], dtype=F64)

    def J(m: Tensor) -> Tensor:
        return torch.func.functional_call(net, dict(parameters.unpack(m)), (x0,)).square().sum()

    m = parameters.pack().requires_grad_()
    (found,) = torch.autograd.grad(J(m), m)
    step = 1e-6
    for i in range(m.numel()):
        e = torch.zeros_like(m)
        e[i] = step
        difference = float((J(m + e) - J(m - e)).detach()) / (2 * step)
        assert float(found[i]) == pytest.approx(difference, rel=1e-6, abs=1e-8), i


def test_the_parameters_live_in_their_own_spaces() -> None:
    mass = torch.tensor([0.5, 2.0, 1.0], dtype=F64)
    field = Unknown(torch.ones(3, dtype=F64), depth="linear", knots=4, space=Diagonal(mass))
    number = Unknown(2.0, positive=True)
    parameters = Parameters(
        nn.ModuleDict({"field": field, "number": number, "fixed": Unknown(1.0, trained=False)})
    )
    spaces = parameters.space.spaces
    assert set(spaces) == {"field.weights.values", "number.weights.values"}
    assert isinstance(spaces["number.weights.values"], Euclidean)
    a, b = torch.randn(2, 4, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    space = spaces["field.weights.values"]
    apart = sum(
        DepthSobolev(field.weights.knots, (), 0.0).inner(a[:, i], b[:, i]) * mass[i] for i in range(3)
    )
    assert space.inner(a, b) == pytest.approx(float(apart), rel=1e-12)


def test_depth_times_space_has_the_kronecker_product_for_a_gram_matrix() -> None:
    generator = torch.Generator().manual_seed(4)
    B = torch.randn(3, 3, dtype=F64, generator=generator)
    G = B @ B.T + torch.eye(3, dtype=F64)
    each = GramSpace(3, lambda a: G @ a, lambda d: torch.linalg.solve(G, d))
    times = torch.tensor([0.0, 0.4, 1.0, 1.1], dtype=F64)
    space, depth = DepthSobolev(times, (3,), 0.3, each), DepthSobolev(times, (1,), 0.3)
    T = torch.stack([depth.gram(e[:, None])[:, 0] for e in torch.eye(4, dtype=F64)])
    a = torch.randn(4, 3, dtype=F64, generator=generator)
    torch.testing.assert_close(space.gram(a).reshape(-1), torch.kron(T, G) @ a.reshape(-1))
    torch.testing.assert_close(space.riesz(space.gram(a)), a)


def test_a_source_of_time_is_found_by_sobolev_conjugate_gradients() -> None:
    """x' = -x + s(t): s(t) = sin(2 t) from the trajectory; J falls to nothing and s is met."""
    knots = 13
    truth = torch.sin(2 * torch.linspace(0, 2, knots, dtype=F64))
    source = Unknown(0.0, depth="linear", knots=knots, duration=2.0)
    net = Node(ScienceActivated(lambda t, x, s: -x + s, {"s": source}), duration=2.0, steps=24)
    parameters = Parameters(net, length=0.2)
    x0 = torch.zeros(1, dtype=F64)

    def forward(m: Tensor) -> Tensor:
        return torch.func.functional_call(net, dict(parameters.unpack(m)), (x0, True))[1:, 0]

    data = forward(truth).detach()
    problem = LeastSquares(parameters.space, forward, data, noise=1e-3)
    result = conjugate_gradients.minimise(problem, parameters.pack(), stopping=MaxIterations(120))
    assert float((result.m - truth).abs().max()) < 0.01


def implicit_euler(u: Tensor, dt: float, k: Tensor, source: Tensor) -> Tensor:
    return (u + dt * source) / (1 + dt * k)


@pytest.mark.parametrize("checkpoint", [None, 3])
def test_the_stepped_form_is_the_recursion_written_out(checkpoint: int | None) -> None:
    k = Unknown(0.5, depth="steps", knots=7, duration=2.0, positive=True)
    with torch.no_grad():
        k.weights.values.add_(torch.linspace(0, 1, 7, dtype=F64))
    source = Unknown(torch.tensor([0.1, -0.3], dtype=F64), depth="linear", knots=2, duration=2.0)
    net = Stepped(implicit_euler, {"k": k, "source": source}, 2.0, 7, checkpoint=checkpoint)
    u = torch.tensor([1.0, 2.0], dtype=F64)
    states = net(u, trajectory=True)
    expected = [u]
    for rate in k.value():
        expected.append(implicit_euler(expected[-1], 2.0 / 7, rate, source.value()[0]))
    torch.testing.assert_close(states, torch.stack(expected))
    torch.testing.assert_close(net(u), expected[-1])

    parameters = Parameters(net)
    m = parameters.pack().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda m: torch.func.functional_call(net, dict(parameters.unpack(m)), (u,)), (m,)
    )


def laplacian(t: Tensor, x: Tensor, D: Tensor) -> Tensor:
    """Second differences with zero flux, h = 1/n."""
    flux = D * x.diff(dim=-1) * x.shape[-1] ** 2
    edge = torch.zeros_like(x[..., :1])
    return torch.cat([flux, edge], -1) - torch.cat([edge, flux], -1)


def test_a_step_beyond_the_stability_interval_is_refused_with_the_way_out() -> None:
    field = ScienceActivated(laplacian, {"D": Unknown(0.5)})
    x0 = torch.rand(2, 16, dtype=F64, generator=torch.Generator().manual_seed(0))
    exact = 4 * 0.5 * 16**2 * math.cos(math.pi / 32) ** 2
    rate = fastest_rate(lambda x: laplacian(x, x, torch.tensor(0.5, dtype=F64)), x0)
    assert 0.93 * exact < rate <= exact * (1 + 1e-12)
    with pytest.raises(GliodeError, match=r"kutta4: a step of 0\.1 is unstable .* take \d+ steps or more"):
        Node(field, duration=1.0, steps=10)(x0)
    enough = math.ceil(exact / TABLEAUX["kutta4"].real_interval)
    stages = next(s for s in range(2, 40) if real_interval(s) > 0.1 * exact)
    smooth = torch.cos(math.pi * (torch.arange(16, dtype=F64) + 0.5) / 16)  # an eigenvector
    decay = math.exp(-4 * 0.5 * 16**2 * math.sin(math.pi / 32) ** 2)
    for scheme, steps in ((TABLEAUX["kutta4"], enough), (chebyshev(stages), 10)):
        found = Node(field, duration=1.0, steps=steps, scheme=scheme)(smooth)
        torch.testing.assert_close(found, decay * smooth, rtol=0, atol=1e-3)


def test_the_fastest_rate_of_rotations_and_shears_is_the_largest_eigenvalue() -> None:
    """x'' = -1e4 x: eigenvalues +-100 i; a cycle of three with weights 1, 10, 10: modulus 100^(1/3)."""
    matrices = [[[0.0, 1.0], [-1e4, 0.0]], [[0.0, 1.0, 0.0], [0.0, 0.0, 10.0], [10.0, 0.0, 0.0]]]
    for matrix, expected in zip(matrices, (100.0, 100 ** (1 / 3)), strict=True):
        found = fastest_rate(torch.tensor(matrix, dtype=F64).mv, torch.ones(len(matrix), dtype=F64))
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("checkpoint", "most"), [(None, 120), (10, 6)])
def test_checkpoints_keep_the_first_states_of_blocks_only(checkpoint: int | None, most: int) -> None:
    """The memory behind what the tape holds on to: each state by itself, not a stack of them."""
    kept: list[int] = []

    def hold(t: Tensor) -> Tensor:
        if t.shape == (17,):
            kept.append(t.untyped_storage().nbytes())
        return t

    net = Stepped(
        lambda u, dt, k: u / (1 + dt * k), {"k": Unknown(0.1, positive=True)}, 1.0, 60, checkpoint=checkpoint
    )
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda t: t):
        net(torch.ones(17, dtype=F64))
    assert 0 < len(kept) <= most and set(kept) == {17 * 8}


def test_the_step_is_checked_again_when_an_unknown_has_changed() -> None:
    net = Node(ScienceActivated(laplacian, {"D": Unknown(0.1)}), duration=0.1, steps=10)
    parameters = Parameters(net)
    x0 = torch.rand(16, dtype=F64, generator=torch.Generator().manual_seed(0))
    assert bool(torch.isfinite(net(x0)).all())
    m = torch.tensor([5.0], dtype=F64)
    with pytest.raises(Diverged, match="unstable"):
        torch.func.functional_call(net, dict(parameters.unpack(m)), (x0,))


@pytest.mark.parametrize("optimizer", [gauss_newton, conjugate_gradients, quasi_newton])
def test_a_trial_without_an_answer_is_rejected_and_the_search_goes_on(optimizer: Any) -> None:
    """u' = r u^2, u(0) = 1, explodes at t = 1/r: from r = 0.01, long steps leave the solvable range."""
    net = Stepped(lambda u, dt, r: u * torch.exp(r * dt * u), {"r": Unknown(0.01, positive=True)}, 8.0, 80)
    parameters = Parameters(net)
    u0 = torch.ones(1, dtype=F64)

    def forward(m: Tensor) -> Tensor:
        return torch.func.functional_call(net, dict(parameters.unpack(m)), (u0,))

    truth = torch.tensor([math.log(0.1)], dtype=F64)
    with pytest.raises(Diverged):
        forward(torch.tensor([0.0], dtype=F64))
    problem = LeastSquares(parameters.space, forward, forward(truth).detach(), noise=0.01)
    result = optimizer.minimise(problem, parameters.pack(), stopping=MaxIterations(60))
    torch.testing.assert_close(result.m, truth, rtol=1e-5, atol=0)
    with pytest.raises(Diverged, match="not finite after step"):
        optimizer.minimise(problem, torch.tensor([3.0], dtype=F64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Unknown(math.nan), "NaN"),
        (lambda: Unknown(0.0, positive=True), "above 0"),
        (lambda: Unknown(torch.ones(2), space=Euclidean(3)), "shape"),
        (lambda: Unknown(1.0, depth="spline"), "kind"),
        (lambda: ScienceActivated(laplacian, {"a b": Unknown(1.0)}), "a b"),
        (lambda: ScienceActivated(laplacian, {"D": cast(Any, 1.0)}), "Unknown"),
        (lambda: Stepped(implicit_euler, {}, 1.0, 0), "steps"),
        (lambda: Stepped(implicit_euler, {}, 1.0, 2, checkpoint=0), "checkpoint"),
    ],
)
def test_bad_input_is_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(GliodeError, match=message):
        make()


def test_a_state_that_stops_being_finite_is_reported() -> None:
    net = Stepped(lambda u, dt, k: u * torch.exp(k * dt * u), {"k": Unknown(1.0)}, 10.0, 10)
    with pytest.raises(GliodeError, match="not finite after step"):
        net(torch.tensor([5.0], dtype=F64))


def test_a_tensor_hidden_in_the_physics_would_lose_its_gradient() -> None:
    hidden = torch.tensor(1.0, dtype=F64, requires_grad=True)
    x0 = torch.ones(1, dtype=F64, requires_grad=True)
    field = ScienceActivated(lambda t, x: -hidden * x)
    with pytest.raises(GliodeError, match="would be lost"):
        integrate(field, x0, torch.linspace(0, 1, 3))
