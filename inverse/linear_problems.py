r"""Linear maps that are ill-posed to invert: blur, projections, diffusion, pictures with parts missing.

    convolution     (A x)_i = sum_j k_j x_(i-j), zero beyond the edge            by FFT
    tomography      (A x)_ray = int x along the ray, x constant on each pixel    exact chord lengths, sparse
    heat            A = exp(-t K), K the Laplacian of insulated cells            a matrix for each axis
    inpainting      the pixels that a mask shows
    downsampling    means of boxes of pixels

Each returns a LinearMap of float64 or float32 tensors and batches of them, which is on the tape to any order
and in both modes, with its exact adjoint (of the sums of products; a Space's Riesz map makes a direction of
it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor
from torch.autograd import Function

from solvers.errors import GliodeError

Operator = Callable[[Tensor], Tensor]
Shape = Sequence[int]


class _Apply(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, operator: Operator, adjoint: Operator) -> Tensor:
        ctx.operator, ctx.adjoint = operator, adjoint
        return operator(x.detach())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _Apply.apply(grads[0], ctx.adjoint, ctx.operator), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Apply.apply(tangents[0], ctx.operator, ctx.adjoint)


class LinearMap:
    """A from tensors (..., *shape) to (..., *data_shape); `adjoint` is A^T. Flat points are taken too.

    operator, adjoint: act on the trailing axes, and leave the dtype as it is.
    """

    def __init__(self, shape: Shape, data_shape: Shape, operator: Operator, adjoint: Operator) -> None:
        self.shape, self.data_shape = tuple(shape), tuple(data_shape)
        self._operator, self._adjoint = operator, adjoint

    def __call__(self, x: Tensor) -> Tensor:
        """A x; x (..., *shape), or flat."""
        out: Tensor = _Apply.apply(_shaped(x, self.shape, "x"), self._operator, self._adjoint)
        return out

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y; y (..., *data_shape), or flat."""
        out: Tensor = _Apply.apply(_shaped(y, self.data_shape, "y"), self._adjoint, self._operator)
        return out


def _shaped(x: Tensor, shape: tuple[int, ...], what: str) -> Tensor:
    if x.ndim > len(shape) and x.shape[x.ndim - len(shape) :] == shape:
        return x
    if x.numel() != math.prod(shape):
        raise GliodeError(f"LinearMap: {what} has shape {tuple(x.shape)}, this map takes {shape}")
    return x.reshape(shape)


def convolution(shape: Shape, kernel: Tensor) -> LinearMap:
    """Convolution with a kernel of as many axes, odd along each and centred; the data have x's shape."""
    if kernel.ndim != len(shape) or any(size % 2 == 0 for size in kernel.shape):
        raise GliodeError(
            f"convolution: the kernel has shape {tuple(kernel.shape)}; give {len(shape)} axes of odd length"
        )
    padded = [n + size - 1 for n, size in zip(shape, kernel.shape, strict=True)]
    axes = tuple(range(-len(padded), 0))
    k = torch.fft.rfftn(kernel.double(), padded)
    inside: tuple[Any, ...] = tuple(
        slice(size // 2, size // 2 + n) for n, size in zip(shape, kernel.shape, strict=True)
    )
    corner: tuple[Any, ...] = tuple(slice(n) for n in shape)

    def filtered(x: Tensor, k: Tensor) -> Tensor:
        transformed = torch.fft.rfftn(x, padded, axes)
        return torch.fft.irfftn(transformed * k.to(transformed.dtype), padded, axes)

    def operator(x: Tensor) -> Tensor:
        return filtered(x, k)[(..., *inside)].clone()

    def adjoint(y: Tensor) -> Tensor:
        whole = y.new_zeros(*y.shape[: y.ndim - len(padded)], *padded)
        whole[(..., *inside)] = y
        return filtered(whole, k.conj())[(..., *corner)].clone()

    return LinearMap(shape, shape, operator, adjoint)


def gaussian(width: float, axes: int = 1) -> Tensor:
    """A kernel exp(-|j|^2 / (2 width^2)) of sum 1, cut at 4 widths; width in pixels."""
    if not (math.isfinite(width) and width > 0):
        raise GliodeError(f"gaussian: the width must be positive, in pixels, got {width}")
    j = torch.arange(-math.ceil(4 * width), math.ceil(4 * width) + 1, dtype=torch.float64)
    line = torch.exp(-(j**2) / (2 * width**2))
    kernel = line
    for _ in range(axes - 1):
        kernel = kernel[..., None] * line
    return kernel / kernel.sum()


def heat(shape: Shape, time: float) -> LinearMap:
    """u(time) from u(0), u_t = Laplace u with insulated edges; cells of size 1, centred differences.

    exp(-time K) exactly, by the cosines that are K's eigenvectors.
    """
    if not (math.isfinite(time) and time > 0):
        raise GliodeError(f"heat: the time must be positive, in units of (cell)^2 / D, got {time}")
    matrices = []
    for n in shape:
        k, j = torch.arange(n, dtype=torch.float64), torch.arange(n, dtype=torch.float64) + 0.5
        cosines = torch.cos(math.pi * k[:, None] * j / n) * (2 / n) ** 0.5
        cosines[0] /= 2**0.5
        decay = torch.exp(-time * (2 * torch.sin(math.pi * k / (2 * n))).square())
        matrices.append((cosines.mT * decay) @ cosines)

    def operator(x: Tensor) -> Tensor:
        for axis, matrix in enumerate(matrices, -len(matrices)):
            x = torch.tensordot(x, matrix.to(x), ([axis], [0])).movedim(-1, axis)
        return x.contiguous()

    return LinearMap(shape, shape, operator, operator)


def inpainting(seen: Tensor) -> LinearMap:
    """The pixels where the boolean `seen` is True, as one row; the adjoint puts zero elsewhere."""
    if seen.dtype != torch.bool or not bool(seen.any()):
        raise GliodeError("inpainting: `seen` must be boolean and True somewhere")
    mask = seen.clone()

    def adjoint(y: Tensor) -> Tensor:
        out = y.new_zeros(*y.shape[:-1], *mask.shape)
        out[..., mask] = y
        return out

    return LinearMap(mask.shape, (int(mask.sum()),), lambda x: x[..., mask], adjoint)


def downsampling(shape: Shape, factor: int) -> LinearMap:
    """Means over boxes of `factor` pixels along each axis; to invert it is super-resolution."""
    if factor < 1 or any(n % factor for n in shape):
        raise GliodeError(f"downsampling: {factor} does not divide the shape {tuple(shape)}")
    coarse = tuple(n // factor for n in shape)
    split = [size for n in coarse for size in (n, factor)]
    within = tuple(range(1 - len(split), 0, 2))

    def operator(x: Tensor) -> Tensor:
        return x.reshape(*x.shape[: x.ndim - len(coarse)], *split).mean(within)

    def adjoint(y: Tensor) -> Tensor:
        for axis in range(-len(coarse), 0):
            y = y.repeat_interleave(factor, axis)
        return y / factor ** len(coarse)

    return LinearMap(shape, coarse, operator, adjoint)


def tomography(pixels: int, angles: int, rays: int, reach: float = 1.0) -> LinearMap:
    r"""Parallel beams through pixels x pixels on the square [-1, 1]^2; data (angles, rays).

    x[i, j] is the value on the pixel with centre (-1 + (j + 1/2) h, -1 + (i + 1/2) h), h = 2 / pixels. The
    ray (a, k) runs along (-sin, cos)(theta), theta = pi a / angles, at the distance
    s = reach (-1 + (2k + 1) / rays) from the origin (reach sqrt(2): past the corners too). The weights are
    the lengths of the ray in the pixels (Siddon 1985), exact to rounding.
    """
    if min(pixels, angles, rays) < 1:
        raise GliodeError(f"tomography: {pixels} pixels, {angles} angles, {rays} rays: give at least 1 each")
    if not 0 < reach <= 2:
        raise GliodeError(f"tomography: the reach must lie in (0, 2], half a side being 1, got {reach}")
    theta = np.repeat(np.pi * np.arange(angles) / angles, rays)
    s = reach * np.tile(-1 + (2 * np.arange(rays) + 1) / rays, angles)
    feet = np.stack([s * np.cos(theta), s * np.sin(theta)])[..., None]
    along = np.stack([-np.sin(theta), np.cos(theta)])[..., None]
    planes, h = np.linspace(-1, 1, pixels + 1), 2 / pixels
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.concatenate(list((planes - feet) / along), axis=1)
    t = np.sort(np.clip(np.nan_to_num(t, nan=4.0), -4, 4), axis=1)  # 4: beyond the square
    middle = np.floor((feet + along * ((t[:, 1:] + t[:, :-1]) / 2) + 1) / h).astype(int)
    length = np.diff(t, axis=1)
    hit = (middle >= 0).all(0) & (middle < pixels).all(0) & (length > 1e-14)
    ray, _ = np.nonzero(hit)
    column, row = middle[:, hit]
    matrix = scipy.sparse.csr_array((length[hit], (ray, row * pixels + column)), (angles * rays, pixels**2))
    ways = {}
    for dtype in (np.float64, np.float32):
        there = matrix.astype(dtype)
        ways[np.dtype(dtype)] = there, there.T.tocsr()

    def product(x: Tensor, way: int, shape: tuple[int, int]) -> Tensor:
        columns = x.numpy().reshape(-1, math.prod(x.shape[-2:])).T
        out = (ways[columns.dtype][way] @ columns).T
        return torch.from_numpy(np.ascontiguousarray(out)).view(*x.shape[:-2], *shape)

    return LinearMap(
        (pixels, pixels),
        (angles, rays),
        lambda x: product(x, 0, (angles, rays)),
        lambda y: product(y, 1, (pixels, pixels)),
    )


def phantom(pixels: int) -> Tensor:
    """A head in section, (pixels, pixels), values in [0, 1]: skull, brain, two ventricles and a tumour."""
    ellipses = (  # value added, centre, half axes, in [-1, 1]^2, rows first
        (1.0, (0.0, 0.0), (0.92, 0.76)),
        (-0.7, (0.0, 0.0), (0.84, 0.68)),
        (-0.2, (-0.1, -0.2), (0.28, 0.1)),
        (-0.2, (-0.1, 0.2), (0.28, 0.1)),
        (0.4, (0.42, 0.25), (0.2, 0.2)),
    )
    line = (torch.arange(pixels, dtype=torch.float64) + 0.5) * 2 / pixels - 1
    out = torch.zeros(pixels, pixels, dtype=torch.float64)
    for value, (row, column), (tall, wide) in ellipses:
        out[((line[:, None] - row) / tall) ** 2 + ((line - column) / wide) ** 2 <= 1] += value
    return out
