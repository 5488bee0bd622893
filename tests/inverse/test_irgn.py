"""Iteratively regularised Gauss-Newton and Levenberg-Marquardt: dense steps, closed form, regularization."""

import numpy as np
import pytest
import torch
from torch import Tensor

from inverse.optimizers import irgn, landweber
from inverse.problem import InverseProblem, LeastSquares
from inverse.regularizers.tikhonov import Tikhonov
from inverse.stopping import Discrepancy, MaxIterations
from solvers.errors import GliodeError
from solvers.spaces import Euclidean, GramSpace

ROOT = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
GRAM = ROOT @ ROOT.mT + torch.eye(5).double()
START = torch.linspace(-0.5, 0.5, 5, dtype=torch.float64)


def nonlinear(noise: float = 0.1) -> tuple[LeastSquares, Tensor]:
    """exp(m) seen through a matrix of falling singular values, in a metric of its own; and the truth."""
    generator = torch.Generator().manual_seed(2)
    u, _ = torch.linalg.qr(torch.randn(8, 5, dtype=torch.float64, generator=generator))
    a = u * torch.logspace(0, -2, 5, dtype=torch.float64)
    truth = torch.tensor([0.3, -0.2, 0.5, 0.1, -0.4], dtype=torch.float64)
    data = a @ truth.exp() + noise * 0.1 * torch.randn(8, dtype=torch.float64, generator=generator)
    space = GramSpace(5, lambda x: GRAM @ x, lambda d: torch.linalg.solve(GRAM, d))
    return LeastSquares(space, lambda m: a @ m.exp(), data, noise * 0.1), truth


@pytest.mark.parametrize("towards", ["start", "iterate"])
def test_steps_are_those_of_the_dense_normal_equations(towards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(irgn, "INNER_TOLERANCE", 1e-13)
    problem, _ = nonlinear()
    result = irgn.minimise(problem, START, MaxIterations(4), towards, alpha=50.0, q=0.3)
    m, alpha = START, 50.0
    for _ in range(4):
        J, r = problem.jacobian(m), problem.residual(m)
        pull = alpha * GRAM @ (m - START) if towards == "start" else 0.0
        m = m - torch.linalg.solve(J.mT @ J + alpha * GRAM, J.mT @ r + pull)
        alpha *= 0.3
    torch.testing.assert_close(result.m, m, rtol=1e-9, atol=1e-10)
    assert result.state.memory["alpha"] == pytest.approx(alpha)


def test_on_a_linear_problem_it_is_tikhonov_with_the_last_alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(irgn, "INNER_TOLERANCE", 1e-13)
    a = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    y = torch.arange(7.0).double()
    problem = LeastSquares(Euclidean(5), lambda m: a @ m, y, 1.0)
    result = irgn.minimise(problem, START, MaxIterations(6), alpha=4.0)
    alpha = 4.0 * 0.5**5
    expected = START + torch.linalg.solve(a.mT @ a + alpha * torch.eye(5).double(), a.mT @ (y - a @ START))
    torch.testing.assert_close(result.m, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("towards", ["start", "iterate"])
def test_the_discrepancy_stops_it_in_far_fewer_steps_than_landweber(towards: str) -> None:
    problem, truth = nonlinear(0.03)
    rule = (Discrepancy(1.2, problem.data_size**0.5), MaxIterations(5000))
    start = torch.zeros(5).double()
    result = irgn.minimise(problem, start, rule, towards)
    slow = landweber.minimise(problem, start, stopping=rule)
    assert result.stopped_by == "Discrepancy" and result.iterations < 20 < slow.iterations
    error, slow_error, first = (problem.space.norm(m - truth) for m in (result.m, slow.m, start))
    assert error < 0.7 * first and error < 1.5 * slow_error


def test_a_killed_run_resumes_to_the_same_numbers() -> None:
    problem, _ = nonlinear()
    whole = irgn.minimise(problem, START, MaxIterations(6))
    part = irgn.minimise(problem, START, MaxIterations(3))
    rest = irgn.minimise(problem, part.state_dict(), MaxIterations(6))
    assert rest.m.tolist() == whole.m.tolist()


def test_an_inner_solve_at_its_limit_is_reported() -> None:
    problem, _ = nonlinear()
    with pytest.warns(UserWarning, match="did not converge in 1"):
        irgn.minimise(problem, START, MaxIterations(5), inner_iterations=1)


def test_an_error_in_the_map_leaves_with_the_best_iterate() -> None:
    problem, _ = nonlinear()
    inner = problem.forward

    def failing(m: Tensor) -> Tensor:
        if problem.counts["forward"] > 12:
            raise GliodeError("the forward solve did not converge")
        return inner(m)

    problem.forward = failing
    with pytest.raises(GliodeError, match="did not converge") as caught:
        irgn.minimise(problem, START, MaxIterations(50), alpha=1.0)
    best = caught.value.best  # type: ignore[attr-defined]
    assert best.iterations >= 1 and best.value < best.history[0]["value"]


def test_unusable_options_are_refused() -> None:
    problem, _ = nonlinear()
    with pytest.raises(GliodeError, match="'origin'"):
        irgn.minimise(problem, START, MaxIterations(1), "origin")
    with pytest.raises(GliodeError, match="between 0 and 1"):
        irgn.minimise(problem, START, MaxIterations(1), q=1.0)
    with pytest.raises(GliodeError, match="alpha must be positive"):
        irgn.minimise(problem, START, MaxIterations(1), alpha=0.0)
    args = problem.space, problem.forward, problem.data, 1.0
    with pytest.raises(GliodeError, match="leave the regularizer out"):
        irgn.minimise(LeastSquares(*args, Tikhonov(problem.space)), START, MaxIterations(1))
    with pytest.raises(GliodeError, match="bounds"):
        irgn.minimise(LeastSquares(*args, bounds=(-9.0, 9.0)), START, MaxIterations(1))
    with pytest.raises(GliodeError, match="LeastSquares"):
        plain = InverseProblem(Euclidean(5), lambda m: (m**2).sum())
        irgn.minimise(plain, START, MaxIterations(1))  # type: ignore[arg-type]
    np.testing.assert_array_equal(START, torch.linspace(-0.5, 0.5, 5, dtype=torch.float64))
