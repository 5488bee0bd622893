"""Inexact Newton-CG: dense Newton steps, mesh independence, negative curvature, resumption."""

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

from inverse.optimizers import newton_cg
from inverse.optimizers.inner import steihaug
from inverse.problem import InverseProblem, LeastSquares
from inverse.regularizers.tikhonov import Tikhonov
from inverse.stopping import GradientTolerance, MaxIterations
from solvers.errors import GliodeError
from solvers.spaces import Euclidean, GramSpace

TIGHT = (GradientTolerance(1e-9), MaxIterations(100))


def elliptic(n: int) -> LeastSquares:
    """m from u at 15 points, -(exp(m) u')' = 1 on (0, 1), u = 0 at its ends; metric: the prior's."""
    h = 1 / n
    mass = scipy.sparse.diags(
        [np.full(n, h / 6), np.r_[h / 3, np.full(n - 1, 2 * h / 3), h / 3], np.full(n, h / 6)], [-1, 0, 1]
    )
    stiffness = scipy.sparse.diags(
        [np.full(n, -1 / h), np.r_[1 / h, np.full(n - 1, 2 / h), 1 / h], np.full(n, -1 / h)], [-1, 0, 1]
    )
    gram = (4 * mass + 0.2 * stiffness).tocsc()
    factor = scipy.sparse.linalg.splu(gram)
    space = GramSpace(
        n + 1,
        lambda a: torch.from_numpy(gram @ a.numpy()),
        lambda d: torch.from_numpy(factor.solve(d.numpy())),
    )
    sensors = torch.from_numpy(np.round(np.linspace(0.1, 0.9, 15) * n).astype(int)) - 1

    def forward(m: Tensor) -> Tensor:
        k = torch.exp((m[1:] + m[:-1]) / 2) / h
        matrix = torch.diag(k[1:] + k[:-1]) - torch.diag(k[1:-1], 1) - torch.diag(k[1:-1], -1)
        return torch.linalg.solve(matrix, torch.full((n - 1,), h, dtype=torch.float64))[sensors]

    x = torch.linspace(0, 1, n + 1, dtype=torch.float64)
    data = forward(torch.sin(5 * x)) + 1e-3 * torch.from_numpy(np.random.default_rng(0).standard_normal(15))
    return LeastSquares(space, forward, data, 1e-3, regularizer=Tikhonov(space))


@pytest.mark.parametrize("globalisation", ["armijo", "trust_region"])
@pytest.mark.parametrize("hessian", ["gauss_newton", "full"])
def test_newton_and_cg_iterations_do_not_depend_on_the_mesh(hessian: str, globalisation: str) -> None:
    counts = []
    for n in (20, 40, 80):
        problem = elliptic(n)
        result = newton_cg.minimise(
            problem,
            torch.zeros(n + 1).double(),
            hessian,
            globalisation,
            stopping=GradientTolerance(1e-8),
        )
        assert result.stopped_by == "GradientTolerance"
        counts.append((result.iterations, int(result.state.memory["inner_iterations"])))
    newton, inner = zip(*counts, strict=True)
    assert max(newton) <= 15 and max(newton) - min(newton) <= 2
    assert max(inner) <= 1.2 * min(inner)


def test_a_quadratic_takes_the_exact_newton_step() -> None:
    generator = torch.Generator().manual_seed(0)
    a, y = torch.randn(6, 4, dtype=torch.float64, generator=generator), torch.arange(6.0).double()
    problem = LeastSquares(Euclidean(4), lambda m: a @ m, y, 1.0)
    result = newton_cg.minimise(problem, torch.zeros(4).double(), stopping=TIGHT)
    np.testing.assert_allclose(result.m, np.linalg.lstsq(a.numpy(), y.numpy(), rcond=None)[0], rtol=1e-8)
    inner = int(result.state.memory["inner_iterations"])
    k = (
        result.iterations
    )  # an inner iteration is a dual pass and an adjoint; an outer one two forwards, one adjoint
    assert result.counts == {"forward": 1 + 2 * k + inner, "adjoint": 1 + k + inner, "tangent": inner}


def test_negative_curvature_is_used_not_followed_uphill() -> None:
    problem = InverseProblem(Euclidean(2), lambda m: (m[0] ** 2 - 1) ** 2 + 2 * m[1] ** 2 + 0.1 * m[0])
    start = torch.tensor([0.1, 1.0], dtype=torch.float64)
    result = newton_cg.minimise(problem, start, hessian="full", stopping=TIGHT)
    roots = np.roots([4.0, 0.0, -4.0, 0.1])
    assert result.stopped_by == "GradientTolerance"
    assert np.abs(roots - float(result.m[0])).min() < 1e-6 and abs(result.m[1]) < 1e-6
    assert abs(result.m[0]) > 0.5  # a minimum, not the saddle


def test_the_inner_iteration_solves_and_stays_in_the_ball_with_the_fall_that_it_states() -> None:
    """In a metric of its own: the dense solution; in a smaller ball its edge, and more than Cauchy's fall."""
    generator = torch.Generator().manual_seed(4)
    root = torch.randn(6, 6, dtype=torch.float64, generator=generator)
    gram = root @ root.mT + torch.eye(6).double()
    space = GramSpace(6, lambda a: gram @ a, lambda d: torch.linalg.solve(gram, d))
    g = torch.randn(6, dtype=torch.float64, generator=generator)
    for shift in (1.0, -3.0):  # definite, indefinite
        H = torch.diag(torch.arange(6.0).double()) + shift * torch.eye(6).double()

        def model(d: Tensor, H: Tensor = H) -> float:
            return float(g @ d + 0.5 * d @ H @ d)

        for radius in (0.05, 0.3, math.inf):
            found = steihaug(space, lambda d, H=H: H @ d, g, 1e-12, 50, radius)  # type: ignore[misc]
            assert found.decrease == pytest.approx(-model(found.d), rel=1e-9)
            assert space.norm(found.d) <= radius * (1 + 1e-9)
            if math.isfinite(radius):
                steepest = -space.riesz(g)
                cauchy = min(model(steepest * t) for t in np.linspace(0, radius / space.norm(steepest), 200))
                assert -found.decrease <= cauchy * (1 - 1e-12)
            if found.ended == "boundary":
                assert space.norm(found.d) == pytest.approx(radius, rel=1e-9)
        if shift > 0:
            torch.testing.assert_close(found.d, -torch.linalg.solve(H, g))
            assert steihaug(space, lambda d, H=H: H @ d, g, 1e-12, 50, 0.05).ended == "boundary"  # type: ignore[misc]
        else:
            assert found.ended == "negative curvature"


@pytest.mark.parametrize("globalisation", ["armijo", "trust_region"])
def test_rosenbrock_s_valley_is_followed_to_its_end(globalisation: str) -> None:
    """Against SciPy's own trust region, from two starts."""

    def valley(m: Tensor) -> Tensor:
        return (100 * (m[1:] - m[:-1] ** 2).square() + (1 - m[:-1]).square()).sum()

    problem = InverseProblem(Euclidean(3), valley)
    for start in ([-1.2, 1.0, 2.0], [0.0, 0.0, 0.0]):
        m0 = torch.tensor(start, dtype=torch.float64)
        result = newton_cg.minimise(problem, m0, "full", globalisation, stopping=TIGHT)
        assert result.stopped_by == "GradientTolerance"
        values = [entry["value"] for entry in result.history]
        assert values == sorted(values, reverse=True)
        rival = scipy.optimize.minimize(
            scipy.optimize.rosen,
            start,
            method="trust-ncg",
            jac=scipy.optimize.rosen_der,
            hess=scipy.optimize.rosen_hess,
            options={"gtol": 1e-10},
        )
        np.testing.assert_allclose(result.m, rival.x, atol=1e-6)
        assert result.iterations <= rival.nit + 15


def test_gauss_newton_steps_first_avoid_the_indefinite_part() -> None:
    """The first step is that of Gauss-Newton, the last ones converge as Newton's."""
    start = torch.zeros(41).double()
    mixed = newton_cg.minimise(elliptic(40), start, "full", gauss_newton_first=2, stopping=TIGHT)
    pure = newton_cg.minimise(elliptic(40), start, "gauss_newton", stopping=TIGHT)
    assert [e["value"] for e in mixed.history[:3]] == [e["value"] for e in pure.history[:3]]
    assert mixed.history[3]["value"] != pure.history[3]["value"]
    torch.testing.assert_close(mixed.m, pure.m, rtol=1e-6, atol=1e-6)


def test_an_inner_solve_at_its_limit_is_reported_and_still_descends() -> None:
    with pytest.warns(UserWarning, match="did not converge in 1 iterations"):
        result = newton_cg.minimise(
            elliptic(40), torch.zeros(41).double(), inner_iterations=1, stopping=MaxIterations(6)
        )
    assert result.state.memory["inner_limits"] > 0
    values = [entry["value"] for entry in result.history]
    assert values == sorted(values, reverse=True) and values[-1] < 0.5 * values[0]


def test_a_hessian_that_is_not_finite_ends_with_the_best_iterate() -> None:
    """m^1.5 - m has slope -1 and an infinite second derivative at 0."""
    problem = InverseProblem(Euclidean(2), lambda m: (m.pow(1.5) - m).sum())
    start = torch.tensor([0.0, 1.0], dtype=torch.float64)
    with pytest.raises(GliodeError, match="not finite") as caught:
        newton_cg.minimise(problem, start, "full")
    assert caught.value.best.m.tolist() == start.tolist()  # type: ignore[attr-defined]


def test_a_killed_run_resumes_to_the_same_numbers() -> None:
    start = torch.zeros(41).double()
    whole = newton_cg.minimise(elliptic(40), start)
    part = newton_cg.minimise(elliptic(40), start, stopping=MaxIterations(3))
    rest = newton_cg.minimise(elliptic(40), part.state_dict())
    assert rest.m.tolist() == whole.m.tolist()
    assert rest.state.memory == whole.state.memory


def test_unusable_options_are_refused() -> None:
    start = torch.zeros(2).double()
    misfit = InverseProblem(Euclidean(2), lambda m: (m**2).sum() + m[0])
    with pytest.raises(GliodeError, match="LeastSquares"):
        newton_cg.minimise(misfit, start)
    with pytest.raises(GliodeError, match="'half'"):
        newton_cg.minimise(misfit, start, hessian="half")
    with pytest.raises(GliodeError, match="'wolfe'"):
        newton_cg.minimise(misfit, start, globalisation="wolfe")
    with pytest.raises(GliodeError, match="at least 1"):
        newton_cg.minimise(misfit, start, inner_iterations=0)
    with pytest.raises(GliodeError, match="bounds"):
        newton_cg.minimise(InverseProblem(Euclidean(2), lambda m: (m**2).sum(), bounds=(0.0, 1.0)), start)
