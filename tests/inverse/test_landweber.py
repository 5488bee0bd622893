"""Landweber's iteration: its closed form, the projected one, and the power iteration."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from inverse.optimizers import landweber, quasi_newton
from inverse.optimizers.iteration import Iterate
from inverse.problem import Bound, InverseProblem, LeastSquares
from inverse.stopping import Discrepancy, GradientTolerance, MaxIterations
from solvers.errors import GliodeError
from solvers.spaces import Communicator, Diagonal, Euclidean, GramSpace, Space, reduce


def linear(
    space: Space | None = None, bounds: tuple[Bound, Bound] | None = None
) -> tuple[LeastSquares, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(7, 4, dtype=torch.float64, generator=generator)
    y = torch.randn(7, dtype=torch.float64, generator=generator)
    return LeastSquares(space or Euclidean(4), lambda m: a @ m, y, 1.0, bounds=bounds), a, y


def gram_space() -> tuple[GramSpace, Tensor]:
    gram = torch.diag(torch.tensor([1.0, 2.0, 5.0, 9.0])).double() + 0.5
    return GramSpace(4, lambda a: gram @ a, lambda d: torch.linalg.solve(gram, d)), gram


def test_a_fixed_step_is_the_filter_1_minus_omega_sigma2_to_the_k() -> None:
    problem, a, y = linear()
    omega, k = 0.05, 12
    result = landweber.minimise(problem, torch.zeros(4).double(), step=omega, stopping=MaxIterations(k))
    u, s, v = np.linalg.svd(a.numpy(), full_matrices=False)
    expected = v.T @ ((1 - (1 - omega * s**2) ** k) / s * (u.T @ y.numpy()))
    np.testing.assert_allclose(result.m, expected, rtol=1e-12)
    assert result.stopped_by == "MaxIterations" and result.numbers == {"iterations": 12.0}
    assert result.counts == {"forward": 13, "adjoint": 13, "tangent": 0}


def test_the_power_iteration_finds_the_norm_in_the_metric_of_the_space() -> None:
    space, gram = gram_space()
    problem, a, _ = linear(space)
    here = Iterate.of(problem.evaluate(torch.zeros(4).double()))
    largest = float(torch.linalg.eigvals(torch.linalg.solve(gram, a.mT @ a)).real.max())
    assert landweber.norm_of_hessian(problem, here, 1e-8, 500) == pytest.approx(largest, rel=1e-5)


@pytest.mark.parametrize("step", ["power", "line_search", 100.0])
def test_it_converges_to_the_least_squares_solution(step: float | str) -> None:
    space, _ = gram_space()
    problem, a, y = linear(space)
    stopping = (GradientTolerance(1e-9), MaxIterations(5000))
    result = landweber.minimise(problem, torch.zeros(4).double(), step=step, stopping=stopping)
    np.testing.assert_allclose(result.m, np.linalg.lstsq(a.numpy(), y.numpy(), rcond=None)[0], rtol=1e-6)
    values = [entry["value"] for entry in result.history]
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(values))


def test_bounds_are_kept_by_projection() -> None:
    """min 1/2 |m - y|^2 over a box is the box's nearest point to y."""
    y = torch.tensor([2.0, -3.0, 0.3, 0.9], dtype=torch.float64)
    problem = LeastSquares(Euclidean(4), lambda m: m * 1.0, y, 1.0, bounds=(-1.0, 1.0))
    result = landweber.minimise(problem, torch.zeros(4).double(), stopping=GradientTolerance(1e-12))
    assert result.m.tolist() == pytest.approx([1.0, -1.0, 0.3, 0.9])
    assert result.gradient_norm < 1e-10  # of its free part


def test_the_discrepancy_principle_regularises() -> None:
    """Stopped at the noise level the error is far below that of the ill-conditioned system's solution."""
    rng = np.random.default_rng(0)
    x = np.linspace(0, 1, 40)
    a = torch.from_numpy(np.exp(-(((x[:, None] - x) / 0.1) ** 2)) / 8)
    truth = torch.from_numpy(np.sin(np.pi * x))
    y = a @ truth + 0.01 * torch.from_numpy(rng.standard_normal(40))
    problem = LeastSquares(Euclidean(40), lambda m: a @ m, y, 0.01)
    result = landweber.minimise(problem, torch.zeros(40).double(), stopping=Discrepancy(1.1, 40**0.5))
    assert result.stopped_by == "Discrepancy"
    assert (result.m - truth).norm() < 0.1 * truth.norm()
    assert (torch.linalg.solve(a, y) - truth).norm() > 10 * truth.norm()


def smooth(
    n: int = 40, comm: Communicator | None = None, own: slice = slice(None)
) -> tuple[LeastSquares, Tensor]:
    """Deconvolution of a step from noisy data; the unknowns may be distributed. And the truth."""
    x = np.linspace(0, 1, n)
    a = torch.from_numpy(np.exp(-(((x[:, None] - x) / 0.1) ** 2)) / 8)
    truth = torch.from_numpy(np.where(x < 0.4, 1.0, 0.2))
    y = a @ truth + 1e-3 * torch.from_numpy(np.random.default_rng(0).standard_normal(n))
    space = Diagonal(torch.full((n,), 1 / n).double()[own], comm)

    def forward(m: Tensor) -> Tensor:
        return reduce(a[:, own] @ m, comm)

    return LeastSquares(space, forward, y, 1e-3), truth[own]


def test_nesterov_s_acceleration_is_the_two_point_iteration() -> None:
    """By hand: z = m + k/(k+3) (m - m_old), then a gradient step; no momentum is lost in these steps."""
    problem, a, y = linear()
    omega, k = 0.02, 9
    result = landweber.minimise(
        problem, torch.zeros(4).double(), omega, "nesterov", stopping=MaxIterations(k)
    )
    m = z = torch.zeros(4).double()
    for j in range(k):
        m_new = z - omega * a.mT @ (a @ z - y)
        z = m_new + j / (j + 3) * (m_new - m)
        m = m_new
    torch.testing.assert_close(result.m, z, rtol=1e-12, atol=1e-14)
    assert result.counts == {"forward": k + 1, "adjoint": k + 1, "tangent": 0}


def test_nesterov_reaches_the_discrepancy_in_about_the_square_root_of_the_iterations() -> None:
    """And its record falls; both estimates are as good."""
    problem, truth = smooth()
    stopping = (Discrepancy(1.2, 40**0.5), MaxIterations(20_000))
    plain, fast = (
        landweber.minimise(problem, torch.zeros(40).double(), acceleration=kind, stopping=stopping)
        for kind in (None, "nesterov")
    )
    assert plain.stopped_by == fast.stopped_by == "Discrepancy"
    assert fast.iterations <= 4 * plain.iterations**0.5 < plain.iterations
    assert all(a["value"] <= b["value"] * (1 + 1e-12) for b, a in pairwise(fast.history))
    errors = [float((result.m - truth).norm()) for result in (plain, fast)]
    assert errors[1] < 1.05 * errors[0] < 0.15 * float(truth.norm())


def test_an_accelerated_run_resumes_to_the_same_numbers_and_keeps_bounds() -> None:
    problem, _, _ = linear(bounds=(-0.2, 0.2))
    start = torch.zeros(4).double()
    whole = landweber.minimise(problem, start, acceleration="nesterov", stopping=MaxIterations(9))
    part = landweber.minimise(problem, start, acceleration="nesterov", stopping=MaxIterations(5))
    rest = landweber.minimise(problem, part.state_dict(), acceleration="nesterov", stopping=MaxIterations(9))
    assert rest.m.tolist() == whole.m.tolist() and float(rest.m.abs().max()) <= 0.2


@pytest.mark.parametrize("acceleration", [None, "nesterov"])
@pytest.mark.mpi
def test_on_two_ranks_it_is_the_serial_iteration(acceleration: str | None) -> None:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    own = slice(comm.rank * 40 // comm.size, (comm.rank + 1) * 40 // comm.size)
    serial, parallel = smooth()[0], smooth(40, comm, own)[0]
    one, all_ = (
        landweber.minimise(
            problem, problem.space.zeros(), acceleration=acceleration, stopping=MaxIterations(30)
        )
        for problem in (serial, parallel)
    )
    torch.testing.assert_close(all_.m, one.m[own], rtol=1e-9, atol=1e-12)
    assert all_.value == pytest.approx(one.value, rel=1e-10)


def test_a_killed_run_resumes_to_the_same_numbers() -> None:
    start = torch.zeros(4).double()
    whole = landweber.minimise(linear()[0], start, stopping=MaxIterations(9))
    part = landweber.minimise(linear()[0], start, stopping=MaxIterations(5))
    rest = landweber.minimise(linear()[0], part.state_dict(), stopping=MaxIterations(9))
    assert rest.m.tolist() == whole.m.tolist() and rest.iterations == 9


def test_unusable_options_are_refused() -> None:
    start = torch.zeros(4).double()
    with pytest.raises(GliodeError, match="Euclidean"):
        landweber.minimise(linear(gram_space()[0], (0.0, 1.0))[0], start)
    with pytest.raises(GliodeError, match="positive"):
        landweber.minimise(linear()[0], start, step=-1.0)
    with pytest.raises(GliodeError, match="'big'"):
        landweber.minimise(linear()[0], start, step="big")
    with pytest.raises(GliodeError, match="'heavy ball'"):
        landweber.minimise(linear()[0], start, acceleration="heavy ball")
    with pytest.raises(GliodeError, match="fixed step"):
        landweber.minimise(linear()[0], start, "line_search", "nesterov")
    saved = landweber.minimise(linear()[0], start, stopping=MaxIterations(2)).state_dict()
    with pytest.raises(GliodeError, match="saved by landweber"):
        quasi_newton.minimise(linear()[0], saved)


def test_a_misfit_without_residual_works_too() -> None:
    problem = InverseProblem(Euclidean(2), lambda m: torch.cosh(m[0] - 1) + m[1] ** 2)
    result = landweber.minimise(problem, torch.zeros(2).double())
    assert result.m.tolist() == pytest.approx([1.0, 0.0], abs=1e-5)
