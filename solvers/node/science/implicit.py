r"""Implicit steps for many states at once: batched conjugate gradients and their exact derivatives.

u = S(b, w, tau) with (M + tau K(w)) u = b, K linear in w and symmetric. The derivatives are implicit, so no
iteration is kept: with lambda = S(dJ/du, w, tau),

    dJ/db = lambda,    dJ/dw = -tau d/dw <lambda, K(w) u>,    dJ/dtau = -<lambda, K(w) u>,
    du = S(db - tau K(dw) u - dtau K(w) u, w, tau).

Each state stops by itself, when its residual in the norm of the preconditioner (Jacobi) has fallen to `rtol`
of the right-hand side's. Torch alone, on any device; states are (..., n), the batch first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from solvers import resolvent
from solvers.errors import Diverged, GliodeError
from solvers.node.science.sparse import Stiffness, agree, product
from solvers.operators import Sparse
from solvers.semidiscrete import SemiDiscrete


class Operator(Protocol):
    """w, u -> K(w) u on the tape, symmetric and linear in w; `diagonal` (..., n) of K(w), off the tape or on;
    `at`: u -> K(w) u off the tape, for many products with one w. `Stiffness` is one.
    """

    def __call__(self, w: Tensor, u: Tensor) -> Tensor: ...

    def diagonal(self, w: Tensor) -> Tensor: ...

    def at(self, w: Tensor) -> Callable[[Tensor], Tensor]: ...


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    b: Tensor,
    inverse: Tensor,
    start: Tensor,
    rtol: float = 1e-10,
    most: int = 2000,
) -> tuple[Tensor, int]:
    """u with apply(u) = b for a symmetric positive operator on states (..., n), and the iterations; no tape.

    inverse: (n,) or (..., n), that of the operator's diagonal. Raises GliodeError where a state does not
    converge within `most` iterations, or the operator proves not to be positive.
    """
    # In single precision the squares of small right-hand sides vanish: each state is solved in its scale.
    scale = b.abs().amax(-1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)
    b, u = b / scale, start / scale
    r = b - apply(u)
    goal = rtol**2 * (b * b * inverse).sum(-1, keepdim=True)
    z = inverse * r
    rho, p = (r * z).sum(-1, keepdim=True), z.clone()
    for iteration in range(most + 1):
        active = ~(rho <= goal)  # also where it is not a number
        if not bool(active.any()):
            return u.mul_(scale), iteration
        q = apply(p)
        curvature = (p * q).sum(-1, keepdim=True)
        broken = active & ~(curvature > 0)
        if bool(broken.any()):
            active = broken
            break
        # A state that has converged stays as it is.
        step = torch.where(active, rho / curvature, 0.0)
        u.addcmul_(step, p)
        r.addcmul_(step, q, value=-1.0)
        torch.mul(inverse, r, out=z)
        new = (r * z).sum(-1, keepdim=True)
        p.mul_(torch.where(active, new / rho, 1.0)).addcmul_(active.to(z), z)
        rho = torch.where(active, new, rho)
    raise Diverged(
        f"implicit solve: {int(active.sum())} of {active.numel()} states did not converge in {iteration}"
        " iterations; check that D is positive and finite, or shorten the time step"
    )


class Resolvent:
    """b -> (M + tau K(w))^-1 b on the tape in b, w and tau, both modes, to any order; b dual, (..., n).

    mass: (n,) lumped, or a symmetric Sparse; stiffness: K, or None for b -> M^-1 b. rtol: of the conjugate
    gradients; their iterations are counted in `iterations`, their solves in `solves`.
    """

    def __init__(
        self,
        mass: Tensor | Sparse,
        stiffness: Operator | None = None,
        rtol: float = 1e-10,
    ) -> None:
        self.mass, self.stiffness, self.rtol = mass, stiffness, rtol
        self.diagonal = mass if isinstance(mass, Tensor) else mass.diagonal
        self.solves = self.iterations = 0

    @staticmethod
    def of(problem: SemiDiscrete, rtol: float = 1e-10) -> Resolvent:
        """Of the diffusion of a problem."""
        if problem.conductances is None:
            raise GliodeError("problem: it has no conductances; export a diffusion, or give a stiffness")
        return Resolvent(problem.mass, Stiffness(problem.conductances), rtol)

    def weigh(self, u: Tensor) -> Tensor:
        """M u."""
        return self.mass * u if isinstance(self.mass, Tensor) else product(self.mass, u)

    def __call__(self, b: Tensor, w: Tensor | None = None, tau: Tensor | float = 0.0) -> Tensor:
        """u (..., n); tau: a number, or (batch, 1) for one of each state (of one b (n,) as many)."""
        agree(self.diagonal, b, len(self.diagonal))
        if w is None and isinstance(self.mass, Tensor):
            return b / self.mass
        if w is not None and self.stiffness is None:
            raise GliodeError("resolvent: weights, but no stiffness that they are of")
        if w is not None and (w.device != b.device or w.dtype != b.dtype):
            raise GliodeError(f"conductances: {w.dtype} on {w.device}, the states {b.dtype} on {b.device}")
        tau = torch.as_tensor(tau, dtype=b.dtype, device=b.device)
        if w is not None and tau.ndim:
            if tau.shape[-1] != 1:
                raise GliodeError(f"tau: shape {tuple(tau.shape)}, expected a number or (batch, 1)")
            try:
                b = b.expand(torch.broadcast_shapes(b.shape, tau.shape))
            except RuntimeError as error:
                raise GliodeError(f"tau: {tuple(tau.shape)} for states {tuple(b.shape)}; {error}") from error
        out: Tensor = _Solve.apply(b, w, tau, self)
        return out

    def product(self, w: Tensor, u: Tensor) -> Tensor:
        """K(w) u."""
        assert self.stiffness is not None
        return self.stiffness(w, u)

    def solve(self, b: Tensor, w: Tensor | None, tau: Tensor) -> Tensor:
        """The same off the tape."""
        if bool((tau < 0).any()):
            raise GliodeError(
                "implicit solve: a negative time step runs backwards, which no solver can follow"
            )
        diagonal, apply = self.diagonal, self.weigh
        if w is not None and self.stiffness is not None:
            diagonal, K = diagonal + tau * self.stiffness.diagonal(w), self.stiffness.at(w)

            def apply(u: Tensor) -> Tensor:
                return self.weigh(u).add_(tau * K(u))

        if not bool(torch.isfinite(diagonal).all()):
            raise Diverged("implicit solve: D or the time step is not finite")
        if not bool((diagonal > 0).all()):
            raise Diverged("implicit solve: the matrix is not positive; D is negative somewhere")
        found, iterations = conjugate_gradients(apply, b, 1.0 / diagonal, b / self.diagonal, self.rtol)
        self.solves, self.iterations = self.solves + 1, self.iterations + iterations
        return found


class _Solve(torch.autograd.Function):
    """u = (M + tau K(w))^-1 b, w None for M alone; symmetric, so adjoint and tangent are the same solve."""

    @staticmethod
    def forward(ctx: Any, b: Tensor, w: Tensor | None, tau: Tensor, resolvent: Resolvent) -> Tensor:
        with torch.no_grad():
            u = resolvent.solve(b.detach(), None if w is None else w.detach(), tau.detach())
        ctx.resolvent = resolvent
        ctx.save_for_backward(u, w, tau)
        ctx.save_for_forward(u, w, tau)
        return u

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u, w, tau = ctx.saved_tensors
        adjoint = _Solve.apply(grads[0], w, tau, ctx.resolvent)
        by_b = adjoint if ctx.needs_input_grad[0] else None
        by_w = by_tau = None
        if w is not None and ctx.needs_input_grad[2]:
            by_tau = -(adjoint * ctx.resolvent.product(w, u)).sum(-1, keepdim=True).sum_to_size(tau.shape)
        if w is not None and ctx.needs_input_grad[1]:
            again = torch.is_grad_enabled()
            with torch.enable_grad():
                leaf = w.view_as(w) if again else w.detach().requires_grad_()
                out = ctx.resolvent.product(leaf, u)
                (by_w,) = torch.autograd.grad(out, leaf, -tau * adjoint, create_graph=again)
        return by_b, by_w, by_tau, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        u, w, tau = ctx.saved_tensors
        db, dw, dtau, _ = tangents
        rhs = torch.zeros_like(u) if db is None else db
        if dw is not None:
            rhs = rhs - tau * ctx.resolvent.product(dw, u)
        if dtau is not None and w is not None:
            rhs = rhs - dtau * ctx.resolvent.product(w, u)
        out: Tensor = _Solve.apply(rhs, w, tau, ctx.resolvent)
        return out


class ImplicitDiffusion:
    """A diffusion step u (..., n) -> u(dt) as `solvers.fem.diffusion.DiffusionStep` takes it, for a batch.

    scheme: one of `solvers.resolvent`. A state that a step of order 2 takes out of its bounds by more than
    `margin` is taken again by two implicit Euler steps of half the length, by itself (counted in
    `fallbacks`); the choice is held fixed when differentiating. For `Strang` and `Evolution`: w (pairs,) or
    (batch, pairs), dt a number or (batch, 1).
    """

    def __init__(self, inverse: Resolvent, scheme: resolvent.Scheme = "sdirk2", margin: float = 1e-7) -> None:
        resolvent.check(scheme)
        self.inverse, self.scheme, self.margin = inverse, scheme, margin
        self.fallbacks = 0

    def __call__(self, u: Tensor, dt: Tensor | float, w: Tensor) -> Tensor:
        """Advance the states by dt days with conductances w."""
        dt = torch.as_tensor(dt, dtype=u.dtype, device=u.device)

        def S(v: Tensor, tau: Tensor) -> Tensor:
            return self.inverse(self.inverse.weigh(v), w, tau)

        out = resolvent.advance(self.scheme, S, u, dt)
        if self.scheme == "implicit-euler":
            return out
        (low, high), (low1, high1) = _bounds(u), _bounds(out)
        left = (low1 < low - self.margin) | (high1 > high + self.margin)
        if bool(left.any()):
            self.fallbacks += int(left.sum())
            out = torch.where(left, resolvent.halves(S, u, dt), out)
        return out


def _bounds(u: Tensor) -> tuple[Tensor, Tensor]:
    low, high = torch.aminmax(u.detach(), dim=-1, keepdim=True)
    return low, high
