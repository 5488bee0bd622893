"""Levenberg-Marquardt against SciPy, with bounds, priors and corrected Jacobians; Newton-CG for fields."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

from inverse.optimizers import gauss_newton
from inverse.optimizers.iteration import Result
from inverse.problem import LeastSquares
from inverse.regularizers.tikhonov import Tikhonov
from inverse.stopping import Discrepancy, GradientTolerance, MaxIterations, StepTolerance
from solvers.errors import GliodeError
from solvers.spaces import Euclidean, GramSpace, Product

T = torch.linspace(0, 4, 30, dtype=torch.float64)
TRUTH = torch.tensor([2.0, 1.3, 0.5, 0.2], dtype=torch.float64)
START = torch.tensor([1.0, 1.0, 1.0, 0.1], dtype=torch.float64)
TIGHT = (GradientTolerance(1e-10), MaxIterations(200))


def decay(m: Tensor) -> Tensor:
    return m[0] * torch.exp(-m[1] * T) + m[2] * torch.exp(-m[3] * T)


def fit(**options: Any) -> LeastSquares:
    generator = torch.Generator().manual_seed(4)
    data = decay(TRUTH) + 0.01 * torch.randn(30, dtype=torch.float64, generator=generator)
    space = options.pop("space", Euclidean(4))
    return LeastSquares(space, decay, data, 0.01, **options)


def reference(
    problem: LeastSquares, prior: tuple[Tensor, Tensor] | None = None
) -> scipy.optimize.OptimizeResult:
    def residuals(x: np.ndarray) -> np.ndarray:
        r = problem.residual(torch.from_numpy(x)).numpy()
        return r if prior is None else np.r_[r, (x - prior[0].numpy()) / prior[1].numpy()]

    return scipy.optimize.least_squares(residuals, START.numpy(), xtol=1e-14, ftol=1e-14, gtol=1e-12)


@pytest.mark.parametrize("jacobian_updates", [False, True])
def test_exponential_decay_is_fitted_as_by_scipy(jacobian_updates: bool) -> None:
    problem = fit()
    result = gauss_newton.minimise(problem, START, jacobian_updates=jacobian_updates, stopping=TIGHT)
    np.testing.assert_allclose(result.m, reference(fit()).x, rtol=1e-6)
    assert result.stopped_by in ("GradientTolerance", "NoDescent")
    assert result.counts == problem.counts


def test_bounds_are_kept_and_the_solution_is_scipys() -> None:
    lower = torch.tensor([0.0, 0.0, 0.0, 0.05], dtype=torch.float64)
    upper = torch.tensor([1.9, 3.0, 0.6, 5.0], dtype=torch.float64)
    problem = fit(bounds=(lower, upper))
    start = torch.minimum(START, upper)
    result = gauss_newton.minimise(problem, start, stopping=TIGHT)
    scipys = scipy.optimize.least_squares(
        lambda x: problem.residual(torch.from_numpy(x)).numpy(),
        torch.minimum(START, upper - 1e-3).numpy(),
        bounds=(lower.numpy(), upper.numpy()),
        xtol=1e-14,
        ftol=1e-14,
        gtol=1e-12,
    )
    np.testing.assert_allclose(result.m, scipys.x, rtol=1e-5)
    assert result.m[0] == 1.9


def test_a_gaussian_prior_acts_as_extra_residuals() -> None:
    mean, sd = torch.tensor([1.5, 1.0, 0.7, 0.3]).double(), torch.tensor([0.1, 0.2, 0.05, 0.1]).double()
    space = Euclidean(4, sd)
    problem = fit(space=space, regularizer=Tikhonov(space, 1.0, mean))
    result = gauss_newton.minimise(problem, START, stopping=TIGHT)
    np.testing.assert_allclose(result.m, reference(fit(), (mean, sd)).x, rtol=1e-6)


def test_a_linear_problem_is_the_bayesian_formula_and_the_counts_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(12, 3, dtype=torch.float64, generator=generator)
    y, mean = (
        torch.randn(12, dtype=torch.float64, generator=generator),
        torch.tensor([1.0, -1.0, 0.5]).double(),
    )
    covariance = torch.tensor([[1.0, 0.3, 0.0], [0.3, 2.0, 0.1], [0.0, 0.1, 0.5]], dtype=torch.float64)
    precision = torch.linalg.inv(covariance)
    space = GramSpace(3, lambda m: precision @ m, lambda d: covariance @ d)
    factor = torch.randn(12, 2, dtype=torch.float64, generator=generator)
    problem = LeastSquares(space, lambda m: a @ m, y, 0.3, Tikhonov(space, 1.0, mean), model_error=factor)
    result = gauss_newton.minimise(problem, mean, damping=1e-14, stopping=(GradientTolerance(1e-6),))
    noise = 0.09 * (torch.eye(12).double() + factor @ factor.mT)
    gain = covariance @ a.mT @ torch.linalg.inv(a @ covariance @ a.mT + noise)
    torch.testing.assert_close(result.m, mean + gain @ (y - a @ mean), rtol=1e-9, atol=1e-9)
    assert result.iterations == 1
    assert result.counts == {"forward": 1 + 3 + 1, "adjoint": 2, "tangent": 3}


def test_corrected_jacobians_save_solves() -> None:
    """A mildly nonlinear fit of six parameters: same answer, fewer forward-equivalent solves."""
    t = torch.linspace(0, 1, 40, dtype=torch.float64)

    def model(m: Tensor) -> Tensor:
        phases = torch.stack([torch.sin((k + 1) * math.pi * t + 0.2 * m[k]) for k in range(6)])
        return torch.exp(0.3 * m) @ phases

    truth = torch.tensor([0.5, -0.6, 0.4, 0.3, -0.8, 0.7], dtype=torch.float64)
    space = Euclidean(6)

    def run(updates: bool) -> Result:
        problem = LeastSquares(space, model, model(truth), 0.05, regularizer=Tikhonov(space))
        stopping = (GradientTolerance(1e-6), MaxIterations(60))
        return gauss_newton.minimise(
            problem, space.zeros(), jacobian_updates=updates, refresh_every=10, stopping=stopping
        )

    full, corrected = run(False), run(True)
    assert full.stopped_by == corrected.stopped_by == "GradientTolerance"
    torch.testing.assert_close(full.m, corrected.m, rtol=1e-4, atol=1e-5)
    assert sum(corrected.counts.values()) < 0.7 * sum(full.counts.values())


def test_rosenbrock_from_far() -> None:
    def residuals(m: Tensor) -> Tensor:
        return torch.stack([10 * (m[1] - m[0] ** 2), 1 - m[0]])

    problem = LeastSquares(Euclidean(2), residuals, torch.zeros(2).double(), 1.0)
    start = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    for updates in (False, True):
        result = gauss_newton.minimise(problem, start, jacobian_updates=updates, stopping=TIGHT)
        assert result.m.tolist() == pytest.approx([1.0, 1.0], abs=1e-8)
        assert result.iterations < 100


def test_steps_that_overflow_are_rejected() -> None:
    """exp overflows for the undamped step; the damping grows until it does not."""
    problem = LeastSquares(
        Euclidean(1), lambda m: torch.exp(torch.exp(m)), torch.tensor([3.0]).double(), 1e-3
    )
    result = gauss_newton.minimise(problem, torch.tensor([-6.0]).double(), damping=1e-9)
    assert float(result.m) == pytest.approx(math.log(math.log(3.0)), rel=1e-6)


@pytest.mark.parametrize("jacobian_updates", [False, True])
def test_a_killed_run_resumes_to_the_same_numbers(jacobian_updates: bool) -> None:
    options: dict[str, Any] = {"jacobian_updates": jacobian_updates}
    whole = gauss_newton.minimise(fit(), START, **options)
    part = gauss_newton.minimise(fit(), START, stopping=MaxIterations(5), **options)
    rest = gauss_newton.minimise(fit(), part.state_dict(), **options)
    assert rest.m.tolist() == whole.m.tolist() and rest.iterations == whole.iterations


def test_named_parameters_and_stopping_by_the_discrepancy() -> None:
    space = Product({"amplitude": Euclidean(2), "rate": Euclidean(2)})

    def forward(m: Tensor) -> Tensor:
        p = space.unpack(m)
        return (p["amplitude"][:, None] * torch.exp(-p["rate"][:, None] * T)).sum(0)

    truth = space.pack({"amplitude": TRUTH[[0, 2]], "rate": TRUTH[[1, 3]]})
    noise = torch.from_numpy(np.random.default_rng(1).standard_normal(30))
    problem = LeastSquares(space, forward, forward(truth) + 0.01 * noise, 0.01)
    start = space.pack({"amplitude": START[[0, 2]], "rate": START[[1, 3]]})
    result = gauss_newton.minimise(problem, start, stopping=Discrepancy(1.2, math.sqrt(problem.data_size)))
    assert result.stopped_by == "Discrepancy"


def test_a_small_step_stops_the_run() -> None:
    result = gauss_newton.minimise(fit(), START, stopping=(StepTolerance(1e-3), MaxIterations(100)))
    assert result.stopped_by == "StepTolerance"
    assert result.numbers["step_norm"] <= result.numbers["limit"] < 0.01


def test_unusable_options_are_refused() -> None:
    with pytest.raises(GliodeError, match="damping"):
        gauss_newton.minimise(fit(), START, damping=0.0)
    with pytest.raises(GliodeError, match="refresh_every"):
        gauss_newton.minimise(fit(), START, refresh_every=0)

    class Comm:
        def allreduce(self, sendobj: Any, /) -> Any: ...
        def Allreduce(self, sendbuf: Any, recvbuf: Any, /) -> None: ...

    space = GramSpace(4, lambda a: a, lambda d: d, Comm())
    with pytest.raises(GliodeError, match="newton_cg"):
        gauss_newton.minimise(fit(space=space), START)
