r"""Total variation, R(m) = weight int |grad m|, exact or smoothed, on finite-element fields and on images.

    exact       weight sum_q w_q |(D m)_q|                     not differentiable; has a prox
    smoothed    weight sum_q w_q sqrt(|(D m)_q|^2 + eps^2)     twice differentiable (Acar and Vogel 1994)

|.| is Euclidean over the d slopes at a point (isotropic). D, D^T and the weights come from the gradient
operator: `solvers.fem.gradients.Gradient` of a domain, or `ImageGradient` of a voxel grid.

The prox of the exact one (Rudin, Osher and Fatemi 1992) is solved in its dual by an accelerated projected
gradient (Chambolle 2004; Beck and Teboulle 2009), with a = weight * step and b the bound of D M^-1 D^T W:

    z = m - a M^-1 D^T W p,    p <- (p + D z / (a b)) / max(1, |.|),
    gap(p) = a sum_q w_q (|D z| - p . D z) >= 1/2 ||z - prox||^2 .
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from inverse.regularizers.interface import checked_step, checked_weight
from solvers.errors import GliodeError
from solvers.spaces import Diagonal, reduce


class GradientOperator(Protocol):
    """A linear D from points to slopes, on the tape.

    space: its metric M; weights: (points,); bound: (points,) or 0-d, a diagonal above D M^-1 D^T W.
    """

    space: Diagonal
    weights: Tensor
    bound: Tensor

    def __call__(self, u: Tensor, /) -> Tensor:
        """D u, (points, d)."""
        ...

    def adjoint(self, q: Tensor, /) -> Tensor:
        """D^T q, a dual."""
        ...


class ImageGradient:
    """Forward differences of an image of any dimension, zero across its far edges (reflecting boundary).

    shape: pixels per axis, an image being the flat tensor (prod(shape),); spacing: the edge of a pixel, one
    number or one for each axis. space: L2, each pixel weighing its volume.
    """

    def __init__(self, shape: Sequence[int], spacing: float | Sequence[float] = 1.0) -> None:
        self.shape = tuple(int(n) for n in shape)
        h = (float(spacing),) * len(self.shape) if isinstance(spacing, int | float) else tuple(spacing)
        if not self.shape or min(self.shape) < 1 or len(h) != len(self.shape):
            raise GliodeError(
                f"ImageGradient: shape {self.shape} and spacing {h}: give one positive number an axis"
            )
        if not all(math.isfinite(edge) and edge > 0 for edge in h):
            raise GliodeError(f"ImageGradient: the spacing must be positive and finite, got {h}")
        self.spacing = h
        self.weights = torch.full((math.prod(self.shape),), math.prod(h), dtype=torch.float64)
        self.bound = torch.tensor(sum(4 / edge**2 for edge in h), dtype=torch.float64)
        self.space = Diagonal(self.weights)

    def __call__(self, u: Tensor) -> Tensor:
        """The slopes D u, (pixels, d)."""
        image = u.view(self.shape)
        slopes = []
        for axis, (n, h) in enumerate(zip(self.shape, self.spacing, strict=True)):
            last = image.narrow(axis, n - 1, 1)
            slopes.append(torch.diff(image, dim=axis, append=last).reshape(-1) / h)
        return torch.stack(slopes, 1)

    def adjoint(self, q: Tensor) -> Tensor:
        """D^T q, (pixels,)."""
        out = torch.zeros(self.shape, dtype=q.dtype, device=q.device)
        for axis, (n, h) in enumerate(zip(self.shape, self.spacing, strict=True)):
            inner = q[:, axis].view(self.shape).narrow(axis, 0, n - 1) / h
            edge = torch.zeros_like(out.narrow(axis, 0, 1))
            out = out - torch.diff(inner, dim=axis, prepend=edge, append=edge)
        return out.reshape(-1)


class TotalVariation:
    """weight int sqrt(|grad m|^2 + smoothing^2).

    smoothing: eps >= 0, a slope in units of m per mm: the smallest that counts as an edge; 0 is the exact
    one. lagged: let the second derivative (the tape's too) be that of lagged diffusivity (Vogel and Oman
    1996), D^T W / sqrt(|D m|^2 + eps^2) D, never below the exact one: from afar Newton's method then comes
    near in a few steps where the exact Hessian crawls, though its end is linear. tolerance: of
    the prox, the relative error ||z - prox|| / ||m|| that its duality gap certifies (the true one is some
    tens of times smaller), in at most `iterations`.
    """

    separable = False

    def __init__(
        self,
        gradient: GradientOperator,
        weight: float = 1.0,
        smoothing: float = 0.0,
        lagged: bool = False,
        tolerance: float = 1e-3,
        iterations: int = 5000,
    ) -> None:
        if not (math.isfinite(smoothing) and smoothing >= 0):
            raise GliodeError(f"TotalVariation: smoothing must be finite and not negative, got {smoothing}")
        if not 0 < tolerance < 1:
            raise GliodeError(f"TotalVariation: tolerance must lie between 0 and 1, got {tolerance}")
        self.operator, self.space = gradient, gradient.space
        self.weight, self.smoothing = checked_weight("TotalVariation", weight), float(smoothing)
        self.lagged, self.tolerance, self.iterations = lagged, tolerance, iterations
        self.dual: Tensor | None = None

    def __call__(self, m: Tensor) -> Tensor:
        """R(m), a 0-d tensor; on the tape where it is smoothed."""
        if self.smoothing == 0 and m.requires_grad:
            raise GliodeError(
                "TotalVariation: the exact one has no derivative; set smoothing > 0, or give it to "
                "inverse.optimizers.proximal as its non-smooth term"
            )
        q = self.operator(m)
        if self.smoothing == 0:
            size = torch.linalg.vector_norm(q, dim=1)
        else:
            square = q.square().sum(1) + self.smoothing**2
            size = square.sqrt()
            if self.lagged:  # the same value and slope; 1 / size is not differentiated again
                size = size.detach() + (square - square.detach()) / (2 * size.detach())
        return self.weight * reduce((self.operator.weights.to(m) * size).sum(), self.space.comm)

    def _sizes(self, q: Tensor, what: str) -> Tensor:
        if self.smoothing == 0:
            raise GliodeError(
                f"TotalVariation: the exact one has no {what}; set smoothing > 0, or use its prox"
            )
        return (q.square().sum(1, keepdim=True) + self.smoothing**2).sqrt()

    def gradient(self, m: Tensor) -> Tensor:
        """The dual R'(m) = weight D^T W D m / sqrt(|D m|^2 + eps^2)."""
        q = self.operator(m)
        return self._dual(q / self._sizes(q, "gradient"))

    def hessian_action(self, m: Tensor, d: Tensor) -> Tensor:
        """The dual R''(m) d, or what stands for it where `lagged`."""
        q, along = self.operator(m), self.operator(d)
        size = self._sizes(q, "Hessian")
        if not self.lagged:
            along = along - q * (q * along).sum(1, keepdim=True) / size.square()
        return self._dual(along / size)

    def _dual(self, p: Tensor) -> Tensor:
        """weight D^T W p."""
        return self.weight * self.operator.adjoint(self.operator.weights.to(p)[:, None] * p)

    def prox(self, m: Tensor, step: float) -> Tensor:
        """argmin_z R(z) + ||z - m||^2 / (2 step) of the exact R; it starts from the dual of the last call.

        Raises GliodeError where `iterations` do not reach the tolerance.
        """
        if self.smoothing > 0:
            raise GliodeError(
                "TotalVariation: the prox is that of the exact one (smoothing 0); a smoothed one is a "
                "regularizer of the problem"
            )
        a = self.weight * checked_step("TotalVariation", step)
        m, operator, space = m.detach(), self.operator, self.space
        w, length = operator.weights.to(m), 1 / (a * operator.bound.to(m)).reshape(-1, 1)
        limit = 0.5 * (self.tolerance * space.norm(m)) ** 2
        p = torch.zeros_like(operator(m)) if self.dual is None else self.dual

        def primal(p: Tensor) -> Tensor:
            return m - a * space.riesz(operator.adjoint(w[:, None] * p))

        y, t, z, gap = p, 1.0, m, math.inf
        with torch.no_grad():
            for k in range(self.iterations):
                slope = operator(primal(y))
                new = torch.addcmul(y, slope, length)
                new /= torch.linalg.vector_norm(new, dim=1, keepdim=True).clamp_(min=1)
                move = new - p
                # restart where the step turns against the momentum (O'Donoghue and Candes 2015)
                along = reduce((slope * move).sum(1) @ w, space.comm) >= 0
                t_next = (1 + math.sqrt(1 + 4 * t * t)) / 2 if along else 1.0
                y = torch.add(new, move, alpha=(t - 1) / t_next) if along else new
                p, t = new, t_next
                if k % 5 == 4:
                    z = primal(p)
                    gap = self._gap(a, p, operator(z))
                    if gap <= limit:
                        self.dual = p
                        return z
        raise GliodeError(
            f"TotalVariation: its prox has a relative error up to {math.sqrt(2 * gap) / space.norm(m):.1e} "
            f"after {self.iterations} iterations, tolerance {self.tolerance:.1e}: raise `iterations` or "
            "`tolerance`, or use inverse.optimizers.primal_dual, which needs no prox of it"
        )

    def _gap(self, a: float, p: Tensor, slope: Tensor) -> float:
        """a sum_q w_q (|D z| - p . D z)."""
        rest = torch.linalg.vector_norm(slope, dim=1) - (p * slope).sum(1)
        return a * float(reduce((self.operator.weights.to(p) * rest).sum(), self.space.comm))
