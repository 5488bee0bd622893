"""The low-rank Laplace posterior against dense matrices, closed forms, torch's Gaussians and a serial run."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from inverse.problem import LeastSquares
from inverse.regularizers.gaussian import GaussianPrior
from inverse.uncertainty.low_rank import LowRankLaplace, eigenpairs, exceedance, laplace
from solvers.errors import GliodeError
from solvers.spaces import Euclidean
from tests.inverse.gaussians import Columns, Dense, matern

N = 30
MEAN = torch.linspace(-1, 2, N, dtype=torch.float64)
PRIOR = Dense(MEAN, matern(N))


def blur(rows: int, width: float = 0.1) -> Tensor:
    """Local means of a field at `rows` places, in units of a noise of 0.1."""
    x, y = torch.linspace(0, 1, N, dtype=torch.float64), torch.linspace(0, 1, rows, dtype=torch.float64)
    A = torch.exp(-0.5 * ((y[:, None] - x) / width).square())
    return A / A.sum(1, keepdim=True) / 0.1


A = blur(12)
HESSIAN = A.mT @ A
EXACT = torch.linalg.inv(HESSIAN + PRIOR.precision)


def posterior(least: float = 1e-10, prior: Dense = PRIOR, shift: float = 0.3) -> LowRankLaplace:
    found = eigenpairs(lambda d: HESSIAN @ d, prior, least)
    return LowRankLaplace(prior, MEAN + shift, found.values, found.vectors, found.next)


def test_the_eigenpairs_are_the_dense_ones() -> None:
    found = eigenpairs(lambda d: HESSIAN @ d, PRIOR, least=1e-10)
    exact = scipy.linalg.eigh(HESSIAN.numpy(), PRIOR.precision.numpy(), eigvals_only=True)[::-1]
    assert len(found.values) == 12 and found.actions <= 2 * 12 + 1  # it noticed that the range is exhausted
    np.testing.assert_allclose(found.values.numpy(), exact[:12], rtol=1e-8)
    V = found.vectors.mT
    torch.testing.assert_close(V.mT @ PRIOR.precision @ V, torch.eye(12).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(HESSIAN @ V, PRIOR.precision @ V * found.values, rtol=0, atol=1e-6)


def test_a_sketch_finds_the_leading_ones_and_says_what_is_left() -> None:
    wide = blur(30, 0.05)
    H = wide.mT @ wide
    exact = scipy.linalg.eigh(H.numpy(), PRIOR.precision.numpy(), eigvals_only=True)[::-1]
    found = eigenpairs(lambda d: H @ d, PRIOR, least=0.1, most=5)
    assert len(found.values) == 5
    np.testing.assert_allclose(found.values.numpy(), exact[:5], rtol=2e-3)
    assert found.next == pytest.approx(exact[5], rel=0.02)
    found = eigenpairs(lambda d: H @ d, PRIOR, least=1.0)
    assert len(found.values) == int((exact >= 1.0).sum())


def test_variance_covariance_and_precision_are_the_dense_ones() -> None:
    result = posterior()
    torch.testing.assert_close(result.variance(), EXACT.diagonal(), rtol=1e-8, atol=0)
    torch.testing.assert_close(result.sd(), EXACT.diagonal().sqrt(), rtol=1e-8, atol=0)
    d = torch.randn(N, dtype=torch.float64)
    torch.testing.assert_close(result.covariance(d), EXACT @ d, rtol=0, atol=1e-8)
    torch.testing.assert_close(result.space.gram(d), (HESSIAN + PRIOR.precision) @ d, rtol=1e-8, atol=1e-4)
    torch.testing.assert_close(result.space.riesz(result.space.gram(d)), d, rtol=0, atol=1e-7)
    assert result.kept == 12 and float(result.neglected().max()) == 0.0


def test_what_is_left_out_stays_within_its_bound() -> None:
    for least in (0.1, 3.0, 100.0):
        result = posterior(least)
        over = result.variance() - EXACT.diagonal()
        assert float(over.min()) > -1e-9 and float(over.max()) > 1e-6
        assert bool((over <= result.neglected() + 1e-9).all())
        assert bool((result.neglected() <= PRIOR.variance()).all())


def test_samples_have_the_posterior_covariance() -> None:
    """What turns draws of the prior into draws of the posterior turns a root of C into a root of S."""
    result = posterior(prior=(columns := Columns(MEAN, PRIOR.covariance)))
    columns.column = 0
    generator = torch.Generator()
    root = torch.stack([result.sample(generator) - result.mean for _ in range(N)], 1)
    torch.testing.assert_close(root @ root.mT, EXACT, rtol=0, atol=1e-8)


def test_information_and_divergence_are_those_of_gaussians() -> None:
    result = posterior()
    after = MultivariateNormal(result.mean, covariance_matrix=(EXACT + EXACT.mT) / 2)
    before = MultivariateNormal(MEAN, covariance_matrix=PRIOR.covariance)
    gain = 0.5 * (torch.logdet(PRIOR.covariance) - torch.logdet(EXACT))
    assert result.information_gain() == pytest.approx(float(gain), rel=1e-6)
    assert result.divergence() == pytest.approx(float(kl_divergence(after, before)), rel=1e-6)


def test_intervals_and_the_probability_to_exceed() -> None:
    result = posterior()
    low, high = result.interval(0.95)
    torch.testing.assert_close(high - low, 2 * 1.959964 * EXACT.diagonal().sqrt(), rtol=1e-6, atol=0)
    torch.testing.assert_close((low + high) / 2, result.mean)
    generator = torch.Generator().manual_seed(3)
    share = result.exceedance(torch.exp, 1.5, 2000, generator)  # monotone, so the exact answer is known
    exact = 0.5 * torch.erfc((math.log(1.5) - result.mean) / (2 * EXACT.diagonal()).sqrt())
    assert float((share - exact).abs().max()) < 4 * math.sqrt(0.25 / 2000)
    assert float(share.min()) < 0.01 and float(share.max()) > 0.99
    wider = exceedance(PRIOR, torch.exp, 1.5, 2000)
    assert float((wider - 0.5 * torch.erfc((math.log(1.5) - MEAN) / 2**0.5)).abs().max()) < 0.045


def test_it_is_made_from_a_problem_on_a_mesh() -> None:
    """A diffused source: the variance against the inverse of the dense Hessian."""
    from mpi4py import MPI

    from solvers.fem.mesh import box
    from solvers.fem.operators import DiffusionOperator
    from solvers.fem.priors import matern as field

    domain = box((12.0, 9.0, 1.0), (12, 9, 1), comm=MPI.COMM_SELF)
    operator = DiffusionOperator(domain)
    w = operator.conductances(torch.ones(domain.n_cells, dtype=torch.float64))
    seen = torch.arange(0, domain.n_owned, 7)
    made = field(domain, sd=0.5, length=5.0)
    prior = GaussianPrior(made.space, 0.2, made.sample)

    def forward(m: Tensor) -> Tensor:
        return operator.solve(domain.mass * m.exp(), w, torch.tensor(2.0, dtype=torch.float64))[seen]

    data = forward(prior.sample(torch.Generator().manual_seed(1)))
    problem = LeastSquares(made.space, forward, data, 0.02, regularizer=prior)
    m = prior.mean + 0.1
    result = laplace(problem, prior, m, least=1e-8)
    J = problem.jacobian(m)
    precision = torch.stack([made.space.gram(e) for e in torch.eye(domain.n_owned).double()], 1)
    exact = torch.linalg.inv(J.mT @ J + precision).diagonal()
    torch.testing.assert_close(result.variance(), exact, rtol=1e-6, atol=0)
    assert float((exact / prior.variance()).min()) < 0.3  # the data say something
    assert result.kept < len(seen) + 1


@pytest.mark.mpi
def test_ranks_share_a_field_and_agree_with_dense_matrices() -> None:
    """On an interval whose dofs lie in order on each rank: the same posterior from one and from two ranks."""
    from mpi4py import MPI

    from solvers.fem.mesh import Domain, interval
    from solvers.fem.priors import matern as field

    def made(domain: Domain) -> tuple[LowRankLaplace, Tensor]:
        prior = field(domain, sd=0.5, length=4.0)
        x = torch.from_numpy(domain.points[: domain.n_owned, 0].copy())
        weights = (10 / (1 + x)).square()
        found = eigenpairs(lambda d: weights * d, gaussian := GaussianPrior(prior.space, 1.0, prior.sample))
        return LowRankLaplace(gaussian, gaussian.mean, found.values, found.vectors, found.next), x

    shared, x = made(interval(20.0, 40))
    alone, all_x = made(interval(20.0, 40, comm=MPI.COMM_SELF))
    here = (x[:, None] - all_x).abs().argmin(1)
    torch.testing.assert_close(shared.values, alone.values, rtol=1e-8, atol=0)
    torch.testing.assert_close(shared.variance(), alone.variance()[here], rtol=1e-8, atol=0)
    assert shared.divergence() == pytest.approx(alone.divergence())
    draws = [p.sample(torch.Generator().manual_seed(5)) for p in (shared, alone)]
    torch.testing.assert_close(draws[0], draws[1][here], rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: eigenpairs(lambda d: d, PRIOR, least=0.0), "least"),
        (lambda: eigenpairs(lambda d: d * math.nan, PRIOR), "NaN"),
        (lambda: posterior().interval(90), "level"),
        (lambda: posterior().exceedance(torch.exp, 1.0, 0), "samples"),
        (lambda: LowRankLaplace(PRIOR, MEAN, torch.ones(2).double(), torch.zeros(3, N).double()), "vectors"),
        (
            lambda: LowRankLaplace(PRIOR, MEAN, -torch.ones(1).double(), torch.zeros(1, N).double()),
            "negative",
        ),
        (lambda: LowRankLaplace(PRIOR, MEAN[:3], torch.ones(1), torch.zeros(1, 3)), "shape"),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(GliodeError, match=message):
        call()


def test_a_weighted_prior_is_no_prior() -> None:
    space = Euclidean(2)
    prior = GaussianPrior(space, 0.0, lambda g: torch.randn(2, dtype=torch.float64, generator=g), weight=3.0)
    problem = LeastSquares(space, lambda m: m, torch.zeros(2).double(), 1.0, regularizer=prior)
    with pytest.raises(GliodeError, match="weight 3"):
        laplace(problem, prior, torch.zeros(2).double())


def test_nothing_learnt_leaves_the_prior() -> None:
    found = eigenpairs(lambda d: 0.0 * d, PRIOR)
    result = LowRankLaplace(PRIOR, MEAN, found.values, found.vectors, found.next)
    torch.testing.assert_close(result.variance(), PRIOR.variance())
    assert result.kept == 0 and result.information_gain() == 0.0 and result.divergence() == 0.0
