"""Rules for alpha and the stopping index: against dense linear algebra, closed forms and each other."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from inverse.choice import (
    Choice,
    ChoiceError,
    Path,
    SpectralTikhonov,
    Trial,
    Trials,
    degrees_of_freedom,
    discrepancy,
    first_discrepancy,
    gcv,
    l_curve,
    oracle,
    quasi_optimality,
    sweep,
)
from inverse.choice.spectral import Regularized
from inverse.optimizers import gauss_newton, landweber, newton_cg
from inverse.optimizers.iteration import Result
from inverse.problem import LeastSquares
from inverse.regularizers.tikhonov import Tikhonov
from inverse.stopping import Discrepancy, GradientTolerance, MaxIterations
from solvers.errors import GliodeError
from solvers.spaces import Communicator, DepthSobolev, Diagonal, Euclidean, Space

N, UNKNOWNS, SD = 24, 16, 0.02
GRID = [10 ** (k / 3) for k in range(-9, 16)]
TIGHT = (GradientTolerance(1e-10), MaxIterations(100))


def setting(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Space]:
    """A smoothing matrix (N, UNKNOWNS), a truth, noisy data, and H1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.linspace(0, 1, UNKNOWNS, dtype=torch.float64)
    t = torch.linspace(0, 1, N, dtype=torch.float64)
    matrix = torch.exp(-(((t[:, None] - x) / 0.1) ** 2)) / UNKNOWNS
    truth = torch.sin(3 * x) + 0.5 * x
    noise = torch.randn(N, generator=generator, dtype=torch.float64)
    return matrix, truth, matrix @ truth + SD * noise, DepthSobolev(x, (), 0.3)


def dense_solution(matrix: Tensor, data: Tensor, gram: np.ndarray, alpha: float) -> np.ndarray:
    A, y = matrix.numpy() / SD, data.numpy() / SD
    solution: np.ndarray = np.linalg.solve(A.T @ A + alpha * gram, A.T @ y)
    return solution


def least_squares(alpha: float = 1.0, seed: int = 0) -> LeastSquares:
    matrix, _, data, space = setting(seed)
    return LeastSquares(space, lambda m: matrix @ m, data, SD, Tikhonov(space, alpha))


def by_newton(alpha: float, start: Tensor) -> Result:
    return newton_cg.minimise(least_squares(alpha), start, stopping=TIGHT)


def by_spectrum(seed: int = 0) -> tuple[SpectralTikhonov, Tensor, Tensor, Space]:
    matrix, truth, data, space = setting(seed)
    return SpectralTikhonov(lambda m: matrix @ m, space), data, truth, space


def trials_of(norms: list[float], penalties: list[float], points: list[float] | None = None) -> Trials:
    """Trials at alpha = 1, 1/10, ... with these figures."""
    at = points or [0.0] * len(norms)
    return Trials(
        "alpha",
        tuple(
            Trial(10.0**-i, torch.tensor([m], dtype=torch.float64), norm, penalty)
            for i, (norm, penalty, m) in enumerate(zip(norms, penalties, at, strict=True))
        ),
    )


def test_the_spectral_solution_is_the_normal_equations_and_newton_s() -> None:
    svd, data, _, space = by_spectrum()
    gram = np.stack([space.gram(unit).numpy() for unit in torch.eye(UNKNOWNS, dtype=torch.float64)], 1)
    problem, A = svd.problem(data, SD), svd.matrix.numpy() / SD
    for alpha in (1e-2, 10.0):
        found = problem.solve(alpha, space.zeros())
        expected = dense_solution(svd.matrix, data, gram, alpha)
        np.testing.assert_allclose(found.m, expected, rtol=1e-8)
        newton = by_newton(alpha, space.zeros())
        assert found.residual_norm == pytest.approx(newton.residual_norm, rel=1e-7)
        assert found.value == pytest.approx(newton.value, rel=1e-9)
        influence = A @ np.linalg.solve(A.T @ A + alpha * gram, A.T)
        assert problem.freedom(alpha, found.m) == pytest.approx(np.trace(influence), rel=1e-8)
        exact = degrees_of_freedom(least_squares(alpha), found.m)
        assert exact == pytest.approx(np.trace(influence), rel=1e-8)
    shift = torch.ones(UNKNOWNS, dtype=torch.float64)
    moved = svd.problem(data, SD, shift).solve(1.0, shift).m
    back = svd.problem(data - svd.matrix @ shift, SD).solve(1.0, shift).m
    torch.testing.assert_close(moved, back + shift)


def test_a_source_of_power_one_half_twice_is_a_star_a() -> None:
    svd, _, truth, space = by_spectrum()
    twice = svd.power(svd.power(truth, 0.5), 0.5)
    expected = space.riesz(svd.matrix.mT @ (svd.matrix @ truth))
    torch.testing.assert_close(twice, expected, rtol=1e-9, atol=1e-12)


def test_random_signs_estimate_the_trace_within_their_deviation() -> None:
    problem, m = least_squares(1.0), torch.zeros(UNKNOWNS, dtype=torch.float64)
    exact, probes = degrees_of_freedom(problem, m), 20
    found = degrees_of_freedom(problem, m, probes=probes)
    assert abs(found - exact) < 3 * math.sqrt(2 * exact / probes)
    assert degrees_of_freedom(problem, m, probes=5) == degrees_of_freedom(problem, m, probes=5)
    other = degrees_of_freedom(problem, m, probes=5, generator=torch.Generator().manual_seed(1))
    assert other != degrees_of_freedom(problem, m, probes=5)


def test_the_trace_of_a_nonlinear_map_is_how_the_fit_follows_the_data() -> None:
    """d(fit)/d(data) by differences of dense Gauss-Newton solutions; F'' times the residual is left out."""
    matrix, _, data, space = setting()
    gram = torch.stack([space.gram(unit) for unit in torch.eye(UNKNOWNS, dtype=torch.float64)], 1)

    def forward(m: Tensor) -> Tensor:
        return torch.sinh(2 * (matrix @ m)) / 2

    def solve(y: Tensor) -> Tensor:
        m = space.zeros()
        for _ in range(20):
            J = torch.cosh(2 * (matrix @ m))[:, None] * matrix / SD
            gradient = J.mT @ (forward(m) - y) / SD + gram @ m
            m = m - torch.linalg.solve(J.mT @ J + gram, gradient)
        return m

    total = 0.0
    for step in 1e-4 * torch.eye(N, dtype=torch.float64):
        change = forward(solve(data + step)) - forward(solve(data - step))
        total += float(change @ step) / (2 * 1e-8)
    problem = LeastSquares(space, forward, data, SD, Tikhonov(space, 1.0))
    found = degrees_of_freedom(problem, solve(data))
    assert found == pytest.approx(total, rel=5e-4)
    assert abs(degrees_of_freedom(least_squares(1.0), space.zeros()) - total) > 5e-3 * total


def test_the_discrepancy_finds_the_root_in_few_solves() -> None:
    svd, data, _, space = by_spectrum()
    problem, delta = svd.problem(data, SD), math.sqrt(N)
    for first in (1e-4, 1.0, 1e6):
        choice = discrepancy(problem.solve, space.zeros(), delta, 1.1, first, tolerance=1e-6)
        assert problem.solve(choice.alpha or 0.0, space.zeros()).residual_norm == pytest.approx(1.1 * delta)
        assert choice.numbers["solves"] <= 16 and "1.1 x 4.899" in choice.why
        norms = [entry["residual_norm"] for entry in choice.trail]
        assert norms == sorted(norms, reverse=True) and choice.index is None


def test_each_solve_starts_at_the_solution_of_the_nearest_alpha() -> None:
    starts: list[float] = []

    def solve(alpha: float, start: Tensor) -> Regularized:
        starts.append(float(start))
        return Regularized(torch.tensor(alpha), alpha, math.sqrt(alpha))

    choice = discrepancy(solve, torch.tensor(7.0), 1.0, 1.0, alpha=40.0)
    assert starts[:3] == [7.0, 40.0, pytest.approx(4.0)] and choice.alpha == pytest.approx(1, rel=0.03)
    starts.clear()
    sweep(solve, torch.tensor(7.0), [1.0, 4.0, 2.0])
    assert starts == [7.0, 4.0, 2.0]


def test_no_alpha_that_meets_the_discrepancy_is_said_with_the_best_kept() -> None:
    def solve(alpha: float, start: Tensor) -> Regularized:
        norm = 2 + alpha / (1 + alpha)  # from 2 to 3
        return Regularized(start, norm**2 / 2, norm)

    start = torch.zeros(1)
    with pytest.raises(ChoiceError, match="cannot explain") as low:
        discrepancy(solve, start, 1.0, 1.0)
    assert low.value.best.residual_norm == pytest.approx(2, abs=1e-4) and len(low.value.trail) == 9
    with pytest.raises(ChoiceError, match="tell nothing"):
        discrepancy(solve, start, 4.0, 1.0)


def test_a_jump_over_the_level_is_named_and_the_lower_side_taken() -> None:
    def solve(alpha: float, start: Tensor) -> Regularized:
        norm = 3.0 if alpha > 0.2 else 1.0
        return Regularized(start, norm**2 / 2, norm)

    choice = discrepancy(solve, torch.zeros(1), 2.0, 1.0)
    assert choice.alpha == pytest.approx(0.2, rel=1e-3) and choice.numbers["residual_norm"] == 1
    assert "jumps there from 1 to 3" in choice.why


def test_gcv_is_the_least_of_its_function() -> None:
    svd, data, _, space = by_spectrum()
    problem = svd.problem(data, SD)
    choice = gcv(sweep(problem.solve, space.zeros(), GRID), problem.freedom, N)
    gram = np.stack([space.gram(unit).numpy() for unit in torch.eye(UNKNOWNS, dtype=torch.float64)], 1)
    A, y = svd.matrix.numpy() / SD, data.numpy() / SD
    values = {}
    for alpha in GRID:
        influence = A @ np.linalg.solve(A.T @ A + alpha * gram, A.T)
        values[alpha] = N * np.sum((y - influence @ y) ** 2) / (N - np.trace(influence)) ** 2
    assert choice.alpha == min(values, key=lambda alpha: values[alpha]) and not choice.at_end
    assert choice.numbers["score"] == pytest.approx(min(values.values()), rel=1e-8)
    with pytest.raises(GliodeError, match="degrees of freedom"):
        gcv(sweep(problem.solve, space.zeros(), GRID), lambda alpha, m: float(N), N)


def test_the_l_curve_turns_where_it_was_built_to() -> None:
    """A rectangular L: horizontal until trial 3, then upright; and its mirror image has no corner there."""
    norms = [1000.0, 100.0, 10.0, 1.0, 1.0, 1.0, 1.0]
    penalties = [1.0, 1.0, 1.0, 1.0, 10.0, 100.0, 1000.0]
    assert l_curve(trials_of(norms, penalties)).alpha == 1e-3
    still = [*norms, 1.0, 1.0], [*penalties, 1000.00001, 1000.00002]
    assert l_curve(trials_of(*still)).alpha == 1e-3
    with pytest.raises(GliodeError, match="does not change"):
        l_curve(trials_of([1.0] * 4, [1.0] * 4))


def test_the_curvature_of_a_circle_is_one_over_its_radius() -> None:
    angles = np.linspace(0.1, math.pi / 2 - 0.1, 7)
    norms = [math.exp(2 - 2 * math.sin(a)) for a in angles]  # (log ||r||, log R / 2) = (2, 2) - 2 (sin, cos)
    penalties = [math.exp(2 * (2 - 2 * math.cos(a))) for a in angles]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which of the equal ones is the largest, rounding decides
        scores = [entry["score"] for entry in l_curve(trials_of(norms, penalties)).trail]
    np.testing.assert_allclose(scores[1:-1], 0.5, rtol=1e-12)


def test_quasi_optimality_takes_the_lowest_valley_and_no_end() -> None:
    points = list(itertools.accumulate([0.0, 0.01, 3.0, 1.0, 2.0, 0.5, 2.0, 0.001]))
    choice = quasi_optimality(trials_of([1.0] * 8, [1.0] * 8, points), Euclidean(1))
    assert choice.alpha == pytest.approx(1e-4)
    assert choice.numbers["score"] == pytest.approx(0.5 / math.log(10))
    with pytest.warns(UserWarning, match="no local minimum"):
        quasi_optimality(trials_of([1.0] * 4, [1.0] * 4, [0.0, 1.0, 3.0, 6.0]), Euclidean(1))


def test_the_oracle_is_not_bettered_and_an_end_is_said() -> None:
    svd, data, truth, space = by_spectrum()
    trials = sweep(svd.problem(data, SD).solve, space.zeros(), GRID)
    best = oracle(trials, truth, space)
    errors = [space.norm(t.m - truth) for t in trials.entries]
    assert space.norm(best.solution - truth) == min(errors) and not best.at_end
    assert best.numbers["relative_error"] == pytest.approx(min(errors) / space.norm(truth))
    with pytest.warns(UserWarning, match="weak end of what was tried"):
        cut = oracle(sweep(svd.problem(data, SD).solve, space.zeros(), [1e5, 1e4, 1e3]), truth, space)
    assert cut.at_end and cut.alpha == 1e3


@pytest.mark.filterwarnings("ignore:gcv")  # at one seed it chooses the end of the grid
def test_all_rules_come_near_the_oracle_on_a_smoothing_matrix() -> None:
    ratios: dict[str, list[float]] = {}
    for seed in range(10):
        svd, data, truth, space = by_spectrum(seed)
        problem = svd.problem(data, SD)
        trials = sweep(problem.solve, space.zeros(), GRID)
        best = space.norm(oracle(trials, truth, space).solution - truth)
        found = [
            discrepancy(problem.solve, space.zeros(), math.sqrt(N), 1.05),
            gcv(trials, problem.freedom, N),
            quasi_optimality(trials, space),
        ]
        for choice in found:
            ratios.setdefault(choice.rule, []).append(space.norm(choice.solution - truth) / best)
    assert len(ratios) == 3 and max(float(np.median(values)) for values in ratios.values()) < 1.5


def test_a_path_chooses_the_index_at_which_the_run_would_have_stopped() -> None:
    problem, (_, truth, _, space) = least_squares(), setting()
    problem.regularizer = None
    path, rule = Path(space), Discrepancy(1.1, math.sqrt(N))
    landweber.minimise(problem, space.zeros(), stopping=MaxIterations(300), callback=path)
    stopped = landweber.minimise(problem, space.zeros(), stopping=rule)
    choice = first_discrepancy(path.trials, rule.delta, rule.tau)
    assert choice.index == stopped.iterations and choice.alpha is None
    torch.testing.assert_close(choice.solution, stopped.m, rtol=0, atol=0)
    best = oracle(path.trials, truth, space)
    errors = [space.norm(t.m - truth) for t in path.trials.entries]
    assert best.index == int(np.argmin(errors)) and 0 < best.index < 300
    quasi = quasi_optimality(path.trials, space)
    assert quasi.index and space.norm(quasi.solution - truth) < 3 * min(errors)
    assert len(quasi.trail) == 301 and set(quasi.trail[1]) == {
        "iteration",
        "residual_norm",
        "penalty",
        "score",
    }
    with pytest.raises(ChoiceError, match="comes down to") as missed:
        first_discrepancy(path.trials, 1e-3)
    assert missed.value.best.at == 300
    with pytest.raises(GliodeError, match="sweep over alpha"):
        gcv(path.trials, lambda alpha, m: 1.0, N)


def test_a_nonlinear_problem_with_its_own_optimizer() -> None:
    """Rates k of a sum of decays, by gauss_newton; the discrepancy is met, the data are fitted to it."""
    t = torch.linspace(0, 4, 30, dtype=torch.float64)
    truth, space = torch.tensor([0.3, 0.8, 1.5], dtype=torch.float64), Euclidean(3)

    def forward(k: Tensor) -> Tensor:
        return torch.exp(-t[:, None] * k).sum(1)

    noise = torch.randn(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    data = forward(truth) + 0.02 * noise
    start = torch.ones(3, dtype=torch.float64) * torch.tensor([0.9, 1.0, 1.1], dtype=torch.float64)

    def solve(alpha: float, m: Tensor) -> Result:
        problem = LeastSquares(space, forward, data, 0.02, Tikhonov(space, alpha, start))
        return gauss_newton.minimise(problem, m)

    choice = discrepancy(solve, start, math.sqrt(30), 1.1, tolerance=1e-3)
    residual = float((forward(choice.solution) - data).norm()) / 0.02
    assert residual == pytest.approx(1.1 * math.sqrt(30), rel=1e-3)
    assert isinstance(choice.result, Result) and choice.result.m is choice.solution
    assert choice.trail[0]["penalty"] < choice.trail[-1]["penalty"]
    alpha = choice.alpha or 0.0
    expected = float((choice.solution - start).square().sum()) / 2
    row = next(entry for entry in choice.trail if entry["alpha"] == alpha)
    assert row["penalty"] == pytest.approx(expected, rel=1e-9)


def test_solves_that_did_not_converge_are_counted_in_why() -> None:
    def solve(alpha: float, start: Tensor) -> Result:
        return landweber.minimise(least_squares(alpha), start, stopping=MaxIterations(2))

    with pytest.warns(UserWarning, match="3 of 3 solves stopped before they converged"):
        oracle(sweep(solve, torch.zeros(UNKNOWNS).double(), [1.0, 2.0, 3.0]), setting()[1], setting()[3])


def test_bad_input_is_named() -> None:
    svd, data, truth, space = by_spectrum()
    solve, zero = svd.problem(data, SD).solve, space.zeros()

    def failing(alpha: float, start: Tensor) -> Regularized:
        raise GliodeError("the inner solve failed")

    cases: list[tuple[str, Callable[[], object]]] = [
        ("known noise level", lambda: discrepancy(solve, zero, 0.0)),
        ("known noise level", lambda: discrepancy(solve, zero, math.nan)),
        ("known noise level", lambda: first_discrepancy(sweep(solve, zero, GRID), -1.0)),
        ("tau", lambda: discrepancy(solve, zero, 1.0, tau=0.9)),
        ("first alpha", lambda: discrepancy(solve, zero, 1.0, alpha=0.0)),
        ("tolerance", lambda: discrepancy(solve, zero, 1.0, tolerance=0.0)),
        ("three different", lambda: sweep(solve, zero, [])),
        ("three different", lambda: sweep(solve, zero, [1.0, 1.0, 2.0])),
        ("positive", lambda: sweep(solve, zero, [1.0, 0.0, 2.0])),
        ("finite", lambda: sweep(solve, zero, [1.0, math.inf, 2.0])),
        ("too few", lambda: Path(space).trials),
        ("standard deviation", lambda: svd.problem(data, 0.0)),
        ("the map gives", lambda: svd.problem(data[1:], 1.0)),
        ("truth", lambda: oracle(sweep(solve, zero, GRID), truth[1:], space)),
        ("probes", lambda: degrees_of_freedom(least_squares(), zero, probes=-1)),
        ("after 1 steps", lambda: degrees_of_freedom(least_squares(), zero, probes=1, most=1)),
        ("residual_norm", lambda: sweep(lambda a, m: Regularized(m, 1.0, None), zero, GRID)),  # type: ignore
        ("is nan", lambda: sweep(lambda a, m: Regularized(m, 1.0, math.nan), zero, GRID)),
    ]
    for message, call in cases:
        with pytest.raises(GliodeError, match=message):
            call()
    with pytest.raises(GliodeError, match="inner solve") as raised:
        sweep(failing, zero, GRID)
    assert "alpha = 1e+05" in raised.value.__notes__[0]


@pytest.mark.mpi
def test_a_distributed_field_gets_the_serial_choice() -> None:
    """r entry by entry, over the ranks: a diagonal influence matrix, whose trace any signs give."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    place = torch.linspace(0, 1, 24, dtype=torch.float64)
    noise = torch.randn(24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own = slice(world.rank, None, world.size)

    def problem(rows: slice, comm: Communicator | None, alpha: float) -> LeastSquares:
        x = place[rows]
        space = Diagonal(1 + x, comm)
        data = torch.exp(-3 * x) * torch.sin(5 * x) + 0.05 * noise[rows]
        return LeastSquares(
            space, lambda u: torch.exp(-3 * x) * u, data, 0.05, Tikhonov(space, alpha), comm=comm
        )

    def choice(rows: slice, comm: Communicator | None) -> Choice:
        return discrepancy(
            lambda alpha, start: newton_cg.minimise(problem(rows, comm, alpha), start, stopping=TIGHT),
            torch.zeros_like(place[rows]),
            math.sqrt(24),
            1.0,
        )

    parallel, serial = choice(own, world), choice(slice(None), None)
    assert parallel.alpha == pytest.approx(serial.alpha, rel=1e-9)
    torch.testing.assert_close(parallel.solution, serial.solution[own], rtol=1e-7, atol=1e-9)
    distributed = problem(own, world, 2.0)
    trace = degrees_of_freedom(
        distributed, parallel.solution, probes=2, generator=torch.Generator().manual_seed(world.rank)
    )
    square = (torch.exp(-3 * place) / 0.05) ** 2
    assert trace == pytest.approx(float((square / (square + 2 * (1 + place))).sum()), rel=1e-5)
    with pytest.raises(GliodeError, match="dense Jacobian"):
        degrees_of_freedom(distributed, parallel.solution)
    with pytest.raises(GliodeError, match="seeded by the rank"):
        degrees_of_freedom(distributed, parallel.solution, probes=2)
