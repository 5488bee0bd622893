"""Linear test problems: exact adjoints, closed forms, the tape."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import scipy.signal
import torch
from torch import Tensor
from torch.autograd import forward_ad

from inverse.linear_problems import (
    LinearMap,
    convolution,
    downsampling,
    gaussian,
    heat,
    inpainting,
    phantom,
    tomography,
)
from solvers.errors import GliodeError


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MAPS: dict[str, Callable[[], LinearMap]] = {
    "convolution": lambda: convolution((9,), draw(5)),
    "convolution, wide kernel": lambda: convolution((6, 7), draw(9, 3)),
    "tomography": lambda: tomography(7, 5, 6),
    "heat": lambda: heat((6, 5), 0.7),
    "inpainting": lambda: inpainting(draw(5, 4) > 0),
    "downsampling": lambda: downsampling((6, 9), 3),
}


@pytest.mark.parametrize("name", MAPS)
def test_the_adjoint_is_the_transpose_and_the_tape_knows_both(name: str) -> None:
    A = MAPS[name]()
    x, y = draw(*A.shape, seed=1), draw(*A.data_shape, seed=2)
    product = float((A(x) * y).sum())
    assert A(x).shape == A.data_shape and A.adjoint(y).shape == A.shape
    assert float((A.adjoint(y) * x).sum()) == pytest.approx(product, rel=1e-12)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((A(leaf) * y).sum(), leaf)
    torch.testing.assert_close(gradient, A.adjoint(y), rtol=0, atol=0)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(A(forward_ad.make_dual(x, 2 * x))).tangent
    torch.testing.assert_close(tangent, 2 * A(x))
    assert torch.autograd.gradgradcheck(lambda x: A(x).square().sum(), leaf)
    torch.testing.assert_close(A(x.reshape(-1)), A(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", MAPS)
def test_a_batch_is_mapped_one_by_one_in_its_own_precision(name: str) -> None:
    A = MAPS[name]()
    x, y = draw(3, 2, *A.shape, seed=1), draw(3, 2, *A.data_shape, seed=2)
    for operator, batch in ((A, x), (A.adjoint, y)):
        one_by_one = torch.stack([operator(part) for part in batch.flatten(0, 1)]).unflatten(0, (3, 2))
        torch.testing.assert_close(operator(batch), one_by_one, rtol=1e-13, atol=1e-13)
        single = operator(batch.float())
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), one_by_one, rtol=1e-4, atol=1e-5)


def test_convolution_is_that_of_scipy() -> None:
    x, kernel = draw(8, 6), draw(3, 5, seed=1)
    expected = scipy.signal.convolve(x.numpy(), kernel.numpy(), mode="same", method="direct")
    np.testing.assert_allclose(convolution((8, 6), kernel)(x), expected, rtol=1e-12, atol=1e-13)


def test_the_gaussian_kernel_has_its_width() -> None:
    k = gaussian(2.0, axes=2)
    j = torch.arange(17, dtype=torch.float64) - 8
    assert float(k.sum()) == pytest.approx(1) and k.shape == (17, 17)
    assert float((k.sum(0) * j**2).sum()) == pytest.approx(4, rel=0.01)  # 0.2 % is cut off


def test_heat_is_the_matrix_exponential() -> None:
    K = np.diag([1.0, 2, 2, 2, 1]) - np.diag(np.ones(4), 1) - np.diag(np.ones(4), -1)
    x = draw(5, 5)
    one = scipy.linalg.expm(-0.7 * K)
    np.testing.assert_allclose(heat((5,), 0.7)(x[0]), one @ x[0].numpy(), rtol=1e-12)
    np.testing.assert_allclose(heat((5, 5), 0.7)(x), one @ x.numpy() @ one, rtol=1e-12)


def test_rays_through_a_square_have_the_length_of_its_chords() -> None:
    """A slab |x| <= 1, |y| <= 1 of ones: Liang and Barsky's clipping, ray by ray."""
    A = tomography(9, 7, 12)
    got = A(torch.ones(9, 9, dtype=torch.float64))
    for a in range(7):
        theta = math.pi * a / 7
        for k in range(12):
            s = -1 + (2 * k + 1) / 12
            foot, along = (
                (s * math.cos(theta), s * math.sin(theta)),
                (-math.sin(theta), math.cos(theta)),
            )
            low, high = -9.0, 9.0
            for f, d in zip(foot, along, strict=True):
                if abs(d) > 1e-12:
                    ends = sorted(((-1 - f) / d, (1 - f) / d))
                    low, high = max(low, ends[0]), min(high, ends[1])
            assert float(got[a, k]) == pytest.approx(max(high - low, 0), abs=1e-12)


def test_one_pixel_is_seen_where_it_lies() -> None:
    x = torch.zeros(4, 4, dtype=torch.float64)
    x[0, 3] = 1  # the corner right (along the first axis of the plane) and low (along the second)
    data = tomography(4, 2, 4)(x)
    assert data.tolist() == [[0, 0, 0, pytest.approx(0.5)], [pytest.approx(0.5), 0, 0, 0]]


def test_rays_reach_the_corners_where_asked() -> None:
    """45 degrees, s = +-2^(1/2) 3/4: the chord through a square's corner is 2 (2^(1/2) - |s|)."""
    data = tomography(5, 4, 4, reach=2**0.5)(torch.ones(5, 5, dtype=torch.float64))
    assert data[1].tolist() == pytest.approx([2**0.5 / 2, 3 * 2**0.5 / 2, 3 * 2**0.5 / 2, 2**0.5 / 2])


def test_a_disc_has_its_chords() -> None:
    pixels, radius = 200, 0.6
    line = (torch.arange(pixels, dtype=torch.float64) + 0.5) * 2 / pixels - 1
    disc = (line[:, None] ** 2 + line**2 <= radius**2).double()
    s = -1 + (2 * torch.arange(15, dtype=torch.float64) + 1) / 15
    chords = 2 * (radius**2 - s**2).clamp(min=0).sqrt()
    assert float((tomography(pixels, 6, 15)(disc) - chords).abs().max()) < 3 * 2 / pixels


def test_pictures_with_parts_missing() -> None:
    x = torch.arange(12, dtype=torch.float64).view(2, 6)
    assert downsampling((2, 6), 2)(x).tolist() == [[3.5, 5.5, 7.5]]
    seen = torch.tensor([[True, False, False], [False, True, True]])
    assert inpainting(seen)(x[:, :3]).tolist() == [0, 7, 8]
    picture = phantom(64)
    assert float(picture.min()) >= 0 and float(picture.max()) <= 1.0
    assert len(picture.unique()) >= 5 and float(picture[0].max()) == 0


def test_bad_input_is_named() -> None:
    cases: dict[str, Callable[[], object]] = {
        "odd length": lambda: convolution((8,), draw(4)),
        "1 axes": lambda: convolution((8,), draw(3, 3)),
        "width": lambda: gaussian(0.0),
        "time": lambda: heat((8,), -1.0),
        "boolean": lambda: inpainting(torch.zeros(3)),
        "somewhere": lambda: inpainting(torch.zeros(3, dtype=torch.bool)),
        "divide": lambda: downsampling((8, 6), 4),
        "at least 1": lambda: tomography(8, 0, 4),
        "reach": lambda: tomography(8, 4, 4, 0.0),
        "shape": lambda: heat((8,), 1.0)(draw(7)),
    }
    for message, call in cases.items():
        with pytest.raises(GliodeError, match=message):
            call()
