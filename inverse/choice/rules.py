r"""Rules that choose from trials, each by the extremum of a score.

    l_curve            largest curvature of (log ||r||, 1/2 log R)          Hansen, O'Leary 1993
    gcv                least N ||r||^2 / (N - tr)^2                         Golub, Heath, Wahba 1979
    quasi_optimality   lowest local minimum of ||dm / dlog(alpha or k)||     Tikhonov, Glasko 1965
    oracle             least ||m - truth||: for studies
    first_discrepancy  the first trial with ||r|| <= tau delta               Morozov 1966

None of the first three knows the noise level, so none converges in the worst case (Bakushinskii 1984); gcv
rests on white noise, l_curve and quasi_optimality on noise that is rougher than the solution.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence

from torch import Tensor

from inverse.choice.trials import Choice, ChoiceError, Trials, choose, trail_of
from solvers.errors import GliodeError
from solvers.spaces import Space

SHORT = 1e-4  # relative change of ||r|| and sqrt R below which neighbours on the L-curve are one point


def l_curve(trials: Trials) -> Choice:
    """Where the L-curve turns most sharply: the curvature of the circle through neighbouring points.

    Points nearer to each other than 1e-4 (the solution no longer changes) have none, nor have the ends.
    """
    points = [(_log(t.residual_norm), 0.5 * _log(t.penalty)) for t in trials.entries]
    scores = [math.nan] * len(points)
    for i in range(1, len(points) - 1):
        (ax, ay), (bx, by), (cx, cy) = points[i - 1 : i + 2]
        sides = math.hypot(bx - ax, by - ay), math.hypot(cx - bx, cy - by), math.hypot(ax - cx, ay - cy)
        if min(sides) > SHORT:  # turning right as ||r|| falls and R rises: a corner towards the origin
            cross = (by - ay) * (cx - bx) - (bx - ax) * (cy - by)
            scores[i] = 2 * cross / math.prod(sides)
    return _largest("l_curve", trials, scores, "the L-curve turns most sharply")


def _log(a: float) -> float:
    return math.log(a) if a > 0 else math.nan


def gcv(trials: Trials, freedom: Callable[[float, Tensor], float], size: int) -> Choice:
    """The least G = N ||r||^2 / (N - tr)^2, tr the trace of the influence matrix d(fit)/d(data).

    freedom(alpha, m): that trace, such as lambda alpha, m: degrees_of_freedom(problem(alpha), m); size: the
    number N of data. For sweeps over alpha.
    """
    if trials.parameter != "alpha":
        raise GliodeError("gcv: needs a sweep over alpha; the influence matrix of an iteration is not known")
    scores = []
    for t in trials.entries:
        left = size - freedom(t.at, t.m)
        if not left > 0:
            raise GliodeError(
                f"gcv: {size - left:.4g} degrees of freedom at alpha = {t.at:.3g}, the data are {size}; "
                "raise the smallest alpha"
            )
        scores.append(size * t.residual_norm**2 / left**2)
    return _largest("gcv", trials, [-s for s in scores], "it predicts left-out data best", scores)


def quasi_optimality(trials: Trials, space: Space) -> Choice:
    """Where the solution changes least: the lowest local minimum of ||m_(i+1) - m_i|| / |log(a_(i+1)/a_i)|.

    a: alpha, or the iteration k >= 1 of a method whose regularization falls as a power of k (Landweber,
    conjugate gradients). The ends are no local minima: beyond a problem's range no solution changes.
    """
    entries = trials.entries
    scores = [math.nan] * len(entries)
    for i, (a, b) in enumerate(itertools.pairwise(entries)):
        if a.at > 0:
            scores[i] = space.norm(b.m - a.m) / abs(math.log(b.at / a.at))
    inner = range(1, len(scores) - 2)
    found = [i for i in inner if scores[i] <= min(scores[i - 1], scores[i + 1])]
    why = "the solution changes least"
    if found:
        return choose("quasi_optimality", trials, scores, min(found, key=lambda i: scores[i]), why)
    return _largest("quasi_optimality", trials, [-s for s in scores], f"no local minimum; {why}", scores)


def oracle(trials: Trials, truth: Tensor, space: Space) -> Choice:
    """The least ||m - truth|| in the space: what no rule can better, for studies with a known truth."""
    space.check(truth, "oracle: truth")
    errors = [space.norm(t.m - truth) for t in trials.entries]
    numbers = {"relative_error": min(errors) / max(space.norm(truth), 1e-300)}
    return _largest("oracle", trials, [-e for e in errors], "it is nearest to the truth", errors, numbers)


def first_discrepancy(trials: Trials, delta: float, tau: float = 1.1) -> Choice:
    """The most regularized trial with ||r|| <= tau delta; ChoiceError where none has.

    The index at which the rule `inverse.stopping.Discrepancy` would have stopped the path.
    """
    target = discrepancy_level(delta, tau)
    scores = [t.residual_norm / target for t in trials.entries]
    numbers = {"tau": tau, "delta": delta}
    for i, score in enumerate(scores):
        if score <= 1:
            why = f"the first with ||r|| <= {tau:g} x {delta:.4g}"
            return choose("first_discrepancy", trials, scores, i, why, False, numbers)
    best = min(range(len(scores)), key=lambda i: scores[i])
    raise ChoiceError(
        f"first_discrepancy: ||r|| comes down to {trials.entries[best].residual_norm:.4g}, not to "
        f"{target:.4g}; go further, or is the noise level too low?",
        trials.entries[best],
        trail_of(trials, scores),
    )


def discrepancy_level(delta: float, tau: float) -> float:
    """tau delta, checked."""
    if not (math.isfinite(delta) and delta > 0):
        raise GliodeError(
            f"discrepancy: delta must be a known noise level above 0, got {delta}; estimate the noise, or "
            "take gcv, l_curve or quasi_optimality, which do without"
        )
    if not (math.isfinite(tau) and tau >= 1):
        raise GliodeError(f"discrepancy: tau must be at least 1, got {tau}; 1.1 is usual")
    return tau * delta


def _largest(
    rule: str,
    trials: Trials,
    scores: Sequence[float],
    why: str,
    shown: Sequence[float] | None = None,
    numbers: dict[str, float] | None = None,
) -> Choice:
    """The trial of the largest score (`shown`: as the trail gives it), with a warning at an end."""
    known = [i for i, score in enumerate(scores) if not math.isnan(score)]
    if not known:
        raise GliodeError(f"{rule}: the solution does not change over these trials; spread them wider")
    best = max(known, key=lambda i: scores[i])
    at_end = best in (known[0], known[-1])
    if at_end:
        weak = "weak" if best == known[-1] else "strong"
        why += f"; that is the {weak} end of what was tried, a better one may lie beyond: go further"
    found = choose(rule, trials, scores if shown is None else shown, best, why, at_end, numbers)
    if at_end:
        warnings.warn(found.why, stacklevel=3)
    return found
