"""Products, singular values and noise against dense Jacobians and closed forms; networks and elements."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mpi4py import MPI
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.func import functional_call

from inverse.sensitivity import (
    adjoint,
    directional,
    monte_carlo,
    propagate,
    singular_values,
)
from solvers.errors import GliodeError
from solvers.evolution import Evolution, PointwiseStep, Strang
from solvers.fem.diffusion import DiffusionStep
from solvers.fem.mesh import interval
from solvers.fem.operators import DiffusionOperator
from solvers.node.fields import Standalone
from solvers.node.models import Node
from solvers.node.weights import Parameters
from solvers.ode.integrate import integrate
from solvers.spaces import Euclidean, GramSpace
from tests.inverse.networks import ResNet, numbers

Case = tuple[Callable[[Tensor], Tensor], Tensor]


class Swinging(nn.Module):
    """A field of one's own that depends on the time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(25, 10), nn.Softplus(), nn.Linear(10, 25))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x) * torch.cos(torch.as_tensor(t))
        return out


def residual_network() -> Case:
    return ResNet(24, 3, 30), numbers(24)


def neural_ode() -> Case:
    field, times = Swinging().double(), torch.linspace(0, 1, 4, dtype=torch.float64)
    return lambda x: integrate(field, x, times, "kutta3"), numbers(25)


def standalone_network() -> Case:
    field = Standalone(22, knots=3, duration=2.0)
    field.reset(gain=1.5, rough=0.5)
    return Node(field, duration=2.0, steps=4, scheme="heun").double(), numbers(22)


def elements() -> Case:
    """Growth and diffusion of a density on an interval: u(0) -> u(3)."""
    domain = interval(12.0, 30, comm=MPI.COMM_SELF)
    operator = DiffusionOperator(domain, rtol=1e-13)
    w = operator.conductances(torch.full((domain.n_cells,), 0.5, dtype=torch.float64))
    logistic = PointwiseStep(lambda u, dt, rho: u / (u + (1 - u) * torch.exp(-rho * dt)))
    evolution = Evolution(Strang(logistic, DiffusionStep(operator, "sdirk2")), checkpoint=2)
    x = torch.from_numpy(domain.points[:, 0])
    rho = torch.tensor(0.4, dtype=torch.float64)
    return lambda u: evolution(u, 3.0, 5, w, rho), 0.5 * torch.exp(-((x - 4) ** 2))


MAPS = [residual_network, neural_ode, standalone_network, elements]


# ---- Products ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", MAPS)
def test_tangents_and_adjoints_are_products_with_the_dense_jacobian(case: Callable[[], Case]) -> None:
    F, m = case()
    J = jacobian(F, m)
    d, w = numbers(*m.shape, seed=1), numbers(*F(m).shape, seed=2)
    value, xi = directional(F, m, d)
    torch.testing.assert_close(value, F(m).detach())
    torch.testing.assert_close(xi, J @ d, rtol=1e-9, atol=1e-11)
    value, dual = adjoint(F, m, w)
    torch.testing.assert_close(value, F(m).detach())
    torch.testing.assert_close(dual, J.mT @ w, rtol=1e-9, atol=1e-11)
    step = 1e-6
    torch.testing.assert_close(
        xi, (F(m + step * d) - F(m - step * d)).detach() / (2 * step), rtol=1e-6, atol=1e-8
    )


class Forwardless(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


def test_what_is_no_map_on_the_tape_is_refused() -> None:
    m = numbers(3)
    with pytest.raises(GliodeError, match="write its jvp"):
        directional(Forwardless.apply, m, m)
    with pytest.raises(GliodeError, match="does not depend on m through the tape"):
        adjoint(lambda x: torch.from_numpy(x.detach().numpy()), m, m)
    with pytest.raises(GliodeError, match="floating-point"):
        directional(torch.sin, torch.arange(3), m)
    with pytest.raises(GliodeError, match="must return one tensor"):
        directional(lambda x: (x, x), m, m)  # type: ignore[arg-type, return-value]
    with pytest.raises(GliodeError, match=r"d: shape \(2,\), but m has \(3,\)"):
        directional(torch.sin, m, m[:2])
    with pytest.raises(GliodeError, match="m: it holds NaN"):
        adjoint(torch.sin, m * math.nan, m)
    _, zero = directional(lambda x: torch.ones_like(x), m, m)
    assert not zero.any()


# ---- Singular values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lanczos", "randomised"])
@pytest.mark.parametrize("case", MAPS)
def test_singular_triplets_are_those_of_the_dense_jacobian(case: Callable[[], Case], method: str) -> None:
    F, m = case()
    J = jacobian(F, m)
    exact = torch.linalg.svdvals(J)
    found = singular_values(F, m, 4, method=method, power=2 if case is elements else 30)
    close = 1e-9 if method == "lanczos" else 1e-5
    torch.testing.assert_close(found.values, exact[:4], rtol=close, atol=0)
    V, U = found.inputs, found.outputs
    torch.testing.assert_close(V @ V.mT, torch.eye(4).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(U @ U.mT, torch.eye(4).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(V @ J.mT, found.values[:, None] * U, rtol=0, atol=1e-9)
    if method == "lanczos":
        torch.testing.assert_close(U @ J, found.values[:, None] * V, rtol=0, atol=1e-6)


def metric(n: int, seed: int) -> tuple[Tensor, GramSpace]:
    a = numbers(n, n, seed=seed)
    G = a @ a.mT / n + 0.1 * torch.eye(n).double()
    return G, GramSpace(n, lambda v: G @ v, lambda d: torch.linalg.solve(G, d))


@pytest.mark.parametrize("method", ["lanczos", "randomised"])
@pytest.mark.parametrize("shape", [(30, 26), (8, 40), (40, 8)])
def test_in_a_metric_they_are_those_of_the_whitened_jacobian(shape: tuple[int, int], method: str) -> None:
    outputs, inputs = shape
    A = numbers(outputs, inputs)
    (GX, X), (GY, Y) = metric(inputs, 1), metric(outputs, 2)
    LX, LY = torch.linalg.cholesky(GX), torch.linalg.cholesky(GY)
    found = singular_values(lambda x: A @ x, numbers(inputs), 5, X, Y, method, power=40)
    whitened = LY.mT @ torch.linalg.solve_triangular(LX.mT, A, upper=True, left=False)
    torch.testing.assert_close(found.values, torch.linalg.svdvals(whitened)[:5], rtol=1e-9, atol=0)
    V, U = found.inputs, found.outputs
    torch.testing.assert_close(V @ GX @ V.mT, torch.eye(5).double(), rtol=0, atol=1e-11)
    torch.testing.assert_close(U @ GY @ U.mT, torch.eye(5).double(), rtol=0, atol=1e-11)
    torch.testing.assert_close(V @ A.mT, found.values[:, None] * U, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["lanczos", "randomised"])
def test_values_below_the_root_of_rounding_are_found(method: str) -> None:
    """Of the squared problem alone values below 1e-8 would be noise."""
    exact = 10.0 ** -torch.arange(40, dtype=torch.float64)
    left, right = (torch.linalg.qr(numbers(40, 40, seed=s))[0] for s in (1, 2))
    found = singular_values(lambda x: left @ (exact * (right @ x)), numbers(40), 11, method=method)
    torch.testing.assert_close(found.values, exact[:11], rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", ["lanczos", "randomised"])
def test_multiple_and_vanishing_values(method: str) -> None:
    m = numbers(5, 6)
    scale = torch.tensor([3.0, 2.0, 0.0, 0.0, 0.0], dtype=torch.float64)[:, None]
    found = singular_values(lambda x: scale * x, m, 13, method=method)
    expected = torch.tensor([3.0] * 6 + [2.0] * 6 + [0.0], dtype=torch.float64)
    torch.testing.assert_close(found.values, expected)
    assert found.inputs.shape == found.outputs.shape == (13, 5, 6)
    V, U = found.inputs.flatten(1), found.outputs.flatten(1)
    torch.testing.assert_close(V @ V.mT, torch.eye(13).double())
    torch.testing.assert_close(U @ U.mT, torch.eye(13).double())
    dead = singular_values(lambda x: torch.relu(x - 100), m, 2, method=method)
    assert not dead.values.any()


@pytest.mark.parametrize("method", ["lanczos", "randomised"])
def test_single_precision_and_seeds(method: str) -> None:
    F, m = ResNet(24, 2, 30, torch.float32), numbers(24).float()
    found = singular_values(F, m, 3, method=method, power=20, seed=1)
    assert found.values.dtype == found.inputs.dtype == found.outputs.dtype == torch.float32
    torch.testing.assert_close(found.values, torch.linalg.svdvals(jacobian(F, m))[:3], rtol=1e-4, atol=0)
    again = singular_values(F, m, 3, method=method, power=20, seed=1)
    assert torch.equal(found.inputs, again.inputs)


def test_singular_values_refuses() -> None:
    class Two:
        def allreduce(self, value: Any, /) -> Any:
            return 2 * value

        def Allreduce(self, sendbuf: Any, recvbuf: Any, /) -> None:
            recvbuf[...] = 2 * sendbuf

    m = numbers(4)
    distributed = GramSpace(4, lambda v: v, lambda d: d, comm=Two())
    for arguments, message in [
        ({"k": 5}, "k: 5 singular values, the Jacobian is 4 x 4; give 1 to 4"),
        ({"k": 0}, "give 1 to 4"),
        ({"method": "qr"}, "'qr' is not one of lanczos, randomised"),
        ({"tol": 0.0}, "tol between 0 and 1"),
        ({"space": Euclidean(3)}, r"m has shape \(4,\), its space has \(3,\)"),
        ({"output_space": Euclidean(3)}, r"F\(m\) has shape \(4,\), its space has \(3,\)"),
        ({"space": distributed}, "m: its space is distributed"),
    ]:
        with pytest.raises(GliodeError, match=message):
            singular_values(torch.sin, m, **arguments)  # type: ignore[arg-type]


# ---- Noise ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [3, 9])
def test_propagation_is_exact_for_affine_maps(outputs: int) -> None:
    A, m = numbers(outputs, 5), numbers(5, seed=1)
    sd = torch.tensor([0.1, 0.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    C, precision = torch.linalg.inv(metric(5, 2)[0]), metric(5, 2)[1]
    cases: list[tuple[dict[str, Any], Tensor]] = [
        ({"sd": 0.3}, 0.09 * A @ A.mT),
        ({"sd": sd}, A @ torch.diag(sd**2) @ A.mT),
        ({"covariance": C}, A @ C @ A.mT),
        ({"covariance": precision}, A @ C @ A.mT),
    ]
    for noise, exact in cases:
        full = propagate(lambda x: A @ x - 1, m, **noise)
        torch.testing.assert_close(full.mean, A @ m - 1)
        torch.testing.assert_close(full.covariance, exact)
        torch.testing.assert_close(full.sd, exact.diagonal().sqrt())
        part = propagate(lambda x: A @ x - 1, m, **noise, diagonal=True)
        assert part.covariance is None
        torch.testing.assert_close(part.sd, exact.diagonal().sqrt())


@pytest.mark.parametrize("kind", ["sd", "covariance", "space"])
def test_monte_carlo_draws_from_the_noise_that_was_asked_for(kind: str) -> None:
    """4000 draws: each covariance within 5 of its standard errors, ((C_ij^2 + C_ii C_jj) / samples)^(1/2)."""
    A, m = numbers(3, 2, 2).flatten(1), numbers(2, 2, seed=1)
    C, space = torch.linalg.inv(metric(4, 2)[0]), metric(4, 2)[1]
    noise: dict[str, Any] = {"sd": {"sd": 0.4}, "covariance": {"covariance": C}, "space": {}}[kind]
    if kind == "space":
        m, noise = m.reshape(4), {"covariance": space}
    exact = A @ (C if kind != "sd" else 0.16 * torch.eye(4).double()) @ A.mT
    draw: dict[str, Any] = {"samples": 4000, "generator": torch.Generator().manual_seed(0)}
    found = monte_carlo(lambda x: A @ x.reshape(4), m, **noise, **draw)
    assert found.covariance is not None
    error = ((exact.square() + torch.outer(exact.diagonal(), exact.diagonal())) / 4000).sqrt()
    assert bool(((found.covariance - exact).abs() < 5 * error).all())
    assert bool(((found.mean - A @ m.reshape(4)).abs() < 5 * found.sd / 4000**0.5).all())
    draw["generator"] = torch.Generator().manual_seed(0)
    part = monte_carlo(lambda x: A @ x.reshape(4), m, **noise, **draw, diagonal=True)
    torch.testing.assert_close(part.sd, found.sd)
    torch.testing.assert_close(part.mean, found.mean)


def test_first_order_and_monte_carlo_of_a_square_differ_by_the_known_terms() -> None:
    """x ~ N(m, s^2): x^2 has mean m^2 + s^2 and variance 4 m^2 s^2 + 2 s^4, not m^2, 4 m^2 s^2."""
    m, s = torch.tensor([1.5], dtype=torch.float64), 1.0
    first = propagate(torch.square, m, sd=s)
    assert float(first.mean) == pytest.approx(2.25) and float(first.sd) == pytest.approx(3)
    drawn = monte_carlo(torch.square, m, sd=s, samples=20000, generator=torch.Generator().manual_seed(0))
    sd = math.sqrt(4 * 2.25 * s**2 + 2 * s**4)
    assert float(drawn.mean) == pytest.approx(2.25 + s**2, abs=5 * sd / 20000**0.5)
    assert float(drawn.sd) == pytest.approx(sd, rel=0.03) and sd > 3.3


@pytest.mark.parametrize("case", MAPS)
def test_first_order_agrees_with_monte_carlo_for_little_noise(case: Callable[[], Case]) -> None:
    F, m = case()
    J = jacobian(F, m)
    first = propagate(F, m, sd=1e-3)
    torch.testing.assert_close(first.covariance, 1e-6 * J @ J.mT, rtol=1e-8, atol=1e-14)
    drawn = monte_carlo(F, m, sd=1e-3, samples=300, generator=torch.Generator().manual_seed(1))
    ratio = drawn.sd / first.sd
    assert float(ratio.min()) > 0.75 and float(ratio.max()) < 1.25  # five or six standard errors of 300 draws


def test_noise_of_the_weights() -> None:
    """y = W x + b with independent noise s on all weights: covariance s^2 (|x|^2 + 1) I."""
    layer, x = nn.Linear(4, 3).double(), numbers(4)
    weights = Parameters(layer)
    found = propagate(lambda w: functional_call(layer, dict(weights.unpack(w)), (x,)), weights.pack(), sd=0.2)
    exact = 0.04 * (x.square().sum() + 1) * torch.eye(3).double()
    torch.testing.assert_close(found.covariance, exact)
    field = Standalone(3, knots=4)
    field.reset()
    node = Node(field, steps=5).double()
    weights = Parameters(node)

    def scores(w: Tensor) -> Tensor:
        out: Tensor = functional_call(node, dict(weights.unpack(w)), (x[:3],))
        return out

    first = propagate(scores, weights.pack(), sd=0.01)
    drawn = monte_carlo(scores, weights.pack(), sd=0.01, samples=300)
    assert float((drawn.sd / first.sd).min()) > 0.75 and float((drawn.sd / first.sd).max()) < 1.25


def test_propagation_refuses() -> None:
    m = numbers(3)
    indefinite = torch.diag(torch.tensor([1.0, -1.0, 1.0]))
    for arguments, message in [
        ({}, "either sd or covariance"),
        ({"sd": 1.0, "covariance": torch.eye(3)}, "either sd or covariance"),
        ({"sd": torch.ones(2)}, r"sd: shape \(2,\), but m has \(3,\)"),
        ({"sd": -1.0}, "finite and not negative"),
        ({"covariance": torch.eye(2)}, r"covariance: shape \(2, 2\), m needs \(3, 3\)"),
    ]:
        with pytest.raises(GliodeError, match=message):
            propagate(torch.sin, m, **arguments)  # type: ignore[arg-type]
    with pytest.raises(GliodeError, match="not positive definite"):
        monte_carlo(torch.sin, m, covariance=indefinite)
    with pytest.raises(GliodeError, match="diagonal=True"):
        propagate(lambda x: x.sum().expand(20000), m, sd=1.0)
    with pytest.raises(GliodeError, match="two or more"):
        monte_carlo(torch.sin, m, sd=1.0, samples=1)
    with pytest.raises(GliodeError, match="gave NaN"):
        monte_carlo(lambda x: (x - 5).sqrt(), m, sd=1.0, samples=2)
