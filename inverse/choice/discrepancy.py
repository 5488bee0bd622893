r"""The discrepancy principle for alpha: ||r(m_alpha)|| = tau delta (Morozov 1966), by root finding.

Where m_alpha is a global minimiser ||r(m_alpha)|| never falls as alpha grows, and it is continuous where that
minimiser is unique (Tikhonov, Glasko 1965). For a nonlinear problem it may jump.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from inverse.choice.rules import discrepancy_level
from inverse.choice.trials import Choice, ChoiceError, Solve, Trial, Trials, attempt, choose, trail_of
from solvers.errors import GliodeError

DECADES = 8  # searched on one side of the first alpha
EVALUATIONS = 40
NARROW = 1e-4  # a bracket of log alpha within which a residual that still differs has jumped


def discrepancy(
    solve: Solve,
    start: Tensor,
    delta: float,
    tau: float = 1.1,
    alpha: float = 1.0,
    tolerance: float = 0.01,
) -> Choice:
    """The alpha with | ||r(m_alpha)|| / (tau delta) - 1 | <= tolerance.

    solve(alpha, start): minimises 1/2 ||r(m)||^2 + alpha R(m), begun each time at the solution of the nearest
    alpha tried; delta: the noise level in the norm of r, sqrt(data_size) for independent noise of the given
    standard deviation; alpha: where to begin, from there by decades until the level is passed, then regula
    falsi (the Illinois form) in (log alpha, log ||r||). Where ||r|| jumps over the level, the alpha just
    below the jump is taken and `why` says so. ChoiceError: no alpha within eight decades meets it.
    """
    target = discrepancy_level(delta, tau)
    if not (math.isfinite(alpha) and alpha > 0):
        raise GliodeError(f"discrepancy: the first alpha must be positive and finite, got {alpha}")
    if not 0 < tolerance < 1:
        raise GliodeError(f"discrepancy: tolerance must lie between 0 and 1, got {tolerance}")
    enough = math.log1p(tolerance)
    heights: dict[float, float] = {}
    tried: dict[float, Trial] = {}

    def height(x: float) -> float:
        """log(||r|| / target) at log alpha = x."""
        near = min(tried, key=lambda other: abs(other - x), default=None)
        tried[x] = attempt(solve, math.exp(x), start if near is None else tried[near].m)
        heights[x] = math.log(max(tried[x].residual_norm, 1e-300) / target)
        return heights[x]

    x = before = math.log(alpha)
    too_large = height(x) > 0
    for _ in range(DECADES):
        if abs(heights[x]) <= enough or (heights[x] > 0) != too_large:
            break
        before, x = x, x + math.log(0.1 if too_large else 10)
        height(x)
    passed = (heights[x] > 0) != too_large
    if abs(heights[x]) > enough and passed:
        x = _root(height, heights, min(x, before), max(x, before), enough)
    order = sorted(tried, reverse=True)
    trials = Trials("alpha", tuple(tried[key] for key in order))
    scores = [math.exp(heights[key]) for key in order]
    level = f"tau delta = {tau:g} x {delta:.4g}"
    norm = tried[x].residual_norm
    if abs(heights[x]) > enough and not passed:
        reason = (
            "the model cannot explain the data so well; give a larger noise level, or look for what it lacks"
            if too_large
            else "the data tell nothing that the reference does not; or the noise level given is too large"
        )
        raise ChoiceError(
            f"discrepancy: no alpha gives ||r|| = {level}; at {math.exp(x):.2g} it is {norm:.4g}: {reason}",
            tried[x],
            trail_of(trials, scores),
        )
    why = f"||r|| = {norm:.4g} meets {level} after {len(tried)} solves"
    if abs(heights[x]) > enough:
        above = tried[min(key for key in tried if key > x)].residual_norm
        why = f"||r|| jumps there from {norm:.4g} to {above:.4g}, over {level}; the side below is taken"
    numbers = {"tau": tau, "delta": delta, "solves": float(len(tried))}
    return choose("discrepancy", trials, scores, order.index(x), why, False, numbers)


def _root(
    height: Callable[[float], float], heights: dict[float, float], low: float, high: float, enough: float
) -> float:
    """A root of height between low (where it is negative) and high; the lower side of a jump."""
    h_low, h_high, last = heights[low], heights[high], 0
    for _ in range(EVALUATIONS):
        if high - low <= NARROW:
            break
        x = (low * h_high - high * h_low) / (h_high - h_low)
        margin = 0.05 * (high - low)
        x = min(max(x, low + margin), high - margin)
        h = height(x)
        if abs(h) <= enough:
            return x
        if h < 0:
            low, h_low, h_high = x, h, h_high / 2 if last < 0 else h_high
            last = -1
        else:
            high, h_high, h_low = x, h, h_low / 2 if last > 0 else h_low
            last = 1
    return low
