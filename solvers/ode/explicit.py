r"""One explicit Runge-Kutta step and its exact adjoint, off the tape.

With lambda the costate after the step, the adjoint of the step runs its stages backwards:

    kappa_i = h (b_i lambda + sum_(j > i) a_ji L_j),    L_i = (d_x f(X_i))^T kappa_i,
    lambda <- lambda + sum_i L_i,    dJ/dw += (d_w f(X_i))^T kappa_i,    dJ/dh = sum_i <kappa_i, K_i> / h.

Where b_i != 0, kappa_i = h b_i Lambda_i with Lambda_i the stage values of the symplectic partner scheme
(`Tableau.partner`) applied to the adjoint problem -p' = (d_x f)^T p: the recursion is that scheme multiplied
out, and undivided, so it needs no b_i != 0 (Sanz-Serna 2016, section 3; Benning et al. 2019).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from solvers.ode.fields import Saved
from solvers.ode.plan import Into, Plan, Tables, Workspace, combine, combined, scaled


def taped(plan: Plan, n: int, x: Tensor, h: Tensor | float, tables: Tables) -> Tensor:
    """Step n on the tape, in both modes."""
    K: list[Tensor] = []
    for i in plan.stages:
        K.append(plan.field.rhs(combined(x, K, plan.a[i], h), *plan.rows(tables, n, i)))
    return combined(x, K, plan.b, h)


def forward(
    plan: Plan, n: int, x: Tensor, h: float, tables: Tables, work: Workspace, K: Sequence[Tensor], out: Tensor
) -> list[Saved]:
    """Step n from x into `out`, the stage values into K; returns what the field saved."""
    saved = []
    for i in plan.stages:
        X = combine(x, K, plan.a[i], h, work.X[n].get(i, x))
        saved.append(plan.field.push(X, plan.rows(tables, n, i), K[i]))
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
    """Takes the costate, in place, to before step n; adds dJ/dw to `into`; dJ/dh where the steps are
    `learned`.

    x, K, saved: what `forward` had and gave.
    """
    kappa = work.kappa
    L: dict[int, Tensor] = {}
    late: list[Tensor] = []  # the L_i that are not in the costate yet, which other stages still read
    slope: Tensor | None = None
    # In units of h where dJ/dh is wanted: a learned time step may be 0, so kappa / h must not be formed.
    unit = 1.0 if learned else h
    for i in reversed(plan.stages):
        own_q, own_p = plan.weight(i)
        later = [term for term in plan.a_adjoint[i] if term[0] in L]
        if not (own_q or own_p or later):
            continue
        if own_q == own_p:
            torch.mul(costate, own_q * unit, out=kappa)
        else:
            kappa.copy_(scaled(costate, own_q * unit, own_p * unit))
        combine(kappa, L, later, unit, kappa)
        if learned:
            part = (kappa * K[i]).sum()
            slope = part if slope is None else slope + part
            kappa.mul_(h)
        X = work.X[n].get(i, x)
        if work.from_values:
            X, out = combine(x, K, plan.a[i], h, X), K[i]
        elif X is not x:
            out = X
        else:
            out = late[0] if late and i == 0 else torch.empty_like(x)
        if i == 0:
            for one in late:
                costate.add_(one)
            late = []
        gw = [None if g is None else g[index[n][i]] for g, index in zip(into, plan.index, strict=True)]
        plan.field.pull(X, saved[i], plan.rows(tables, n, i), kappa, gw, out)
        L[i] = out
        late.append(out)
    for one in late:
        costate.add_(one)
    return slope
