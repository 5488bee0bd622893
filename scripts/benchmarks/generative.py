r"""Posteriors under a learned generative prior, beside Laplace, held to the posterior itself.

Fields of 16 x 16 pixels with one soft disc in each (inverse.datasets.discs), blurred by a Gaussian of 1.5
pixels, noise 0.3 of the mean height. The prior of the fields has four numbers, so the posterior of the field
is known: by importance sampling, twice, the second time from kernels about the best of the first. Compared
with it, by their posterior means and standard deviations at each pixel:

    score      chains of the score prior (data/regularizers/discs.safetensors, inverse.uncertainty.annealed)
    Laplace    the Gaussian prior of the same mean and covariance as the fields, 20,000 of them; exact for it

Errors of means are relative to the field's norm, those of standard deviations to the norm of the true ones.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inverse.datasets.discs import discs, drawn, fields, limits
from inverse.linear_problems import convolution, gaussian
from inverse.problem import LeastSquares
from inverse.regularizers.learned import files
from inverse.regularizers.learned.score import ScorePrior
from inverse.uncertainty.annealed import annealed
from inverse.uncertainty.chains import Plan
from scripts.benchmarks import Check
from solvers.errors import GliodeError
from solvers.spaces import Euclidean

SIZE, WIDTH, NOISE, LEAST = 16, 1.5, 0.3, 0.2
CASES, MORE = range(6), range(20)
PLAN = Plan(chains=16, draws=150, burn_in=100)
FIRST, DRAWS, EFFECTIVE = 50_000, 40_000, 1000


def run(full: bool) -> list[Check]:
    """The table and its bars."""
    os.environ["OMP_NUM_THREADS"] = "1"
    begin = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(min(2, os.cpu_count() or 1)) as pool:
        rows = pool.map(case, MORE if full else CASES, chunksize=1)
    checks = []
    for number, row in enumerate(rows):
        what = "mean's error, sd's error, error against the truth"
        told = "; ".join(
            f"{name} {row[name][0]:.2f}, {row[name][1]:.2f}, {row[name][2]:.2f}"
            for name in ("score", "Laplace")
        )
        checks.append(
            Check(f"disc {number}: {what}", f"{told}; exact {row['exact']:.2f}; R-hat {row['rhat']:.2f}")
        )
    means, sds, truths = (
        {name: np.array([row[name][k] for row in rows]) for name in ("score", "Laplace")} for k in range(3)
    )
    for what, found in (("posterior mean", means), ("posterior sd", sds)):
        for name in ("score", "Laplace"):
            checks.append(Check(f"{what}: relative error of {name}, mean", float(found[name].mean())))
        ratio = float(found["Laplace"].mean() / found["score"].mean())
        checks.append(Check.at_least(f"{what}: Laplace's error over the score prior's", ratio, 1.5))
    ratio = float(truths["Laplace"].mean() / truths["score"].mean())
    checks.append(Check("error against the truth, Laplace's over the score prior's", ratio))
    exact = float(truths["score"].mean() / np.mean([row["exact"] for row in rows]))
    checks.append(Check("error against the truth, the score prior's over the exact posterior's", exact))
    checks.append(
        Check("effective draws of the exact posterior, least", min(row["effective"] for row in rows))
    )
    checks.append(Check("all cases", time.perf_counter() - begin, "s"))
    return checks


def case(number: int) -> dict[str, Any]:
    """Errors of means and standard deviations, and against the truth, of one disc."""
    torch.set_num_threads(1)
    A = convolution((SIZE, SIZE), gaussian(WIDTH, 2))
    truth = discs(1, SIZE, 10_000 + number).reshape(-1)
    generator = torch.Generator().manual_seed(20_000 + number)
    noise = NOISE * torch.randn(SIZE**2, generator=generator, dtype=torch.float64)
    y = A(truth).reshape(-1) + noise
    mean, sd, effective = exact(A, y, number)
    ours = sampled(A, y)
    scale, size = truth.norm(), sd.norm()
    row: dict[str, Any] = {
        "exact": float((mean - truth).norm() / scale),
        "effective": effective,
        "rhat": ours[2],
    }
    for name, (m, s) in (("score", ours[:2]), ("Laplace", gaussian_posterior(A, y))):
        row[name] = tuple(
            float(x) for x in ((m - mean).norm() / scale, (s - sd).norm() / size, (m - truth).norm() / scale)
        )
    return row


def matrix(A: Any) -> Tensor:
    """A as a dense matrix; symmetric up to the edges."""
    unit = torch.eye(SIZE**2, dtype=torch.float64)
    return torch.stack([A(e).reshape(-1) for e in unit], 1)


def exact(A: Any, y: Tensor, seed: int) -> tuple[Tensor, Tensor, float]:
    """Mean and standard deviation of the field, and the effective draws, by importance sampling."""
    K, (low, high) = matrix(A).float(), limits(SIZE)

    def logs(numbers: Tensor) -> Tensor:
        parts = [
            -(fields(part, SIZE).float().reshape(-1, SIZE**2) @ K.mT - y.float()).square().sum(1).double()
            for part in numbers.split(20_000)
        ]
        inside = ((numbers >= low) & (numbers <= high)).all(1)
        return torch.where(inside, torch.cat(parts) / (2 * NOISE**2), -torch.inf)

    numbers = drawn(FIRST, SIZE, 30_000 + seed)
    weights = torch.softmax(logs(numbers), 0)
    # the second time from kernels about the best of the first, each draw of which then counts by p / q
    rng = np.random.default_rng(40_000 + seed)
    centres = numbers[rng.choice(FIRST, 400, p=weights.numpy())]
    spread = (weights @ (numbers - weights @ numbers).square()).sqrt().clamp(min=0.02) * 0.7
    picked = torch.from_numpy(rng.integers(len(centres), size=DRAWS))
    numbers = centres[picked] + spread * torch.from_numpy(rng.standard_normal((DRAWS, 4)))
    apart = torch.cat(
        [
            (-((part[:, None] - centres) / spread).square().sum(2) / 2).logsumexp(1)
            for part in numbers.split(5000)
        ]
    )
    weights = torch.softmax(logs(numbers) - apart, 0)
    effective = 1 / float(weights.square().sum())
    if effective < EFFECTIVE:
        raise GliodeError(f"generative: {effective:.0f} effective draws of the exact posterior are too few")
    x = fields(numbers, SIZE).reshape(-1, SIZE**2)
    mean = weights @ x
    return mean, (weights @ (x - mean).square()).sqrt(), effective


def gaussian_posterior(A: Any, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation under the Gaussian prior of the fields' own moments."""
    x, K = discs(20_000, SIZE, 1).reshape(-1, SIZE**2), matrix(A)
    mean, C = x.mean(0), torch.cov(x.mT)
    gain = C @ K.mT @ torch.linalg.inv(K @ C @ K.mT + NOISE**2 * torch.eye(SIZE**2, dtype=torch.float64))
    return mean + gain @ (y - K @ mean), (C - gain @ K @ C).diag().clamp(min=0).sqrt()


def sampled(A: Any, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean, standard deviation and worst R-hat of the chains."""
    prior, _ = files.load_energy(files.shipped("discs"))
    assert isinstance(prior, ScorePrior)
    problem = LeastSquares(Euclidean(SIZE**2), lambda m: A(m).reshape(-1), y, NOISE)
    chains = annealed(problem, prior, PLAN, levels=20, steps=30, least=LEAST)
    return chains.mean(), chains.sd(), float(chains.diagnostics().rhat.max())
