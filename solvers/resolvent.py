r"""Time steps of M u' = -K u made of the resolvent S(tau) = (M + tau K)^-1 M; the formulas, for any S."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

from torch import Tensor

from solvers.errors import GliodeError

Scheme = Literal["sdirk2", "crank-nicolson", "implicit-euler"]
GAMMA = 1.0 - 1.0 / math.sqrt(2.0)


def check(scheme: str, more: tuple[str, ...] = ()) -> None:
    """Raise GliodeError for a scheme that is not one of these, or of `more`."""
    known = (*more, *get_args(Scheme))
    if scheme not in known:
        raise GliodeError(f"scheme: {scheme!r} is not one of {', '.join(known)}")


def advance(scheme: str, S: Callable[[Tensor, Tensor], Tensor], u: Tensor, dt: Tensor) -> Tensor:
    r"""u after dt days; S(v, tau) applies the resolvent.

    - ``sdirk2``: the two-stage L-stable SDIRK of order 2, gamma = 1 - 1/sqrt 2, which for a linear problem is
      u1 = S((1 + sqrt 2) S u0 - sqrt 2 u0) with tau = gamma dt (Alexander 1977; Hairer & Wanner II, table
      6.5).
    - ``crank-nicolson``: u1 = 2 S(dt/2) u0 - u0; order 2, one solve, A-stable only.
    - ``implicit-euler``: u1 = S(dt) u0; order 1.
    """
    if scheme == "implicit-euler":
        return S(u, dt)
    if scheme == "sdirk2":
        tau = GAMMA * dt
        first = S(u, tau)
        return S((1.0 + math.sqrt(2.0)) * first - math.sqrt(2.0) * u, tau)
    return 2.0 * S(u, dt / 2) - u


def halves(S: Callable[[Tensor, Tensor], Tensor], u: Tensor, dt: Tensor) -> Tensor:
    """Two implicit Euler steps of half the length, which keep the bounds of u where M + tau K is an M-matrix:
    for steps of order 2 that left them.
    """
    return S(S(u, dt / 2), dt / 2)
