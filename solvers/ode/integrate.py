r"""Integration of x' = f(t, x; w) over a grid, and its gradient in three ways that agree to rounding.

    "adjoint"       the exact discrete adjoint, no tape (explicit.py): the symplectic partner scheme
    "autograd"      the tape of all operations
    "checkpointed"  the tape of one block of steps at a time, the blocks run again

Second derivatives and forward mode (the sensitivity problem xi' = d_x f xi + d_w f d) run through the same
steps on the tape, whatever was chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from solvers.errors import GliodeError
from solvers.evolution import is_dual, recomputed
from solvers.ode import explicit, implicit
from solvers.ode.fields import Forced, Function, Saved, VectorField
from solvers.ode.plan import Plan, Workspace
from solvers.ode.tableau import Tableau
from solvers.ode.tableaux import tableau

GRADIENTS = ("adjoint", "autograd", "checkpointed")


@dataclass
class Noise:
    """Gaussian noise in training: std times standard normal numbers, new ones for every step.

    where: "state": added to x before each step; "rhs": added to f, the same at all stages of a step.
    generator: for its seed (None: torch's own).
    """

    std: float
    where: str = "state"
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.std) and self.std >= 0):
            raise GliodeError(f"noise: std must be finite and not negative, got {self.std}")
        if self.where not in ("state", "rhs"):
            raise GliodeError(f"noise: where is {self.where!r}, give 'state' or 'rhs'")

    def draw(self, steps: int, x: Tensor) -> Tensor:
        """(steps, *x.shape)."""
        device = x.device if self.generator is None else self.generator.device
        sample = torch.randn((steps, *x.shape), generator=self.generator, dtype=x.dtype, device=device)
        return self.std * sample.to(x.device)


def integrate(
    field: VectorField | Callable[..., Tensor],
    x0: Tensor,
    times: Tensor,
    scheme: str | Tableau = "kutta4",
    gradient: str = "adjoint",
    store: str = "stages",
    parameters: Sequence[Tensor] = (),
    trajectory: bool = False,
    noise: Noise | None = None,
) -> Tensor:
    """x at the last of `times`; trajectory=True: at all of them, (len(times), *x0.shape).

    field: a VectorField, or a plain f(t, x, *parameters) (a callable or an nn.Module); x0: (..., d), a batch
    of states; times: (N + 1,) the grid, increasing or decreasing, on the tape if the time steps are learned
    (a step may be 0); scheme: a name of `tableaux.TABLEAUX` or a Tableau. gradient: see above; store, of the
    adjoint: "stages" keeps every stage for the backward pass, "states" the N states only, for one more
    forward run. noise: injected while training; leave it out to evaluate.

    Differentiable in x0, the times, the parameters and the field's weights: once without a tape, to any order
    and in forward mode through the tape. Raises GliodeError for unknown names, a grid of less than two times,
    or states that a partitioned scheme cannot halve.
    """
    scheme = tableau(scheme)
    if gradient not in GRADIENTS:
        raise GliodeError(f"gradient {gradient!r} is not one of {', '.join(GRADIENTS)}")
    if store not in ("stages", "states"):
        raise GliodeError(f"store {store!r} is not 'stages' or 'states'")
    if times.ndim != 1 or len(times) < 2 or not bool(torch.isfinite(times.detach()).all()):
        raise GliodeError(f"times: give at least two finite times in one dimension, not {tuple(times.shape)}")
    if scheme.partitioned and x0.shape[-1] % 2:
        raise GliodeError(f"{scheme.name}: the state (q, p) has an even dimension, not {x0.shape[-1]}")
    if isinstance(field, VectorField):
        if parameters:
            raise GliodeError("parameters: a VectorField has its own weights; they are for plain functions")
    else:
        field = Function(field, parameters)
    field.check(x0, times, scheme)
    steps = times.diff()
    kicks: Tensor | None = None
    if noise is not None and noise.std:
        if noise.where == "state":
            kicks = noise.draw(len(steps), x0)
        else:
            field = Forced(field, noise.draw(len(steps), x0))
    nodes = torch.tensor(scheme.c, dtype=times.dtype, device=times.device)
    sampled = field.sample(times[:-1, None] + steps[:, None] * nodes)
    plan = Plan(field, scheme, [weight.index for weight in sampled])
    tables = [weight.table for weight in sampled]
    inputs = (x0, steps, *tables)
    if is_dual(*inputs) or not torch.is_grad_enabled() or not any(v.requires_grad for v in inputs):
        gradient = "autograd"  # forward mode, or no derivative at all: the plain steps
    elif gradient != "autograd":
        _require_known(plan, x0, tables)
    if gradient == "adjoint":
        adjoint: Tensor = _Adjoint.apply(plan, kicks, store, trajectory, *inputs)
        return adjoint
    if gradient == "autograd":
        return _on_tape(plan, 0, kicks, trajectory, *inputs)
    return _in_blocks(plan, kicks, trajectory, *inputs)


def _require_known(plan: Plan, x: Tensor, tables: Sequence[Tensor]) -> None:
    """Raise GliodeError where f holds a tensor that needs a gradient and is no weight: it would get none."""
    row = [table.detach()[index[0][0]] for table, index in zip(tables, plan.index, strict=True)]
    if plan.field.rhs(x.detach(), *row).requires_grad:
        raise GliodeError(
            "field: the function holds tensors that need a gradient, which would be lost; pass them as "
            "parameters=(...), let `sample` return them, or take gradient='autograd'"
        )


def _method(plan: Plan) -> ModuleType:
    """The module whose `taped`, `forward` and `adjoint` take one step."""
    return explicit if plan.scheme.explicit else implicit


def _on_tape(
    plan: Plan, first: int, kicks: Tensor | None, trajectory: bool, x: Tensor, steps: Tensor, *tables: Tensor
) -> Tensor:
    """The steps from number `first` on; `steps` are theirs only, `tables` all."""
    learned = steps.requires_grad or is_dual(steps)
    h = steps.unbind(0) if learned else steps.tolist()
    rows = [table.unbind(0) for table in tables]
    states = [x]
    for n, hn in enumerate(h, first):
        if kicks is not None:
            x = x + kicks[n]
        x = _method(plan).taped(plan, n, x, hn, rows)
        if trajectory:
            states.append(x)
    return torch.stack(states) if trajectory else x


def _in_blocks(
    plan: Plan, kicks: Tensor | None, trajectory: bool, x: Tensor, steps: Tensor, *tables: Tensor
) -> Tensor:
    """sqrt(N) blocks of sqrt(N) steps, of which the backward pass keeps the first state and runs again."""
    size = math.isqrt(len(steps) - 1) + 1
    states = [x[None]]
    for first in range(0, len(steps), size):

        def block(x: Tensor, h: Tensor, *tables: Tensor, first: int = first) -> Tensor:
            return _on_tape(plan, first, kicks, trajectory, x, h, *tables)

        out = recomputed(block, x, steps[first : first + size], *tables)
        if trajectory:
            states.append(out[1:])
        x = out[-1] if trajectory else out
    return torch.cat(states) if trajectory else x


class _Adjoint(torch.autograd.Function):
    """The steps with their discrete adjoint as backward."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        kicks: Tensor | None,
        store: str,
        trajectory: bool,
        x: Tensor,
        steps: Tensor,
        *tables: Tensor,
    ) -> Tensor:
        ctx.plan, ctx.kicks, ctx.trajectory = plan, kicks, trajectory
        ctx.save_for_backward(x, steps, *tables)
        ctx.sweep = _Sweep(plan, kicks, store == "stages", x, steps, tables)
        return ctx.sweep.run(trajectory)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[4:]
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative: the first again, on the tape
            inputs = [v.view_as(v) for v in inputs]
            wanted = [v for v, n in zip(inputs, needed, strict=True) if n]
            out = _on_tape(ctx.plan, 0, ctx.kicks, ctx.trajectory, *inputs)
            found = iter(
                torch.autograd.grad(out, wanted, grads[0], create_graph=True, materialize_grads=True)
            )
            return (None,) * 4 + tuple(next(found) if n else None for n in needed)
        return (None,) * 4 + ctx.sweep.back(grads[0], ctx.trajectory, needed)


class _Sweep:
    """One run forward, and back, which uses up the workspace: a second time it runs forward again first."""

    def __init__(
        self,
        plan: Plan,
        kicks: Tensor | None,
        keep: bool,
        x: Tensor,
        steps: Tensor,
        tables: Sequence[Tensor],
    ) -> None:
        self.plan, self.kicks, self.keep, self.method = plan, kicks, keep, _method(plan)
        self.x, self.h, self.like = x, steps.tolist(), (steps, tables)
        self.tables = [table.unbind(0) for table in tables]
        self.work: Workspace | None = None
        # The stage values themselves are wanted by the field, by the derivatives by time steps, or both.
        self.from_values = plan.field.saves_value or steps.requires_grad or not plan.scheme.explicit

    def _start(self, work: Workspace, n: int) -> Tensor:
        return work.states[n] if self.kicks is None else work.states[n] + self.kicks[n]

    def _forward(self, work: Workspace, n: int, out: Tensor) -> list[Saved]:
        start = self._start(work, n)
        return self.method.forward(self.plan, n, start, self.h[n], self.tables, work, work.K[n], out)

    def run(self, trajectory: bool) -> Tensor:
        self.work = work = Workspace(self.plan, self.x, len(self.h), self.keep, self.from_values)
        for n in range(len(self.h)):
            saved = self._forward(work, n, work.states[n + 1])
            if self.keep:
                work.saved.append(saved)
        if self.keep and not self.from_values:
            work.K = [()] * len(self.h)  # of one step, and done with
        end = work.states.pop()
        return torch.stack([*work.states, end]) if trajectory else end

    def back(self, grad: Tensor, trajectory: bool, needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
        if self.work is None:
            self.run(False)
        work, self.work = self.work, None
        assert work is not None
        steps, tables = self.like
        found = [torch.zeros_like(t) if n else None for t, n in zip(tables, needed[2:], strict=True)]
        parts = [None if g is None else g.unbind(0) for g in found]
        into = list(zip(parts, self.plan.index, strict=True))
        slopes = []
        costate = (grad[-1] if trajectory else grad).clone(memory_format=torch.contiguous_format)
        for n in reversed(range(len(self.h))):
            saved = work.saved[n] if self.keep else self._forward(work, n, torch.empty_like(costate))
            slope = self.method.adjoint(
                self.plan,
                n,
                self._start(work, n),
                self.h[n],
                self.tables,
                work,
                work.K[n],
                saved,
                costate,
                into,
                needed[1],
            )
            if trajectory:
                costate += grad[n]
            if slope is not None:
                slopes.append(slope)
        by_step = torch.stack(slopes[::-1]).to(steps) if needed[1] else None
        return (costate if needed[0] else None, by_step, *found)
