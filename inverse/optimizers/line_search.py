r"""Step lengths along a descent direction d: phi(eta) = J(m + eta d), phi'(eta) = <J'(m + eta d), d>.

Values that are not finite count as infinitely high. Each search returns the new Iterate and eta, or None
where no step along d lowers J by more than rounding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inverse.optimizers.iteration import Iterate
from inverse.problem import InverseProblem, Mapped

ARMIJO = 1e-4

Step = tuple[Iterate, float]
End = tuple[float, float, float]


def sensitivity(problem: InverseProblem, here: Iterate, d: Tensor, slope: float) -> Step | None:
    """The step that the problem itself gives along d (`InverseProblem.step`), then safeguarded.

    With a forward map it comes from the sensitivity problem, one tangent solve: for least squares without R
    it is eta = -<r, J d> / ||J d||^2, for other losses the root of phi' with the map linearised; it is shrunk
    while J falls too little. Without a forward map it is -phi'(0) / phi''(0), phi''(0) from the Hessian
    action, and a strong Wolfe search goes on from there, which is the root of phi' to a tenth of phi'(0).
    Without positive curvature that search starts from a unit step.
    """
    eta = problem.step(here.m, d, slope)
    if eta is None:
        return wolfe(problem, here, d, slope, 1 / problem.space.norm(d), 0.1)
    if isinstance(problem, Mapped):
        return backtracking(problem, here, d, slope, eta)
    return wolfe(problem, here, d, slope, eta, 0.1)


def backtracking(
    problem: InverseProblem, here: Iterate, d: Tensor, slope: float, guess: float, trials: int = 30
) -> Step | None:
    """Armijo: guess, shrunk by quadratic interpolation until phi(eta) <= phi(0) + 1e-4 eta phi'(0)."""
    eta = guess
    for _ in range(trials):
        trial = problem.evaluate(here.m + eta * d)
        if trial.value <= here.value + ARMIJO * eta * slope + rounding(here):
            return Iterate.of(trial), eta
        eta = _between((0.0, here.value, slope), (eta, trial.value, math.nan), 0.5)
        del trial  # and its graph, before the next one is built
    return None


def wolfe(
    problem: InverseProblem, here: Iterate, d: Tensor, slope: float, guess: float, c2: float, trials: int = 25
) -> Step | None:
    """Strong Wolfe: Armijo's decrease and |phi'(eta)| <= c2 |phi'(0)|.

    Nocedal and Wright 2006, algorithms 3.5 and 3.6. `low` is the lowest end (eta, phi, phi') so far, `high`
    the other end of an interval that holds such an eta, once there is one. After `trials` evaluations the
    lowest point is returned even if its slope is steeper.
    """
    start = low = (0.0, here.value, slope)
    high: End | None = None
    best: Step | None = None
    eta = guess
    for _ in range(trials):
        trial = problem.evaluate(here.m + eta * d)
        limit = min(here.value + ARMIJO * eta * slope, low[1]) + rounding(here)
        there = Iterate.of(trial) if trial.value <= limit else None
        new = (eta, trial.value, math.nan if there is None else problem.space.pair(there.gradient, d))
        del trial
        if there is None or not math.isfinite(new[2]):
            high = new
        else:
            best = there, eta
            if abs(new[2]) <= -c2 * slope:
                return best
            if high is None and new[2] < 0:
                eta, low = _beyond(low, new), new
                continue
            if high is None or new[2] * (high[0] - low[0]) >= 0:
                high = low
            low = new
        eta = _between(low, high, 0.9)
        if abs(high[0] - low[0]) <= 1e-12 * max(high[0], low[0]):
            break
    return best if low is not start else None


def rounding(here: Iterate) -> float:
    """How far two equal values of J may differ in the point's arithmetic."""
    return 10 * torch.finfo(here.m.dtype).eps * abs(here.value)


def _between(low: End, high: End, most: float) -> float:
    """Where the cubic (without high's slope: the quadratic) is lowest, kept 0.1 to `most` of the way."""
    width, rise = high[0] - low[0], high[1] - low[1]
    if math.isnan(high[2]):
        bend = 2 * (rise - low[2] * width)
        part = -low[2] * width / bend if bend > 0 else math.nan
    else:
        a = low[2] + high[2] - 3 * rise / width
        root = a * a - low[2] * high[2]
        b = math.copysign(math.sqrt(root), width) if root >= 0 else math.nan
        bottom = high[2] - low[2] + 2 * b
        part = 1 - (high[2] + b - a) / bottom if bottom else math.nan
    part = min(max(part, 0.1), most) if math.isfinite(part) else 0.5
    return low[0] + part * width


def _beyond(before: End, new: End) -> float:
    """Where the secant of phi' vanishes, kept 2 to 10 times as far as `new`."""
    fall = new[2] - before[2]
    eta = new[0] - new[2] * (new[0] - before[0]) / fall if fall > 0 else math.inf
    return min(max(eta, 2 * new[0]), 10 * new[0])
