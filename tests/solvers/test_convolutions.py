"""Convolutions against dense matrices, and the bound of their norm against the norms of those."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from solvers.errors import GliodeError
from solvers.node.convolutions import Convolution, adjoint, composed, convolve, limited, norm_bound

SHAPES = [
    (1, 1, 3, 3),
    (4, 1, 5, 5),
    (1, 3, 3, 5),
    (3, 2, 3, 3),
    (2, 5, 3, 3),
    (2, 1, 3, 3, 3),
    (3, 2, 1, 3, 2),
]


def random_kernel(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(kernel: Tensor, grid: tuple[int, ...]) -> Tensor:
    """The matrix, by the sum of the definition."""
    out, into, *size = kernel.shape
    smaller = [n - s + 1 for n, s in zip(grid, size, strict=True)]
    matrix = torch.zeros(out, *smaller, into, *grid, dtype=kernel.dtype)
    for p in itertools.product(*(range(n) for n in smaller)):
        window = tuple(slice(a, a + s) for a, s in zip(p, size, strict=True))
        rows: Any = (slice(None), *p, slice(None), *window)
        matrix[rows] = kernel
    return matrix.reshape(out * torch.Size(smaller).numel(), -1)


@pytest.mark.parametrize("shape", SHAPES)
def test_apply_and_adjoint_are_the_matrix_and_its_transpose(shape: tuple[int, ...]) -> None:
    kernel, grid = random_kernel(shape), (7, 6, 5)[: len(shape) - 2]
    matrix = dense(kernel, grid)
    x = random_kernel((2, shape[1], *grid), 1)
    y = convolve(x, kernel)
    torch.testing.assert_close(y.reshape(2, -1), x.reshape(2, -1) @ matrix.mT)
    torch.testing.assert_close(adjoint(y, kernel).reshape(2, -1), y.reshape(2, -1) @ matrix)


@pytest.mark.parametrize("shape", SHAPES)
def test_bound_is_above_every_grid_and_near_the_norm_on_large_ones(shape: tuple[int, ...]) -> None:
    for seed in range(3):
        kernel = random_kernel(shape, seed)
        bound = float(norm_bound(kernel))
        grid = (14, 14) if len(shape) == 4 else (7, 7, 7)
        norm = float(torch.linalg.matrix_norm(dense(kernel, grid), 2))
        assert norm < bound
        # the supremum, by a grid finer than the bound's and not a multiple of it
        symbol = torch.fft.fftn(
            kernel, (127, 126) if len(shape) == 4 else (47, 46, 45), dim=tuple(range(2, len(shape)))
        )
        top = float(torch.linalg.matrix_norm(symbol.flatten(2).permute(2, 0, 1), 2).max())
        assert top <= bound <= 1.016 * top
        assert norm > 0.7 * top  # so that the supremum is what the norm comes to


def test_slack_is_sharp_for_a_peak_between_the_samples() -> None:
    """2 |sin w| has its largest value, 2, midway between two of 6 samples."""
    kernel = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64).reshape(1, 1, 1, 3)
    samples = float(torch.fft.fft(kernel[0, 0, 0], 6).abs().max())
    assert samples == pytest.approx(3**0.5)
    assert 2 <= float(norm_bound(kernel, 2)) == pytest.approx(2, rel=1e-12)


@pytest.mark.parametrize("shape", [(3, 1, 3, 3), (2, 4, 3, 3), (2, 1, 3, 3, 3)])
def test_bound_has_the_derivative_of_differences(shape: tuple[int, ...]) -> None:
    kernel = random_kernel(shape).requires_grad_()
    assert torch.autograd.gradcheck(norm_bound, (kernel,))
    assert torch.autograd.gradcheck(lambda k: limited(k, 0.7), (kernel,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_limited_keeps_what_is_below_and_brings_down_what_is_above(dtype: torch.dtype) -> None:
    kernel = random_kernel((4, 2, 3, 3)).to(dtype)
    small = 0.1 * kernel / norm_bound(kernel)
    assert torch.equal(limited(small, 1.0), small)
    # on a torus the norm is the largest singular value of the discrete symbol, and it is attained
    symbol = torch.fft.fftn(limited(kernel, 1.0).double(), (48, 48), dim=(2, 3))
    norm = float(torch.linalg.matrix_norm(symbol.permute(2, 3, 0, 1), 2).max())
    assert 0.98 < norm <= 1


def test_a_chain_is_one_convolution() -> None:
    kernels = [random_kernel(shape, i) for i, shape in enumerate([(3, 1, 5, 5), (2, 3, 3, 3), (4, 2, 1, 1)])]
    x = random_kernel((2, 1, 11, 9), 9)
    step = x
    for kernel in kernels:
        step = convolve(step, kernel)
    torch.testing.assert_close(convolve(x, composed(kernels)), step)


@pytest.mark.parametrize("dim", [2, 3])
def test_module_is_mean_free_and_of_norm_one(dim: int) -> None:
    torch.manual_seed(0)
    module = Convolution((1, 3, 5), (3, 3), dim).double()
    module.require_fit((5,) * dim)
    x = random_kernel((2, 1, *(9,) * dim))
    y = module(x)
    assert y.shape == (2, 5, *(5,) * dim)
    torch.testing.assert_close(module(x + 3.0), y)
    w = random_kernel(tuple(y.shape), 1)
    assert float((y * w).sum()) == pytest.approx(float((x * module.adjoint(w)).sum()), rel=1e-12)
    kernel = module.kernel().detach()
    assert (
        0.98
        < float(torch.fft.fftn(kernel, (64,) * dim, dim=tuple(range(2, 2 + dim))).norm(dim=(0, 1)).max())
        <= 1
    )


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(GliodeError, match="dim 4"):
        Convolution((1, 2), (3,), 4)
    with pytest.raises(GliodeError, match="one after each kernel"):
        Convolution((1, 2), (3, 3))
    with pytest.raises(GliodeError, match="give odd ones"):
        Convolution((1, 2), (4,))
    with pytest.raises(GliodeError, match="mean-free"):
        Convolution((1, 2), (1,))
    with pytest.raises(GliodeError, match="2 axes of 5"):
        Convolution((1, 2), (5,)).require_fit((4, 8))
