r"""The inner iteration of the Newton-like methods: H d = -g by conjugate gradients in a Space.

The Riesz map preconditions. The iteration ends at a residual below a tolerance, at a direction of negative
curvature, or at the edge of a ball ||d|| <= radius (Steihaug 1983, Toint 1981), whose norm, that of the
space, grows with every iteration.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.errors import GliodeError
from solvers.spaces import Space


@dataclass(frozen=True)
class Inner:
    """A direction d of descent and how it was found.

    decrease: what the quadratic model falls by, -<g, d> - 1/2 <H d, d>; iterations: Hessian actions; ended:
    "converged", "negative curvature", "boundary" or "limit" (the allowed iterations are used up).
    """

    d: Tensor
    decrease: float
    iterations: int
    ended: str


def steihaug(
    space: Space,
    action: Callable[[Tensor], Tensor],
    gradient: Tensor,
    tolerance: float,
    most: int,
    radius: float = math.inf,
) -> Inner:
    """d near -H^-1 gradient, H given by its action (primal to dual), symmetric.

    tolerance: of the residual's dual norm. With an infinite radius negative curvature ends at the last d (at
    first: the steepest descent direction). Raises GliodeError where the action is not finite.
    """
    d = torch.zeros_like(gradient)
    residual = -gradient
    z = space.riesz(residual)
    p, square = z, max(space.pair(residual, z), 0.0)
    dd, dp, pp = 0.0, 0.0, square  # products of d and p in the space, by recurrence
    if math.sqrt(square) <= tolerance:
        return Inner(d, 0.0, 0, "converged")

    def leave(a: float, k: int, ended: str) -> Inner:
        """From d along p by a."""
        there, rest = d + a * p, residual - a * image
        return Inner(there, 0.5 * (space.pair(rest, there) - space.pair(gradient, there)), k + 1, ended)

    for k in range(most):
        image = action(p)
        curvature = space.pair(image, p)
        if not math.isfinite(curvature):
            raise GliodeError(f"Hessian: its action is not finite (inner iteration {k + 1}); start elsewhere")
        a = square / curvature if curvature > 0 else math.inf
        if not dd + 2 * a * dp + a * a * pp < radius**2:
            if math.isinf(radius):
                return leave(1.0 if k == 0 else 0.0, k, "negative curvature")
            edge = (math.sqrt(max(dp * dp + pp * (radius**2 - dd), 0.0)) - dp) / pp
            return leave(edge, k, "boundary" if curvature > 0 else "negative curvature")
        d, residual = d + a * p, residual - a * image
        z = space.riesz(residual)
        before, square = square, max(space.pair(residual, z), 0.0)
        ended = "converged" if math.sqrt(square) <= tolerance else "limit" if k + 1 == most else None
        if ended is not None:
            fall = 0.5 * (space.pair(residual, d) - space.pair(gradient, d))
            return Inner(d, fall, k + 1, ended)
        beta = square / before
        dd, dp, pp = dd + 2 * a * dp + a * a * pp, beta * (dp + a * pp), square + beta**2 * pp
        p = z + beta * p
    raise GliodeError(f"inner iteration: at least one must be allowed, got {most}")
