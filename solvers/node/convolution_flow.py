r"""The gradient flow of a convex energy of images, by convolutions, and a non-expansive denoiser made of it.

    x' = -K(t)^T a(t) sigma((K(t) x) / a(t) + b(t)),    x (..., rows, columns), a > 0 and b of each channel

With slopes of sigma in [0, s] this is minus the gradient of a convex function of x, with Lipschitz constant
s ||K||^2, whatever the widths a are: where |K x| is far above a, an edge, tanh leaves it be.

K is a bank of filters that is closed under flips of rows and of columns, on the image mirrored beyond its
edges. The mirrored image lives on a torus of twice as many rows and columns, of whose four quarters each
sees what the others see, by flipped filters. Hence ||K|| <= sup |symbol|, as on all of Z^2, the edges
included (docs/theory/plug_and_play.md), and `solvers.node.convolutions.norm_bound` certifies it. The filters
sum to 0: the flow leaves the mean alone.

Euler's step of length h with h s ||K||^2 <= 2 alpha, alpha < 1, is alpha-averaged: alpha times a 1-Lipschitz
map plus 1 - alpha times the identity. A composition of N of them is averaged with the constant

    1 / (1 + (1 - alpha) / (alpha N)),    N / (N + 1) for alpha = 1/2: firmly non-expansive steps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d

from solvers.errors import GliodeError
from solvers.node.activations import Activation, activation
from solvers.node.convolutions import limited
from solvers.node.models import Node
from solvers.node.weights import DepthWeights
from solvers.ode.fields import Sampled, VectorField
from solvers.ode.tableau import Tableau


def mirrored(x: Tensor, edge: int) -> Tensor:
    """x (..., rows, columns) with `edge` rows and columns more on each side, x mirrored at the border of its
    pixels; on the tape.
    """
    if edge == 0:
        return x
    x = torch.cat([x[..., :edge].flip(-1), x, x[..., -edge:].flip(-1)], -1)
    return torch.cat([x[..., :edge, :].flip(-2), x, x[..., -edge:, :].flip(-2)], -2)


def folded(y: Tensor, edge: int) -> Tensor:
    """The adjoint of `mirrored`, on the tape."""
    if edge == 0:
        return y
    out = y[..., edge:-edge, :].clone()
    out[..., :edge, :] += y[..., :edge, :].flip(-2)
    out[..., -edge:, :] += y[..., -edge:, :].flip(-2)
    y, out = out, out[..., edge:-edge].clone()
    out[..., :edge] += y[..., :edge].flip(-1)
    out[..., -edge:] += y[..., -edge:].flip(-1)
    return out


class ConvolutionalFlow(VectorField):
    """-K(t)^T a(t) sigma((K(t) x) / a(t) + b(t)) for images x (..., rows, columns) of `size` pixels and more.

    channels: filters of size x size pixels (odd) that are free; with their flips there are four times as
    many. limit: ||K(t)|| <= limit at every stage (inf: any). width: a at the start, in the units of x. The
    rest as `DepthWeights`. K starts as a tight frame of random filters that see all but the mean of a patch,
    at the limit (without one, at 1).

    Raises GliodeError for numbers that make no sense, a sigma that is not monotone, and, when it is
    integrated, for images that are too small.
    """

    saves_value = False

    def __init__(
        self,
        channels: int = 12,
        size: int = 7,
        sigma: str | Activation = "tanh",
        kind: str = "linear",
        knots: int = 2,
        duration: float = 1.0,
        limit: float = math.inf,
        width: float = 0.3,
    ) -> None:
        super().__init__()
        self.sigma = activation(sigma)
        if channels < 1 or size < 3 or size % 2 == 0:
            raise GliodeError(
                f"convolutional flow: {channels} filters of size {size}; give 1 or more, of an odd size from "
                "3 on"
            )
        if not (limit > 0 and width > 0 and math.isfinite(width)):
            raise GliodeError(f"convolutional flow: limit {limit}, width {width}; both must be positive")
        if self.sigma.slopes[0] < 0:
            raise GliodeError(
                f"convolutional flow: activation {self.sigma.name} has slopes down to "
                f"{self.sigma.slopes[0]:g}; it must be monotone"
            )
        self.size, self.limit = size, limit
        self._kept: tuple[Any, Sequence[Sampled]] | None = None
        self.K = DepthWeights((channels, 1, size, size), kind, knots, duration)
        self.b = DepthWeights((channels,), kind, knots, duration)
        self.log_a = DepthWeights((channels,), kind, knots, duration)
        with torch.no_grad():
            self.log_a.values.fill_(math.log(width))
        self.reset()

    def reset(self, generator: torch.Generator | None = None) -> None:
        """K a random tight frame, the same at all depths; b = 0."""
        count, _, *shape = self.K.values.shape[1:]
        drawn = torch.randn(count, 1, *shape, generator=generator).double()
        rows = _bank(drawn).reshape(4 * count, -1)
        values, vectors = torch.linalg.eigh(rows.T @ rows)
        seen = values > 1e-9 * values[-1]
        whiten = (vectors[:, seen] * values[seen].rsqrt()) @ vectors[:, seen].T
        gain = (1.0 if math.isinf(self.limit) else self.limit) / self.size
        with torch.no_grad():
            frame = (drawn.reshape(count, -1) @ whiten).reshape(drawn.shape)
            self.K.values.copy_(gain * frame)
            self.b.values.zero_()

    def sample(self, stages: Tensor) -> Sequence[Sampled]:
        values = (self.K.values, self.b.values, self.log_a.values)
        if any(v.requires_grad for v in values):
            return self._sampled(stages)
        key = stages.tolist(), [(id(v), v._version, v.dtype) for v in values]
        if self._kept is None or self._kept[0] != key:  # of frozen weights: once
            self._kept = key, self._sampled(stages)
        return self._kept[1]

    def _sampled(self, stages: Tensor) -> Sequence[Sampled]:
        K, b, log_a = (weights.sample(stages) for weights in (self.K, self.b, self.log_a))
        a = log_a.table.exp().repeat(1, 4)[:, :, None, None, None]
        banks = torch.stack([self.bank(k) for k in K.table])
        return (
            Sampled(banks / a, K.index),  # the widths are put into the two kernels: two products less
            Sampled(b.table.repeat(1, 4), b.index),
            Sampled(banks * a, K.index),
        )

    def bank(self, k: Tensor) -> Tensor:
        """The kernels of K, (4 channels, 1, size, size), of free ones (channels, 1, size, size)."""
        bank = _bank(k)
        return bank if math.isinf(self.limit) else limited(bank, self.limit)

    def check(self, x0: Tensor, times: Tensor, scheme: Tableau) -> None:
        if x0.ndim < 2 or min(x0.shape[-2:]) < self.size:
            raise GliodeError(
                f"convolutional flow: states of shape {tuple(x0.shape)}; give images (..., rows, columns) of "
                f"{self.size} pixels and more each way"
            )

    def rhs(self, x: Tensor, *w: Tensor) -> Tensor:
        edge = self.size // 2
        images = mirrored(x.reshape(-1, 1, *x.shape[-2:]), edge)
        responses = self.sigma.value(conv2d(images, w[0], w[1]))
        return -folded(conv_transpose2d(responses, w[2]), edge).reshape(x.shape)


def _bank(k: Tensor) -> Tensor:
    k = k - k.mean((-2, -1), keepdim=True)
    return torch.cat([k, k.flip(-1), k.flip(-2), k.flip(-2, -1)])


class NonExpansiveDenoiser(Node):
    """x(steps) of a ConvolutionalFlow from the noisy images x(0), by Euler steps of length 1.

    D is 1-Lipschitz and `averaged` for whatever weights, in training too. level: the standard deviation of
    the noise, in the units of the images; D_level(x) = level D_1(x / level) is as Lipschitz and averaged as
    D_1, so that one training serves several levels.

    each: the constant of each step, between 0 and 1; 1/2 makes them firmly non-expansive, those nearer to 1
    take the noise away in fewer steps. It is computed in the arithmetic of its weights, whatever the images'
    is. channels, size, sigma: as `ConvolutionalFlow`; every step has weights
    of its own. Raises GliodeError for other numbers, and an activation whose slopes are not in [0, 1].
    """

    field: ConvolutionalFlow

    def __init__(
        self,
        channels: int = 12,
        size: int = 7,
        sigma: str | Activation = "tanh",
        steps: int = 8,
        each: float = 0.95,
        level: float = 0.1,
    ) -> None:
        sigma = activation(sigma)
        low, high = sigma.slopes
        if not (0 < each < 1):
            raise GliodeError(f"denoiser: each is {each}; the constant of a step must lie between 0 and 1")
        if low < 0 or not 0 < high <= 1:
            raise GliodeError(
                f"denoiser: the slopes of activation {sigma.name} reach from {low:g} to {high:g}; they must "
                "lie in [0, 1] (tanh, relu, softplus, sigmoid)"
            )
        limit = math.sqrt(2 * each / high)
        field = ConvolutionalFlow(channels, size, sigma, "steps", max(steps, 1), float(max(steps, 1)), limit)
        super().__init__(field, float(steps), steps, "euler", "autograd")
        self._settings = {
            **{"channels": channels, "size": size, "sigma": sigma.name},
            **{"steps": steps, "each": each, "level": level},
        }
        self.each, self.level = each, _level(level)

    @property
    def averaged(self) -> float:
        """alpha of the denoiser: D = (1 - alpha) identity + alpha N with N 1-Lipschitz."""
        return 1 / (1 + (1 - self.each) / (self.each * len(self.times().diff())))

    def at(self, level: float) -> NonExpansiveDenoiser:
        """A frozen copy for noise of another standard deviation."""
        other = copy.deepcopy(self).eval().requires_grad_(False)
        other.level = _level(level)
        return other

    def forward(self, x: Tensor, trajectory: bool = False) -> Tensor:
        out = super().forward((x / self.level).to(self.field.K.values), trajectory)
        return (self.level * out).to(x)

    def settings(self) -> dict[str, Any]:
        """The arguments that make a denoiser of this architecture."""
        return dict(self._settings)


def _level(level: float) -> float:
    if not (math.isfinite(level) and level > 0):
        raise GliodeError(f"denoiser: the noise's level must be positive and finite, got {level}")
    return float(level)
