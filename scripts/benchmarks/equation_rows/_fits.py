"""Parameters found again from noisy data, for the rows, by Gauss-Newton."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from inverse.optimizers import gauss_newton
from inverse.problem import LeastSquares
from inverse.stopping import GradientTolerance, MaxIterations, StepTolerance
from scripts.benchmarks._measures import noisy
from solvers.spaces import Euclidean, Space

SEEDS = (1, 2, 3)
STOPPING = (GradientTolerance(1e-4), StepTolerance(1e-4), MaxIterations(20))
Found = dict[str, tuple[float, list[float]]]


def estimates(
    space: Space, forward: Callable[[Tensor], Tensor], clean: Tensor, guess: Tensor
) -> list[Tensor]:
    """The minimisers, one for the noise of each seed, each search from the guess."""
    found = []
    for seed in SEEDS:
        problem = LeastSquares(space, forward, *noisy(clean, seed))
        found.append(gauss_newton.minimise(problem, guess, jacobian_updates=True, stopping=STOPPING).m)
    return found


def fits(
    forward: Callable[[Tensor], Tensor], clean: Tensor, truth: Mapping[str, float], start: Mapping[str, float]
) -> Found:
    """{name: (truth, estimate for each seed)}; forward: the values of the parameters (k,) -> data.

    All are positive: the search is for their logarithms.
    """
    guess = torch.tensor([start[name] for name in truth], dtype=torch.float64).log()
    found = estimates(Euclidean(len(truth)), lambda m: forward(m.exp()), clean, guess)
    return {name: (truth[name], [float(m[k].exp()) for m in found]) for k, name in enumerate(truth)}
