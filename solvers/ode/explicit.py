r"""One explicit Runge-Kutta step and its exact adjoint, off the tape.

With lambda the costate after the step, the adjoint of the step runs its stages backwards:

    kappa_i = h (b_i lambda + sum_(j > i) a_ji L_j),    L_i = (d_x f(X_i))^T kappa_i,
    lambda <- lambda + sum_i L_i,    dJ/dw += (d_w f(X_i))^T kappa_i,    dJ/dh = sum_i <kappa_i, K_i> / h.

`adjoint` holds kappa_i / (h s_i), where s_i = b_i unless that is 0 (`Plan.reverse`): then the costate enters
as it is, and the field multiplies its products by h s_i on the way, which costs it nothing.

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
    kappa, L, slope = work.kappa, dict[int, Tensor](), None
    late: list[Tensor] = []  # the L_i that are not in the costate yet
    for i, scale, own, later in plan.reverse:
        if own != (1.0, 1.0):
            combine(kappa.copy_(scaled(costate, *own)), L, later, 1.0, kappa)
        elif later:
            combine(costate, L, later, 1.0, kappa)
        else:
            kappa.copy_(costate)
        if learned:
            part = (kappa * K[i]).sum() * scale
            slope = part if slope is None else slope + part
        X = work.X[n].get(i, x)
        if work.from_values:
            X, out = combine(x, K, plan.a[i], h, X), K[i]
        elif X is not x:
            out = X
        elif i == 0 and late:  # no stage is left that reads them
            out = late[0]
            for one in late:
                costate.add_(one)
            late = []
        else:
            out = torch.empty_like(x)
        gw = [None if g is None else g[index[n][i]] for g, index in into]
        plan.field.pull(X, saved[i], plan.rows(tables, n, i), kappa, h * scale, gw, out)
        L[i] = out
        late.append(out)
    for one in late:
        costate.add_(one)
    return slope
