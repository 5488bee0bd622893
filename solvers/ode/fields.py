r"""Vector fields x' = f(t, x; w), as the integrator wants them: with their weights sampled before it starts.

A field's weights at all stages of all steps are `sample`d once, on the tape: tables (R, *shape) of R rows
and, for each, which row serves stage i of step n. The integrator then sees an autonomous f(x, *w) with one
row of every table, and hands back a gradient for each table; what the tables are made of (knots, splines, the
time itself) is the tape's business.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from solvers.errors import GliodeError
from solvers.ode.tableau import Tableau

Rows = list[list[int]]
Saved = tuple[Tensor, ...]


@dataclass(frozen=True)
class Sampled:
    """A weight at all stages: `table` (R, *shape), on the tape; stage i of step n takes row index[n][i]."""

    table: Tensor
    index: Rows

    @staticmethod
    def constant(weight: Tensor, stages: Tensor) -> Sampled:
        """A weight that does not depend on the depth; `stages` (steps, s) are the stage times."""
        row = [0] * stages.shape[1]
        return Sampled(weight.unsqueeze(0), [row] * stages.shape[0])

    @staticmethod
    def stepwise(weights: Tensor, stages: Tensor, what: str) -> Sampled:
        """weights (steps, *shape), row n for all stages of step n. Raises GliodeError on another number."""
        if weights.shape[0] != stages.shape[0]:
            raise GliodeError(
                f"{what}: {weights.shape[0]} layers of weights for {stages.shape[0]} steps: give as many"
            )
        return Sampled(weights, [[n] * stages.shape[1] for n in range(stages.shape[0])])


class VectorField(nn.Module):
    """f(x; w): `sample` and `rhs` define it; `push` and `pull` by hand make its gradient faster."""

    saves_value = True  # whether `push` may save its `out`: then it is kept for every stage

    @abstractmethod
    def sample(self, stages: Tensor) -> Sequence[Sampled]:
        """The weights at the stage times (steps, s), in the order in which `rhs` takes them, on the tape."""

    @abstractmethod
    def rhs(self, x: Tensor, *w: Tensor) -> Tensor:
        """f at the states x (..., d) with one row of each weight, on the tape in both modes."""

    def check(self, x0: Tensor, times: Tensor, scheme: Tableau) -> None:
        """Raise GliodeError where an integration cannot succeed; called before each. Here: nothing to say."""

    def push(self, x: Tensor, w: Sequence[Tensor], out: Tensor) -> Saved:
        """f(x; w) into `out`, off the tape; returns what `pull` needs besides x and w (`out` may be part of
        it: it is left alone until then; x is not). Here: the tape of this one stage.
        """
        with torch.enable_grad():
            leaves = tuple(v.detach().requires_grad_() for v in (x.clone(), *w))
            k = self.rhs(*leaves)
        out.copy_(k.detach())
        return k, *leaves

    def pull(
        self,
        x: Tensor,
        saved: Saved,
        w: Sequence[Tensor],
        p: Tensor,
        scale: float,
        into: Sequence[Tensor | None],
        out: Tensor,
    ) -> None:
        """scale (d_x f)^T p into `out`; adds scale (d_w f)^T p to the tensors of `into` that are not None. p
        may be spoilt; `out` may be the memory of x, or that into which `push` wrote, so it is written last.
        """
        k, *leaves = saved
        out.zero_()
        if not k.requires_grad:
            return
        into = (out, *into)
        wanted = [leaf for leaf, g in zip(leaves, into, strict=True) if g is not None]
        parts = iter(torch.autograd.grad(k, wanted, p.mul_(scale), retain_graph=True, allow_unused=True))
        for g in into:
            part = None if g is None else next(parts)
            if g is not None and part is not None:
                g += part


class Function(VectorField):
    """A plain f(t, x, *parameters) as a vector field, with gradients for t and the parameters.

    f: a callable (tensors of it that need a gradient must be among `parameters`), or an nn.Module f(t, x),
    whose parameters are found.
    """

    def __init__(self, f: Callable[..., Tensor], parameters: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.f = f
        self._given = tuple(parameters)
        self._names = [name for name, _ in f.named_parameters()] if isinstance(f, nn.Module) else []

    def sample(self, stages: Tensor) -> Sequence[Sampled]:
        steps, s = stages.shape
        times = Sampled(stages.reshape(-1), [list(range(n * s, n * s + s)) for n in range(steps)])
        own = [p for _, p in self.f.named_parameters()] if isinstance(self.f, nn.Module) else []
        return times, *(Sampled.constant(p, stages) for p in (*own, *self._given))

    def rhs(self, x: Tensor, *w: Tensor) -> Tensor:
        t, *weights = w
        own, given = weights[: len(self._names)], weights[len(self._names) :]
        if isinstance(self.f, nn.Module):
            parameters: dict[str, Any] = dict(zip(self._names, own, strict=True))
            out: Tensor = torch.func.functional_call(self.f, parameters, (t, x, *given))
            return out
        return self.f(t, x, *given)


class Forced(VectorField):
    """f(x; w) + forcing_n in step n: the noise of a right-hand side; forcing (steps, *x.shape)."""

    def __init__(self, field: VectorField, forcing: Tensor) -> None:
        super().__init__()
        self.field, self.forcing = field, forcing

    def sample(self, stages: Tensor) -> Sequence[Sampled]:
        return *self.field.sample(stages), Sampled.stepwise(self.forcing, stages, "noise")

    def rhs(self, x: Tensor, *w: Tensor) -> Tensor:
        return self.field.rhs(x, *w[:-1]) + w[-1]

    def push(self, x: Tensor, w: Sequence[Tensor], out: Tensor) -> Saved:
        saved = self.field.push(x, w[:-1], out)
        if any(kept is out for kept in saved):
            saved = tuple(kept.clone() if kept is out else kept for kept in saved)
        out += w[-1]
        return saved

    def pull(
        self,
        x: Tensor,
        saved: Saved,
        w: Sequence[Tensor],
        p: Tensor,
        scale: float,
        into: Sequence[Tensor | None],
        out: Tensor,
    ) -> None:
        if into[-1] is not None:
            into[-1].add_(p, alpha=scale)
        self.field.pull(x, saved, w[:-1], p, scale, into[:-1], out)
