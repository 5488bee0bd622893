"""Chains against exact Gaussian posteriors, a quadrature, detailed balance by hand, themselves resumed."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from inverse.problem import InverseProblem, LeastSquares
from inverse.regularizers.gaussian import GaussianPrior
from inverse.uncertainty import mcmc
from inverse.uncertainty.chains import Plan
from inverse.uncertainty.diagnostics import diagnose
from inverse.uncertainty.low_rank import LowRankLaplace, laplace
from inverse.uncertainty.mcmc import mala, pcn
from solvers.errors import GliodeError
from solvers.spaces import Diagonal, Euclidean
from tests.inverse.gaussians import Dense, matern

METHODS = {"pcn": pcn, "mala": mala}
SMALL = Plan(chains=2, draws=30, burn_in=20, seed=4)


def line(n: int = 12) -> tuple[LeastSquares, Dense, Tensor, Tensor]:
    """A linear problem, its prior, and the exact mean and covariance of its posterior."""
    prior = Dense(torch.linspace(0, 1, n, dtype=torch.float64), matern(n, 0.4))
    A = torch.eye(n, dtype=torch.float64)[::3] + 0.5
    data = A @ prior.sample(torch.Generator().manual_seed(1)) + 0.1
    problem = LeastSquares(prior.space, lambda m: A @ m, data, 0.4)
    covariance = torch.linalg.inv(A.mT @ A / 0.16 + prior.precision)
    mean = prior.mean + covariance @ A.mT @ (data - A @ prior.mean) / 0.16
    return problem, prior, mean, covariance


def curved() -> tuple[LeastSquares, Dense, Tensor]:
    """Two parameters of which the data see exp(m0) + m1: a bent ridge, its prior and an estimate."""
    prior = Dense(torch.zeros(2).double(), torch.diag(torch.tensor([1.0, 0.5]).double()))
    data = torch.tensor([0.0], dtype=torch.float64)
    problem = LeastSquares(prior.space, lambda m: m[:1].exp() + m[1:], data, 1.0)
    return problem, prior, torch.tensor([-0.338655, -0.237576], dtype=torch.float64)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preconditioned", [False, True])
def test_chains_find_the_exact_posterior_of_a_linear_problem(method: str, preconditioned: bool) -> None:
    problem, prior, mean, covariance = line()
    reference = laplace(problem, prior, mean, least=1e-9) if preconditioned else None
    plan = Plan(chains=4, draws=500 if preconditioned else 800, burn_in=200, seed=2)
    chains = METHODS[method](problem, prior, reference, plan)
    health, sd = chains.diagnostics(), covariance.diagonal().sqrt()
    error = (chains.mean() - mean).abs() / sd
    assert bool((error < 4 / health.bulk.sqrt()).all())
    assert bool(((chains.sd() / sd - 1).abs() < 4 / (2 * health.bulk.clamp(max=1000)).sqrt()).all())
    if preconditioned:  # the reference is the posterior: nothing is rejected, and beta grows to 1
        assert float(chains.acceptance.min()) > 0.999 and chains.beta > 0.99
        assert float(health.bulk.min()) > 1200 and float(health.rhat.max()) < 1.01
    else:
        target = mcmc.TARGET[method]
        assert bool(((chains.acceptance - target).abs() < 0.12).all()) and chains.stopped_by == "draws"


@pytest.mark.parametrize("method", METHODS)
def test_chains_find_a_posterior_far_from_gaussian(method: str) -> None:
    """Against a quadrature; the Laplace posterior that helps the chains is itself wrong."""
    problem, prior, m = curved()
    reference = laplace(problem, prior, m)
    chains = METHODS[method](problem, prior, reference, Plan(draws=800, burn_in=200))
    x = torch.linspace(-5, 5, 801, dtype=torch.float64)
    u, v = torch.meshgrid(x, x, indexing="ij")
    density = torch.exp(-0.5 * (u.exp() + v) ** 2 - 0.5 * u**2 - v**2)
    density /= density.sum()
    mean = torch.stack([(density * u).sum(), (density * v).sum()])
    sd = torch.stack([(density * (u - mean[0]) ** 2).sum(), (density * (v - mean[1]) ** 2).sum()]).sqrt()
    few = chains.diagnostics().bulk
    assert bool(((chains.mean() - mean).abs() / sd < 4 / few.sqrt()).all())
    assert bool(((chains.sd() / sd - 1).abs() < 5 / (2 * few).sqrt()).all())
    assert float(((m - mean).abs() / sd).max()) > 0.2 and float((reference.sd() / sd - 1).abs().max()) > 0.1
    assert float(few.min()) > 400


@pytest.mark.parametrize("preconditioned", [False, True])
def test_mala_is_in_detailed_balance(preconditioned: bool) -> None:
    """log [pi(x) q(x, y)] - log [pi(y) q(y, x)] with dense densities is minus the logarithm of the ratio."""
    problem, prior, m = curved()
    reference = laplace(problem, prior, m + 0.2) if preconditioned else None
    for method in METHODS:
        sampler = mcmc._Sampler(method, problem, prior, reference, SMALL, m, None, None, None)
        here = sampler.state.points[0]
        there, ratio = sampler._propose(here, 0.6, torch.Generator().manual_seed(3))
        S = torch.stack([sampler.space.riesz(e) for e in torch.eye(2).double()], 1)
        centre = sampler.around.mean

        def log_pi(p: Tensor) -> Tensor:
            return -problem.misfit(p) - 0.5 * (p - prior.mean) @ prior.precision @ (p - prior.mean)

        def drift(p: Tensor, method: str = method, S: Tensor = S, centre: Tensor = centre) -> Tensor:
            """The gradient of -log(pi / reference), by the tape."""
            if method == "pcn":
                return torch.zeros(2).double()
            leaf = p.clone().requires_grad_()
            value = -log_pi(leaf) - 0.5 * (leaf - centre) @ torch.linalg.inv(S) @ (leaf - centre)
            return torch.autograd.grad(value, leaf)[0]

        def log_q(a: Tensor, b: Tensor, S: Tensor = S, centre: Tensor = centre) -> Tensor:
            away = b - centre - 0.8 * (a - centre) + 0.2 * S @ drift(a)
            return -0.5 * away @ torch.linalg.inv(S) @ away / 0.36

        a, b = here.m, there.m
        exact = log_pi(b) + log_q(b, a) - log_pi(a) - log_q(a, b)
        assert ratio == pytest.approx(float(exact), rel=1e-8, abs=1e-10)
        assert abs(ratio) > 1e-3


def test_acceptance_does_not_fall_as_a_mesh_is_refined() -> None:
    shares = []
    for n in (10, 80):
        prior = Dense(torch.zeros(n).double(), matern(n, 0.5))
        middle = torch.zeros(n, dtype=torch.float64)
        middle[n // 2] = 1.0
        problem = LeastSquares(prior.space, partial(torch.mv, middle[None]), torch.ones(1).double(), 0.5)
        plan = Plan(chains=2, draws=800, burn_in=0, step=0.5, seed=1)
        shares.append(float(pcn(problem, prior, plan=plan).acceptance.mean()))
    assert shares[1] == pytest.approx(shares[0], abs=0.06)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", [7, 33])
def test_an_interrupted_run_goes_on_bit_by_bit(method: str, stop: int, tmp_path: Path) -> None:
    problem, prior, mean, _ = line()
    reference = laplace(problem, prior, mean + 0.1)
    whole = METHODS[method](problem, prior, reference, SMALL)

    def interrupt(progress: mcmc.Progress) -> None:
        if progress.step == stop:
            raise KeyboardInterrupt

    file = tmp_path / "chain.npz"
    if stop < SMALL.burn_in:
        with pytest.raises(KeyboardInterrupt):
            METHODS[method](problem, prior, reference, SMALL, checkpoint=file, callback=interrupt)
    else:
        part = METHODS[method](problem, prior, reference, SMALL, checkpoint=file, callback=interrupt)
        assert part.stopped_by == "interrupted" and torch.equal(part.samples, whole.samples[:, :13])
    again = METHODS[method](problem, prior, reference, SMALL, checkpoint=file)
    assert torch.equal(again.samples, whole.samples) and again.beta == whole.beta
    assert torch.equal(again.acceptance, whole.acceptance)
    longer = Plan(chains=2, draws=40, burn_in=20, seed=4)
    more = METHODS[method](problem, prior, reference, longer, checkpoint=file)
    assert torch.equal(more.samples, METHODS[method](problem, prior, reference, longer).samples)
    assert torch.equal(more.samples[:, :30], whole.samples)


def test_a_checkpoint_is_written_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, prior, _, _ = line()
    monkeypatch.setattr(mcmc, "EVERY", 0.0)
    file, there = tmp_path / "chain.npz", []
    pcn(problem, prior, plan=SMALL, checkpoint=file, callback=lambda progress: there.append(file.exists()))
    assert not there[0] and all(there[1:])


def test_nothing_is_lost_when_a_solve_fails(tmp_path: Path) -> None:
    problem, prior, _, _ = line()
    calls = 0

    def failing(m: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 90:
            raise GliodeError("the solver did not converge")
        return problem.misfit(m)

    file = tmp_path / "chain.npz"
    with pytest.raises(GliodeError, match="converge"):
        pcn(InverseProblem(prior.space, failing), prior, plan=SMALL, checkpoint=file)
    before = problem.counts["forward"]
    rest = pcn(problem, prior, plan=SMALL, checkpoint=file)
    assert torch.equal(rest.samples, pcn(problem, prior, plan=SMALL).samples)
    assert rest.counts["forward"] == 1 + 2 * (
        50 - 43
    )  # a look whether the posterior is the same, and the rest
    assert problem.counts["forward"] > before


def test_a_checkpoint_of_another_run_is_refused_and_kept(tmp_path: Path) -> None:
    problem, prior, _, _ = line()
    file = tmp_path / "chain.npz"
    pcn(problem, prior, plan=SMALL, checkpoint=file)
    content = file.read_bytes()
    with pytest.raises(GliodeError, match="another plan"):
        pcn(problem, prior, plan=Plan(chains=2, draws=30, burn_in=20, seed=5), checkpoint=file)
    other = LeastSquares(prior.space, problem.forward, problem.data + 1, 0.4)
    with pytest.raises(GliodeError, match="other data"):
        pcn(other, prior, plan=SMALL, checkpoint=file)
    with pytest.raises(GliodeError, match="another `keep`"):
        pcn(problem, prior, plan=SMALL, checkpoint=file, keep=lambda m: m[:3])
    assert file.read_bytes() == content


def test_infinite_misfits_have_probability_zero_and_keep_chooses() -> None:
    """A half-line: a normal distribution cut at 0 has the mean sqrt(2 / pi)."""
    prior = GaussianPrior(Euclidean(1), 0.0, lambda g: torch.randn(1, dtype=torch.float64, generator=g))
    cut = InverseProblem(prior.space, lambda m: torch.where(m < 0, torch.nan, 0.0 * m).sum())
    start = torch.ones(1, dtype=torch.float64)
    for run in METHODS.values():
        chains = run(cut, prior, plan=Plan(draws=800, burn_in=100), start=start, keep=lambda m: 2 * m[0])
        assert chains.samples.shape == (4, 800) and float(chains.samples.min()) > 0
        error = 4 * float(chains.sd()) / math.sqrt(float(chains.diagnostics().bulk))
        assert float(chains.mean()) == pytest.approx(2 * math.sqrt(2 / math.pi), abs=error)


def test_the_summaries_are_those_of_numpy_and_the_diagnostics_see_trouble() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(4, 500, 2, dtype=torch.float64, generator=generator)
    chains = mcmc.Chains(samples, 1.0, torch.ones(4), "draws", {})
    flat = samples.reshape(-1, 2).numpy()
    np.testing.assert_allclose(chains.sd().numpy(), flat.std(0, ddof=1))
    np.testing.assert_allclose(chains.interval(0.8)[1].numpy(), np.quantile(flat, 0.9, axis=0))
    fine = chains.diagnostics()
    assert fine.converged and float(fine.bulk.min()) > 1500 and "R-hat <= 1.00" in str(fine)
    apart = samples.clone()
    apart[0, :, 1] += 2
    health = diagnose(apart)
    assert not health.converged and float(health.rhat[1]) > 1.2 and float(health.rhat[0]) < 1.01
    slow = samples.cumsum(1)[..., 0]
    assert float(diagnose(slow).bulk) < 100
    assert not diagnose(torch.ones(2, 10)).converged


@pytest.mark.mpi
def test_ranks_walk_together(tmp_path: Path) -> None:
    """A field over the ranks: the chain is that of one process, and all ranks accept alike."""
    from mpi4py import MPI

    from solvers.fem.mesh import Domain, interval
    from solvers.fem.priors import matern as field
    from solvers.spaces import reduce

    def drawn(domain: Domain, draws: int, checkpoint: Path | None = None) -> tuple[Tensor, Tensor]:
        made = field(domain, sd=1.0, length=6.0)
        prior = GaussianPrior(made.space, 0.5, made.sample)
        weights = domain.mass / 20.0

        def misfit(m: Tensor) -> Tensor:
            return 0.5 * ((reduce((weights * m.exp()).sum(), made.space.comm) - 3) / 0.5) ** 2

        plan = Plan(chains=2, draws=draws, burn_in=20)
        chains = mala(InverseProblem(made.space, misfit), prior, plan=plan, checkpoint=checkpoint)
        return chains.samples, torch.from_numpy(domain.points[: domain.n_owned, 0].copy())

    drawn(interval(20.0, 40), 8, tmp_path / "chain.npz")
    samples, x = drawn(interval(20.0, 40), 20, tmp_path / "chain.npz")  # goes on from there
    alone, all_x = drawn(interval(20.0, 40, comm=MPI.COMM_SELF), 20)
    torch.testing.assert_close(samples, alone[..., (x[:, None] - all_x).abs().argmin(1)], rtol=0, atol=1e-7)
    assert float((alone[:, 1:] - alone[:, :-1]).abs().amax(2).gt(0).double().mean()) > 0.2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Plan(draws=0), "draws 0"),
        (lambda: Plan(step=1.5), "step"),
        (lambda: Plan(target=1.0), "target"),
        (lambda: diagnose(torch.zeros(1, 10)), "chains"),
        (lambda: pcn(line()[0], line()[1], start=torch.zeros(3).double()), "shape"),
        (lambda: pcn(InverseProblem(line()[1].space, lambda m: m.sum() * math.inf), line()[1]), "chain 0"),
        (
            lambda: pcn(InverseProblem(line()[1].space, lambda m: m.sum(), bounds=(0.0, None)), line()[1]),
            "bounds",
        ),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(GliodeError, match=message):
        call()


def test_a_weighted_prior_is_refused() -> None:
    space = Diagonal(torch.ones(2).double())
    prior = GaussianPrior(space, 0.0, lambda g: torch.randn(2, dtype=torch.float64, generator=g), weight=2.0)
    with pytest.raises(GliodeError, match="weight 2"):
        pcn(InverseProblem(space, lambda m: m.sum()), prior)
    assert LowRankLaplace(prior, prior.mean, torch.zeros(0).double(), torch.zeros(0, 2).double()).kept == 0
