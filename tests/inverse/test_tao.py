"""TAO in the metric of a space: against SciPy, against closed forms, on any mesh, on two ranks."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

from inverse.optimizers import tao
from inverse.problem import Bound, InverseProblem, LeastSquares
from inverse.stopping import GradientTolerance, MaxIterations
from solvers.errors import GliodeError
from solvers.spaces import Communicator, Diagonal, Euclidean, GramSpace, Product, reduce

TIGHT = (GradientTolerance(1e-10), MaxIterations(300))
METHODS = tao.FIRST_ORDER + tao.NEWTON
START = torch.tensor([-1.2, 0.5, 0.2], dtype=torch.float64)


def valley(m: Tensor) -> Tensor:
    """Rosenbrock's function."""
    return (100 * (m[1:] - m[:-1] ** 2).square() + (1 - m[:-1]).square()).sum()


@pytest.mark.parametrize("bounds", [None, (-2.0, 0.8)])
@pytest.mark.parametrize("method", METHODS)
def test_rosenbrock_s_minimum_is_scipy_s(method: str, bounds: tuple[Bound, Bound] | None) -> None:
    problem = InverseProblem(Diagonal(torch.tensor([0.5, 2.0, 3.0]).double()), valley, bounds=bounds)
    result = tao.minimise(problem, START, method, "full", stopping=TIGHT)
    box = scipy.optimize.Bounds(*(bounds or (-np.inf, np.inf)))  # type: ignore[arg-type]
    rival = scipy.optimize.minimize(
        scipy.optimize.rosen,
        START.numpy(),
        jac=scipy.optimize.rosen_der,
        bounds=box,
        method="L-BFGS-B",
        options={"ftol": 1e-16, "gtol": 1e-10},
    )
    assert result.stopped_by in ("GradientTolerance", "TAO")
    np.testing.assert_allclose(result.m, rival.x, atol=2e-6)
    values = [entry["value"] for entry in result.history]
    assert values == sorted(values, reverse=True)


def obstacle(n: int, comm: Communicator | None = None, own: slice = slice(None)) -> LeastSquares:
    """sin(2 pi x) from 30 smoothed values, above -0.3, in L2 of uneven cells; may be distributed."""
    edges = torch.linspace(0, 1, n + 1, dtype=torch.float64) ** 1.5
    h, x = edges.diff(), (edges[1:] + edges[:-1]) / 2
    sensors = torch.linspace(0.05, 0.95, 30, dtype=torch.float64)
    b = h * torch.exp(-((sensors[:, None] - x) ** 2) / 0.02) / 0.25
    space = Diagonal(h[own], comm)

    def penalty(m: Tensor) -> Tensor:
        return 5.0 * reduce((h[own] * m.square()).sum(), comm)

    data, lower = b @ torch.sin(2 * torch.pi * x), torch.full((n,), -0.3, dtype=torch.float64)[own]
    return LeastSquares(space, lambda m: reduce(b[:, own] @ m, comm), data, 0.3, penalty, (lower, None))


def dense_solution(problem: LeastSquares) -> np.ndarray:
    """The same bounded quadratic by SciPy's active set (bvls)."""
    J = problem.jacobian(problem.space.zeros()).numpy()
    assert isinstance(problem.space, Diagonal)
    rows = np.vstack([J, np.diag(np.sqrt(10.0 * problem.space.weights.numpy()))])
    rhs = np.concatenate([problem.data.numpy() / 0.3, np.zeros(J.shape[1])])
    return scipy.optimize.lsq_linear(rows, rhs, (-0.3, np.inf), method="bvls", tol=1e-14).x  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", METHODS)
def test_a_bounded_quadratic_is_that_of_an_active_set_method(method: str) -> None:
    problem = obstacle(40)
    result = tao.minimise(problem, problem.space.zeros(), method, stopping=TIGHT)
    np.testing.assert_allclose(result.m, dense_solution(problem), atol=1e-5)
    assert float(result.m.min()) == pytest.approx(-0.3, abs=1e-12)


@pytest.mark.parametrize("method", ["bqnls", "bntr"])
def test_iterations_do_not_depend_on_the_mesh(method: str) -> None:
    counts = []
    for n in (20, 80, 320):
        problem = obstacle(n)
        result = tao.minimise(problem, problem.space.zeros(), method, stopping=GradientTolerance(1e-5))
        assert result.stopped_by == "GradientTolerance"
        counts.append(result.iterations)
    assert max(counts) <= 1.5 * min(counts) + 2


@pytest.mark.parametrize("method", ["blmvm", "bqnls", "bnls", "bntr"])
@pytest.mark.mpi
def test_on_two_ranks_it_is_the_serial_solution(method: str) -> None:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    own = slice(comm.rank * 40 // comm.size, (comm.rank + 1) * 40 // comm.size)
    serial, parallel = obstacle(40), obstacle(40, comm, own)
    one, whole = (tao.minimise(p, p.space.zeros(), method, stopping=TIGHT) for p in (serial, parallel))
    assert whole.value == pytest.approx(one.value, rel=1e-9)
    torch.testing.assert_close(whole.m, one.m[own], rtol=1e-4, atol=1e-5)
    mixed = Product({"field": parallel.space, "number": Euclidean(1)})
    if comm.size > 1:
        with pytest.raises(GliodeError, match="replicated"):
            tao.minimise(InverseProblem(mixed, lambda m: mixed.pairing(m, m) + m[0]), mixed.zeros())


def test_history_callback_and_rules_see_every_iterate() -> None:
    seen: list[int] = []
    problem = InverseProblem(Euclidean(3), valley)
    result = tao.minimise(
        problem, START, stopping=MaxIterations(5), callback=lambda state: seen.append(state.iteration)
    )
    assert seen == [0, 1, 2, 3, 4, 5] and result.stopped_by == "MaxIterations"
    assert result.value == pytest.approx(problem.value(result.m))
    assert result.value < result.history[0]["value"]
    again = tao.minimise(problem, result.state_dict(), stopping=MaxIterations(7))
    assert again.iterations == 7 and again.history[5]["value"] == result.value


def test_an_error_inside_leaves_with_the_best_iterate() -> None:
    def failing(m: Tensor) -> Tensor:
        if float(m.detach()[0]) > 0:
            raise GliodeError("the solver gave up")
        return valley(m)

    with pytest.raises(GliodeError, match="gave up") as caught:
        tao.minimise(InverseProblem(Euclidean(3), failing), START)
    assert caught.value.best.value <= float(valley(START))  # type: ignore[attr-defined]


def test_unusable_input_is_refused() -> None:
    problem = InverseProblem(Euclidean(3), valley)
    with pytest.raises(GliodeError, match="'lmvm'"):
        tao.minimise(problem, START, "lmvm")
    with pytest.raises(GliodeError, match="'half'"):
        tao.minimise(problem, START, hessian="half")
    with pytest.raises(GliodeError, match="LeastSquares"):
        tao.minimise(problem, START, "bnls")
    with pytest.raises(GliodeError, match="diagonal metric"):
        tao.minimise(InverseProblem(GramSpace(3, torch.clone, torch.clone), valley), START)


def test_without_petsc4py_it_says_so() -> None:
    code = (
        "import sys; sys.modules['petsc4py'] = None\n"
        "import torch\n"
        "from inverse.optimizers import tao\n"
        "from inverse.problem import InverseProblem\n"
        "from solvers.errors import GliodeError\n"
        "from solvers.spaces import Euclidean\n"
        "problem = InverseProblem(Euclidean(1), lambda m: (m ** 2).sum())\n"
        "try: tao.minimise(problem, torch.ones(1).double())\n"
        "except GliodeError as error: print(error)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert "petsc4py is not installed" in done.stdout, done.stderr
