r"""What is provable of a convex R: with noise delta -> 0 and alpha ~ delta the solutions converge.

An exact solution is made from a test picture's data f: x+ = argmin 1/2 ||B x - f||^2 + R(x), B = A / sd, so
that R'(x+) = B^T w, w = f - B x+: of all x with B x = B x+ it has the least R, with a source condition. For
data B x+ + l e and alpha = l, l = 2 to 1/8, the minimisers x_l obey, whatever B (Burger and Osher 2004; take
the pairing of both conditions with x_l - x+),

    ||B (x_l - x+)|| <= l ||e - w||,    <R'(x_l) - R'(x+), x_l - x+> <= l ||e - w||^2 / 4 .
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from inverse.image_problems import image_problem, restored, test_truths
from inverse.regularizers.learned import files
from inverse.regularizers.learned.energy import Learned
from scripts.benchmarks import Check
from scripts.benchmarks._images import Parameters

NOISE = (4.0, 2.0, 1.0, 0.5, 0.25)  # per cent
TIGHT, MOST = 1e-6, 1500
SEED = 91


@dataclass
class Limit:
    """One picture at each level: relative error, distance and residual over what the theory allows, and
    the discrepancy ||B x - y|| / (l sqrt(N)).
    """

    error: list[float]
    distance: list[float]
    share: list[float]
    discrepancy: list[float]


def limit(job: tuple[str, str, Parameters, int, tuple[float, ...]]) -> Limit:
    """(problem, path of weights, parameters, number of the test picture, levels l)."""
    torch.set_num_threads(1)
    what, path, parameters, number, levels = job
    problem = image_problem(what)
    energy, _ = files.load_energy(path, units="1")
    truth = test_truths()[number]
    f = problem.measured(truth, SEED)
    space = problem.least_squares(f).space

    def times(alpha: float) -> Learned:
        return Learned(energy, space, problem.A.shape, alpha * parameters["weight"], parameters["scale"])

    def solved(y: torch.Tensor, alpha: float, start: torch.Tensor) -> torch.Tensor:
        return restored(problem, y, times(alpha), start, TIGHT, MOST).m

    exact, R = solved(f, 1.0, problem.naive(f)), times(1.0)
    w = (f - problem.A(exact)) / problem.sd
    slope = R.gradient(exact)
    e = torch.randn(w.shape, generator=torch.Generator().manual_seed(SEED + 1 + number), dtype=w.dtype)
    out, x = Limit([], [], [], []), exact
    for level in levels:
        y = problem.A(exact) + level * problem.sd * e
        x = solved(y, level, x)
        away = x - exact
        allowed = float((e - w).norm())
        gap = float((R.gradient(x) - slope) @ away)
        moved = float(problem.A(away).norm()) / problem.sd
        out.error.append(float(away.norm() / exact.norm()))
        out.distance.append(gap)
        out.share.append(max(moved / (level * allowed), gap / (level * allowed**2 / 4)))
        out.discrepancy.append(float((problem.A(x) - y).norm()) / (problem.sd * level * math.sqrt(y.numel())))
    return out


def limit_checks(
    what: str, name: str, first: float, levels: tuple[float, ...], found: list[Limit]
) -> list[Check]:
    """Orders and monotony of the means over the pictures; `first`: per cent of noise at the level 1."""
    noise = [first * level for level in levels]
    error, distance = (np.mean([getattr(one, key) for one in found], axis=0) for key in ("error", "distance"))
    falls = [max(b / a for a, b in zip(one.error, one.error[1:], strict=False)) for one in found]
    title = f"{what}, {name}, noise {noise[0]:g} to {noise[-1]:g} %"

    def order(values: np.ndarray) -> float:
        return float(np.polyfit(np.log(noise), np.log(values), 1)[0])

    return [
        Check(f"{title}: relative errors", " ".join(f"{value:.4f}" for value in error)),
        Check.at_most(f"{title}: error over that of twice the noise, worst", max(falls), 0.999),
        Check(f"{title}: order of the error", order(error)),
        Check.at_least(f"{title}: order of the Bregman distance (theory 1)", order(distance), 0.9),
        Check.at_most(
            f"{title}: residual and distance over the bound, worst",
            max(max(one.share) for one in found),
            1.001,
        ),
        Check.at_most(
            f"{title}: discrepancy ||A x - y|| / delta, worst",
            max(max(one.discrepancy) for one in found),
            3.0,
        ),
    ]
