"""The score prior against the Gaussians for which everything is known, and its chains against them."""

import math

import pytest
import torch
from torch import Tensor

from inverse.losses import Mean
from inverse.methods import Adam
from inverse.problem import LeastSquares
from inverse.regularizers.gaussian import GaussianPrior
from inverse.regularizers.learned.score import ScorePrior
from inverse.trainers.score_matching import ScoreMatching
from inverse.training import train
from inverse.uncertainty.annealed import annealed
from inverse.uncertainty.chains import Plan
from inverse.uncertainty.mcmc import mala
from solvers.errors import GliodeError
from solvers.spaces import Euclidean


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(shape: tuple[int, ...], levels: tuple[float, float], **options: float) -> ScorePrior:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ScorePrior(shape, levels, channels=8, depth=3, **options).double()


def test_untrained_it_is_a_gaussian() -> None:
    prior, x = made((4, 5), (0.1, 2.0), mean=0.3, spread=1.5), noise(3, 4, 5)
    for s in (0.1, 0.7, 2.0):
        variance = (1.5**2 + s**2) ** 2 / s**2  # N_s(x) = a x leaves s^2 / (1 - a)^2
        torch.testing.assert_close(prior(x, s), (x - 0.3).square().sum((1, 2)) / (2 * variance))
        torch.testing.assert_close(prior.denoised(x, s), x - s**2 / variance * (x - 0.3))
    torch.testing.assert_close(prior(x, torch.tensor([0.1, 0.7, 2.0]))[1], prior(x[1:2], 0.7)[0])


def test_trained_it_denoises_nearly_as_well_as_any_can() -> None:
    # Of a field of one value, +1 or -1, noise leaves E[field | x] = tanh(x / s^2).
    def fields(n: int, seed: int) -> Tensor:
        return 2.0 * torch.randint(0, 2, (n, 1), generator=torch.Generator().manual_seed(seed)) - 1

    with torch.random.fork_rng():
        torch.manual_seed(0)
        prior = ScorePrior((1,), (0.3, 3.0), channels=16, depth=4)
    data = fields(2000, 1), torch.zeros(2000)
    train(ScoreMatching(prior), Mean(), data, Adam(2e-2, cosine=True), epochs=100, batch=100)
    for s in (0.6, 1.5):
        x = fields(4000, 2) + s * torch.randn(4000, 1, generator=torch.Generator().manual_seed(3))
        best, linear = torch.tanh(x / s**2), x / (1 + s**2)
        with torch.no_grad():
            apart = float((prior.denoised(x, s) - best).square().mean().sqrt())
        assert apart < 0.08, (s, apart)
        assert apart < 0.5 * float((linear - best).square().mean().sqrt())


def test_chains_of_a_gaussian_posterior_have_its_moments() -> None:
    prior = made((3,), (0.3, 2.0), mean=0.5, spread=1.0)
    A, sd = noise(2, 3, seed=4), 0.4
    y = noise(2, seed=5)
    variance = (1 + 0.3**2) ** 2 / 0.3**2  # untrained it is a Gaussian
    precision = A.mT @ A / sd**2 + torch.eye(3, dtype=torch.float64) / variance
    covariance = torch.linalg.inv(precision)
    mean = covariance @ (A.mT @ y / sd**2 + 0.5 / variance)
    problem = LeastSquares(Euclidean(3), lambda m: A @ m, y, sd)
    chains = annealed(problem, prior, Plan(chains=2, draws=500, burn_in=100), levels=3, steps=20)
    size = chains.diagnostics().bulk
    shrunk = 1 - 0.3**2 / variance  # what is kept is the denoised field
    mean, spread = 0.5 + shrunk * (mean - 0.5), shrunk * covariance.diag().sqrt()
    assert bool(((chains.mean() - mean).abs() < 4 * spread / size.sqrt()).all())
    assert bool(((chains.sd() / spread).log().abs() < 4 / (2 * size).sqrt()).all())


def test_settings_are_checked() -> None:
    prior = made((3,), (0.05, 2.0))
    problem = LeastSquares(Euclidean(3), lambda m: m, noise(3), 1.0)
    with pytest.raises(GliodeError, match="levels of"):
        annealed(problem, prior, levels=1)
    with pytest.raises(GliodeError, match=r"shape \(3,\) for 4"):
        annealed(LeastSquares(Euclidean(4), lambda m: m, noise(4), 1.0), prior)
    gaussian = GaussianPrior(Euclidean(3), 0.0, lambda generator: torch.randn(3, generator=generator))
    with pytest.raises(GliodeError, match="2 starts for 4 chains"):
        mala(problem, gaussian, start=noise(2, 3))
    for levels, spread in (((0.0, 1.0), 1.0), ((1.0, 0.5), 1.0), ((0.1, math.inf), 1.0), ((0.1, 1.0), 0.0)):
        with pytest.raises(GliodeError, match="0 < least < most"):
            ScorePrior((3,), levels, spread=spread)
    with pytest.raises(GliodeError, match="one to three axes"):
        ScorePrior((2, 2, 2, 2), (0.1, 1.0))
