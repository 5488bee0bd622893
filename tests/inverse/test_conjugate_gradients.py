"""Conjugate gradients: finite termination, mesh independence, safeguards, resumption, honest counts."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

from inverse.optimizers import conjugate_gradients
from inverse.optimizers.iteration import Iterate, NonFiniteError
from inverse.optimizers.line_search import sensitivity, wolfe
from inverse.problem import InverseProblem, LeastSquares
from inverse.regularizers.tikhonov import Tikhonov
from inverse.stopping import Discrepancy, GradientTolerance, MaxIterations, State
from solvers.errors import GliodeError
from solvers.spaces import DepthSobolev, Euclidean, GramSpace, Space

VARIANTS = ["FR", "PR+", "FR-PR", "HS", "DY"]
N = 6
TIGHT = (GradientTolerance(1e-9), MaxIterations(200))


def matrix(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, N, dtype=torch.float64, generator=generator) + 2 * torch.eye(N, dtype=torch.float64)


def gram_space() -> GramSpace:
    gram = matrix(5).mT @ matrix(5) + torch.eye(N, dtype=torch.float64)
    return GramSpace(N, lambda a: gram @ a, lambda d: torch.linalg.solve(gram, d))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("space", [Euclidean(N), gram_space()], ids=["Euclidean", "GramSpace"])
@pytest.mark.parametrize("kind", ["least squares", "misfit"])
def test_a_quadratic_in_n_dimensions_takes_n_steps(variant: str, space: Space, kind: str) -> None:
    a, y = matrix(1), torch.arange(1.0, N + 1).double()
    prior = Tikhonov(space, 0.5)
    problem: InverseProblem
    if kind == "least squares":
        problem = LeastSquares(space, lambda m: a @ m, y, 1.0, regularizer=prior)
    else:
        problem = InverseProblem(space, lambda m: 0.5 * (a @ m - y).square().sum(), regularizer=prior)
    gram = torch.stack([space.gram(e) for e in torch.eye(N, dtype=torch.float64)])
    exact = torch.linalg.solve(a.mT @ a + 0.5 * gram, a.mT @ y)
    result = conjugate_gradients.minimise(problem, torch.zeros(N).double(), variant=variant, stopping=TIGHT)
    assert result.iterations <= N
    assert result.stopped_by == "GradientTolerance"
    torch.testing.assert_close(result.m, exact, rtol=1e-7, atol=1e-8)
    k = result.iterations
    if kind == "least squares":  # each step: one dual pass for its length, one forward, one adjoint
        assert result.counts == {"forward": 1 + 2 * k, "adjoint": 1 + k, "tangent": k}
    else:  # the length by a Hessian action: a forward, two adjoints, a tangent
        assert result.counts == {"forward": 1 + 2 * k, "adjoint": 1 + 3 * k, "tangent": k}


def test_the_sensitivity_step_is_the_closed_form() -> None:
    """eta = -<r, J d> / ||J d||^2 at a nonlinear point where the full step is taken."""
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    problem = LeastSquares(Euclidean(2), lambda m: m[0] * torch.exp(m[1] * t), 2 * torch.exp(-t), 1.0)
    m = torch.tensor([1.8, -0.8], dtype=torch.float64)
    here = Iterate.of(problem.evaluate(m))
    d = -here.riesz
    taken = sensitivity(problem, here, d, -(here.gradient_norm**2))
    assert taken is not None
    r, xi = problem.residual(m), problem.jvp(m, d)
    assert taken[1] == pytest.approx(-float(r @ xi) / float(xi @ xi), rel=1e-12)


def rosenbrock(m: Tensor) -> Tensor:
    return 100 * (m[1] - m[0] ** 2) ** 2 + (1 - m[0]) ** 2


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("step", ["sensitivity", "wolfe"])
def test_rosenbrock(variant: str, step: str) -> None:
    problem = InverseProblem(Euclidean(2), rosenbrock)
    start = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    stopping = (GradientTolerance(0, absolute=1e-7), MaxIterations(500))
    result = conjugate_gradients.minimise(problem, start, variant=variant, step=step, stopping=stopping)
    assert result.stopped_by == "GradientTolerance"
    assert result.m.tolist() == pytest.approx([1.0, 1.0], abs=1e-6)
    values = [entry["value"] for entry in result.history]
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(values))


def rosenbrock_residuals(m: Tensor) -> Tensor:
    return math.sqrt(2) * torch.stack([10 * (m[1] - m[0] ** 2), 1 - m[0]])


@pytest.mark.parametrize("variant", VARIANTS)
def test_rosenbrock_as_least_squares(variant: str) -> None:
    problem = LeastSquares(Euclidean(2), rosenbrock_residuals, torch.zeros(2).double(), 1.0)
    start = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    stopping = (GradientTolerance(0, absolute=1e-7), MaxIterations(2000))
    result = conjugate_gradients.minimise(problem, start, variant=variant, stopping=stopping)
    assert result.m.tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


def smoothing_problem(n: int, sobolev: bool, noise: float = 0.05) -> LeastSquares:
    """m on a graded mesh of [0, 1] from 20 noisy local means, H1 penalised; metric H1 or Euclidean."""
    x = np.linspace(0, 1, n) ** 1.5
    h = np.diff(x)
    mass = scipy.sparse.diags([h / 6, np.r_[h, 0] / 3 + np.r_[0, h] / 3, h / 6], [-1, 0, 1])
    stiffness = scipy.sparse.diags([-1 / h, np.r_[1 / h, 0] + np.r_[0, 1 / h], -1 / h], [-1, 0, 1])
    gram = (mass + 0.04 * stiffness).tocsc()
    factor = scipy.sparse.linalg.splu(gram)
    space = GramSpace(
        n,
        lambda a: torch.from_numpy(gram @ a.numpy()),
        lambda d: torch.from_numpy(factor.solve(d.numpy())),
    )
    centres = np.linspace(0.05, 0.95, 20)
    windows = torch.from_numpy(np.exp(-(((centres[:, None] - x[None]) / 0.05) ** 2)) @ mass.toarray())
    data = torch.from_numpy(np.sin(6 * centres)) * 0.05

    def forward(m: Tensor) -> Tensor:
        return windows @ (m + 0.1 * m**3)

    return LeastSquares(
        space if sobolev else Euclidean(n), forward, data, noise, regularizer=Tikhonov(space, 0.1)
    )


def test_iterations_do_not_depend_on_the_mesh_in_the_right_metric_only() -> None:
    stopping = (GradientTolerance(1e-6), MaxIterations(3000))
    counts = {
        sobolev: [
            conjugate_gradients.minimise(
                smoothing_problem(n, sobolev), torch.zeros(n).double(), stopping=stopping
            ).iterations
            for n in (80, 160, 320)
        ]
        for sobolev in (True, False)
    }
    assert max(counts[True]) <= 1.2 * min(counts[True])
    assert counts[False][2] > 1.8 * counts[False][1] > 1.8**2 * counts[False][0]


def test_depth_varying_weights_are_a_space_like_any_other() -> None:
    """Controls w(t) of x' = w(t), x(1) = target at least energy: w is constant."""
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    space = DepthSobolev(t, (2,), 0.3)
    target = torch.tensor([1.0, -2.0], dtype=torch.float64)
    problem = LeastSquares(
        space, lambda w: torch.trapezoid(w, t, dim=0), target, 1e-3, regularizer=Tikhonov(space)
    )
    result = conjugate_gradients.minimise(problem, space.zeros(), stopping=TIGHT)
    torch.testing.assert_close(result.m, target.expand(11, 2) / (1 + 1e-6), rtol=1e-9, atol=1e-9)
    assert result.iterations <= 2


def test_stopping_by_the_discrepancy_is_recorded_with_its_numbers() -> None:
    problem = smoothing_problem(40, True, noise=0.005)
    rule = Discrepancy(1.2, math.sqrt(problem.data_size))
    result = conjugate_gradients.minimise(problem, torch.zeros(40).double(), stopping=rule)
    assert result.stopped_by == "Discrepancy"
    assert result.residual_norm is not None and result.residual_norm <= 1.2 * math.sqrt(20)
    assert result.numbers == {"residual_norm": result.residual_norm, "tau": 1.2, "delta": math.sqrt(20)}
    assert result.iterations > 1 and result.history[-2]["misfit"] > 0.5 * 1.2**2 * 20
    assert [entry["iteration"] for entry in result.history] == list(range(result.iterations + 1))


@pytest.mark.parametrize("step", ["sensitivity", "wolfe"])
def test_a_killed_run_resumes_to_the_same_numbers(step: str, tmp_path: Path) -> None:
    start = torch.zeros(40).double()
    whole = conjugate_gradients.minimise(smoothing_problem(40, True), start, step=step)
    part = conjugate_gradients.minimise(
        smoothing_problem(40, True), start, step=step, stopping=MaxIterations(4)
    )
    arrays: dict[str, Any] = part.state_dict()
    np.savez(tmp_path / "state.npz", **arrays)
    with np.load(tmp_path / "state.npz", allow_pickle=False) as saved:
        rest = conjugate_gradients.minimise(smoothing_problem(40, True), dict(saved), step=step)
    torch.testing.assert_close(rest.m, whole.m, rtol=0, atol=0)
    assert rest.iterations == whole.iterations
    assert rest.counts["adjoint"] == whole.counts["adjoint"] + 1  # the first gradient after resuming
    assert [entry["value"] for entry in rest.history] == [entry["value"] for entry in whole.history]


def test_an_interruption_returns_the_best_iterate() -> None:
    problem = smoothing_problem(40, True)

    def impatient(state: State) -> None:
        if state.iteration == 3:
            raise KeyboardInterrupt

    result = conjugate_gradients.minimise(problem, torch.zeros(40).double(), callback=impatient)
    assert result.stopped_by == "interrupted" and result.iterations == 3
    assert problem.value(result.m) == pytest.approx(result.value)


class Failing:
    """A map that from a certain call on ends in something else."""

    def __init__(self, good: Callable[[Tensor], Tensor], calls: int, end: Callable[[Tensor], Tensor]) -> None:
        self.good, self.left, self.end = good, calls, end

    def __call__(self, m: Tensor) -> Tensor:
        self.left -= 1
        return self.good(m) if self.left >= 0 else self.end(m)


def does_not_converge(m: Tensor) -> Tensor:
    raise GliodeError("solver: did not converge")


def test_failures_leave_the_best_iterate() -> None:
    start = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    nan = InverseProblem(Euclidean(2), Failing(rosenbrock, 20, lambda m: m.sum() * math.nan))
    result = conjugate_gradients.minimise(nan, start, step="wolfe")
    assert result.stopped_by == "LineSearch" and result.value < rosenbrock(start)

    failing = InverseProblem(Euclidean(2), Failing(rosenbrock, 20, does_not_converge))
    with pytest.raises(GliodeError, match="did not converge") as error:
        conjugate_gradients.minimise(failing, start, step="wolfe")
    best = error.value.best  # type: ignore[attr-defined]
    assert best.stopped_by == "failed" and best.iterations >= 1 and best.value < rosenbrock(start)

    kink = Failing(rosenbrock_residuals, 20, lambda m: (0 * m).abs().sqrt())  # 0 with the derivative NaN
    problem = LeastSquares(Euclidean(2), kink, torch.zeros(2).double(), 1.0)
    with pytest.raises(NonFiniteError, match="gradient norm nan") as not_finite:
        conjugate_gradients.minimise(problem, start)
    best = not_finite.value.best  # type: ignore[attr-defined]
    assert best.iterations >= 1 and 0 < best.value < rosenbrock(start)


def test_the_wolfe_search_satisfies_both_conditions() -> None:
    problem = InverseProblem(Euclidean(1), lambda m: (m[0] ** 4 - 3 * m[0] ** 2 + m[0]).clone())
    for start, guess in [(2.0, 1e-4), (2.0, 10.0), (-0.1, 1e-3), (0.1, 50.0)]:
        here = Iterate.of(problem.evaluate(torch.tensor([start], dtype=torch.float64)))
        d, slope = -here.riesz, -(here.gradient_norm**2)
        found = wolfe(problem, here, d, slope, guess, 0.1)
        assert found is not None
        there, eta = found
        assert there.value <= here.value + 1e-4 * eta * slope
        assert abs(float(there.gradient @ d)) <= -0.1 * slope


def test_unusable_options_are_refused() -> None:
    problem = InverseProblem(Euclidean(2), rosenbrock, bounds=(-2.0, 2.0))
    start = torch.zeros(2).double()
    with pytest.raises(GliodeError, match="bounds"):
        conjugate_gradients.minimise(problem, start)
    with pytest.raises(GliodeError, match="variant 'XY'"):
        conjugate_gradients.minimise(problem, start, variant="XY")
    with pytest.raises(GliodeError, match="step 'long'"):
        conjugate_gradients.minimise(problem, start, step="long")
