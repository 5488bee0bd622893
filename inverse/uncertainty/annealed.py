r"""Samples of a posterior whose prior is a `ScorePrior`: chains led from its broad levels down to its least.

    exp(-Phi(m) - R_s(m)),    s from the most noise to the least, in a geometric row,

infinity-MALA at each level (inverse.uncertainty.mcmc, N(mean, spread^2) the reference: its step adapts), each
chain going on where it was at the level before. The broad posteriors have one mode, so the chains of the last
level start in its modes about as often as these weigh (annealing; Song and Ermon 2019 without the acceptance
ratio). The last level's posterior is sampled exactly, and stands for the prior's own as far as its noise is
small; what is kept of a point is its denoised field.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from inverse.problem import InverseProblem
from inverse.regularizers.gaussian import GaussianPrior
from inverse.regularizers.learned.energy import Learned
from inverse.regularizers.learned.score import ScorePrior
from inverse.uncertainty.chains import Chains, Plan
from inverse.uncertainty.mcmc import Callback, mala
from solvers.errors import GliodeError
from solvers.spaces import Euclidean


def annealed(
    problem: InverseProblem,
    prior: ScorePrior,
    plan: Plan | None = None,
    levels: int = 12,
    steps: int = 100,
    least: float | None = None,
    callback: Callback | None = None,
) -> Chains:
    """Chains of the posterior of a flat field, `steps` at each of the levels, then those of `plan`.

    problem: its misfit is Phi, its regularizer is not used; Euclidean space of the prior's fields. least: the
    last level's noise, None for the prior's own; chains move the more freely the larger it is, and it need
    not be far below what the data leave open. The rest is as for `mcmc.mala`. Raises GliodeError where the
    problem's points are no such fields.
    """
    plan = plan or Plan()
    least = least or prior.levels[0]
    if levels < 2 or steps < 1:
        raise GliodeError(f"annealed: {levels} levels of {steps} steps; give 2 or more, 1 or more")
    frozen = Learned(prior, problem.space, prior.shape).energy
    assert isinstance(frozen, ScorePrior)
    n = problem.space.size
    space = Euclidean(n, prior.spread)

    def draw(generator: torch.Generator) -> Tensor:
        return prior.spread * torch.randn(n, dtype=torch.float64, generator=generator)

    gaussian = GaussianPrior(space, prior.mean, draw)

    def posterior(sigma: float) -> InverseProblem:
        """Phi + R_s less what the Gaussian reference has already."""

        def misfit(m: Tensor) -> Tensor:
            return problem.misfit(m) + frozen(m.reshape(1, *prior.shape), sigma)[0] - gaussian(m)

        return InverseProblem(space, misfit)

    def denoised(m: Tensor) -> Tensor:
        with torch.no_grad():
            return frozen.denoised(m.reshape(1, *prior.shape), least).reshape(-1)

    start: Tensor | None = None
    step = plan.step
    for k, sigma in enumerate(np.geomspace(prior.levels[1], least, levels)):
        short = Plan(plan.chains, 1, steps, plan.seed + 10007 * (k + 1), step, plan.target)
        found = mala(posterior(float(sigma)), gaussian, None, short, start)
        start, step = found.samples[:, -1], found.beta
    last = Plan(plan.chains, plan.draws, plan.burn_in, plan.seed, step, plan.target)
    return mala(posterior(least), gaussian, None, last, start, denoised, callback=callback)
