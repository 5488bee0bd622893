r"""Time steps that keep a local error: the grid for `integrate`.

An embedded scheme estimates the error of a step from its stages, e = h sum_i (b_i - b^_i) K_i. Measured in
units of what is tolerated,

    err = max over states of  sqrt(mean_k (e_k / (atol + rtol max(|x_k|, |x+_k|)))^2),

a step with err <= 1 is accepted, and the next one has the length of a PI controller (Gustafsson 1991; Hairer,
Norsett and Wanner 1993, section II.4; Hairer and Wanner 1996, section IV.2),

    h+ = 0.9 h err^(-0.7/k) err_before^(0.4/k),    0.2 <= h+ / h <= 5,

with k = 1 + the lower of the two orders; a step that fails is tried again with 0.9 h err^(-1/k).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from solvers.errors import GliodeError
from solvers.ode import implicit
from solvers.ode.fields import Function, VectorField
from solvers.ode.plan import Plan, combined
from solvers.ode.tableau import Tableau
from solvers.ode.tableaux import tableau

SAFETY, LEAST, MOST = 0.9, 0.2, 5.0


@torch.no_grad()
def adaptive_grid(
    field: VectorField | Callable[..., Tensor],
    x0: Tensor,
    t0: float,
    t1: float,
    scheme: str | Tableau = "dormand_prince",
    rtol: float = 1e-6,
    atol: float = 1e-8,
    parameters: Sequence[Tensor] = (),
    first_step: float | None = None,
    max_steps: int = 10_000,
) -> Tensor:
    """The times (N + 1,) from t0 to t1 (t1 < t0 too) at which steps from x0 (..., d) keep the tolerance.

        times = adaptive_grid(field, x0, 0.0, 5.0)
        x = integrate(field, x0, times, "dormand_prince")

    `integrate` then takes these very steps: its value is the adaptive solution, and its gradient is exact
    for the scheme on this grid, the steps frozen (how the grid itself would move with x0 and the weights is
    left out, which is of the size of the tolerance). Each state of a batch keeps the tolerance; all share
    the grid.

    field, parameters: as in `integrate`; scheme: a tableau with `b_embedded`; first_step: the length of the
    first step (None: from the sizes of x0, f and its change); max_steps: tried, accepted or not.

    Raises GliodeError for a scheme without an embedded one, weights with a layer for each step, numbers out
    of range, values that are not finite, more than max_steps, or steps that shrink to rounding.
    """
    scheme = tableau(scheme)
    if scheme.b_embedded is None or scheme.partitioned:
        raise GliodeError(
            f"{scheme.name}: no b_embedded, so no error estimate; take 'dormand_prince' or 'heun', for stiff "
            "equations 'radau5'"
        )
    if not (math.isfinite(rtol) and rtol >= 0 and math.isfinite(atol) and atol > 0):
        raise GliodeError(f"rtol = {rtol}, atol = {atol}: give finite numbers, rtol >= 0 and atol > 0")
    if not (math.isfinite(t0) and math.isfinite(t1) and t0 != t1):
        raise GliodeError(f"t0 = {t0}, t1 = {t1}: give two different finite times")
    if first_step is not None and not (math.isfinite(first_step) and first_step > 0):
        raise GliodeError(f"first_step: {first_step}; give a positive length, whatever the direction of time")
    if not isinstance(field, VectorField):
        field = Function(field, parameters)
    elif parameters:
        raise GliodeError("parameters: a VectorField has its own weights; they are for plain functions")
    _refuse_layers(field, x0, t0)

    trial = _Trial(field, scheme, rtol, atol)
    embedded = Tableau(f"{scheme.name}, embedded", scheme.A, scheme.b_embedded, scheme.c)
    k = 1 + min(scheme.order, embedded.order)
    span, way = abs(t1 - t0), math.copysign(1.0, t1 - t0)
    shortest = 16 * torch.finfo(x0.dtype).eps * max(abs(t0), abs(t1))
    h = min(span, first_step or trial.first_step(x0, t0, t1, k))
    x, t, before, times = x0, t0, 1.0, [t0]
    failed = False
    for _ in range(max_steps):
        left = abs(t1 - t)
        h = left if h > 0.99 * left else h  # no sliver at the end
        after, err = trial(x, t, way * h)
        if err <= 1:
            t = t1 if h == left else t + way * h
            times.append(t)
            if t == t1:
                return torch.tensor(times, dtype=x0.dtype, device=x0.device)
            growth = SAFETY * max(err, 1e-10) ** (-0.7 / k) * before ** (0.4 / k)
            h *= min(1.0 if failed else MOST, max(LEAST, growth))
            x, before, failed = after, max(err, 1e-4), False
        else:
            h *= max(LEAST, SAFETY * err ** (-1 / k)) if math.isfinite(err) else LEAST
            failed = True
            if h < shortest:
                raise GliodeError(
                    f"{scheme.name}: at t = {t:g} the step shrinks to rounding: the solution is not smooth "
                    "or not finite there (or the tolerance is too small for the dtype)"
                )
    raise GliodeError(
        f"{scheme.name}: {max_steps} steps took it to t = {t:g} only; raise max_steps or the tolerances, or "
        "take 'radau5', or another implicit or stabilised scheme, if the problem is stiff"
    )


def _refuse_layers(field: VectorField, x0: Tensor, t0: float) -> None:
    """Weights of one step each know how many steps there are: one of two samples fails."""
    try:
        for steps in (1, 2):
            field.sample(torch.full((steps, 1), t0, dtype=x0.dtype, device=x0.device))
    except GliodeError as error:
        raise GliodeError(
            f"adaptive steps: the field cannot be sampled at any times: {error} (weights of kind 'steps' "
            "have one layer for each step; take 'linear', 'cubic' or 'constant')"
        ) from error


class _Trial:
    """One step, and its error in units of what is tolerated."""

    def __init__(self, field: VectorField, scheme: Tableau, rtol: float, atol: float) -> None:
        assert scheme.b_embedded is not None
        self.field, self.scheme, self.rtol, self.atol = field, scheme, rtol, atol
        self.difference = [(j, float(e), float(e)) for j, e in enumerate(scheme.b - scheme.b_embedded) if e]

    def __call__(self, x: Tensor, t: float, h: float) -> tuple[Tensor, float]:
        """x after a step h from t, and err (infinite where it is no number)."""
        plan, tables = self._sampled(x, [t + float(c) * h for c in self.scheme.c])
        K: list[Tensor] = []
        if self.scheme.explicit:
            for i in plan.stages:
                K.append(self.field.rhs(combined(x, K, plan.a[i], h), *plan.rows(tables, 0, i)))
        else:
            try:
                K = list(implicit.stage_values(plan, 0, x, h, tables))
            except GliodeError:  # Newton's method finds nothing: shorter, then
                return x, math.inf
        after = combined(x, K, plan.b, h)
        err = self._size(combined(torch.zeros_like(x), K, self.difference, h), x, after)
        return after, err if math.isfinite(err) else math.inf

    def first_step(self, x: Tensor, t0: float, t1: float, k: int) -> float:
        """Hairer, Norsett and Wanner 1993, section II.4, "starting step size"."""
        f = self._rhs(x, t0)
        of_x, of_f = self._size(x, x, x), self._size(f, x, x)
        if not math.isfinite(of_x + of_f):
            raise GliodeError(f"x0 or the right-hand side at t = {t0:g} is not finite")
        h = min(abs(t1 - t0), 0.01 * of_x / of_f if min(of_x, of_f) > 1e-5 else 1e-6)
        way = math.copysign(h, t1 - t0)
        most = max(of_f, self._size(self._rhs(x + way * f, t0 + way) - f, x, x) / h)
        return min(100 * h, (0.01 / most) ** (1 / k) if most > 1e-15 else max(1e-6, 1e-3 * h))

    def _size(self, e: Tensor, x: Tensor, y: Tensor) -> float:
        in_units = e / (self.atol + self.rtol * torch.maximum(x.abs(), y.abs()))
        return float(in_units.square().mean(-1).sqrt().max())

    def _rhs(self, x: Tensor, t: float) -> Tensor:
        plan, tables = self._sampled(x, [t])
        return self.field.rhs(x, *plan.rows(tables, 0, 0))

    def _sampled(self, x: Tensor, stages: list[float]) -> tuple[Plan, list[Sequence[Tensor]]]:
        sampled = self.field.sample(torch.tensor([stages], dtype=x.dtype, device=x.device))
        return Plan(self.field, self.scheme, [s.index for s in sampled]), [s.table.unbind(0) for s in sampled]
