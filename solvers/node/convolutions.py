r"""Convolutions of images and volumes, and a certified upper bound of their norm.

    (K x)_o(p) = sum_i sum_j k_oi(j) x_i(p + j),    K: (batch, in, *grid) -> (batch, out, *smaller grid)

"valid": p runs where the kernel lies wholly inside, so that no values beyond the edge are made up (torch's
order of indices, not mirrored). Such a K cuts out of the convolution on all of Z^d, whence

    ||K|| <= sup_w s(w),    s(w) the largest singular value of the symbol  k^(w) = sum_j k(j) exp(i j . w).

For fixed v, f(w) = |k^(w) v|^2 >= 0 is along each axis a trigonometric polynomial of degree size - 1. One of
degree d and values in [0, M] that is M at w0 is at least M cos^2(d (w - w0) / 2) for |w - w0| <= pi / d
(M. Riesz 1914: compared with M / 2 (1 + cos d w)), and some point of a regular grid of N > d on [0, 2 pi) is
not further away than pi / N. Axis by axis therefore

    sup_w s(w) <= max over the grid of s times the product of 1 / cos(pi d / (2 N)) over the axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from solvers.errors import GliodeError

_FORWARD = {2: functional.conv2d, 3: functional.conv3d}
_ADJOINT = {2: functional.conv_transpose2d, 3: functional.conv_transpose3d}


def convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """K x, (batch, out, *smaller grid), of x (batch, in, *grid); kernel (out, in, *size). On the tape."""
    return _FORWARD[kernel.ndim - 2](x, kernel)


def adjoint(y: Tensor, kernel: Tensor) -> Tensor:
    """K^T y, (batch, in, *grid), of y (batch, out, *smaller grid). On the tape."""
    if kernel.shape[1] == 1 and kernel.ndim == 4 and y.dtype == torch.float32 and not y.is_cuda:
        # torch's transposed convolution is many times slower where it makes one channel of float32
        size = tuple(kernel.shape[2:])
        grid = tuple(n + s - 1 for n, s in zip(y.shape[2:], size, strict=True))
        return functional.fold(kernel.flatten(1).mT @ y.flatten(2), grid, size)
    return _ADJOINT[kernel.ndim - 2](y, kernel)


def composed(kernels: Sequence[Tensor]) -> Tensor:
    """The one kernel of K_n ... K_1: valid convolutions after one another are a valid one. On the tape."""
    whole = kernels[0]
    for kernel in kernels[1:]:
        whole = adjoint(whole.transpose(0, 1), kernel.transpose(0, 1)).transpose(0, 1)
    return whole


def norm_bound(kernel: Tensor, samples: int = 16) -> Tensor:
    """A certified upper bound of ||K|| on any grid, 0-d, on the tape (once) for the kernel (out, in, *size).

    samples: N over the size, along each axis; it lies above sup s by at most 1.005 an axis for 16. Rounded
    up, also for what `limited` rounds.
    """
    dim, sizes = kernel.ndim - 2, kernel.shape[2:]
    counts = [samples * size for size in sizes]
    axes = tuple(range(-dim, 0))
    slack = 1 / math.prod(math.cos(math.pi * (s - 1) / (2 * n)) for s, n in zip(sizes, counts, strict=True))
    wide = kernel.shape[1] > kernel.shape[0]
    with torch.no_grad():  # where the largest singular value is, and its vector; in float64
        k = kernel.detach().double()
        k = k.transpose(0, 1) if wide else k
        gram = _spectrum(_autocorrelation(k, axes), sizes, counts, axes)
        n = len(gram)
        if n == 1:
            where, v = int(gram.real.argmax()), gram.new_ones(1)
        else:
            gram = gram.reshape(n, n, -1).permute(2, 0, 1)
            where = int(torch.linalg.eigvalsh(gram)[:, -1].argmax())
            v = torch.linalg.eigh(gram[where])[1][:, -1]
        last = counts[-1] // 2 + 1
        place = torch.unravel_index(torch.tensor(where), (*counts[:-1], last))
        phase = k.new_zeros(sizes)
        for axis, (p, size, count) in enumerate(zip(place, sizes, counts, strict=True)):
            line = 2 * math.pi * float(p) / count * torch.arange(size, dtype=torch.float64)
            phase = phase + line.to(phase).reshape([-1 if a == axis else 1 for a in range(dim)])
    own = kernel.double()
    own = own.transpose(0, 1) if wide else own
    at = torch.complex((own * phase.cos()).sum(axes), -(own * phase.sin()).sum(axes))
    size_of = torch.linalg.vector_norm(torch.view_as_real(at @ v))
    return (size_of * (slack * (1 + _margin(kernel)))).to(kernel)


def limited(kernel: Tensor, limit: float | Tensor = 1.0) -> Tensor:
    """min(1, limit / bound) times the kernel, so that ||K|| <= limit; on the tape."""
    return kernel * (limit / norm_bound(kernel).clamp(min=limit))


def _margin(kernel: Tensor) -> float:
    """More than what rounding each entry, and the factor of `limited`, moves the norm by, relatively."""
    return 8 * math.sqrt(kernel.numel()) * torch.finfo(kernel.dtype).eps


def _autocorrelation(k: Tensor, axes: tuple[int, ...]) -> Tensor:
    """sum_o (k_oi * k_oj)(lag), (in, in, *lags), lag 0 first and the negative ones last."""
    lags = [2 * k.shape[axis] - 1 for axis in axes]
    symbol = torch.fft.rfftn(k, lags, axes)
    out: Tensor = torch.fft.irfftn(torch.einsum("oi...,oj...->ij...", symbol.conj(), symbol), lags, axes)
    return out


def _spectrum(r: Tensor, sizes: Sequence[int], counts: Sequence[int], axes: tuple[int, ...]) -> Tensor:
    """k^* k on the grid of frequencies, half of them along the last axis (the others are conjugates)."""
    for axis, size, count in zip(axes, sizes, counts, strict=True):
        shape = list(r.shape)
        shape[axis] = count - (2 * size - 1)
        first, rest = r.split([size, size - 1], axis)
        r = torch.cat([first, r.new_zeros(shape), rest], axis)
    return torch.fft.rfftn(r, dim=axes)


class Convolution(nn.Module):
    """K_n ... K_1 of free kernels, mean-free and divided by the bound of its norm: ||K|| <= 1 nearly.

    channels (in, ..., out) and sizes, one for each K_i (odd, so that the whole is odd too), `dim` 2 or 3. The
    chain is a parametrisation: `kernel()` is composed first, and applied as one. Mean-free: the kernel of
    every output, of each input, sums to 0: constants are not seen.

    Raises GliodeError for a chain that makes no sense.
    """

    def __init__(self, channels: Sequence[int], sizes: Sequence[int], dim: int = 2) -> None:
        super().__init__()
        if dim not in _FORWARD:
            raise GliodeError(f"convolution: dim {dim} is not 2 or 3")
        if len(channels) != len(sizes) + 1 or not sizes or min(channels) < 1:
            raise GliodeError(
                f"convolution: {len(channels)} numbers of channels {list(channels)} for {len(sizes)} sizes "
                f"{list(sizes)}; give the input's, and one after each kernel, all 1 or more"
            )
        if min(sizes) < 1 or any(size % 2 == 0 for size in sizes):
            raise GliodeError(f"convolution: sizes {list(sizes)}; give odd ones")
        if max(sizes) < 2:
            raise GliodeError(
                "convolution: mean-free kernels of one pixel are zero; give a size of 3 or more"
            )
        self.dim = dim
        self.size = sum(sizes) - len(sizes) + 1
        self.kernels = nn.ParameterList()
        for a, b, size in zip(channels, channels[1:], sizes, strict=False):
            self.kernels.append(nn.Parameter(torch.randn(b, a, *(size,) * dim) / math.sqrt(a * size**dim)))

    def kernel(self) -> Tensor:
        """The one kernel (out, in, *size) that is applied; on the tape."""
        kernels = list(self.kernels)
        axes = tuple(range(2, 2 + self.dim))
        large = max(range(len(kernels)), key=lambda i: kernels[i].shape[2])
        kernels[large] = kernels[large] - kernels[large].mean(axes, keepdim=True)
        whole = composed(kernels)  # its sum is the product of the sums
        return whole * ((1 - _margin(whole)) / norm_bound(whole))

    def forward(self, x: Tensor) -> Tensor:
        """K x of (batch, in, *grid)."""
        return convolve(x, self.kernel())

    def adjoint(self, y: Tensor) -> Tensor:
        """K^T y of (batch, out, *smaller grid)."""
        return adjoint(y, self.kernel())

    def require_fit(self, grid: Sequence[int]) -> None:
        """Raise GliodeError unless the kernel lies inside a grid of this shape somewhere."""
        if len(grid) != self.dim or min(grid) < self.size:
            raise GliodeError(
                f"convolution: a grid of shape {tuple(grid)}; its kernel needs {self.dim} axes of "
                f"{self.size} and more"
            )
