r"""The diffusion step of many tumours at once: a Runge-Kutta-Legendre polynomial each, and its exact adjoint.

For M u' = -K(w) u, M lumped, u(dt) is the polynomial of `solvers.legendre` in L = M^-1 K(w), as in
`solvers.fem.legendre`, which it equals to rounding: every tumour has the number of stages of its own w and
dt. Those with fewer than the batch's most are done earlier forward, start later backward, and copy in
between. Nothing is stored for the gradient but u: the stages run again in the backward pass.

What a product is, and the form of a state, is the operator's: `Lanes` (CPU, compiled, any mesh) or
`VoxelOperator` (torch, CPU and CUDA, voxel grids).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from solvers.errors import Diverged, GliodeError
from solvers.evolution import is_dual
from solvers.legendre import MOST_STAGES, FloatArray, polynomial, reach, stages_for

Products = tuple[Tensor, Sequence[Tensor]]


class Operator(Protocol):
    """K(w) and M for a batch of states u; per tumour numbers have a shape that broadcasts with u.

    weights: what w is made of, each a tensor whose entries belong to one tumour each. bound: of the
    eigenvalues of M^-1 K(w), 1/day. advance: g base + f a - t L a + h u for a part of the batch, with
    coefficients (g, f, t, h, c), 0 for None; L = M^-1 K, transposed K M^-1; products (y, totals): totals gain
    c d/dweights of (M^-1 a)^T K(w) y; spare: memory for the result, may be that of base. rate: M^-1 K(w) u on
    the tape.
    """

    def split(self, u: Tensor) -> list[Any]: ...

    def bound(self, *weights: Tensor) -> Tensor: ...

    def advance(
        self,
        weights: Sequence[Tensor],
        a: Tensor,
        base: Tensor | None,
        coefficients: Tensor,
        u: Tensor | None = None,
        transposed: bool = False,
        products: Products | None = None,
        spare: Tensor | None = None,
    ) -> Tensor: ...

    def rate(self, weights: Sequence[Tensor], u: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class _Plan:
    """The coefficients (stages, 5, *numbers) of `advance`, forward and adjoint, and who starts late there.

    s: stages of each tumour, in the shape of its numbers; odd: 1 for tumours that start an odd number of
    stages late in the adjoint, None if there are none.
    """

    s: Any
    forward: Tensor
    adjoint: Tensor
    odd: Tensor | None


def _plan(s: Any, dt: FloatArray, like: Tensor) -> _Plan:
    """The plan for stages s and steps dt (numpy arrays of one shape), in the device and dtype of `like`."""
    most = int(s.max())
    forward, adjoint = np.zeros((2, most, 5, *s.shape))
    for place in np.ndindex(*s.shape):
        p = polynomial(int(s[place]))
        at, late = (..., *place), most - p.s
        theta = 4.0 * dt[place] / (p.s * p.s + p.s - 2)
        ahead, back = forward[at], adjoint[at]  # (stages, 5)
        ahead[:, 0] = back[:, 0] = 1.0
        ahead[: p.s, 1], ahead[: p.s, 2] = p.factor, theta * p.factor
        back[late:, 1], back[late:, 2] = p.adjoint_factor, theta * p.adjoint_factor
        k = np.arange(p.s - 1, -1, -1)
        back[late:, 4] = -p.b * theta * p.alpha[k] * p.adjoint_scale[:-1] * p.scale[k]
        # The last stage gives the step itself; a tumour that was done before has its z in a or in base.
        last = p.b * p.scale[-1]
        done = (last, last * p.factor[-1], last * theta * p.factor[-1])
        ahead[-1, :3] = done if late == 0 else (0.0, last, 0.0) if late % 2 else (last, 0.0, 0.0)
        back[-1, :3] *= p.b * p.adjoint_scale[-1]
        ahead[-1, 3] = back[-1, 3] = 1.0 - p.b
    odd = (most - s) % 2

    def tensor(x: Any) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(like)

    return _Plan(s, tensor(forward), tensor(adjoint), tensor(odd) if odd.any() else None)


class BatchedFlow:
    """u -> u(dt) for each tumour, on the tape: differentiable in u, dt and the weights, in both modes, twice.

    stages: their number for every tumour, so that the result is smooth in the weights (default: the fewest
    that are stable, for each). Parts of the batch run on torch.get_num_threads() threads. Raises GliodeError
    for a step that `stages` do not make stable, a negative step, weights that are negative or not finite.
    """

    def __init__(self, operator: Operator, stages: int | None = None) -> None:
        if stages is not None and not 2 <= stages <= MOST_STAGES:
            raise GliodeError(f"stages: {stages} is not in 2 to {MOST_STAGES}")
        self.operator, self.stages = operator, stages
        self._bounds: list[tuple[tuple[Tensor, ...], tuple[int, ...], FloatArray]] = []
        self._plans: list[tuple[FloatArray, FloatArray, _Plan]] = []

    def __call__(self, u: Tensor, dt: Tensor | float, *weights: Tensor) -> Tensor:
        """Advance u by dt days; dt: a number, or one for each tumour."""
        u, weights = u.contiguous(), tuple(w.contiguous() for w in weights)
        shape, parts = self.bound(weights).shape, self.operator.split(u)
        fits = u.ndim == len(shape) and all(k in (1, m) for k, m in zip(shape, u.shape, strict=True))
        if not fits or (parts != [...] and len(parts) != shape[0]):
            raise GliodeError(f"state: shape {tuple(u.shape)}, its weights are of tumours {shape}")
        if any(w.dtype != u.dtype or w.device != u.device for w in weights):
            raise GliodeError(
                f"state: {u.dtype} on {u.device}, its weights {weights[0].dtype} on {weights[0].device}"
            )
        dt = torch.as_tensor(dt, dtype=u.dtype, device=u.device).expand(shape)
        dual = is_dual(u, dt, *weights)
        if dual and torch.is_grad_enabled() and any(x.requires_grad for x in (u, dt, *weights)):
            return self.on_tape(u, dt, *weights)
        return _Flow.apply(self, u, dt, *weights)  # type: ignore[no-any-return]

    def on_tape(self, u: Tensor, dt: Tensor, *weights: Tensor) -> Tensor:
        """The same, stage by stage on the tape: slower, for derivatives of derivatives."""
        s = self.plan(u, dt, weights).s
        polynomials = np.vectorize(polynomial, otypes=[object])(s)

        def numbers(of: Callable[..., float]) -> Tensor:
            return torch.from_numpy(np.vectorize(of, otypes=[float])(polynomials)).to(u)

        theta = dt * numbers(lambda p: 4.0 / (p.s * p.s + p.s - 2))
        before, y, out = torch.zeros_like(u), u, numbers(lambda p: 1.0 - p.b) * u
        for j in range(1, int(s.max()) + 1):
            product = y - theta * self.operator.rate(weights, y)
            before, y = y, ((2 * j - 1) / j) * product - ((j - 1) / j) * before
            out = out + numbers(lambda p, j=j: p.b * (j == p.s)) * y
        return out

    def bound(self, weights: Sequence[Tensor]) -> FloatArray:
        """A bound of each tumour's rates in 1/day; the last few are kept."""
        # Detached, they share memory and version with their source, and hold the memory while they are kept.
        weights = tuple(w.detach() for w in weights)
        versions = tuple(w._version for w in weights)
        for kept, known, bound in self._bounds:
            if known == versions and all(_same(a, b) for a, b in zip(kept, weights, strict=True)):
                return bound
        found: FloatArray = self.operator.bound(*weights).double().cpu().numpy()
        if not np.isfinite(found).all() or (found < 0).any():
            raise Diverged("diffusion: D is negative or not finite for some tumour")
        self._bounds = [(weights, versions, found), *self._bounds[:3]]
        return found

    def plan(self, u: Tensor, dt: Tensor, weights: Sequence[Tensor]) -> _Plan:
        """The stages and coefficients of a step; the last few are kept."""
        bound, days = self.bound(weights), dt.detach().double().cpu().numpy().copy()  # it is kept
        for kept, known, plan in self._plans:
            if known is bound and np.array_equal(kept, days) and plan.forward.dtype == u.dtype:
                return plan
        if not (np.isfinite(days).all() and (days >= 0).all()):
            raise GliodeError("diffusion: a step runs backwards or is not finite, which no solver can follow")
        z = days * bound
        most = int(z.argmax())
        at, rate = days.flat[most], bound.flat[most]
        if self.stages is None:
            s = np.vectorize(stages_for, otypes=[int])(z)
            if int(s.max()) > MOST_STAGES:
                raise Diverged(
                    f"diffusion: a step of {at:g} days needs {s.max()} stages on this mesh (the fastest mode"
                    f" decays at {rate:.3g}/day); shorten it"
                )
        elif z.flat[most] > reach(self.stages) * (1 + 1e-9):
            longest = reach(self.stages) / rate
            raise Diverged(
                f"stages: {self.stages} are stable up to {longest:.3g} days on this mesh (the"
                f" fastest mode decays at {rate:.3g}/day), the step is {at:.3g} days: take shorter steps, or"
                f" {stages_for(float(z.flat[most]))} stages and more, or leave their number out"
            )
        else:
            s = np.full(z.shape, self.stages)
        plan = _plan(s, days, u)
        self._plans = [(days, bound, plan), *self._plans[:3]]
        return plan

    def _each(self, u: Tensor, run: Callable[[Any], None]) -> None:
        """run for each part of the batch, on as many threads as torch has."""
        parts, threads = self.operator.split(u), torch.get_num_threads()
        if len(parts) == 1 or threads == 1:
            for part in parts:
                run(part)
            return
        with ThreadPoolExecutor(min(threads, len(parts))) as pool:
            list(pool.map(run, parts))

    def forward(self, plan: _Plan, u: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """The step, off the tape."""
        out = torch.empty_like(u)

        def run(part: Any) -> None:
            table = plan.forward[:, :, part].contiguous()
            self._stages(u[part], [w[part] for w in weights], table, out[part])

        self._each(u, run)
        return out

    def _stages(
        self, u: Tensor, weights: list[Tensor], table: Tensor, out: Tensor | None = None
    ) -> list[Tensor]:
        """The step into `out`; without it z_0 ... z_{s-1}, all kept."""
        stages: list[Tensor] = [u]
        before: Tensor | None = None
        a = u
        for j, coefficients in enumerate(table if out is not None else table[:-1], start=1):
            last = j == len(table)
            spare = None if out is None else out if last else before if j > 2 else None
            z = self.operator.advance(weights, a, before, coefficients, u if last else None, spare=spare)
            before, a = a, z
            if out is None:
                stages.append(z)
        if out is not None and a is not out:
            out.copy_(a)
        return stages

    def adjoint(
        self, plan: _Plan, given: Tensor, state: Tensor, weights: Sequence[Tensor], by_weights: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """The derivatives by u and, where they are asked for, by the weights."""
        grad = torch.empty_like(state)
        totals = [torch.zeros_like(w) for w in weights] if by_weights else []

        def run(part: Any) -> None:
            ours, start, out = [w[part] for w in weights], given[part], grad[part]
            table = plan.adjoint[:, :, part].contiguous()
            ahead = plan.forward[:, :, part].contiguous()
            stages = self._stages(state[part], ours, ahead) if by_weights else []
            before: Tensor | None = None
            a = start
            if plan.odd is not None:
                before, a = plan.odd[part] * start, (1.0 - plan.odd[part]) * start
            for j, coefficients in enumerate(table, start=1):
                last = j == len(table)
                u, spare = (start, out) if last else (None, before if j > 2 else None)
                products = (stages[-j], [t[part] for t in totals]) if by_weights else None
                z = self.operator.advance(ours, a, before, coefficients, u, True, products, spare)
                before, a = a, z
            if a is not out:
                out.copy_(a)

        self._each(state, run)
        return grad, totals

    def tangent(
        self,
        plan: _Plan,
        u: Tensor,
        weights: Sequence[Tensor],
        du: Tensor,
        changes: Sequence[Tensor] | None,
    ) -> Tensor:
        """The derivative along du and changes of the weights."""
        out = torch.empty_like(u)

        def run(part: Any) -> None:
            ours, table = [w[part] for w in weights], plan.forward[:, :, part].contiguous()
            # A change of L acts on the stages of u: f = 0 and base = z in a second product.
            second = table.clone()
            second[:, 0], second[:, 1], second[:, 3] = 1.0, 0.0, 0.0
            stages = [] if changes is None else self._stages(u[part], ours, table)
            before: Tensor | None = None
            a = start = du[part]
            for j, coefficients in enumerate(table, start=1):
                last = j == len(table)
                z = self.operator.advance(ours, a, before, coefficients, start if last else None)
                if changes is not None:
                    more = [w[part] for w in changes]
                    z = self.operator.advance(more, stages[j - 1], z, second[j - 1], spare=z)
                before, a = a, z
            out[part].copy_(a)

        self._each(u, run)
        return out


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.dtype == b.dtype


class _Flow(torch.autograd.Function):
    """A whole step with its derivatives by hand; those of the derivatives come from `on_tape`."""

    @staticmethod
    def forward(ctx: Any, flow: BatchedFlow, u: Tensor, dt: Tensor, *weights: Tensor) -> Tensor:
        ctx.flow, ctx.plan = flow, flow.plan(u, dt, weights)
        ctx.save_for_backward(u, dt, *weights)
        ctx.save_for_forward(u, dt, *weights)
        return flow.forward(ctx.plan, u.detach(), [w.detach() for w in weights])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        if torch.is_grad_enabled() or is_dual(grads[0]):
            with torch.enable_grad():
                fresh = [x.view_as(x) for x in inputs]
                wanted = [x for x, n in zip(fresh, needed, strict=True) if n]
                out = ctx.flow.on_tape(*fresh)
                found = iter(torch.autograd.grad(out, wanted, grads[0], create_graph=True))
            return (None, *(next(found) if n else None for n in needed))
        u, dt, *weights = (x.detach() for x in inputs)
        grad, totals = ctx.flow.adjoint(ctx.plan, grads[0].contiguous(), u, weights, any(needed[1:]))
        grad_dt = None
        if needed[1]:  # theta L(w) depends on w dt alone
            grad_dt = sum((w * g).sum_to_size(dt.shape) for w, g in zip(weights, totals, strict=True)) / dt
            if bool((still := dt == 0).any()):
                rate = ctx.flow.operator.rate(weights, u)
                grad_dt = torch.where(still, -(grads[0] * rate).sum_to_size(dt.shape), grad_dt)
        return None, grad, grad_dt, *(totals if totals else [None] * len(weights))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        u, dt, *weights = (x.detach() for x in ctx.saved_tensors)
        _, du, ddt, *dweights = tangents
        changes, still = None, dt == 0
        if ddt is not None or any(d is not None for d in dweights):
            growth = torch.zeros_like(dt) if ddt is None else torch.where(still, 0.0, ddt / dt)
            changes = [
                (growth * w if d is None else growth * w + d).contiguous()
                for w, d in zip(weights, dweights, strict=True)
            ]
        du = torch.zeros_like(u) if du is None else du.contiguous()
        out: Tensor = ctx.flow.tangent(ctx.plan, u, weights, du, changes)
        if ddt is not None and bool(still.any()):  # du/ddt = -L u there
            out -= torch.where(still, ddt, 0.0) * ctx.flow.operator.rate(weights, u)
        return out
