"""What the steps of one integration share, and the combinations of stages that they are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from solvers.ode.fields import Rows, Saved, VectorField
from solvers.ode.tableau import Array, Tableau

Terms = list[tuple[int, float, float]]  # (stage, coefficient for q, for p); equal where not partitioned
Tables = Sequence[Sequence[Tensor]]
Into = Sequence[tuple[Sequence[Tensor] | None, Rows]]


class Workspace:
    """The memory of one run, allocated once: fresh memory for each stage costs more than arithmetic.

    states[n], n <= steps, of which the last is the result; K[n][i] the stage values and X[n][i] the states of
    the stages that do not start from states[n] itself. `keep`: of every step, not of one only, what the
    backward pass starts from, the stage values, of which it makes the states again (`from_values`), or the
    states; it writes over what it has used. saved[n][i]: what the field saved; kappa: scratch.
    """

    def __init__(self, plan: Plan, x: Tensor, steps: int, keep: bool, from_values: bool) -> None:
        def slots(kept: bool, count: int) -> list[tuple[Tensor, ...]]:
            rows = x.new_empty((steps if kept else 1, count, *x.shape)).unbind(0)
            return [row.unbind(0) for row in rows] * (1 if kept else steps)

        self.from_values = from_values
        self.states = [x, *x.new_empty((steps - 1, *x.shape)).unbind(0), x.new_empty(x.shape)]
        self.K = slots(keep and from_values, len(plan.stages))
        moved = [i for i in plan.stages if plan.a[i]]
        if from_values:
            self.X = [dict.fromkeys(moved, torch.empty_like(x))] * steps
        else:
            self.X = [dict(zip(moved, row, strict=True)) for row in slots(keep, len(moved))]
        self.saved: list[list[Saved]] = []
        self.kappa = x.new_empty(x.shape)


class Plan:
    """What all steps share: the field, the scheme, which row of each weight's table serves which stage."""

    def __init__(self, vector_field: VectorField, scheme: Tableau, index: Sequence[Rows]) -> None:
        self.field, self.scheme, self.index = vector_field, scheme, tuple(index)

        def terms(q: Array, p: Array | None) -> Terms:
            pairs = zip(map(float, q), map(float, q if p is None else p), strict=True)
            return [(j, ours, theirs) for j, (ours, theirs) in enumerate(pairs) if ours or theirs]

        A, A_p = scheme.A, scheme.A_p
        self.stages = range(scheme.stages)
        self.a = [terms(A[i], None if A_p is None else A_p[i]) for i in self.stages]
        self.a_adjoint = [terms(A[:, i], None if A_p is None else A_p[:, i]) for i in self.stages]
        self.b = terms(scheme.b, scheme.b_p)
        self._own_weight = {j: (q, p) for j, q, p in self.b}
        self.reverse = self._backwards()

    def _backwards(self) -> list[tuple[int, float, tuple[float, float], Terms]]:
        """Of each stage that matters, last first: the stage, s, and kappa / (h s) as shares of the costate
        (for q, for p) and of the L_j of later stages.
        """
        found: list[tuple[int, float, tuple[float, float], Terms]] = []
        for i in reversed(self.stages):
            own = self.weight(i)
            later = [term for term in self.a_adjoint[i] if any(term[0] == earlier[0] for earlier in found)]
            if own[0] == own[1] != 0:
                scale = own[0]
                terms = [(j, q / scale, p / scale) for j, q, p in later]
                found.append((i, scale, (1.0, 1.0), terms))
            elif any(own) or later:
                found.append((i, 1.0, own, later))
        return found

    def weight(self, i: int) -> tuple[float, float]:
        """b_i for q and for p."""
        return self._own_weight.get(i, (0.0, 0.0))

    def rows(self, tables: Tables, n: int, i: int) -> list[Tensor]:
        """The weights of stage i of step n."""
        return [table[index[n][i]] for table, index in zip(tables, self.index, strict=True)]


def scaled(k: Tensor, for_q: float, for_p: float) -> Tensor:
    """(for_q k_q, for_p k_p): the halves of the last dimension by themselves."""
    if for_q == for_p:
        return k * for_q
    q, p = k.chunk(2, -1)
    return torch.cat([q * for_q, p * for_p], -1)


def combined(x: Tensor, ks: Sequence[Tensor], terms: Terms, h: Tensor | float) -> Tensor:
    """x + h sum_j coefficient_j k_j, on the tape."""
    for j, for_q, for_p in terms:
        if isinstance(h, Tensor):
            x = x + h * scaled(ks[j], for_q, for_p)
        elif for_q == for_p:
            x = x.add(ks[j], alpha=for_q * h)
        else:
            x = x + scaled(ks[j], for_q * h, for_p * h)
    return x


def combine(
    x: Tensor, ks: Sequence[Tensor] | Mapping[int, Tensor], terms: Terms, h: float, out: Tensor
) -> Tensor:
    """The same off the tape, into `out`; without terms x itself."""
    source = x
    for j, for_q, for_p in terms:
        if for_q == for_p:
            torch.add(source, ks[j], alpha=for_q * h, out=out)
        else:
            torch.add(source, scaled(ks[j], for_q * h, for_p * h), out=out)
        source = out
    return source
