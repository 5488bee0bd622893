"""Evolution: a step repeated over a time grid, with checkpointing and dated events.

A step is any callable ``step(u, dt, *parameters) -> u`` on the tape: a finite-element step, an exact
pointwise flow, a Runge-Kutta step. Nothing here knows of finite elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from solvers.errors import GliodeError

Step = Callable[..., Tensor]


def is_dual(*tensors: Tensor) -> bool:
    """Whether any tensor carries a forward-mode tangent."""
    return any(
        isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None
        for tensor in tensors
    )


class _Block(torch.autograd.Function):
    """f(*tensors), keeping only its inputs: `backward` runs f again. Differentiable again when the tape asks
    for it.
    """

    @staticmethod
    def forward(ctx: Any, f: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.f = f
        ctx.save_for_backward(*tensors)
        with torch.no_grad():
            return f(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            # Fresh nodes on top of the inputs: the sweep below must end here, not in the graph they came
            # from.
            needed = ctx.needs_input_grad[1:]
            inputs = tuple(
                x.view_as(x) if again else x.detach().requires_grad_(n)
                for x, n in zip(inputs, needed, strict=True)
            )
            wanted = [x for x, n in zip(inputs, needed, strict=True) if n]
            out = ctx.f(*inputs)
            found = iter(torch.autograd.grad(out, wanted, grads[0], create_graph=again, allow_unused=True))
        return (None, *(next(found) if n else None for n in ctx.needs_input_grad[1:]))


def recomputed(f: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """f(*tensors) storing only the inputs for the backward pass (every differentiable tensor must be an
    argument).

    In forward mode f runs as it is: nothing is stored there that recomputation would save.
    """
    if is_dual(*tensors) or not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        return f(*tensors)
    return _Block.apply(f, *tensors)  # type: ignore[no-any-return]


class PointwiseStep:
    """An exact flow u(dt) = flow(u, dt, *parameters), applied at every degree of freedom by itself.

    recompute: keep only u and the parameters for the gradient and run the flow again there.
    """

    def __init__(self, flow: Step, recompute: bool = True) -> None:
        self.flow, self.recompute = flow, recompute

    def __call__(self, u: Tensor, dt: Tensor | float, *parameters: Tensor) -> Tensor:
        """Advance u by dt."""
        dt = torch.as_tensor(dt, dtype=u.dtype)
        return recomputed(self.flow, u, dt, *parameters) if self.recompute else self.flow(u, dt, *parameters)


class Strang:
    """Diffusion for dt/2, reaction for dt, diffusion for dt/2: order 2 from two flows of order 2 (Strang
    1968).

    In a run of equal steps the half steps of diffusion that meet are taken as one: only the `first` step
    opens with a half and only the `last` closes with one. For growing fronts this order has 3 to 40 times
    less error than reaction outside, at the same cost. The parameters are the diffusion's first
    (`n_diffusion` of them), then the reaction's.
    """

    def __init__(self, reaction: Step, diffusion: Step, n_diffusion: int = 1) -> None:
        self.reaction, self.diffusion, self.n_diffusion = reaction, diffusion, n_diffusion

    def __call__(
        self, u: Tensor, dt: Tensor | float, *parameters: Tensor, first: bool = True, last: bool = True
    ) -> Tensor:
        """Advance u by dt."""
        ours, theirs = parameters[: self.n_diffusion], parameters[self.n_diffusion :]
        if first:
            u = self.diffusion(u, dt / 2, *ours)
        u = self.reaction(u, dt, *theirs)
        return self.diffusion(u, dt / 2 if last else dt, *ours)


class Evolution:
    """`steps` equal steps over a duration, a tensor or a number, so that an age is a parameter like any
    other.

    checkpoint: steps to a block. Blocks keep their first state only and run again in the backward pass;
    sqrt(steps) is the best single level. None keeps every step. progress: called after each step with (steps
    done, steps in all).
    """

    def __init__(
        self, step: Step, checkpoint: int | None = None, progress: Callable[[int, int], None] | None = None
    ) -> None:
        if checkpoint is not None and checkpoint < 1:
            raise GliodeError(f"checkpoint: {checkpoint} steps to a block; give 1 or more, or none")
        self.step = step
        self.checkpoint = checkpoint
        self.progress = progress

    def __call__(self, u: Tensor, duration: Tensor | float, steps: int, *parameters: Tensor) -> Tensor:
        """The state after `duration` days."""
        if steps < 1:
            raise GliodeError(f"steps: {steps}; an evolution needs at least one")
        dt = torch.as_tensor(duration, dtype=u.dtype) / steps
        size = self.checkpoint or 1
        for start in range(0, steps, size):
            count = min(size, steps - start)
            block = range(start, start + count)
            if self.checkpoint:
                u = recomputed(lambda v, dt, *p, k=block: self._run(v, dt, k, steps, p), u, dt, *parameters)
            else:
                u = self._run(u, dt, block, steps, parameters)
            if self.progress is not None:
                self.progress(start + count, steps)
        return u

    def _run(self, u: Tensor, dt: Tensor, block: range, steps: int, parameters: Sequence[Tensor]) -> Tensor:
        for k in block:
            if isinstance(self.step, Strang):
                u = self.step(u, dt, *parameters, first=k == 0, last=k == steps - 1)
            else:
                u = self.step(u, dt, *parameters)
        return u
