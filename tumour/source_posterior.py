r"""How sure of a source: the Laplace posterior of the field m, and what follows for u(0) and for u(T).

Prior: m is Gaussian of mean 0 (a density of 0.007), standard deviation sd and a correlation length
(BiLaplacian, solvers.fem.priors). Likelihood: the images with their white noise, no smoothing. The maximum
is found by Newton's method from the discrepancy's estimate; the Hessian's eigenvalues above 0.2 are kept. As
u(0) is an increasing function of m at each point, with mu and s the posterior's mean and sd of m,

    P(u(0) > c) = Phi((mu - m_c) / s),    positive(m_c) = c,

exactly, and the moments of u(0) are Gauss-Hermite sums; P(u(T) > 0.16) is the share of samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from inverse.optimizers import newton_cg
from inverse.problem import LeastSquares
from inverse.regularizers.gaussian import GaussianPrior
from inverse.stopping import GradientTolerance, MaxIterations
from inverse.uncertainty.low_rank import LowRankLaplace, laplace
from solvers.errors import GliodeError
from solvers.fem.priors import matern
from tumour.imaging import LEVELS
from tumour.source import SourceProblem, inverse_positive, positive

LEAST, MOST, NODES, EXACT = 0.2, 100, 64, 500


@dataclass(frozen=True)
class SourcePosterior:
    """At the owned dofs: mean and sd of u(0), the probability that it exceeds `threshold`, and (`later`) the
    one that the density at the scans' last day exceeds 0.16. laplace: of m; iterations: Newton's.
    """

    mean: Tensor
    sd: Tensor
    exceedance: Tensor
    threshold: float
    later: Tensor
    laplace: LowRankLaplace
    iterations: int
    counts: dict[str, int]


def posterior_of(
    problem: SourceProblem,
    m: Tensor,
    defect: Tensor,
    sd: float = 0.1,
    length: float = 12.0,
    threshold: float = 0.05,
    samples: int = 50,
    tick: Callable[[str], None] | None = None,
) -> SourcePosterior:
    """The posterior near a field m (owned dofs,) at whose source the data's defect was taken."""
    if not 0 < threshold < 1:
        raise GliodeError(f"locate.posterior.threshold: {threshold} is not in (0, 1)")
    tell = tick or (lambda text: None)
    field = matern(problem.domain, sd, length)
    prior = GaussianPrior(field.space, 0.0, field.sample)
    white = LeastSquares(
        prior.space,
        lambda a: problem.growing.images(positive(a)),
        problem.data - defect,
        problem.sd,
        regularizer=prior,
    )
    rules = (GradientTolerance(1e-2), MaxIterations(10))
    # Far below zero the source does not change with m, but the prior's norm does: a moderate start.
    start = m.clamp(-sd, None)
    found = newton_cg.minimise(
        white,
        start,
        inner_iterations=25,
        stopping=rules,
        callback=lambda s: tell(f"posterior: Newton iteration {s.iteration}"),
    )
    at = laplace(white, prior, found.m, LEAST, MOST)
    tell(f"posterior: {at.kept} directions seen by the data")
    large = problem.domain.n_global > EXACT
    variance = at.variance(torch.Generator().manual_seed(0) if large else None)
    spread = variance.clamp(min=(1e-6 * sd) ** 2).sqrt()
    mean, deviation = _moments(found.m, spread)
    exceeded = torch.special.ndtr((found.m - inverse_positive(threshold)) / spread)
    later = at.exceedance(lambda a: problem.growing.states(positive(a))[-1], LEVELS["oedema"], samples)
    return SourcePosterior(
        mean, deviation, exceeded, threshold, later, at, found.iterations, dict(white.counts)
    )


def _moments(mean: Tensor, sd: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of positive(m), m ~ N(mean, sd^2) entry by entry."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    first, second = torch.zeros_like(mean), torch.zeros_like(mean)
    for node, weight in zip(nodes, weights / math.sqrt(2 * math.pi), strict=True):
        u = positive(mean + node * sd)
        first, second = first + weight * u, second + weight * u**2
    return first, (second - first**2).clamp(min=0).sqrt()
