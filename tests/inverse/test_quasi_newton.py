"""L-BFGS over a space, with and without bounds."""

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

from inverse.optimizers import quasi_newton
from inverse.optimizers.iteration import NonFiniteError
from inverse.problem import InverseProblem, LeastSquares
from inverse.regularizers.tikhonov import Tikhonov
from inverse.stopping import GradientTolerance, MaxIterations, State
from solvers.errors import GliodeError
from solvers.spaces import DepthSobolev, Euclidean, GramSpace, Product

TIGHT = (GradientTolerance(1e-9), MaxIterations(300))


def rosenbrock(m: Tensor) -> Tensor:
    return (100 * (m[1:] - m[:-1] ** 2) ** 2 + (1 - m[:-1]) ** 2).sum()


def test_rosenbrock_in_several_dimensions() -> None:
    problem = InverseProblem(Euclidean(8), rosenbrock)
    result = quasi_newton.minimise(problem, torch.zeros(8).double(), stopping=TIGHT)
    assert result.stopped_by == "GradientTolerance"
    torch.testing.assert_close(result.m, torch.ones(8).double(), rtol=1e-6, atol=1e-6)
    assert result.counts["forward"] < 120 and result.counts["tangent"] == 0


def test_the_metric_is_a_change_of_variables() -> None:
    """In a space with Gram matrix L L^T the iterates are those of the Euclidean method in z = L^T m."""
    generator = torch.Generator().manual_seed(2)
    root = torch.tril(torch.randn(5, 5, dtype=torch.float64, generator=generator)) + 3 * torch.eye(5).double()
    gram = root @ root.mT
    space = GramSpace(5, lambda a: gram @ a, lambda d: torch.linalg.solve(gram, d))
    stopping = MaxIterations(12)
    primal = quasi_newton.minimise(
        InverseProblem(space, rosenbrock), torch.zeros(5).double(), stopping=stopping
    )

    def in_z(z: Tensor) -> Tensor:
        return rosenbrock(torch.linalg.solve_triangular(root.mT, z[:, None], upper=True)[:, 0])

    euclidean = quasi_newton.minimise(
        InverseProblem(Euclidean(5), in_z), torch.zeros(5).double(), stopping=stopping
    )
    for a, b in zip(primal.history, euclidean.history, strict=True):
        assert a["value"] == pytest.approx(b["value"], rel=1e-6)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-5)


def test_iterations_do_not_depend_on_the_number_of_knots() -> None:
    """Track a path by x' = tanh(w(t)) with w in H1 of depth."""

    def iterations(n: int) -> int:
        t = torch.linspace(0, 1, n, dtype=torch.float64)
        h = float(t[1])
        space = DepthSobolev(t, (1,), 0.2)

        def path(w: Tensor) -> Tensor:
            v = torch.tanh(w[:, 0])
            return torch.cumsum(h * (v[1:] + v[:-1]) / 2, 0)

        target = 0.3 * torch.sin(3 * t[1:])
        problem = LeastSquares(space, path, target, 0.05 / h**0.5, regularizer=Tikhonov(space, 0.3))
        return quasi_newton.minimise(problem, space.zeros(), stopping=TIGHT).iterations

    counts = [iterations(n) for n in (21, 81, 321)]
    assert max(counts) <= 1.15 * min(counts)


@pytest.mark.parametrize("scale", [None, torch.tensor([0.1, 1.0, 10.0, 2.0])])
def test_bounds_reach_scipys_solution_in_the_metric(scale: Tensor | None) -> None:
    lower, upper = torch.tensor([-1.0, -1, 0.2, -1]).double(), torch.tensor([0.5, 2, 2, 0.7]).double()
    problem = InverseProblem(Euclidean(4, scale), rosenbrock, bounds=(lower, upper))
    start = torch.tensor([0.0, 0.0, 0.5, 0.0], dtype=torch.float64)
    result = quasi_newton.minimise(problem, start, stopping=TIGHT)
    reference = scipy.optimize.minimize(
        lambda x: float(rosenbrock(torch.from_numpy(x))),
        start.numpy(),
        method="trust-constr",
        bounds=scipy.optimize.Bounds(lower.numpy(), upper.numpy()),
        options={"gtol": 1e-10, "xtol": 1e-12, "maxiter": 3000},
    )
    np.testing.assert_allclose(result.m, reference.x, atol=1e-5)
    assert bool(((result.m >= lower) & (result.m <= upper)).all())
    assert result.stopped_by in ("GradientTolerance", "LineSearch")
    assert result.counts["forward"] == result.counts["adjoint"] == problem.counts["forward"]


def test_one_sided_bounds_on_a_product() -> None:
    space = Product({"a": Euclidean(1, 2.0), "b": Euclidean(2)})
    problem = InverseProblem(
        space, lambda m: ((m + 1) ** 2).sum(), bounds=(torch.tensor([0.0, -2, -2]), None)
    )
    result = quasi_newton.minimise(problem, torch.ones(3).double(), stopping=TIGHT)
    assert result.m.tolist() == pytest.approx([0, -1, -1], abs=1e-7)


def test_a_killed_run_resumes_to_the_same_numbers() -> None:
    def problem() -> InverseProblem:
        return InverseProblem(Euclidean(6), rosenbrock)

    whole = quasi_newton.minimise(problem(), torch.zeros(6).double())
    part = quasi_newton.minimise(problem(), torch.zeros(6).double(), stopping=MaxIterations(13))
    rest = quasi_newton.minimise(problem(), part.state_dict())
    assert rest.m.tolist() == whole.m.tolist() and rest.iterations == whole.iterations


@pytest.mark.parametrize("bounds", [None, (-5.0, 5.0)])
def test_interruptions_and_rules_act_inside_scipy_too(bounds: tuple[float, float] | None) -> None:
    def impatient(state: State) -> None:
        if state.iteration == 4:
            raise KeyboardInterrupt

    problem = InverseProblem(Euclidean(4), rosenbrock, bounds=bounds)
    result = quasi_newton.minimise(problem, torch.zeros(4).double(), callback=impatient)
    assert result.stopped_by == "interrupted" and result.iterations == 4
    assert problem.value(result.m) == pytest.approx(result.value)
    limited = quasi_newton.minimise(problem, torch.zeros(4).double(), stopping=MaxIterations(5))
    assert limited.stopped_by == "MaxIterations" and limited.iterations == 5
    resumed = quasi_newton.minimise(problem, limited.state_dict(), stopping=TIGHT)
    torch.testing.assert_close(resumed.m, torch.ones(4).double(), rtol=1e-6, atol=1e-6)


def test_unusable_problems_are_refused() -> None:
    space = GramSpace(2, lambda a: a, lambda d: d)
    with pytest.raises(GliodeError, match="diagonal metric"):
        quasi_newton.minimise(InverseProblem(space, rosenbrock, bounds=(0.0, 2.0)), torch.ones(2).double())
    wild = InverseProblem(Euclidean(2), lambda m: torch.log(1.5 - m).sum() * 1e6, bounds=(0.0, 9.0))
    with pytest.raises(NonFiniteError) as error:
        quasi_newton.minimise(wild, torch.ones(2).double())
    assert error.value.best.iterations == 0  # type: ignore[attr-defined]
