"""The Gaussian prior against a dense normal density, and its variance in both ways."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from inverse.regularizers.gaussian import GaussianPrior
from solvers.errors import GliodeError
from solvers.spaces import Communicator, GramSpace


def chain(n: int, comm: Communicator | None = None, own: slice = slice(None)) -> tuple[GaussianPrior, Tensor]:
    """A BiLaplacian on n points of a line, 12 points a correlation length; and its covariance."""
    A = (
        torch.diag(torch.full((n,), 2.0))
        - torch.diag(torch.ones(n - 1), 1)
        - torch.diag(torch.ones(n - 1), -1)
    ).double()
    A[0, 0] = A[-1, -1] = 1.0
    A = 4 * A + 0.3 * torch.eye(n).double()
    C = torch.linalg.inv(A @ A)
    root = torch.linalg.inv(A)

    def spread(part: Tensor) -> Tensor:
        whole = torch.zeros(n, dtype=torch.float64)
        whole[own] = part
        if comm is not None:
            comm.Allreduce(whole.numpy().copy(), whole.numpy())
        return whole

    space = GramSpace(len(C[own]), lambda a: (A @ A @ spread(a))[own], lambda d: (C @ spread(d))[own], comm)

    def draw(generator: torch.Generator) -> Tensor:
        return (root @ torch.randn(n, dtype=torch.float64, generator=generator))[own]

    return GaussianPrior(space, 0.5, draw), C


def test_it_is_minus_the_logarithm_of_the_normal_density() -> None:
    prior, C = chain(20)
    normal = torch.distributions.MultivariateNormal(torch.full((20,), 0.5).double(), C)
    generator = torch.Generator().manual_seed(0)
    a, b = prior.sample(generator), prior.sample(generator)
    difference = normal.log_prob(b) - normal.log_prob(a)
    assert float(prior(a) - prior(b)) == pytest.approx(float(difference), rel=1e-9)
    leaf = a.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(-normal.log_prob(leaf), leaf)
    torch.testing.assert_close(prior.gradient(a), gradient, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(prior.hessian_action(a, b), torch.linalg.solve(C, b), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(prior.space.riesz(b), C @ b)


def test_the_exact_variance_is_the_diagonal() -> None:
    prior, C = chain(40)
    torch.testing.assert_close(prior.variance(), C.diag())


def test_the_estimated_variance_has_the_stated_error_and_no_bias() -> None:
    prior, C = chain(300)
    errors = [
        (prior.variance(torch.Generator().manual_seed(seed), rank=30, draws=50) - C.diag()) / C.diag()
        for seed in range(12)
    ]
    stacked = torch.stack(errors)
    spread = float(stacked.square().mean().sqrt())
    assert spread < 0.5 * math.sqrt(2 / 50)  # the rest is below half of the variance here
    assert abs(float(stacked.mean())) < spread / math.sqrt(12)
    plain = torch.stack([prior.sample(torch.Generator().manual_seed(seed)) for seed in range(80)])
    assert float((((plain - 0.5) ** 2).mean(0) / C.diag() - 1).square().mean().sqrt()) > 2 * spread


@pytest.mark.mpi
def test_on_two_ranks_it_is_the_serial_one() -> None:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    own = slice(comm.rank * 60 // comm.size, (comm.rank + 1) * 60 // comm.size)
    serial, C = chain(60)
    parallel, _ = chain(60, comm, own)
    a = serial.sample(torch.Generator().manual_seed(2))
    torch.testing.assert_close(parallel.sample(torch.Generator().manual_seed(2)), a[own])
    assert float(parallel(a[own])) == pytest.approx(float(serial(a)), rel=1e-10)
    torch.testing.assert_close(parallel.variance(), C.diag()[own])
    estimates = [p.variance(torch.Generator().manual_seed(5), 20, 30) for p in (parallel, serial)]
    torch.testing.assert_close(estimates[0], estimates[1][own])


def test_bad_input_is_named() -> None:
    prior, _ = chain(5)
    with pytest.raises(GliodeError, match="weight"):
        GaussianPrior(prior.space, 0.0, prior.sample, weight=0.0)
    with pytest.raises(GliodeError, match="mean holds NaN"):
        GaussianPrior(prior.space, math.nan, prior.sample)
    with pytest.raises(GliodeError, match="reference has shape"):
        GaussianPrior(prior.space, torch.zeros(3).double(), prior.sample)
    large = GramSpace(30_000, np.copy, np.copy)  # type: ignore[arg-type]
    with pytest.raises(GliodeError, match="pass a generator"):
        GaussianPrior(large, 0.0, prior.sample).variance()
