r"""Ridge regularizers: the responses of trained filters, each paid for by a trained potential.

    R(x) = sum_c sum_p psi_c((W x)_c(p)),    R'(x) = W^T psi'(W x),    R''(x) = W^T diag(psi''(W x)) W

W is a convolution ("valid": no edge is made up) of mean-free filters, normalised to ||W|| <= 1 by its
certified bound, psi_c even with psi_c'' in [-low_c, high_c] (`potentials`). Hence, whatever the weights,

    <R'(x) - R'(z), x - z> >= -|| diag(low)^(1/2) W ||^2 ||x - z||^2,

0 for convex potentials, at most 1 for those of low <= 1; the Lipschitz constant likewise with max(low, high).

    CRR     convex (Goujon, Neumayer, Bohra, Ducotterd and Unser 2023)
    WCRR    weakly convex of modulus <= 1: with the misfit of denoising, 1/2 ||x - y||^2, convex up to the
            weight 1 (Goujon, Neumayer and Unser 2024)
    fields of experts    Student potentials (Roth and Black 2009)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from inverse.regularizers.learned.energy import Energy, Guarantee
from inverse.regularizers.learned.potentials import POTENTIALS, Potential
from solvers.errors import GliodeError
from solvers.node.convolutions import Convolution, adjoint, convolve, norm_bound

PART = 2**17  # responses in a part


class Ridge(Energy):
    """R of images (batch, rows, columns) or volumes (batch, x, y, z), dim 2 or 3.

    channels, sizes: of the chain of kernels that makes the filters, from one channel on; potential: a name of
    POTENTIALS, with its `options`. A single kernel starts with the cosines of lowest frequency on its window,
    a chain with random numbers. Raises GliodeError for settings that make no sense.
    """

    def __init__(
        self,
        channels: Sequence[int] = (48,),
        sizes: Sequence[int] = (7,),
        dim: int = 2,
        potential: str = "smooth_l1",
        **options: Any,
    ) -> None:
        super().__init__()
        if potential not in POTENTIALS:
            raise GliodeError(f"ridge: potential {potential!r} is not one of {', '.join(POTENTIALS)}")
        self.conv = Convolution((1, *channels), sizes, dim)
        if len(sizes) == 1 and channels[0] < sizes[0] ** dim:
            self.conv.kernels[0].data = cosines(channels[0], sizes[0], dim).to(self.conv.kernels[0])
        try:
            self.potential = POTENTIALS[potential](channels[-1], **options)
        except TypeError as error:
            raise GliodeError(f"ridge: options {options} for potential {potential}: {error}") from error
        self._settings = {
            **{"channels": list(channels), "sizes": list(sizes), "dim": dim, "potential": potential},
            **options,
        }
        self._kept: tuple[list[tuple[Tensor, int]], Tensor] | None = None

    def kernel(self) -> Tensor:
        """W's kernel, on the tape; of frozen weights it is made once."""
        weights = list(self.conv.kernels)
        if any(w.requires_grad for w in weights):
            return self.conv.kernel()
        mine = [(w, w._version) for w in weights]
        kept = self._kept
        if kept is None or any(a is not b or i != j for (a, i), (b, j) in zip(mine, kept[0], strict=True)):
            with torch.no_grad():
                kept = self._kept = mine, self.conv.kernel()
        return kept[1]

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel()
        if any(p.requires_grad for p in self.parameters()):
            return self.potential(convolve(x[:, None], kernel)).flatten(1).sum(1)
        value: Tensor = _Swept.apply(x, kernel, self.potential)
        return value

    def gradient(self, x: Tensor) -> Tensor:
        kernel = self.kernel()
        return _dual(x, kernel, self.potential)

    def guarantee(self) -> Guarantee:
        with torch.no_grad():
            kernel = self.kernel()
            low, high = (
                c.to(kernel).reshape(-1, *(1,) * (kernel.ndim - 1)) for c in self.potential.curvature()
            )
            modulus = float(norm_bound(low.sqrt() * kernel)) ** 2 if bool(low.any()) else 0.0
            lipschitz = float(norm_bound(torch.maximum(low, high).sqrt() * kernel)) ** 2
        return Guarantee(modulus, lipschitz, False)  # constants cost nothing

    def settings(self) -> dict[str, Any]:
        return dict(self._settings)

    def require_fit(self, shape: tuple[int, ...]) -> None:
        self.conv.require_fit(shape)


class FieldsOfExperts(Ridge):
    """A Ridge with Student potentials, log(1 + t^2): heavy tails, and no convexity to speak of."""

    def __init__(
        self, channels: Sequence[int] = (48,), sizes: Sequence[int] = (7,), dim: int = 2, **options: Any
    ) -> None:
        super().__init__(channels, sizes, dim, "student", **options)

    def settings(self) -> dict[str, Any]:
        return {name: value for name, value in super().settings().items() if name != "potential"}


def cosines(count: int, size: int, dim: int) -> Tensor:
    """The orthonormal cosine transform's functions on a window, (count, 1, *size), without the constant."""
    k, j = torch.arange(size, dtype=torch.float64), torch.arange(size, dtype=torch.float64) + 0.5
    line = torch.cos(math.pi * k[:, None] * j / size) * math.sqrt(2 / size)
    line[0] /= math.sqrt(2)
    orders = sorted(itertools.product(range(size), repeat=dim), key=lambda n: sum(i * i for i in n))
    each = []
    for order in orders[1 : count + 1]:
        product = torch.ones((), dtype=torch.float64)
        for i in order:
            product = product[..., None] * line[i]
        each.append(product)
    return torch.stack(each)[:, None]


def _dual(x: Tensor, kernel: Tensor, potential: Potential) -> Tensor:
    """W^T psi'(W x), on the tape."""
    return adjoint(potential.slope(convolve(x[:, None], kernel)), kernel)[:, 0]


class _Swept(Function):
    """R(x) with frozen weights; R'(x) is found on the way, part by part, while a part is in the cache."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, potential: Potential) -> Tensor:
        size, rows = kernel.shape[2], x.shape[1] - kernel.shape[2] + 1
        step = max(1, PART * x.shape[1] // (len(kernel) * x[0].numel()))
        values, dual = x.new_zeros(len(x)), torch.zeros_like(x)
        for i in range(len(x)):
            for first in range(0, rows, step):
                last = min(first + step, rows) + size - 1
                value, slope = potential.value_and_slope(convolve(x[i : i + 1, None, first:last], kernel))
                values[i] += value.sum()
                dual[i, first:last] += adjoint(slope, kernel)[0, 0]
        ctx.kernel, ctx.potential = kernel, potential
        ctx.save_for_backward(x, dual)
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, dual = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            dual = _dual(x, ctx.kernel, ctx.potential)
        return grads[0].reshape(-1, *(1,) * (x.ndim - 1)) * dual, None, None
