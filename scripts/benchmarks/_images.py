"""How images are compared: PSNR, SSIM, bootstrap intervals, one search of parameters for all, one table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy.stats import bootstrap
from torch import Tensor

from scripts.benchmarks import Check

Parameters = dict[str, float]
RESAMPLES = 9999


def psnr(found: Tensor, truth: Tensor) -> float:
    """-10 log10 of the mean square error of an image in [0, 1], dB; -inf where it is not finite."""
    from skimage.metrics import peak_signal_noise_ratio

    x = found.detach().double().numpy()
    if not np.isfinite(x).all():
        return -math.inf
    return float(peak_signal_noise_ratio(truth.double().numpy(), x, data_range=1.0))


def ssim(found: Tensor, truth: Tensor) -> float:
    """Structural similarity (Wang, Bovik, Sheikh and Simoncelli 2004), windows of 7 x 7; 0 if not finite."""
    from skimage.metrics import structural_similarity

    x = found.detach().double().numpy()
    if not np.isfinite(x).all():
        return 0.0
    return float(structural_similarity(truth.double().numpy(), x, data_range=1.0))


class Interval(NamedTuple):
    """A mean and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def interval(values: Sequence[float]) -> Interval:
    """Of the mean of the values, by the bias-corrected and accelerated bootstrap, seed 0."""
    x = np.asarray(values, dtype=float)
    mean = float(x.mean())
    if len(x) < 2 or not np.isfinite(x).all():
        return Interval(mean, -math.inf, math.inf)  # nothing is known
    if float(np.ptp(x)) <= 1e-12 * (1 + abs(mean)):
        return Interval(mean, mean, mean)
    found = bootstrap(
        (x,), np.mean, n_resamples=RESAMPLES, confidence_level=0.95, rng=np.random.default_rng(0)
    )
    return Interval(mean, *(float(end) for end in found.confidence_interval))


def gain(values: Sequence[float], over: Sequence[float]) -> Interval:
    """Of the mean difference on the same images in the same order: paired."""
    return interval([a - b for a, b in zip(values, over, strict=True)])


class Tuned(NamedTuple):
    """The best parameters, their score and how many were tried."""

    parameters: Parameters
    score: float
    tried: int


def tuned(
    score: Callable[[Parameters], float],
    start: Mapping[str, float],
    budget: int = 12,
    factor: float = 4.0,
    least: float = 1.1,
) -> Tuned:
    """The positive parameters of the largest score: a compass search in logarithms, the same for all methods.

    Each parameter in turn is multiplied and divided by `factor`, on as long as that is better; when no
    parameter gains any more, the factor becomes its square root, until it is below `least` or `budget` scores
    were taken. A score that is not finite loses. No parameters: the score is taken once.
    """
    best, seen = dict(start), {}  # type: Parameters, dict[tuple[float, ...], float]

    def at(parameters: Parameters) -> float:
        key = tuple(round(math.log(value), 9) for value in parameters.values())
        if key not in seen:
            found = score(parameters)
            seen[key] = found if math.isfinite(found) else -math.inf
        return seen[key]

    highest = at(best)
    forward = dict.fromkeys(best, 1)  # the direction that gained last is tried first
    while best and factor >= least and len(seen) < budget:
        gained = False
        for name in best:
            for direction in (forward[name], -forward[name]):
                moved = False
                while len(seen) < budget:
                    trial = best | {name: best[name] * factor**direction}
                    there = at(trial)
                    if not there > highest:
                        break
                    best, highest, moved = trial, there, True
                    forward[name] = direction
                gained = gained or moved
                if moved:
                    break
        if not gained:
            factor = math.sqrt(factor)
    return Tuned(best, highest, len(seen))


@dataclass
class Row:
    """One method on all test images, in one order."""

    name: str
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    iterations: list[int] = field(default_factory=list)
    parameters: Parameters = field(default_factory=dict)
    tried: int = 1
    notes: list[str] = field(default_factory=list)
    """How it fails, where it does."""

    def add(self, found: Tensor, truth: Tensor, seconds: float, iterations: int) -> None:
        """One image more."""
        self.psnr.append(psnr(found, truth))
        self.ssim.append(ssim(found, truth))
        self.seconds.append(seconds)
        self.iterations.append(iterations)


def table(what: str, rows: Sequence[Row], reference: str = "TV") -> list[Check]:
    """A line for each method: PSNR and its gain over the reference, SSIM, cost, parameters, failures."""
    by_name = {row.name: row for row in rows}
    base = by_name.get(reference)
    checks = []
    for row in rows:
        parts = [f"{interval(row.psnr)} dB", f"SSIM {_three(interval(row.ssim))}"]
        notes = list(row.notes)
        if base is not None and row is not base:
            over = gain(row.psnr, base.psnr)
            parts.append(f"over {reference} {over.mean:+.2f} [{over.low:+.2f}, {over.high:+.2f}]")
            if over.high < 0:
                notes.append(f"loses against {reference}")
        parts.append(f"{np.mean(row.seconds):.2g} s, {np.mean(row.iterations):.0f} iterations")
        if row.parameters:
            tuned_to = ", ".join(f"{name} {value:.3g}" for name, value in row.parameters.items())
            parts.append(f"{tuned_to} ({row.tried} tried)")
        checks.append(Check(f"{what}: {row.name}", "; ".join(parts + notes)))
    return checks


def _three(of: Interval) -> str:
    return f"{of.mean:.3f} [{of.low:.3f}, {of.high:.3f}]"
