"""Denoising of held-out photographs: total variation, convex and weakly convex ridge regularizers.

y = x + sigma e of 8 grey photographs that nothing was trained or tuned on, 256 x 256 (after halving where the
photograph is longer than 500 both ways), sigma 5, 15 and 25 of 255, one noise for all methods:

    min_x 1/2 ||x - y||^2 + R(x),    R exact TV (by its prox) or a trained one, weight / scale^2 R(scale x)

weight, and scale where there is one, are tuned on the validation photographs at each sigma, all by the same
search. The weakly convex one is held to where its guarantee makes this problem convex: weight times modulus
at most 1. The pictures are continued by mirroring, by 6 pixels, for the filters to see the edge from both
sides; all results are cut to [0, 1].
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from torch import Tensor

from inverse.datasets.images import TEST, test_images, validation_images
from inverse.optimizers import quasi_newton
from inverse.problem import LeastSquares
from inverse.regularizers.learned import files
from inverse.regularizers.learned.energy import Energy, Learned
from inverse.regularizers.total_variation import ImageGradient, TotalVariation
from inverse.stopping import GradientTolerance, MaxIterations
from scripts.benchmarks import Check
from scripts.benchmarks._images import Parameters, Row, gain, psnr, table, tuned
from solvers.spaces import Euclidean

SIGMAS = (5, 15, 25)
METHODS = {"TV": None, "CRR": "crr", "WCRR": "wcrr"}
BARS = {"CRR": 0.5, "WCRR": 1.0}  # dB over TV at sigma 25
MIRRORED = 6
VALIDATION_SEED, TEST_SEED = 71, 81

Denoise = Callable[[Tensor], tuple[Tensor, int]]


def noisy(clean: Tensor, sigma: float, seed: int) -> Tensor:
    """The same standard noise at every sigma."""
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed), dtype=clean.dtype)
    return clean + sigma * noise


def mirrored(y: Tensor) -> Tensor:
    """The picture continued on all sides."""
    return torch.nn.functional.pad(y[None, None], (MIRRORED,) * 4, mode="reflect")[0, 0]


class Counted(ImageGradient):
    """Counts how often it is applied, which the prox does once or twice an iteration."""

    taken = 0

    def __call__(self, u: Tensor) -> Tensor:
        self.taken += 1
        return super().__call__(u)


def total_variation(shape: tuple[int, ...], weight: float) -> Denoise:
    """By the exact prox, each picture from zero; it tells its applications of the gradient."""

    def denoise(y: Tensor) -> tuple[Tensor, int]:
        gradient = Counted(shape)
        found = TotalVariation(gradient, weight).prox(y.reshape(-1), 1.0)
        return found.reshape(y.shape), gradient.taken

    return denoise


def by_learned(energy: Energy, weight: float, scale: float) -> Denoise:
    """By limited-memory BFGS, to a gradient of 1e-3 of that at the data."""

    def denoise(y: Tensor) -> tuple[Tensor, int]:
        data = mirrored(y)
        space, start = Euclidean(data.numel()), data.reshape(-1)
        R = Learned(energy, space, tuple(data.shape), weight, scale)
        problem = LeastSquares(space, lambda m: m, start, 1.0, R)
        stopping = (GradientTolerance(1e-3), MaxIterations(300))
        found = quasi_newton.minimise(problem, start, stopping=stopping)
        inside = slice(MIRRORED, -MIRRORED)
        return found.m.reshape(data.shape)[inside, inside], found.iterations

    return denoise


def contest(method: str, sigma: int, tries: int) -> tuple[Row, float]:
    """A method tuned on the validation photographs, on the test photographs; and its weight times modulus."""
    torch.set_num_threads(1)
    s, held = sigma / 255, validation_images(256)
    name = METHODS[method]
    modulus = 0.0
    if name is None:
        start: Parameters = {"weight": 0.8 * s}

        def made(p: Parameters) -> Denoise:
            return total_variation(tuple(held.shape[1:]), p["weight"])
    else:
        energy, card = files.load_energy(files.shipped(name), units="1")
        energy = energy.double()
        modulus = energy.guarantee().modulus
        weight = card.weight * card.noise[1] ** 2  # trained with 1/2 ||x - y||^2 / noise^2
        if modulus:
            weight = min(weight, 0.999 / modulus)
        start = {"weight": weight, "scale": card.noise[1] / s}

        def made(p: Parameters) -> Denoise:
            return by_learned(energy, p["weight"], p["scale"])

    def score(p: Parameters) -> float:
        if p["weight"] * modulus > 1:
            return -math.inf  # beyond what is certified
        denoise = made(p)
        data = noisy(held, s, VALIDATION_SEED)
        return sum(psnr(denoise(y)[0].clamp(0, 1), x) for x, y in zip(held, data, strict=True)) / len(held)

    best = tuned(score, start, tries, 1.25, 1.02)
    row, denoise, truths = (
        Row(method, parameters=best.parameters, tried=best.tried),
        made(best.parameters),
        test_images(256),
    )
    for x, y in zip(truths, noisy(truths, s, TEST_SEED), strict=True):
        begin = time.process_time()
        found, iterations = denoise(y)
        row.add(found.clamp(0, 1), x, time.process_time() - begin, iterations)
    return row, modulus * best.parameters["weight"]


def run(full: bool) -> list[Check]:
    """Two processes; full: a longer search of the parameters."""
    tasks = [(method, sigma, 24 if full else 9) for sigma in reversed(SIGMAS) for method in reversed(METHODS)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        found = dict(zip(tasks, pool.map(contest, *zip(*tasks, strict=True)), strict=True))
    checks = []
    for sigma in SIGMAS:
        rows = [found[task][0] for method in METHODS for task in tasks if task[:2] == (method, sigma)]
        checks += table(f"sigma {sigma}", rows)
        for i, name in enumerate(TEST):
            each = ", ".join(f"{row.name} {row.psnr[i]:.2f}" for row in rows)
            checks.append(Check(f"sigma {sigma}: {name}", each, "dB"))
        certified = [value for task, (row, value) in found.items() if task[1] == sigma and row.name == "WCRR"]
        checks.append(Check.at_most(f"sigma {sigma}: WCRR's weight times modulus", max(certified), 1.0))
    for row in rows[1:]:
        over = gain(row.psnr, rows[0].psnr)
        what = f"sigma 25: {row.name} over tuned TV [{over.low:+.2f}, {over.high:+.2f}]"
        checks.append(Check.at_least(what, over.mean, BARS[row.name], "dB"))
    return checks
