"""One step of linear diffusion, M u' = -K(w) u, on the tape."""

from __future__ import annotations

import math
from typing import Literal

import torch
from mpi4py import MPI
from torch import Tensor

from solvers import resolvent
from solvers.fem.legendre import LegendreFlow
from solvers.fem.operators import DiffusionOperator

Scheme = Literal["rkl2", "sdirk2", "crank-nicolson", "implicit-euler"]


class DiffusionStep:
    r"""A diffusion step u -> u(dt) by a scheme with the resolvent S(tau) = (M + tau K)^-1 M.

    - ``rkl2`` (default): the Runge-Kutta-Legendre polynomial of order 2, explicit, stable at any step
      (`LegendreFlow`).
    - ``sdirk2``, ``crank-nicolson`` (order 2), ``implicit-euler`` (order 1): see `solvers.resolvent.advance`.

    Bounds. Diffusion keeps min u0 <= u <= max u0. With an M-matrix (voxel bricks, scalar D) implicit Euler
    does too at any step; a second-order step that leaves the bounds by more than `margin` is taken again by
    two implicit Euler steps of half the length (counted in `fallbacks`). No value is ever clipped. On general
    meshes and with tensors the fallback is a help, not a guarantee. The choice of branch is held fixed when
    differentiating.
    """

    def __init__(self, operator: DiffusionOperator, scheme: Scheme = "rkl2", margin: float = 1e-7) -> None:
        resolvent.check(scheme, ("rkl2",))
        self.operator = operator
        self.scheme = scheme
        self.margin = margin
        self.fallbacks = 0
        self._flow = LegendreFlow(operator) if scheme == "rkl2" else None

    def __call__(self, u: Tensor, dt: Tensor | float, w: Tensor) -> Tensor:
        """Advance the state u (owned dofs,) by dt days with conductances w = operator.conductances(D)."""
        dt = torch.as_tensor(dt, dtype=torch.float64)

        def S(v: Tensor, tau: Tensor) -> Tensor:
            return self.operator.solve(self.operator.domain.mass * v, w, tau)

        u1 = self._flow(u, w, dt) if self._flow else resolvent.advance(self.scheme, S, u, dt)
        if self.scheme != "implicit-euler" and self._leaves_bounds(u, u1):
            self.fallbacks += 1
            u1 = resolvent.halves(S, u, dt)
        return u1

    def _leaves_bounds(self, before: Tensor, after: Tensor) -> bool:
        extremes = [-math.inf] * 4
        if len(before):  # a rank may own nothing
            low, high = torch.aminmax(before.detach())
            low1, high1 = torch.aminmax(after.detach())
            extremes = [-float(low), float(high), -float(low1), float(high1)]
        comm = self.operator.domain.comm
        if comm.size > 1:
            extremes = [comm.allreduce(value, op=MPI.MAX) for value in extremes]
        return extremes[2] > extremes[0] + self.margin or extremes[3] > extremes[1] + self.margin
