"""A root of an increasing scalar function, by Newton's method kept inside a bracket."""

from __future__ import annotations

import math
from collections.abc import Callable

GROWTH = 10.0  # most that a step may grow by while no upper end is known
EVALUATIONS = 60


def increasing_root(
    derivatives: Callable[[float], tuple[float, float]], slope: float, tolerance: float
) -> float | None:
    """eta > 0 with |g(eta)| <= tolerance |g(0)|, where derivatives(eta) = g(eta), g'(eta).

    slope: g(0) < 0. None unless g'(0) > 0. g is the derivative of an objective along a line: where it changes
    from - to + is a minimum; where it stays negative, since the objective falls for ever, its size still
    falls below the tolerance, and that eta is returned. Values that are not finite count as too far.
    """
    rise = derivatives(0.0)[1]
    eta = -slope / rise if math.isfinite(rise) and rise > 0 else math.inf
    if not math.isfinite(eta):
        return None
    low, high = 0.0, math.inf
    for _ in range(EVALUATIONS):
        value, rise = derivatives(eta)
        if abs(value) <= tolerance * -slope:
            break
        if value < 0:
            low = eta
        else:
            high = eta
        newton = eta - value / rise if rise > 0 else math.nan
        if math.isinf(high):
            eta = newton if newton < GROWTH * eta else GROWTH * eta
        else:
            eta = newton if low < newton < high else (low + high) / 2
            if high - low <= tolerance * high:
                break
    return eta
