r"""One implicit Runge-Kutta step and its exact adjoint.

The stage values solve, all stages and the whole batch at once,

    K_i = f(X_i),    X_i = x + h sum_j a_ij K_j,

by Newton's method with matrix-free GMRES (Saad and Schultz 1986), from K = 0: so the first iterate is that of
a linearly implicit step, which stiffness does not carry away. With lambda the costate after the step, the
cotangents of the stages solve the transposed linear system

    kappa_i = h (b_i lambda + sum_j a_ji L_j),    L_i = (d_x f(X_i))^T kappa_i,

and the rest is as in explicit.py. On the tape the stage values are one implicit function, whose derivatives
are solutions of its linearised equation, which is an implicit function again: exact to any order, in both
modes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solvers.errors import Diverged, GliodeError
from solvers.evolution import is_dual
from solvers.ode.fields import Saved
from solvers.ode.plan import Into, Plan, Tables, Workspace, combine, combined, scaled
from solvers.ode.tableau import Array

Product = Callable[[Tensor], Tensor]
Equation = Callable[..., Tensor]  # F(u, *theta) of the equation u = F(u, *theta)

REDUCTION = 1e-4  # of the residual by each GMRES solve
ITERATIONS = 50


def taped(plan: Plan, n: int, x: Tensor, h: Tensor | float, tables: Tables) -> Tensor:
    """Step n on the tape, in both modes."""
    F, theta = _stage_equation(plan), _stage_inputs(plan, n, x, h, tables)
    start, size = _start(plan, x, float(h))
    if torch.is_grad_enabled():
        with torch.enable_grad():
            hidden = F(start, *(v.detach() for v in theta)).requires_grad
        if hidden:
            raise GliodeError(
                f"{plan.scheme.name}: the field holds tensors that need a gradient, which an implicit step "
                "would lose; pass them as parameters=(...) or write the field as an nn.Module"
            )
    K: Tensor = _Root.apply(F, False, size, start, *theta)
    return combined(x, K.unbind(0), plan.b, h)


def forward(
    plan: Plan, n: int, x: Tensor, h: float, tables: Tables, work: Workspace, K: Sequence[Tensor], out: Tensor
) -> list[Saved]:
    """Step n from x into `out`, the stage values into K; returns what the field saved."""
    for i, k in enumerate(stage_values(plan, n, x, h, tables)):
        K[i].copy_(k)
    saved = []
    for i in plan.stages:
        X = combine(x, K, plan.a[i], h, work.X[n].get(i, x))
        # Not into K[i]: the solution is more accurate, as f amplifies the rounding in X.
        saved.append(plan.field.push(X, plan.rows(tables, n, i), torch.empty_like(x)))
    combine(x, K, plan.b, h, out)
    return saved


def adjoint(
    plan: Plan,
    n: int,
    x: Tensor,
    h: float,
    tables: Tables,
    work: Workspace,
    K: Sequence[Tensor],
    saved: list[Saved],
    costate: Tensor,
    into: Into,
    learned: bool,
) -> Tensor | None:
    """Takes the costate, in place, to before step n; adds dJ/dw to `into`; dJ/dh where steps are `learned`.

    x, K, saved: what `forward` had and gave.
    """
    nothing: list[Tensor | None] = [None] * len(into)

    def pulled(kappa: Tensor, gradients: Callable[[int], Sequence[Tensor | None]]) -> Tensor:
        found = torch.empty_like(kappa)
        for i in plan.stages:
            X = combine(x, K, plan.a[i], h, work.X[n].get(i, x))
            given = work.kappa.copy_(kappa[i])
            plan.field.pull(X, saved[i], plan.rows(tables, n, i), given, 1.0, gradients(i), found[i])
        return found

    # In units of h, which may be 0: u = kappa / h.
    own = torch.stack([scaled(costate, *plan.weight(i)) for i in plan.stages])
    zero = torch.zeros_like(costate)

    def product(u: Tensor) -> Tensor:
        L = pulled(u, lambda i: nothing).unbind(0)
        return u - torch.stack([combined(zero, L, plan.a_adjoint[i], h) for i in plan.stages])

    u = _solved(lambda u: (own - product(u), product), own, float(torch.linalg.vector_norm(own)))
    costate += pulled(u * h, lambda i: [None if g is None else g[index[n][i]] for g, index in into]).sum(0)
    return (u * torch.stack(tuple(K))).sum() if learned else None


def stage_values(plan: Plan, n: int, x: Tensor, h: float, tables: Tables) -> Sequence[Tensor]:
    """The K_i of step n, off the tape."""
    start, size = _start(plan, x, h)
    return _newton(_stage_equation(plan), False, size, start, *_stage_inputs(plan, n, x, h, tables)).unbind(0)


def _stage_equation(plan: Plan) -> Equation:
    """K = F(K, x, h, *rows): all stages, (s, *x.shape), with the rows of one stage after those of another."""

    def F(K: Tensor, x: Tensor, h: Tensor, *rows: Tensor) -> Tensor:
        ks, each = K.unbind(0), len(plan.index)
        return torch.stack(
            [
                plan.field.rhs(combined(x, ks, plan.a[i], h), *rows[i * each : (i + 1) * each])
                for i in plan.stages
            ]
        )

    return F


def _stage_inputs(plan: Plan, n: int, x: Tensor, h: Tensor | float, tables: Tables) -> tuple[Tensor, ...]:
    step = h if isinstance(h, Tensor) else torch.tensor(h, dtype=torch.float64)
    return x, step, *(row for i in plan.stages for row in plan.rows(tables, n, i))


def _start(plan: Plan, x: Tensor, h: float) -> tuple[Tensor, float]:
    """K = 0, and the size of x in units of K, to which rounding in X = x + h A K is relative."""
    size = float(torch.linalg.vector_norm(x.detach())) * math.sqrt(plan.scheme.stages)
    return x.new_zeros((plan.scheme.stages, *x.shape)), size / abs(h) if h else 0.0


class _Root(torch.autograd.Function):
    """(theta) -> u with u = F(u, *theta), `linear` in u or not, from a start (zero if linear)."""

    @staticmethod
    def forward(ctx: Any, F: Equation, linear: bool, size: float, start: Tensor, *theta: Tensor) -> Tensor:
        u = _newton(F, linear, size, start, *theta)
        ctx.F, ctx.how = F, (linear, size, start)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, *theta)
        ctx.save_for_forward(u, *theta)
        return u

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """v = g + F_u^T v, then F_theta^T v."""
        needed = ctx.needs_input_grad[4:]
        g = grads[0]
        if g is None:
            return (None,) * (4 + len(needed))
        u, *theta = ctx.saved_tensors
        v = _root_of_linear(_transposed(ctx.F), g, u, *theta)
        again = torch.is_grad_enabled() or is_dual(v, u, *theta)
        with torch.enable_grad():
            # Fresh nodes on top of the inputs: the sweep below must end here, not in the graph behind them.
            inputs = [
                t.view_as(t) if again else t.detach().requires_grad_(n)
                for t, n in zip(theta, needed, strict=True)
            ]
            wanted = [t for t, n in zip(inputs, needed, strict=True) if n]
            out = ctx.F(u if again else u.detach(), *inputs)
            if not out.requires_grad:
                return (None,) * (4 + len(needed))
            found = iter(torch.autograd.grad(out, wanted, v, create_graph=again, allow_unused=True))
        return (None,) * 4 + tuple(next(found) if n else None for n in needed)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        """du = F_theta dtheta + F_u du."""
        u, *theta = ctx.saved_tensors
        if torch.is_grad_enabled() and any(t.requires_grad for t in theta):
            u = _Root.apply(ctx.F, *ctx.how, *theta)  # the saved one is not on the tape yet
        moved = {i: t for i, t in enumerate(tangents[4:]) if t is not None}

        def F(*some: Tensor) -> Tensor:
            values = dict(zip(moved, some, strict=True))
            return ctx.F(u, *(values.get(i, t) for i, t in enumerate(theta)))

        change = _along(F, [theta[i] for i in moved], list(moved.values()))
        return _root_of_linear(_linear(ctx.F), change, u, *theta)


def _root_of_linear(F: Equation, g: Tensor, *theta: Tensor) -> Tensor:
    size = float(torch.linalg.vector_norm(g.detach()))
    u: Tensor = _Root.apply(F, True, size, torch.zeros_like(g), g, *theta)
    return u


def _transposed(F: Equation) -> Equation:
    """v = g + F_u(u, *theta)^T v."""

    def transposed(v: Tensor, g: Tensor, u: Tensor, *theta: Tensor) -> Tensor:
        with torch.enable_grad():
            u = _leaf(u)
            return g + _vjp(F(u, *theta), u, v)

    return transposed


def _linear(F: Equation) -> Equation:
    """v = g + F_u(u, *theta) v."""
    return lambda v, g, u, *theta: g + _along(lambda u: F(u, *theta), [u], [v])


def _leaf(u: Tensor) -> Tensor:
    return u.view_as(u) if u.requires_grad else u.detach().requires_grad_()


def _vjp(out: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """(d out / d u)^T v, on the tape."""
    if not out.requires_grad:
        return torch.zeros_like(u)
    (found,) = torch.autograd.grad(out, u, v, create_graph=True, materialize_grads=True)
    return found


def _along(F: Callable[..., Tensor], at: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
    """The derivative of F along the directions, on the tape.

    As the derivative of the linear v -> F'^T v: forward mode cannot be nested, and this may run within it.
    """
    with torch.enable_grad():
        leaves = [_leaf(t) for t in at]
        out = F(*leaves)
        v = torch.zeros_like(out).requires_grad_()
        if not out.requires_grad:
            return torch.zeros_like(out)
        pulled = torch.autograd.grad(out, leaves, v, create_graph=True, materialize_grads=True)
        depends = [(g, d) for g, d in zip(pulled, directions, strict=True) if g.requires_grad]
        if not depends:
            return torch.zeros_like(out)
        found = torch.autograd.grad(
            [g for g, _ in depends], v, [d for _, d in depends], create_graph=True, materialize_grads=True
        )
        return found[0]


def _newton(F: Equation, linear: bool, size: float, start: Tensor, *theta: Tensor) -> Tensor:
    """u = F(u, *theta), off the tape."""
    theta = tuple(t.detach() for t in theta)

    def linearised(u: Tensor) -> tuple[Tensor, Product]:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            out = F(u, *theta)
            v = torch.zeros_like(u).requires_grad_()
            pulled = _vjp(out, u, v)

        def product(d: Tensor) -> Tensor:
            if not pulled.requires_grad:
                return d
            (moved,) = torch.autograd.grad(pulled, v, d, retain_graph=True, materialize_grads=True)
            return d - moved

        return (out - u).detach(), product

    if linear:
        value, product = linearised(start)
        return _solved(lambda u: (value - product(u), product), start, size)
    return _solved(linearised, start, size)


def _solved(linearised: Callable[[Tensor], tuple[Tensor, Product]], u: Tensor, size: float) -> Tensor:
    """Newton's method; linearised: u -> (residual, product with the matrix of the next linear system).

    It ends where what is left after a correction is below rounding, or where corrections no longer shrink and
    are small relative to u and `size`: rounding in the residual allows no more.
    """
    eps = torch.finfo(u.dtype).eps
    before = math.inf
    for _ in range(ITERATIONS):
        residual, product = linearised(u)
        change = _gmres(product, residual)
        u = u + change
        by, norm = torch.stack([torch.linalg.vector_norm(change), torch.linalg.vector_norm(u)]).tolist()
        if not math.isfinite(by + norm):
            break
        stalls = by >= before and by <= math.sqrt(eps) * (norm + size)
        if by <= 0.1 * eps / REDUCTION * norm or stalls:
            return u
        before = by
    raise Diverged(
        "implicit scheme: Newton's method finds no solution of the stage equations; take more, shorter steps"
    )


def _gmres(product: Product, b: Tensor, iterations: int = 100) -> Tensor:
    """x with ||b - A x|| <= REDUCTION ||b||, or as near as it gets; NaN where numbers are not finite."""
    norm = float(torch.linalg.vector_norm(b))
    if norm == 0 or not math.isfinite(norm):
        return b
    basis = b.new_empty((iterations + 1, b.numel()))
    basis[0] = b.flatten() / norm
    H = np.zeros((iterations + 1, iterations))
    z: Array = np.ones(1)  # z^T H = 0: the smallest ||norm e_1 - H y|| is norm / ||z||
    for k in range(iterations):
        V = basis[: k + 1]
        w = product(basis[k].view(b.shape)).flatten()
        shares = V @ w
        w = w - shares @ V
        again = V @ w  # Gram-Schmidt twice is enough
        w = w - again @ V
        H[: k + 2, k] = torch.cat([shares + again, torch.linalg.vector_norm(w)[None]]).tolist()
        if not np.isfinite(H[: k + 2, k]).all():
            return b * math.nan
        if H[k + 1, k] == 0:
            break
        z = np.append(z, -(z @ H[: k + 1, k]) / H[k + 1, k])
        if np.linalg.norm(z) * REDUCTION >= 1:
            break
        basis[k + 1] = w / H[k + 1, k]
    y = np.linalg.lstsq(H[: k + 2, : k + 1], norm * np.eye(k + 2)[0], rcond=None)[0]
    return (torch.from_numpy(y).to(b) @ V).view(b.shape)
