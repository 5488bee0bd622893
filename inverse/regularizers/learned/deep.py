r"""What deep energies on images and volumes are made of, and a certified bound of their curvature.

Layers of features (batch, channels, *grid), any grid, dim 2 or 3: convolutions (`Layer`), and activations
sigma with |sigma'| <= s1 and |sigma''| <= s2. For R(x) = sum_p w . N(x)(p) of such a network N, with z_l what
goes into its l-th activation and a_l = dR / d sigma(z_l),

    <R''(x) u, u> = sum_l sum_p,c a_l(p, c) sigma''(z_l(p, c)) ((z_l' u)(p, c))^2
    |<R''(x) u, u>| <= sum_l s2 max_c sup_p |a_l(., c)| ||z_l'||^2 ||u||^2 .

||z_l'|| is bounded layer by layer by `norm_bound`, going forward. |a_l| is bounded going backward from |w|,
channel by channel, by sums of |kernel|: it is the derivative of the network with |kernel| for kernel and s1 t
for sigma(t), at one pixel. So both do without the number of pixels. Networks are written once: handed a
`Reach` instead of features, their layers carry these bounds along (docs/theory/adversarial.md).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from inverse.regularizers.learned.energy import Energy, Guarantee
from solvers.errors import GliodeError
from solvers.node.convolutions import norm_bound

_FORWARD = {2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED = {2: functional.conv_transpose2d, 3: functional.conv_transpose3d}
ROUNDING = 1 + 1e-6  # more than what rounding in float64 moves a bound by


@dataclass
class Reach:
    """Features of which bounds are known: ||d features / dx|| <= lipschitz, and `path` (channels,) of the
    network of absolute values, on a tape; trail: path, ||z'|| and s2 of the activations on the way.
    """

    lipschitz: float
    path: Tensor
    trail: list[tuple[Tensor, float, float]] = field(default_factory=list)

    @staticmethod
    def of_images() -> Reach:
        """The field itself, one channel."""
        return Reach(1.0, torch.ones(1, dtype=torch.float64, requires_grad=True))

    def __add__(self, other: Reach) -> Reach:
        return Reach(self.lipschitz + other.lipschitz, self.path + other.path, self.trail)

    def curvature(self, weights: Tensor) -> float:
        """The bound of |<R'' u, u>| / ||u||^2 for R = sum_p v(p) . features(p), |v(p)_c| <= |weights_c|."""
        total = (weights.detach().double().abs() * self.path).sum()
        slopes = torch.autograd.grad(total, [path for path, _, _ in self.trail], retain_graph=True)
        parts = (float(a.max()) * s2 * z**2 for a, (_, z, s2) in zip(slopes, self.trail, strict=True))
        return ROUNDING * sum(parts)


Features = TypeVar("Features", Tensor, Reach)


@dataclass(frozen=True)
class Bend:
    """An activation and the bounds s1, s2 of |sigma'| and |sigma''|; sigma(0) = 0."""

    value: Callable[[Tensor], Tensor]
    slope: float
    curvature: float

    def __call__(self, z: Features) -> Features:
        if isinstance(z, Tensor):
            return self.value(z)
        path = self.slope * z.path
        z.trail.append((path, z.lipschitz, self.curvature))
        return Reach(self.slope * z.lipschitz, path, z.trail)


LEAK = 0.2


def _soft(z: Tensor) -> Tensor:
    return torch.lerp(functional.softplus(z, threshold=40.0) - math.log(2), z, LEAK)


SOFT = Bend(_soft, 1.0, (1 - LEAK) / 4)
"""Convex and increasing, with slopes in (0.2, 1): a smooth leaky ReLU."""
RAMP = Bend(lambda z: functional.softplus(z, threshold=40.0) - math.log(2), 1.0, 0.25)
"""Convex and increasing, and bounded below."""
TANH = Bend(torch.tanh, 1.0, 4 / 27**0.5)
STUDENT = Bend(lambda z: torch.log1p(9 * z.square()) / 18, 1 / 6, 1.0)
"""log(1 + 9 z^2) / 18, even: minus the logarithm of Student's density (Kobler et al. 2020)."""


class Layer(nn.Module):
    """A convolution (batch, in, *grid) -> (batch, out, *grid), zero beyond the edge, and a bias.

    valid: only where the kernel lies inside, so the grid shrinks. stride 2 smooths by (1, 2, 1) / 4 along
    each axis and halves the grid, rounding up; without smoothing, R' has a pattern of the period of the grids
    even at flat fields. back: the adjoint of such, with a bias of its own, to a grid that it came from.
    mean_free: every kernel sums to 0. nonnegative: every entry is positive, whatever the weights are.
    """

    def __init__(
        self,
        channels: tuple[int, int],
        size: int = 3,
        dim: int = 2,
        stride: int = 1,
        valid: bool = False,
        mean_free: bool = False,
        nonnegative: bool = False,
        bias: bool = True,
        gain: float = 1.0,
        back: bool = False,
    ) -> None:
        super().__init__()
        if dim not in _FORWARD or size % 2 == 0 or min(size, *channels) < 1 or stride not in (1, 2):
            raise GliodeError(
                f"layer: dim {dim}, size {size}, channels {channels}, stride {stride}; give 2 or 3, an odd "
                "size, 1 or more, 1 or 2"
            )
        self.dim, self.size, self.stride = dim, size, stride
        self.valid, self.mean_free, self.nonnegative, self.back = valid, mean_free, nonnegative, back
        first, last = channels if back else channels[::-1]
        count = channels[0] * size**dim
        free = torch.randn(first, last, *[size] * dim) * (gain / math.sqrt(count))
        if nonnegative:  # of mean gain / count, and not all alike
            free = torch.log(torch.expm1(gain / count * (0.5 + torch.rand_like(free))))
        self.free = nn.Parameter(free)
        self.bias = nn.Parameter(torch.zeros(channels[1])) if bias else None

    def kernel(self) -> Tensor:
        """(out, in, *sizes), or of `back` (in, out, *sizes); on the tape."""
        if self.nonnegative:
            return functional.softplus(self.free)
        k: Tensor = self.free
        axes = tuple(range(2, 2 + self.dim))
        if self.mean_free:
            k = k - k.mean(axes, keepdim=True)
        for axis in axes if self.stride > 1 else ():
            zero = torch.zeros_like(k.narrow(axis, 0, 1))
            low, high = torch.cat([k, zero], axis), torch.cat([zero, k], axis)
            k = (low + high) / 2
            low, high = torch.cat([k, zero], axis), torch.cat([zero, k], axis)
            k = (low + high) / 2
        return k

    def forward(self, x: Features, grid: tuple[int, ...] = ()) -> Features:
        """grid: of the result, for `back` alone."""
        if isinstance(x, Reach):
            return self._carried(x)
        kernel = self.kernel()
        size = kernel.shape[2]
        padding = 0 if self.valid else size // 2
        if not self.back:
            return _FORWARD[self.dim](x, kernel, self.bias, self.stride, padding)
        reached = [(n - 1) * self.stride - 2 * padding + size for n in x.shape[2:]]
        more = [n - m for n, m in zip(grid, reached, strict=True)]
        return _TRANSPOSED[self.dim](x, kernel, self.bias, self.stride, padding, more)

    def _carried(self, x: Reach) -> Reach:
        with torch.no_grad():
            kernel = self.kernel().double()
            parts = phases(kernel, self.stride)
            norm = float(norm_bound(torch.cat(parts, 1)))
            # what one pixel adds to: all of the kernel, or of one that strides a phase
            mass = torch.stack([part.abs().flatten(2).sum(2) for part in parts])
            mass = mass.sum(0).mT if self.back else mass.amax(0)
        return Reach(norm * x.lipschitz, mass @ x.path, x.trail)


def phases(kernel: Tensor, stride: int) -> list[Tensor]:
    """The kernels by which a convolution that strides acts on each of the stride^dim coarse grids that the
    fine one is made of: (out, in, *smaller) each, of equal size.
    """
    parts = [kernel]
    for axis in range(2, kernel.ndim):
        rest = -kernel.shape[axis] % stride
        padded = [
            torch.cat([part, torch.zeros_like(part.narrow(axis, 0, 1))], axis) if rest else part
            for part in parts
        ]
        parts = [
            part.index_select(axis, torch.arange(first, part.shape[axis], stride))
            for part in padded
            for first in range(stride)
        ]
    return parts


class DeepSum(Energy):
    """R(x) = sum over pixels of w . N(x) + squares / 2 ||x||^2, N the `features` of x (batch, 1, *grid).

    The first term grows at most linearly, for its gradient is bounded: with squares > 0 R is coercive.
    """

    def __init__(self, dim: int, least: int, squares: float) -> None:
        super().__init__()
        if not (math.isfinite(squares) and squares >= 0):
            raise GliodeError(
                f"{type(self).__name__}: squares must be finite and not negative, got {squares}"
            )
        self.dim, self.least, self.squares = dim, least, squares

    @abstractmethod
    def features(self, x: Features) -> Features:
        """N(x), (batch, channels, *some grid), of x (batch, 1, *grid)."""

    @abstractmethod
    def weights(self) -> Tensor:
        """w, (channels,)."""

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x[:, None]).flatten(2).sum(2)
        return features @ self.weights() + self.squares / 2 * x.square().flatten(1).sum(1)

    def bound(self) -> float:
        """Of |<R''(x) u, u>| / ||u||^2 without the squares, any x and u, on any grid."""
        with torch.enable_grad():
            return self.features(Reach.of_images()).curvature(self.weights())

    def guarantee(self) -> Guarantee:
        bound = self.bound()
        return Guarantee(max(bound - self.squares, 0.0), bound + self.squares, self.squares > 0)

    def require_fit(self, shape: tuple[int, ...]) -> None:
        require_grid(type(self).__name__, shape, self.dim, self.least)


def require_grid(name: str, shape: tuple[int, ...], dim: int, least: int) -> None:
    """Raise GliodeError unless the shape has `dim` axes of `least` and more."""
    if len(shape) != dim or min(shape) < least:
        raise GliodeError(
            f"{name}: a field of shape {tuple(shape)}; this one takes {dim} axes of {least} pixels and more"
        )
