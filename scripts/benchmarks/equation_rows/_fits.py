"""Parameters found again from noisy data, for the rows: Gauss-Newton on their logarithms."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from inverse.optimizers import gauss_newton
from inverse.problem import LeastSquares
from inverse.stopping import GradientTolerance, MaxIterations, StepTolerance
from solvers.spaces import Euclidean

SEEDS = (1, 2, 3)
NOISE = 0.01
Found = dict[str, tuple[float, list[float]]]


def noisy(clean: Tensor, seed: int) -> tuple[Tensor, float]:
    """The data with Gaussian noise of 1 % of their largest value, and its standard deviation."""
    sd = NOISE * float(clean.abs().max())
    generator = torch.Generator().manual_seed(seed)
    return clean + sd * torch.randn(clean.shape, generator=generator, dtype=clean.dtype), sd


def fits(
    forward: Callable[[Tensor], Tensor], clean: Tensor, truth: Mapping[str, float], start: Mapping[str, float]
) -> Found:
    """{name: (truth, estimate for each seed)}; forward: the values of the parameters (k,) -> data."""
    names = list(truth)
    guess = torch.tensor([start[name] for name in names], dtype=torch.float64).log()
    found: Found = {name: (truth[name], []) for name in names}
    for seed in SEEDS:
        data, sd = noisy(clean, seed)
        problem = LeastSquares(Euclidean(len(names)), lambda m: forward(m.exp()), data, sd)
        stopping = (GradientTolerance(1e-4), StepTolerance(1e-4), MaxIterations(20))
        result = gauss_newton.minimise(problem, guess, jacobian_updates=True, stopping=stopping)
        guess = result.m  # of the next seed: where the search begins does not matter to where it ends
        for name, value in zip(names, result.m.exp().tolist(), strict=True):
            found[name][1].append(value)
    return found
