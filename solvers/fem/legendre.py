r"""Diffusion by a Runge-Kutta-Legendre polynomial: products instead of linear solves, and its exact adjoint.

For M u' = -K(w) u a step is u(dt) = (1 - b) u0 + b P_s(1 - theta L) u0 with L = M^-1 K(w) and the s, b and
theta of `solvers.legendre`. On voxels it all but keeps the bounds: the response to a unit load undershoots by
at most 6 % of its largest value at any step (SDIRK2: by 100 times it). What should vanish within a step,
modes of dt (mode's rate) > 2, is halved only, so steps are to resolve the widths that matter: dt D < width^2.

The polynomial of a symmetric operator is its own adjoint, so a gradient costs the same products once more,
and it is exact to rounding: there is no solver tolerance. With y_j = P_j(1 - theta L) u0 and a_j the
transposed recurrence,

    dJ/dw = -theta sum_j alpha_j (G a_j) (G y_{j-1}).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from solvers.errors import Diverged, GliodeError
from solvers.evolution import is_dual
from solvers.fem.kernels import Stage
from solvers.fem.mesh import FloatArray
from solvers.fem.operators import DiffusionOperator
from solvers.legendre import MOST_STAGES, Polynomial, polynomial, stages_for


class LegendreFlow:
    """u -> u(dt) on the tape: differentiable in u, w and dt, in both modes, twice; serial and MPI."""

    def __init__(self, operator: DiffusionOperator) -> None:
        self.operator = operator
        domain, pairs = operator.domain, operator.conductances
        counts = np.bincount(pairs.first.numpy(), minlength=len(domain.points))
        self._stage = Stage(np.concatenate([[0], np.cumsum(counts)]), pairs.second.numpy())
        self._product = np.empty(len(domain.points))
        self._inverse_mass = domain.ghosts.extend(1.0 / domain.mass)  # of owned dofs and ghosts
        self._owned = slice(0, domain.n_owned)
        self._bounds: list[tuple[Tensor, int, float]] = []

    def __call__(self, u: Tensor, w: Tensor, dt: Tensor) -> Tensor:
        """Advance u by dt days."""
        dual, taped = is_dual(u, w, dt), torch.is_grad_enabled()
        if dual and taped and any(x.requires_grad for x in (u, w, dt)):
            return self.on_tape(u, w, dt)
        keep = dual or (taped and (w.requires_grad or dt.requires_grad))
        return _Flow.apply(u, w, dt, self, keep)  # type: ignore[no-any-return]

    def on_tape(self, u: Tensor, w: Tensor, dt: Tensor) -> Tensor:
        """The same, stage by stage on the tape: slower, for derivatives of derivatives."""
        p = self.polynomial(w, float(dt.detach()))
        theta = dt * (4.0 / (p.s * p.s + p.s - 2))
        before, y = torch.zeros_like(u), u
        for alpha, beta in zip(p.alpha, p.beta, strict=True):
            before, y = y, float(alpha) * (y - theta * self._rate(w, y)) - float(beta) * before
        return (1.0 - p.b) * u + p.b * y

    def polynomial(self, w: Tensor, dt: float) -> Polynomial:
        """The polynomial with the stages that make a step of dt days stable."""
        bound = self.bound(w)
        if dt < 0:
            raise GliodeError(f"diffusion: a step of {dt} days runs backwards, which no solver can follow")
        s = stages_for(dt * bound)
        if s > MOST_STAGES:
            raise Diverged(
                f"diffusion: a step of {dt:g} days needs {s} stages on this mesh (the fastest mode decays at"
                f" {bound:.3g}/day); remove slivers from the mesh, shorten the step, or choose the scheme"
                " sdirk2"
            )
        return polynomial(s)

    def bound(self, w: Tensor) -> float:
        """A bound of L's eigenvalues in 1/day (Gershgorin); the last few are kept."""
        w = w.detach()  # shares memory and version with its source, and holds the memory while it is kept
        pairs, domain = self.operator.conductances, self.operator.domain
        for kept, version, bound in self._bounds:
            same = kept.data_ptr() == w.data_ptr() and kept.shape == w.shape and version == w._version
            if domain.comm.allreduce(same, op=MPI.LAND):  # where a rank has no pairs, all w look the same
                return bound
        if domain.comm.allreduce(pairs.vertex_rule and bool((w < 0).any()), op=MPI.LOR):
            raise GliodeError("diffusion: D is negative somewhere")
        both, sums = w + w.abs(), torch.zeros(len(self._product), dtype=torch.float64)
        sums.index_add_(0, pairs.first, both).index_add_(0, pairs.second, both)
        rows = domain.ghosts.gather(sums) * self._inverse_mass[self._owned]
        most = float(rows.max()) if len(rows) else 0.0
        largest: float = domain.comm.allreduce(most if math.isfinite(most) else math.inf, op=MPI.MAX)
        if not math.isfinite(largest):
            raise GliodeError("diffusion: D is not finite")
        self._bounds = [(w, w._version, largest), *self._bounds[:2]]
        return largest

    def _advance(
        self,
        w: Tensor,
        a: FloatArray,
        base: FloatArray | None,
        z: FloatArray,
        f: float,
        t: float,
        products: tuple[float, FloatArray, FloatArray] | None = None,
    ) -> None:
        """z = base + f a - t L(w) a, base None for 0, arrays local; products: see `Stage`.

        Sets the ghosts of a; those of z and base are of no use.
        """
        ghosts, inverse_mass = self.operator.domain.ghosts, self._inverse_mass.numpy()
        if ghosts.parallel:
            ghosts.fill(a)
        self._stage(w.numpy(), a, self._product, products, (inverse_mass, base, z, f, t))
        if ghosts.parallel:
            for place, more in ghosts.send_back(self._product):
                z[place] -= t * inverse_mass[place] * more

    def _forward(self, u: Tensor, w: Tensor, dt: float, keep: bool) -> tuple[Tensor, FloatArray | None]:
        """The step, and the stages z_0 ... z_{s-1} if they are to be kept."""
        p = self.polynomial(w, dt)
        theta = 4.0 * dt / (p.s * p.s + p.s - 2)
        z = np.empty((p.s + 1 if keep else 2, len(self._product)))
        z[0, self._owned] = u.numpy()
        for j, f in enumerate(map(float, p.factor), start=1):
            base = z[(j - 2) % len(z)] if j > 1 else None
            self._advance(w, z[(j - 1) % len(z)], base, z[j % len(z)], f, f * theta)
        self._count(p.s)
        last = torch.from_numpy(z[p.s % len(z), self._owned])
        out = torch.add((1.0 - p.b) * u, last, alpha=p.b * float(p.scale[-1]))
        return out, z[:-1] if keep else None

    def _adjoint(
        self, g: Tensor, w: Tensor, dt: float, stages: FloatArray | None
    ) -> tuple[Tensor, Tensor | None]:
        """The derivatives by u and, given the stages, by w."""
        p = self.polynomial(w, dt)
        theta = 4.0 * dt / (p.s * p.s + p.s - 2)
        z = np.empty((2, len(self._product)))
        np.multiply(self._inverse_mass[self._owned].numpy(), p.b * g.numpy(), out=z[0, self._owned])
        total = None if stages is None else np.zeros(len(w))
        products = None
        for j, f in enumerate(map(float, p.adjoint_factor), start=1):
            if stages is not None and total is not None:
                k = p.s - j
                weight = -theta * p.alpha[k] * p.adjoint_scale[j - 1] * p.scale[k]
                products = float(weight), stages[k], total
            self._advance(w, z[(j - 1) % 2], z[j % 2] if j > 1 else None, z[j % 2], f, f * theta, products)
        self._count(p.s)
        grad = self.operator.domain.mass * torch.from_numpy(z[p.s % 2, self._owned])
        grad.mul_(float(p.adjoint_scale[-1])).add_(g, alpha=1.0 - p.b)
        return grad, None if total is None else torch.from_numpy(total)

    def _tangent(
        self, w: Tensor, dt: float, stages: FloatArray, tangents: tuple[Tensor | None, ...]
    ) -> Tensor:
        """The derivative along (du, dw, ddt)."""
        p = self.polynomial(w, dt)
        theta = 4.0 * dt / (p.s * p.s + p.s - 2)
        du, dw, ddt = tangents
        if dt == 0:
            u = torch.from_numpy(stages[0, self._owned])
            still = torch.zeros_like(u) if du is None else du.clone()
            return still if ddt is None else still - float(ddt) * self._rate(w, u)
        # theta L(w) changes by theta L(dw + w ddt / dt).
        growth = 0.0 if ddt is None else float(ddt) / dt
        change = None if ddt is None else growth * w
        if dw is not None:
            change = dw if change is None else dw + change
        z = np.zeros((2, len(self._product)))
        if du is not None:
            z[0, self._owned] = du.numpy()
        start = torch.from_numpy(z[0, self._owned].copy())
        for j, f in enumerate(map(float, p.factor), start=1):
            base, target = z[j % 2] if j > 1 else None, z[j % 2]
            self._advance(w, z[(j - 1) % 2], base, target, f, f * theta)
            if change is not None:
                self._advance(change, stages[j - 1], target, target, 0.0, f * theta)
        self._count(p.s)
        last = torch.from_numpy(z[p.s % 2, self._owned])
        return torch.add((1.0 - p.b) * start, last, alpha=p.b * float(p.scale[-1]))

    def _rate(self, w: Tensor, u: Tensor) -> Tensor:
        """L(w) u on the tape."""
        return self._inverse_mass[self._owned] * self.operator.stiffness(w, u)

    def _count(self, stages: int) -> None:
        self.operator.count.solves += 1
        self.operator.count.iterations += stages


class _Flow(torch.autograd.Function):
    """A whole step with its derivatives by hand; those of the derivatives come from `on_tape`."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, w: Tensor, dt: Tensor, flow: LegendreFlow, keep: bool) -> Tensor:
        out, ctx.stages = flow._forward(u.detach(), w.detach(), float(dt), keep)
        ctx.flow = flow
        ctx.save_for_backward(u, w, dt)
        ctx.save_for_forward(u, w, dt)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, needed = ctx.saved_tensors, ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() or is_dual(grads[0]):
            with torch.enable_grad():
                fresh = [x.view_as(x) for x in inputs]
                wanted = [x for x, n in zip(fresh, needed, strict=True) if n]
                out = ctx.flow.on_tape(*fresh)
                found = iter(torch.autograd.grad(out, wanted, grads[0], create_graph=True))
            return (*(next(found) if n else None for n in needed), None, None)
        u, w, dt = inputs
        grad, grad_w = ctx.flow._adjoint(grads[0], w.detach(), float(dt), ctx.stages)
        grad_dt = None
        if needed[2] and float(dt) == 0:
            grad_dt = -torch.dot(grads[0], ctx.flow._rate(w.detach(), u.detach())).view_as(dt)
        elif needed[2] and grad_w is not None:  # theta L(w) depends on w dt alone
            grad_dt = torch.dot(w, grad_w) / dt
        return grad, grad_w, grad_dt, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        _, w, dt = ctx.saved_tensors
        out: Tensor = ctx.flow._tangent(w.detach(), float(dt), ctx.stages, tangents[:3])
        return out
