"""Proximal gradients and primal-dual splitting against scikit-learn, dual solutions and theory."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from mpi4py import MPI
from scipy.optimize import lsq_linear
from sklearn.linear_model import Lasso
from torch import Tensor

from inverse.optimizers import primal_dual, proximal
from inverse.optimizers.iteration import Result, Start
from inverse.problem import Bound, InverseProblem, LeastSquares
from inverse.regularizers.constraints import Box, Positivity
from inverse.regularizers.interface import Proximable
from inverse.regularizers.sparsity import Sparsity
from inverse.regularizers.tikhonov import Tikhonov
from inverse.regularizers.total_variation import ImageGradient, TotalVariation
from inverse.stopping import Discrepancy, GradientTolerance, MaxIterations
from solvers.errors import GliodeError
from solvers.fem import mesh
from solvers.fem.gradients import Gradient
from solvers.fem.spaces import communicator, lumped
from solvers.spaces import Diagonal, Euclidean, GramSpace, Space, reduce

COMM = MPI.COMM_WORLD
FINE = (GradientTolerance(1e-9), MaxIterations(5000))


def regression(
    space: Space | None = None, seed: int = 0, n: int = 20, bounds: tuple[Bound, Bound] | None = None
) -> tuple[LeastSquares, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(30, n, dtype=torch.float64, generator=generator)
    truth = torch.zeros(n, dtype=torch.float64)
    truth[::6] = torch.tensor([2.0, -1.5, 1.0, 3.0]).double()[: len(truth[::6])]
    y = a @ truth + 0.1 * torch.randn(30, dtype=torch.float64, generator=generator)
    return LeastSquares(space or Euclidean(n), lambda m: a @ m, y, 1.0, bounds=bounds), a, y


def blur(n: int = 60) -> tuple[Tensor, Tensor]:
    x = torch.arange(n, dtype=torch.float64)
    a = torch.exp(-(((x[:, None] - x) / 4) ** 2))
    a = a / a.sum(1, keepdim=True)
    return a, (x > 20).double() + 1.5 * ((x > 35) & (x < 45))


@pytest.mark.parametrize("method", ["fista", "ista", "nonmonotone"])
@pytest.mark.parametrize("positive", [False, True])
def test_lasso_agrees_with_scikit_learn(method: str, positive: bool) -> None:
    problem, a, y = regression()
    found = proximal.minimise(
        problem, torch.ones(20).double(), Sparsity(problem.space, 6.0, positive), method, stopping=FINE
    )
    lasso = Lasso(alpha=6.0 / 30, fit_intercept=False, positive=positive, tol=1e-12, max_iter=100000)
    expected = lasso.fit(a.numpy(), y.numpy()).coef_
    np.testing.assert_allclose(found.m, expected, atol=1e-7)
    assert 2 < (expected == 0).sum() == (found.m == 0).sum()
    rest = a @ found.m - y
    assert found.value == pytest.approx(float(0.5 * rest @ rest + 6 * found.m.abs().sum()))
    assert found.history[-1]["misfit"] == pytest.approx(float(0.5 * rest @ rest))


def test_the_minimiser_does_not_know_the_metric() -> None:
    """With diagonal weights the problem in x = s z is a Lasso again, its columns over their mass."""
    weights = torch.linspace(0.3, 3.0, 20, dtype=torch.float64)
    problem, a, y = regression(Diagonal(weights))
    found = proximal.minimise(problem, torch.zeros(20).double(), Sparsity(problem.space, 6.0), stopping=FINE)
    lasso = Lasso(alpha=6.0 / 30, fit_intercept=False, tol=1e-12, max_iter=100000)
    expected = lasso.fit((a / weights).numpy(), y.numpy()).coef_ / weights.numpy()
    np.testing.assert_allclose(found.m, expected, atol=1e-7)


@pytest.mark.parametrize("method", ["fista", "nonmonotone"])
def test_bounds_are_held_at_every_iterate(method: str) -> None:
    """Box least squares by SciPy's active sets: as bounds of the problem, as Box, and with sparsity."""
    start = torch.full((20,), 0.5, dtype=torch.float64)
    seen: list[Tensor] = []
    problem, a, y = regression(bounds=(-0.1, 1.2))
    expected = lsq_linear(a.numpy(), y.numpy(), (-0.1, 1.2), method="bvls", tol=1e-14).x
    for which in (None, Box(Euclidean(20), -0.1, 1.2)):
        chosen = problem if which is None else regression()[0]
        found = proximal.minimise(
            chosen, start, which, method, stopping=FINE, callback=lambda state: seen.append(state.m)
        )
        np.testing.assert_allclose(found.m, expected, atol=1e-7)
    assert all(bool(((m >= -0.1) & (m <= 1.2)).all()) for m in seen) and len(seen) > 20
    both = proximal.minimise(problem, start, Sparsity(problem.space, 3.0), method, stopping=FINE)
    gradient = a.T @ (a @ both.m - y)  # optimal: |g_i| <= 3 where 0, -+3 inside, outward at the bounds
    inside = (both.m > -0.1 + 1e-9) & (both.m < 1.2 - 1e-9) & (both.m != 0)
    torch.testing.assert_close(gradient[inside], -3 * both.m[inside].sign(), rtol=0, atol=1e-5)
    assert float(gradient[both.m == 0].abs().max()) <= 3
    assert bool((gradient[both.m >= 1.2 - 1e-9] <= -3).all())


def ill_posed(method: str, steps: int) -> list[float]:
    """Values above the least of a badly conditioned quadratic, whose L is 1."""
    s = 1 / torch.arange(1, 401, dtype=torch.float64) ** 2
    problem = LeastSquares(Euclidean(400), lambda m: s.sqrt() * m, s.sqrt(), 1.0)
    start = torch.zeros(400).double()
    result = proximal.minimise(problem, start, Positivity(problem.space), method, 1.0, MaxIterations(steps))
    return [entry["value"] for entry in result.history]


def test_the_rates_are_those_of_the_theory() -> None:
    """Beck and Teboulle's bounds, theorems 3.1 and 4.4, are held, and fista's decay is the faster."""
    k = np.arange(1, 201)
    slow, fast = np.array(ill_posed("ista", 200))[1:], np.array(ill_posed("fista", 200))[1:]
    square = 400.0  # ||m_0 - m*||^2
    assert (slow <= square / (2 * k)).all()
    assert (fast <= 2 * square / (k + 1) ** 2).all()
    order = [np.polyfit(np.log(k[20:]), np.log(values[20:]), 1)[0] for values in (slow, fast)]
    assert -1.2 < order[0] < -0.3 and order[1] < 1.8 * order[0]
    assert (np.diff(slow) <= 1e-15).all() and (np.diff(fast) <= 1e-15).all()


def test_a_forward_and_an_adjoint_solve_a_step() -> None:
    problem, _, _ = regression()
    term = Sparsity(problem.space, 1.0)
    found = proximal.minimise(problem, torch.zeros(20).double(), term, "ista", 1e-3, MaxIterations(10))
    assert found.counts == {"forward": 11, "adjoint": 10, "tangent": 0}
    found = proximal.minimise(problem, torch.zeros(20).double(), term, "fista", 1e-3, MaxIterations(10))
    assert found.counts["adjoint"] == 10 and found.counts["forward"] <= 20


def bistable(m: Tensor) -> Tensor:
    return (m.square() - 1).square().sum() / 4 + 0.05 * (m[1:] * m[:-1]).sum()


def test_a_problem_that_is_not_convex_ends_at_a_stationary_point() -> None:
    """Optimality of sparsity: J' = -weight sign(m) off zero, |J'| <= weight on it; from several starts."""
    problem = InverseProblem(Euclidean(12), bistable)
    term = Sparsity(problem.space, 0.3)
    for seed in range(4):
        start = 1.5 * torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for method in ("nonmonotone", "fista"):
            found = proximal.minimise(problem, start, term, method, stopping=FINE)
            _, gradient = problem.value_and_gradient(found.m)
            on = found.m != 0
            torch.testing.assert_close(gradient[on], -0.3 * found.m[on].sign(), rtol=0, atol=1e-6)
            assert bool((gradient[~on].abs() <= 0.3 + 1e-6).all())
            assert found.value < problem.value(start) + float(term(start))


def test_momentum_that_overshoots_is_refused() -> None:
    """Values stay below Li and Lin's mean of past ones, by means of some plain steps; those of fista fall."""
    s = torch.tensor([1.0, 0.03, 0.001], dtype=torch.float64)
    problem = LeastSquares(Euclidean(3), lambda m: s.sqrt() * m, s.sqrt(), 1.0)
    start, rules = torch.zeros(3).double(), MaxIterations(400)
    found = proximal.minimise(problem, start, None, "nonmonotone", 1.0, rules)
    mean, mass = found.history[0]["value"], 1.0
    for entry in found.history[1:]:
        assert entry["value"] <= mean
        mean, mass = (0.8 * mass * mean + entry["value"]) / (0.8 * mass + 1), 0.8 * mass + 1
    plain_steps = found.counts["adjoint"] - found.iterations
    assert 0 < plain_steps < 300
    values = [entry["value"] for entry in found.history]
    assert max(b - a for a, b in pairwise(values)) > 0  # it is not monotone
    falling = proximal.minimise(problem, start, None, "fista", 1.0, rules)
    assert all(b["value"] <= a["value"] + 1e-15 for a, b in pairwise(falling.history))
    assert falling.value < 1e-12
    assert float(falling.state.memory["t"]) < 150  # 201 without a restart


def test_the_discrepancy_principle_stops_it() -> None:
    a, truth = blur()
    y = a @ truth + 0.05 * torch.randn(60, dtype=torch.float64)
    problem = LeastSquares(Euclidean(60), lambda m: a @ m, y, 0.05)
    rule = Discrepancy(1.1, 60**0.5)
    for method in ("ista", "fista", "nonmonotone"):
        found = proximal.minimise(
            problem, torch.zeros(60).double(), Positivity(problem.space), method, stopping=rule
        )
        assert found.stopped_by == "Discrepancy" and found.residual_norm == pytest.approx(
            float((a @ found.m - y).norm()) / 0.05
        )
        assert found.history[-2]["misfit"] > 0.5 * (1.1**2 * 60) >= found.history[-1]["misfit"]
        assert float((found.m - truth).norm() / truth.norm()) < 0.25


def deblurring(penalty: float = 2.0) -> tuple[LeastSquares, TotalVariation]:
    a, truth = blur()
    y = a @ truth + 0.05 * torch.randn(60, dtype=torch.float64)
    D = ImageGradient((60,))
    return LeastSquares(D.space, lambda m: a @ m, y, 0.05), TotalVariation(D, penalty, tolerance=1e-5)


def test_total_variation_by_all_methods_is_one_solution() -> None:
    """And its dual certifies it: A^T r = -D^T p with |p| <= weight, p = weight sign(D m) at the jumps."""
    problem, tv = deblurring()
    start = torch.zeros(60).double()
    one = proximal.minimise(problem, start, tv, stopping=(GradientTolerance(1e-7), MaxIterations(3000)))
    rules = (GradientTolerance(1e-7), MaxIterations(3000))
    runs = [
        primal_dual.minimise(problem, start, tv, None, misfit, 0.2, rules) for misfit in ("gradient", "dual")
    ]
    for run in runs:
        assert run.value == pytest.approx(one.value, rel=3e-6)
        torch.testing.assert_close(run.m, one.m, rtol=0, atol=1e-2)
    _, gradient = problem.value_and_gradient(runs[0].m)
    p = torch.cumsum(gradient, 0)[:-1]  # the only p with D^T p = -gradient in one dimension
    slopes = torch.diff(runs[0].m)
    assert float(p.abs().max()) <= 2 * (1 + 1e-3)
    jumps = slopes.abs() > 1e-3
    assert 1 < int(jumps.sum()) < 20
    torch.testing.assert_close(p[jumps], 2 * slopes[jumps].sign(), rtol=0, atol=2e-2)


def test_denoising_of_an_image_closes_the_duality_gap() -> None:
    """ROF: by primal-dual splitting, by fista (whose one step is the prox), and P - D of the prox's dual."""
    D = ImageGradient((8, 7))
    y = torch.randn(56, dtype=torch.float64)
    problem = LeastSquares(D.space, lambda m: m * 1.0, y, 1.0)
    tv = TotalVariation(D, 0.4, tolerance=1e-5)
    expected = tv.prox(y, 1.0)
    assert tv.dual is not None
    shift = 0.4 * D.adjoint(tv.dual)
    least = float(shift @ y - 0.5 * shift @ shift)
    assert float(tv.dual.norm(dim=1).max()) <= 1 + 1e-12
    for misfit in ("gradient", "dual"):
        found = primal_dual.minimise(problem, torch.zeros(56).double(), tv, None, misfit, 10.0, FINE)
        assert -1e-9 <= found.value - least <= 0.5 * (1e-5 * float(y.norm())) ** 2
        torch.testing.assert_close(found.m, expected, rtol=0, atol=1e-5)
    found = proximal.minimise(problem, torch.zeros(56).double(), tv, step=1.0, stopping=MaxIterations(1))
    torch.testing.assert_close(found.m, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("misfit", ["gradient", "dual"])
def test_primal_dual_takes_a_third_term_and_bounds(misfit: str) -> None:
    """TV + L1 and TV + box: against the optimum of a fine smoothing by the generic bounded L-BFGS."""
    problem, tv = deblurring(1.0)
    start, fine = torch.full((60,), 0.3, dtype=torch.float64), (GradientTolerance(1e-8), MaxIterations(4000))
    bounded = LeastSquares(problem.space, problem.forward, problem.data, 0.05, bounds=(0.0, 1.0))
    cases: list[tuple[LeastSquares, Proximable]] = [
        (problem, Box(problem.space, 0.0, 1.0)),
        (bounded, Sparsity(problem.space, 1.0)),
    ]
    for chosen, term in cases:
        found = primal_dual.minimise(chosen, start, tv, term, misfit, 0.3, fine)
        assert float(found.m.min()) >= 0 and float(found.m.max()) <= 1
        other = bounded_by_scipy(problem, tv, 1.0 if isinstance(term, Sparsity) else 0.0)
        assert found.value == pytest.approx(other, rel=1e-4) and found.value <= other * (1 + 1e-9)


def bounded_by_scipy(problem: LeastSquares, tv: TotalVariation, sparse: float) -> float:
    """min over [0, 1]^n of misfit + weight sum |D m| + sparse sum m, |.| smoothed by 1e-5 for the search."""
    from scipy.optimize import minimize

    a = problem.forward(torch.eye(60).double()).numpy()
    y, w = problem.data.numpy(), tv.weight

    def value(m: np.ndarray, eps: float) -> tuple[float, np.ndarray]:
        r, d = (a @ m - y) / 0.05**2, np.diff(m)
        size = np.sqrt(d**2 + eps**2)
        g = a.T @ r + sparse + w * (np.append(0, d / size) - np.append(d / size, 0))
        return 0.5 * 0.05**2 * r @ r + w * size.sum() + sparse * m.sum(), g

    m = np.full(60, 0.3)
    for eps in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
        m = minimize(
            value,
            m,
            (eps,),
            "L-BFGS-B",
            jac=True,
            bounds=[(0, 1)] * 60,
            options={"maxiter": 3000, "maxfun": 9000},
        ).x
    return value(m, 1e-12)[0]


def micrometres(points: np.ndarray) -> list[list[int]]:
    return [[round(1e3 * float(x)) for x in point] for point in points]


@pytest.mark.mpi
@pytest.mark.parametrize("way", ["sparse", "variation", "primal_dual"])
def test_ranks_agree_with_a_serial_run(way: str) -> None:
    def run(comm: MPI.Comm) -> tuple[mesh.Domain, Result]:
        where = mesh.box((1.0, 1.2, 0.8), (5, 4, 3), comm)
        space = lumped(where)

        def forward(m: Tensor) -> Tensor:
            return torch.stack([reduce((where.mass * k * m).sum(), communicator(where)) for k in probes])

        probes = [where.interpolate(lambda x, q=q: np.exp(-3 * ((x - q) ** 2).sum(1))) for q in centres]
        truth = where.interpolate(lambda x: 2.0 * (np.abs(x - 0.5).max(1) < 0.35))
        problem = LeastSquares(space, forward, forward(truth), 0.01)
        start, rules = torch.zeros_like(truth), MaxIterations(40)
        if way == "sparse":
            return where, proximal.minimise(problem, start, Sparsity(space, 2.0, True), stopping=rules)
        tv = TotalVariation(Gradient(where), 1.0, tolerance=1e-6)
        if way == "variation":
            return where, proximal.minimise(problem, start, tv, "nonmonotone", stopping=MaxIterations(5))
        return where, primal_dual.minimise(problem, start, tv, Positivity(space), stopping=rules)

    centres = np.random.default_rng(1).uniform(0, 1, (8, 3))
    (whole, serial), (where, spread) = run(MPI.COMM_SELF), run(COMM)
    places = {tuple(point): k for k, point in enumerate(micrometres(whole.points))}
    mine = [places[tuple(point)] for point in micrometres(where.points[: where.n_owned])]
    assert spread.iterations == serial.iterations
    assert spread.value == pytest.approx(serial.value, rel=1e-6)
    torch.testing.assert_close(spread.m, serial.m[mine], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("method", ["fista", "ista", "nonmonotone", "gradient", "dual"])
def test_a_killed_run_resumes_to_the_same_numbers(method: str) -> None:
    def go(start: Start, n: int) -> Result:
        if method in ("gradient", "dual"):
            problem, tv = regression()[0], TotalVariation(ImageGradient((20,)), 2.0)
            return primal_dual.minimise(
                problem,
                start,
                tv,
                Positivity(tv.space),
                method,
                stopping=MaxIterations(n),
            )
        problem = regression()[0]
        return proximal.minimise(
            problem,
            start,
            Sparsity(problem.space, 3.0),
            method,
            stopping=MaxIterations(n),
        )

    whole, part = go(torch.ones(20).double(), 25), go(torch.ones(20).double(), 12)
    rest = go(part.state_dict(), 25)
    assert rest.m.tolist() == whole.m.tolist() and rest.iterations == 25
    assert [e["gradient_norm"] for e in rest.history] == [e["gradient_norm"] for e in whole.history]


def test_a_nonlinear_misfit_makes_the_steps_shorter() -> None:
    """From a flat start the curvature is far below that at the solution: F(m) = exp(m)."""
    data = torch.exp(torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0]).double())
    problem = LeastSquares(Euclidean(5), torch.exp, data, 0.1)
    tv = TotalVariation(ImageGradient((5,)), 5.0, tolerance=1e-6)
    start, fine = torch.full((5,), 0.1, dtype=torch.float64), (GradientTolerance(1e-8), MaxIterations(20000))
    found = [
        proximal.minimise(problem, start, tv, "fista", stopping=fine),
        proximal.minimise(problem, start, tv, "nonmonotone", stopping=fine),
        primal_dual.minimise(problem, start, tv, stopping=fine),
        primal_dual.minimise(problem, start, tv, misfit="dual", stopping=fine),
    ]
    assert found[0].state.memory["tau"] < 0.95 / proximal.norm_of_smooth(problem, start)
    for run in found[1:]:
        torch.testing.assert_close(run.m, found[0].m, rtol=0, atol=1e-4)


def test_unusable_input_is_refused() -> None:
    problem, _, _ = regression()
    start, tv = torch.zeros(20).double(), TotalVariation(ImageGradient((20,)))
    gram = GramSpace(20, lambda a: 2 * a, lambda d: d / 2)
    with pytest.raises(GliodeError, match="not diagonal"):
        proximal.minimise(regression(gram)[0], start)
    with pytest.raises(GliodeError, match="another space"):
        proximal.minimise(problem, start, Sparsity(Euclidean(20, 2.0)))
    with pytest.raises(GliodeError, match="another space"):
        proximal.minimise(problem, start, Tikhonov(gram))
    with pytest.raises(GliodeError, match="another space"):
        primal_dual.minimise(problem, start, TotalVariation(ImageGradient((20,), 0.5)))
    with pytest.raises(GliodeError, match="primal_dual"):
        proximal.minimise(regression(bounds=(0.0, 1.0))[0], start, tv)
    with pytest.raises(GliodeError, match="infinite at the start"):
        proximal.minimise(problem, start - 1, Positivity(problem.space))
    for options in ({"method": "newton"}, {"step": "big"}, {"step": 0.0}):
        with pytest.raises(GliodeError, match=f"{next(iter(options.values()))}"):
            proximal.minimise(problem, start, **options)  # type: ignore[arg-type]
    with pytest.raises(GliodeError, match="'both'"):
        primal_dual.minimise(problem, start, tv, misfit="both")
    with pytest.raises(GliodeError, match="balance"):
        primal_dual.minimise(problem, start, tv, balance=-1.0)
    with pytest.raises(GliodeError, match="LeastSquares"):
        primal_dual.minimise(InverseProblem(Euclidean(20), bistable), start, tv, misfit="dual")
    with pytest.raises(GliodeError, match="smoothed"):
        primal_dual.minimise(problem, start, TotalVariation(ImageGradient((20,)), 1.0, 0.1))


def test_a_misfit_that_breaks_keeps_the_best_iterate() -> None:
    calls = []

    def broken(m: Tensor) -> Tensor:
        calls.append(1)
        return (m - 2).square().sum() * (math.nan if len(calls) > 30 else 1.0)

    problem = InverseProblem(Euclidean(3), broken)
    found = proximal.minimise(problem, torch.zeros(3).double(), step=0.05)
    assert found.stopped_by == "NoDescent" and math.isfinite(found.value) and found.iterations > 5
