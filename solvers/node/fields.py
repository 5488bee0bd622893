r"""Vector fields that are networks, with their gradients by hand.

    Standalone     sigma(W(t) x + b(t))
    ODENet         alpha(t) sigma(K(t) x + b(t))
    GradientFlow   -K(t)^T sigma(K(t) x + b(t)), the gradient flow of a convex energy where sigma' >= 0
    TwoLayer       W2(t) sigma(W1(t) x + b1(t)) + b2(t)

States are (..., d). Weights of each are `DepthWeights`; see there for `kind`, `knots` and `duration`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from solvers.node.activations import Activation, activation
from solvers.node.weights import DepthWeights
from solvers.ode.fields import Sampled, Saved, VectorField


def _flat(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def _affine_into(out: Tensor | None, x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """W x + b, in `out` if given, off the tape."""
    if x.ndim == 2:
        return torch.addmm(b, x, W.t(), out=out)
    z = torch.addmm(b, _flat(x), W.t(), out=None if out is None else _flat(out))
    return z.view(*x.shape[:-1], -1) if out is None else out


def _product(out: Tensor, g: Tensor, W: Tensor, scale: float) -> None:
    """scale g W, row by row, into `out`, off the tape."""
    out = _flat(out)
    torch.addmm(out, _flat(g), W, beta=0, alpha=scale, out=out)


def _affine(g: Tensor, x: Tensor, scale: float, into: Sequence[Tensor | None]) -> None:
    """Adds the gradients of W and b in z = W x + b, where scale g is that of z."""
    weight, bias = into
    g = _flat(g)
    if weight is not None:
        weight.addmm_(g.t(), _flat(x), alpha=scale)
    if bias is not None:
        bias.add_(g.sum(0), alpha=scale)


class _Layered(VectorField):
    """What the fields share: their weights by name, an activation, and a random start."""

    def __init__(
        self,
        shapes: dict[str, tuple[int, ...]],
        sigma: str | Activation,
        kind: str,
        knots: int,
        duration: float,
    ) -> None:
        super().__init__()
        self.sigma = activation(sigma)
        self.names = tuple(shapes)
        for name, shape in shapes.items():
            self.add_module(name, DepthWeights(shape, kind, knots, duration))
        self.reset()

    def weights(self, name: str) -> DepthWeights:
        found = self.get_submodule(name)
        assert isinstance(found, DepthWeights)
        return found

    def sample(self, stages: Tensor) -> Sequence[Sampled]:
        return [self.weights(name).sample(stages) for name in self.names]

    def reset(self, gain: float = 1.0, rough: float = 0.0, generator: torch.Generator | None = None) -> None:
        """Matrices ~ gain N(0, 1 / columns), the same at all depths, plus `rough` times such numbers of each
        knot's own; biases 0.
        """
        with torch.no_grad():
            for name in self.names:
                values = self.weights(name).values
                values.zero_()
                if values.ndim == 3:
                    scale = gain / math.sqrt(values.shape[-1])
                    values.add_(torch.randn(values.shape[1:], generator=generator), alpha=scale)
                    values.add_(torch.randn(values.shape, generator=generator), alpha=rough * scale)

    def _open(self, x: Tensor, W: Tensor, b: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """sigma(W x + b), in `out` where the activation works in place, and what its pullback needs; off the
        tape.
        """
        z = _affine_into(out if self.sigma.value_ is not None else None, x, W, b)
        if self.sigma.value_ is not None:
            self.sigma.value_(z)
            return z, z
        value = self.sigma.value(z)
        return value, value if self.sigma.from_value else z


class Standalone(_Layered):
    """sigma(W(t) x + b(t)): the standalone NODE, whose state is all there is. W (d, d), b (d,)."""

    def __init__(
        self,
        dim: int,
        sigma: str | Activation = "tanh",
        kind: str = "linear",
        knots: int = 2,
        duration: float = 1.0,
    ) -> None:
        super().__init__({"W": (dim, dim), "b": (dim,)}, sigma, kind, knots, duration)

    @property
    def saves_value(self) -> bool:  # type: ignore[override]
        return self.sigma.value_ is not None

    def rhs(self, x: Tensor, *w: Tensor) -> Tensor:
        return self.sigma.value(linear(x, w[0], w[1]))

    def push(self, x: Tensor, w: Sequence[Tensor], out: Tensor) -> Saved:
        value, saved = self._open(x, w[0], w[1], out)
        if value is not out:
            out.copy_(value)
        return (saved,)

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
        g = self.sigma.pullback(p, saved[0])
        _affine(g, x, scale, into)
        _product(out, g, w[0], scale)


class ODENet(_Layered):
    """alpha(t) sigma(K(t) x + b(t)), alpha a learned scalar. K (d, d), b (d,), alpha ()."""

    saves_value = False

    def __init__(
        self,
        dim: int,
        sigma: str | Activation = "tanh",
        kind: str = "linear",
        knots: int = 2,
        duration: float = 1.0,
    ) -> None:
        super().__init__({"K": (dim, dim), "b": (dim,), "alpha": ()}, sigma, kind, knots, duration)

    def reset(self, gain: float = 1.0, rough: float = 0.0, generator: torch.Generator | None = None) -> None:
        super().reset(gain, rough, generator)
        with torch.no_grad():
            self.weights("alpha").values.fill_(1.0)

    def rhs(self, x: Tensor, *w: Tensor) -> Tensor:
        return w[2] * self.sigma.value(linear(x, w[0], w[1]))

    def push(self, x: Tensor, w: Sequence[Tensor], out: Tensor) -> Saved:
        value, saved = self._open(x, w[0], w[1])
        torch.mul(value, w[2], out=out)
        return value, saved

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
        if into[2] is not None:
            into[2].add_((p * saved[0]).sum(), alpha=scale)
        g = self.sigma.pullback(p * w[2], saved[1])
        _affine(g, x, scale, into[:2])
        _product(out, g, w[0], scale)


class GradientFlow(_Layered):
    """-K(t)^T sigma(K(t) x + b(t)): minus the gradient of sum_i Sigma((K x + b)_i), Sigma' = sigma. K (m, d),
    b (m,).
    """

    saves_value = False

    def __init__(
        self,
        dim: int,
        width: int | None = None,
        sigma: str | Activation = "tanh",
        kind: str = "linear",
        knots: int = 2,
        duration: float = 1.0,
    ) -> None:
        width = dim if width is None else width
        super().__init__({"K": (width, dim), "b": (width,)}, sigma, kind, knots, duration)

    def rhs(self, x: Tensor, *w: Tensor) -> Tensor:
        return -(self.sigma.value(linear(x, w[0], w[1])) @ w[0])

    def push(self, x: Tensor, w: Sequence[Tensor], out: Tensor) -> Saved:
        value, saved = self._open(x, w[0], w[1])
        _product(out, value, w[0], -1.0)
        return value, saved

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
        if into[0] is not None:
            into[0].addmm_(_flat(saved[0]).t(), _flat(p), alpha=-scale)
        g = self.sigma.pullback(p @ w[0].t(), saved[1])
        _affine(g, x, -scale, into)
        _product(out, g, w[0], -scale)


class TwoLayer(_Layered):
    """W2(t) sigma(W1(t) x + b1(t)) + b2(t). W1 (m, d), b1 (m,), W2 (d, m), b2 (d,)."""

    saves_value = False

    def __init__(
        self,
        dim: int,
        width: int,
        sigma: str | Activation = "tanh",
        kind: str = "constant",
        knots: int = 1,
        duration: float = 1.0,
    ) -> None:
        shapes = {"W1": (width, dim), "b1": (width,), "W2": (dim, width), "b2": (dim,)}
        super().__init__(shapes, sigma, kind, knots, duration)

    def rhs(self, x: Tensor, *w: Tensor) -> Tensor:
        return linear(self.sigma.value(linear(x, w[0], w[1])), w[2], w[3])

    def push(self, x: Tensor, w: Sequence[Tensor], out: Tensor) -> Saved:
        value, saved = self._open(x, w[0], w[1])
        _affine_into(out, value, w[2], w[3])
        return value, saved

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
        _affine(p, saved[0], scale, into[2:])
        g = self.sigma.pullback(p @ w[2], saved[1])
        _affine(g, x, scale, into[:2])
        _product(out, g, w[0], scale)
