r"""Optimise, then discretise: the adjoint problem as one more differential equation, solved backwards.

For a demonstration of what it costs. The state, the costate and the gradient,

    x' = f(t, x; w),    -p' = (d_x f)^T p,    -g' = (d_w f)^T p,

are integrated together from T to 0, each with the scheme of the direct run, as tools do that keep nothing
of it (Chen et al. 2018). That pair of schemes is not symplectic: what comes out is not the gradient of the
numbers that the program computes, and is wrong by the scheme's error. And x is solved for backwards, which
a dissipative problem does not allow: there the error grows like that of a heat equation run backwards.
`integrate` has neither fault (`scripts/benchmark.py adjoint_gap`; docs/theory/integration.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from solvers.errors import GliodeError
from solvers.ode.fields import Function, VectorField
from solvers.ode.integrate import integrate
from solvers.ode.plan import Plan, combined
from solvers.ode.tableau import Tableau
from solvers.ode.tableaux import tableau


def backsolve(
    field: VectorField | Callable[..., Tensor],
    x0: Tensor,
    times: Tensor,
    scheme: str | Tableau = "kutta4",
    parameters: Sequence[Tensor] = (),
) -> Tensor:
    """x at the last of `times`, with a gradient from the adjoint problem solved backwards on the same grid.

    Arguments as in `integrate`; the gradient is for x0, the parameters and the field's weights, not for the
    times. Not exact: see above. Raises GliodeError unless the scheme is explicit and not partitioned.
    """
    scheme = tableau(scheme)
    if not scheme.explicit or scheme.partitioned:
        raise GliodeError(f"{scheme.name}: backsolve is for explicit schemes with one pair (A, b)")
    if not isinstance(field, VectorField):
        field = Function(field, parameters)
    with torch.no_grad():
        end = integrate(field, x0, times, scheme)
    backwards = times.detach().flip(0)
    steps = backwards.diff()
    nodes = torch.tensor(scheme.c, dtype=times.dtype, device=times.device)
    sampled = field.sample(backwards[:-1, None] + steps[:, None] * nodes)
    plan = Plan(field, scheme, [weight.index for weight in sampled])
    out: Tensor = _Backwards.apply(plan, steps.tolist(), end, x0, *(weight.table for weight in sampled))
    return out


class _Backwards(torch.autograd.Function):
    """(x0, tables) -> the end; all the work is in the backward pass."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, steps: list[float], end: Tensor, x0: Tensor, *tables: Tensor) -> Tensor:
        ctx.plan, ctx.steps = plan, steps
        ctx.save_for_backward(end, *tables)
        return end.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        x, *tables = ctx.saved_tensors
        p = grads[0]
        found = [torch.zeros_like(table) for table in tables]
        for n, h in enumerate(ctx.steps):  # negative
            K: list[Tensor] = []
            M: list[Tensor] = []  # p'
            for i in plan.stages:
                X, P = combined(x, K, plan.a[i], h), combined(p, M, plan.a[i], h)
                rows = plan.rows(tables, n, i)
                k, L, parts = torch.empty_like(x), torch.empty_like(x), [torch.zeros_like(r) for r in rows]
                saved = plan.field.push(X, rows, k)
                plan.field.pull(X, saved, rows, P.clone(), 1.0, parts, L)
                K.append(k)
                M.append(-L)
                for g, index, part in zip(found, plan.index, parts, strict=True):
                    g[index[n][i]] -= h * plan.weight(i)[0] * part
            x, p = combined(x, K, plan.b, h), combined(p, M, plan.b, h)
        return None, None, None, p, *found
