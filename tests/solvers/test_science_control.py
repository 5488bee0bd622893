"""Problems made well-posed by training, against closed forms: two-point, control and ill-posed ones."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.special import ellipj
from torch import Tensor
from torch.func import functional_call

from inverse.optimizers import conjugate_gradients, gauss_newton, newton_cg
from inverse.problem import InverseProblem, LeastSquares
from inverse.regularizers.tikhonov import Tikhonov
from inverse.stopping import Discrepancy, GradientTolerance, MaxIterations, Rule
from solvers.node.models import Node
from solvers.node.science.activated import ScienceActivated, Unknown
from solvers.node.science.variational import Path
from solvers.node.weights import Parameters
from solvers.ode.integrate import integrate
from solvers.spaces import Euclidean

F64 = torch.float64
TIGHT = (GradientTolerance(1e-11), MaxIterations(40))


def shot(slope: float, second: Callable[[Tensor], Tensor], goal: float, times: Tensor) -> Tensor:
    """x at the times, of x'' = second(x), x(0) = 0, whose slope at 0 was found from x(T) = goal."""

    def path(m: Tensor) -> Tensor:
        first = torch.cat([m.new_zeros(1), m])
        return integrate(lambda t, y: torch.stack([y[1], second(y[0])]), first, times, trajectory=True)[:, 0]

    target = torch.tensor([goal], dtype=F64)
    problem = LeastSquares(Euclidean(1), lambda m: path(m)[-1:], target, 1.0)
    return path(gauss_newton.minimise(problem, torch.tensor([slope], dtype=F64), stopping=TIGHT).m)


@pytest.mark.parametrize(("start", "a"), [(1.0, 1.5171645990507543), (10.0, 10.938702773220)])
def test_bratus_two_solutions_by_their_slopes(start: float, a: float) -> None:
    """u'' = -e^u, u(0) = u(1) = 0: 2 log(cosh(a / 4) / cosh((x - 1/2) a / 2)), a = sqrt(2) cosh(a / 4)."""
    assert a == pytest.approx(math.sqrt(2) * math.cosh(a / 4), rel=1e-9)
    x = torch.linspace(0, 1, 41, dtype=F64)
    exact = 2 * (math.cosh(a / 4) / ((x - 0.5) * a / 2).cosh()).log()
    torch.testing.assert_close(shot(start, lambda u: -u.exp(), 0.0, x), exact, rtol=0, atol=2e-5)


def test_bratus_lower_solution_is_the_path_of_least_energy() -> None:
    path = Path(lambda t, u, w: (0.5 * w.square() - u.exp()).sum(-1), [0.0], [0.0], knots=17)
    problem = InverseProblem(path.space(), path.cost)
    m = newton_cg.minimise(problem, path.straight(), "full", stopping=TIGHT).m
    exact = shot(1.0, lambda u: -u.exp(), 0.0, torch.linspace(0, 1, 65, dtype=F64))[::4]
    torch.testing.assert_close(path.at(m, path.knots)[0][:, 0], exact, rtol=0, atol=1e-6)


def test_a_pendulum_is_sent_to_an_angle() -> None:
    """From hanging with the slope 2 k: 2 asin(k sn(t, k)), Jacobi's elliptic sine."""
    k, times = 0.9, torch.linspace(0, 2, 81, dtype=F64)
    exact = torch.from_numpy(2 * np.arcsin(k * ellipj(times.numpy(), k**2)[0]))
    found = shot(1.0, lambda x: -x.sin(), float(exact[-1]), times)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-7)
    assert float((found[1] - found[0]) / times[1]) == pytest.approx(2 * k, abs=2e-3)


def test_the_best_control_of_a_linear_system() -> None:
    """u' = A u + B w, 1/2 |u(T) - y|^2 + a/2 int w^2: w = B^T e^(A^T (T - t)) p, a p = y - u(T)."""
    A = np.array([[-1.0, 1.0, 0.0], [1.0, -2.0, 1.0], [0.0, 1.0, -1.0]])  # three cells of a bar, no flux out
    B, y, a, T = np.array([0.0, 0.0, 1.0]), np.array([0.2, 0.5, 1.0]), 0.01, 1.0
    nodes, shares = np.polynomial.legendre.leggauss(20)
    reached = [scipy.linalg.expm(A * s) @ B for s in (nodes + 1) / 2]
    gramian = sum(c / 2 * np.outer(r, r) for c, r in zip(shares, reached, strict=True))
    p = np.linalg.solve(a * np.eye(3) + gramian, y)
    times = np.linspace(0, T, 21)
    exact = np.array([B @ scipy.linalg.expm(A.T * (T - t)) @ p for t in times])

    At, Bt, yt = (torch.from_numpy(v) for v in (A, B, y))
    w = Unknown(0.0, "linear", 21)
    network = Node(ScienceActivated(lambda t, u, w: u @ At.mT + w * Bt, {"w": w}), T, 20)
    parameters = Parameters(network)
    zero = torch.zeros(3, dtype=F64)

    def end(m: Tensor) -> Tensor:
        out: Tensor = functional_call(network, dict(parameters.unpack(m)), (zero,))
        return out

    problem = LeastSquares(parameters.space, end, yt, 1.0, Tikhonov(parameters.space, a))
    found = newton_cg.minimise(problem, parameters.pack(), stopping=TIGHT)
    np.testing.assert_allclose(end(found.m).numpy(), gramian @ p, rtol=2e-4)
    np.testing.assert_allclose(found.m.numpy(), exact, rtol=0, atol=5e-3 * np.abs(exact).max())
    least = 0.5 * ((gramian @ p - y) ** 2).sum() + 0.5 * a * p @ gramian @ p
    assert least * (1 - 1e-5) < found.value < least * (1 + 1e-3)


def test_an_equation_is_solved_by_its_right_hand_side_as_the_weight() -> None:
    """u' = w with int |w - u (1 - u)|^2 least is the logistic equation: order 4 at the knots."""
    errors = []
    for knots in (9, 17):
        path = Path(lambda t, u, w: (w - 5 * u * (1 - u)).square().sum(-1), [0.1], knots=knots)

        def residual(m: Tensor, path: Path = path) -> Tensor:
            u, w = path.sampled(m)
            return path.quadrature.sqrt() * (w - 5 * u * (1 - u))[:, 0]

        problem = LeastSquares(path.space(), residual, torch.zeros(len(path.times), dtype=F64), 1.0)
        start = torch.full((knots, 1), 5 * 0.1 * 0.9, dtype=F64)
        found = newton_cg.minimise(problem, start, stopping=TIGHT)
        assert 2 * found.value == pytest.approx(float(path.cost(found.m)), rel=1e-9)
        exact = 1 / (1 + 9 * (-5 * path.knots).exp())
        errors.append(float((path.at(found.m, path.knots)[0][:, 0] - exact).abs().max()))
    assert errors[1] < 1e-5 and errors[0] / errors[1] > 10


def test_a_force_from_noisy_positions_needs_the_discrepancy_principle() -> None:
    """x'' = w = 6 t - 2 from 40 positions with 1 % noise."""
    w = Unknown(0.0, "linear", 41)
    field = ScienceActivated(lambda t, y, w: torch.stack([y[..., 1], w.expand_as(y[..., 0])], -1), {"w": w})
    network = Node(field, 1.0, 40)
    t = network.times()
    clean = t**3 - t**2
    errors = {}
    for length, stop in ((0.3, Discrepancy(1.1, math.sqrt(40))), (0.0, GradientTolerance(1e-7))):
        parameters = Parameters(network, length)

        def seen(m: Tensor, parameters: Parameters = parameters) -> Tensor:
            inputs = torch.zeros(2, dtype=F64), True
            out: Tensor = functional_call(network, dict(parameters.unpack(m)), inputs)
            return out[1:, 0]

        sd = 0.01 * float(clean.abs().max())
        generator = torch.Generator().manual_seed(5)
        data = clean[1:] + sd * torch.randn(40, generator=generator, dtype=F64)
        problem = LeastSquares(parameters.space, seen, data, sd)
        rules: list[Rule] = [stop, MaxIterations(40)]
        found = conjugate_gradients.minimise(problem, parameters.pack(), stopping=rules)
        errors[length] = float((found.m - (6 * t - 2)).norm() / (6 * t - 2).norm())
    assert errors[0.3] < 0.5 and errors[0.0] > 5 * errors[0.3]
