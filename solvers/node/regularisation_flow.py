r"""The regularisation flow: an inverse problem A y = f solved by a flow that is partly learned.

    y' = -K(t)^T sigma(K(t) y + b(t)) - lambda A^T (A y - f),    0 <= t <= t*.

A monotone sigma makes the learned part a monotone map of y, so that the flow regularises: the depth t* plays
the part of the regularization parameter. For data f_delta within delta of f, from the same y(0),

    ||y_delta(t) - y(t)|| <= min(lambda ||A|| t delta, delta sqrt(lambda t / 2)),

and y_delta(t*) -> y-dagger, A y-dagger = f, under a source condition with t* chosen by delta. Statements and
proofs are in docs/theory/regularisation_flow.md (the model: Celledoni, Ehrhardt, Etmann, McLachlan, Owren,
Schönlieb and Sherry 2021). Without a learned part, K = 0, it is Showalter's method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from solvers.errors import GliodeError
from solvers.node.activations import Activation
from solvers.node.fields import GradientFlow
from solvers.ode.fields import Sampled, Saved

Map = Callable[[Tensor], Tensor]


class RegularisationFlow(GradientFlow):
    """-K(t)^T sigma(K(t) y + b(t)) - lambda A^T (A y - f) for states y (..., d).

    A: a matrix (m, d), or the pair (A, its adjoint) of linear callables (..., d) -> (..., m) and back, on the
    tape; it is a constant. data: f (..., m), one for all states or one for each (assign `flow.data` for the
    next batch), on the tape: the flow has a derivative with respect to its data. weight: lambda >= 0; the
    rest as `GradientFlow`, whose K and b are 0 until `reset`.
    Raises GliodeError for a sigma that is not monotone, shapes that do not fit, and a pair that fails
    <A y, r> = <y, A^T r>.

    An explicit step keeps the flow's contraction where h (s ||K||^2 + lambda ||A||^2) <= 2 r, with s the
    largest slope of sigma and r the scheme's circle-contractivity radius.
    """

    data: Tensor
    matrix: Tensor

    def __init__(
        self,
        dim: int,
        A: Tensor | tuple[Map, Map],
        data: Tensor,
        weight: float = 1.0,
        width: int | None = None,
        sigma: str | Activation = "tanh",
        kind: str = "linear",
        knots: int = 2,
        duration: float = 1.0,
    ) -> None:
        super().__init__(dim, width, sigma, kind, knots, duration)
        if self.sigma.slopes[0] < 0:
            raise GliodeError(
                f"regularisation flow: activation {self.sigma.name} has slopes down to "
                f"{self.sigma.slopes[0]:g}; it must be monotone"
            )
        if not (math.isfinite(weight) and weight >= 0):
            raise GliodeError(f"regularisation flow: weight must be finite and not negative, got {weight}")
        self.weight = weight
        self.register_buffer("data", data, persistent=False)
        self.register_buffer("matrix", A.detach() if isinstance(A, Tensor) else None, persistent=False)
        self._maps = None if isinstance(A, Tensor) else A
        if isinstance(A, Tensor) and A.shape != (data.shape[-1], dim):
            raise GliodeError(
                f"regularisation flow: A has shape {tuple(A.shape)}; for data (..., {data.shape[-1]}) and "
                f"states (..., {dim}) it is ({data.shape[-1]}, {dim})"
            )
        if self._maps is not None:
            self._check_adjoint(dim)

    def forward_map(self, y: Tensor) -> Tensor:
        """A y."""
        return linear(y, self.matrix) if self._maps is None else self._maps[0](y)

    def adjoint_map(self, r: Tensor) -> Tensor:
        """A^T r."""
        return r @ self.matrix if self._maps is None else self._maps[1](r)

    def _check_adjoint(self, dim: int) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = [(*self.data.shape[:-1], size) for size in (dim, self.data.shape[-1])]
        y, r = (torch.randn(shape, generator=generator).to(self.data) for shape in shapes)
        with torch.no_grad():
            Ay, Ar = self.forward_map(y), self.adjoint_map(r)
        if Ay.shape != r.shape or Ar.shape != y.shape:
            raise GliodeError(
                f"regularisation flow: A maps {tuple(y.shape)} to {tuple(Ay.shape)} and its adjoint "
                f"{tuple(r.shape)} to {tuple(Ar.shape)}; the data are {tuple(r.shape)}"
            )
        gap, size = float(((Ay * r).sum() - (y * Ar).sum()).abs()), float(Ay.norm() * r.norm())
        if gap > math.sqrt(torch.finfo(self.data.dtype).eps) * size:
            raise GliodeError(
                f"regularisation flow: <A y, r> and <y, A^T r> differ by {gap:.1e}: the second callable of A "
                "is not the adjoint of the first"
            )

    def sample(self, stages: Tensor) -> Sequence[Sampled]:
        return *super().sample(stages), Sampled.constant(self.data, stages)

    def rhs(self, x: Tensor, *w: Tensor) -> Tensor:
        return super().rhs(x, *w[:2]) - self.weight * self.adjoint_map(self.forward_map(x) - w[2])

    def push(self, x: Tensor, w: Sequence[Tensor], out: Tensor) -> Saved:
        saved = super().push(x, w[:2], out)
        out.sub_(self.adjoint_map(self.forward_map(x) - w[2]), alpha=self.weight)
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
        Ap = self.forward_map(p)  # before the network spoils p
        super().pull(x, saved, w[:2], p, scale, into[:2], out)
        if into[2] is not None:
            into[2].add_(Ap.sum_to_size(into[2].shape), alpha=scale * self.weight)
        out.sub_(self.adjoint_map(Ap), alpha=scale * self.weight)
