"""Regularizers: value, dual gradient and Hessian action against dense algebra and the tape."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from inverse.regularizers.constraints import Box, Positivity
from inverse.regularizers.interface import Proximable, Regularizer, Sum
from inverse.regularizers.sobolev import Seminorm
from inverse.regularizers.sparsity import Sparsity
from inverse.regularizers.tikhonov import Tikhonov
from inverse.regularizers.total_variation import ImageGradient, TotalVariation
from solvers.errors import GliodeError
from solvers.spaces import DepthSobolev, Diagonal, Euclidean, GramSpace, Product, Space

GRAM = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 3.0]], dtype=torch.float64)
FIELD = GramSpace(3, lambda a: GRAM @ a, lambda d: torch.linalg.solve(GRAM, d))
DEPTH = DepthSobolev(torch.tensor([0.0, 0.2, 1.0]), (2,), 0.5)


@pytest.mark.parametrize("space", [Euclidean(3, 0.5), FIELD, DEPTH, Product({"a": FIELD, "b": Euclidean(2)})])
def test_tikhonov_is_half_the_squared_norm_in_the_space(space: Space) -> None:
    reference, m, d = (torch.randn(space.shape, dtype=torch.float64) for _ in range(3))
    r = Tikhonov(space, 0.7, reference)
    assert float(r(m)) == pytest.approx(0.35 * space.norm(m - reference) ** 2)
    torch.testing.assert_close(r.gradient(m), 0.7 * space.gram(m - reference))
    torch.testing.assert_close(r.hessian_action(m, d), 0.7 * space.gram(d))
    leaf = m.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(r(leaf), leaf, create_graph=True)
    torch.testing.assert_close(gradient, r.gradient(m))
    torch.testing.assert_close(torch.autograd.grad(gradient, leaf, d)[0], r.hessian_action(m, d))
    assert gradcheck(r, (leaf,), check_forward_ad=True)
    assert gradgradcheck(r, (leaf,))
    assert float(Tikhonov(space)(reference)) == pytest.approx(0.5 * space.norm(reference) ** 2)


def test_the_seminorm_leaves_constants_free() -> None:
    stiffness = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 2.0, -1.0], [0.0, -1.0, 1.0]], dtype=torch.float64)
    m, d = torch.tensor([0.0, 1.0, 4.0]).double(), torch.tensor([1.0, 0.0, -1.0]).double()
    r = Seminorm(lambda a: stiffness @ a, 2.0)
    assert float(r(m)) == pytest.approx(1**2 + 3**2)
    assert float(r(m + 5)) == pytest.approx(float(r(m)))
    torch.testing.assert_close(r.gradient(m), 2 * stiffness @ m)
    torch.testing.assert_close(r.hessian_action(m, d), 2 * stiffness @ d)
    assert float(Seminorm(lambda a: stiffness @ a, reference=m)(m + 1)) == pytest.approx(0.0)
    assert gradgradcheck(r, (m.clone().requires_grad_(),))


def smooth() -> list[Regularizer]:
    stiffness = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 2.0, -1.0], [0.0, -1.0, 1.0]], dtype=torch.float64)
    tikhonov = Tikhonov(FIELD, 0.7, torch.ones(3).double())
    variation = TotalVariation(ImageGradient((3,)), 0.4, 0.2)
    terms: list[Regularizer] = [tikhonov, Seminorm(lambda a: stiffness @ a, 0.3), variation]
    return [*terms, Sum(terms, 2.0), Sum([Sum(terms), tikhonov])]


@pytest.mark.parametrize("which", range(5))
def test_every_smooth_one_keeps_the_interface(which: int) -> None:
    """Gradient and Hessian action are those of the value on the tape; the weight scales all three."""
    r, m, d = smooth()[which], *torch.randn(2, 3, dtype=torch.float64)
    leaf = m.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(r(leaf), leaf, create_graph=True)
    torch.testing.assert_close(r.gradient(m), gradient.detach())
    torch.testing.assert_close(r.hessian_action(m, d), torch.autograd.grad(gradient, leaf, d)[0])
    before, slope, action = float(r(m)), r.gradient(m), r.hessian_action(m, d)
    r.weight *= 3
    assert float(r(m)) == pytest.approx(3 * before)
    torch.testing.assert_close(r.gradient(m), 3 * slope)
    torch.testing.assert_close(r.hessian_action(m, d), 3 * action)


def test_a_sum_adds_its_terms() -> None:
    tikhonov, m = Tikhonov(FIELD, 0.7), torch.randn(3, dtype=torch.float64)
    assert float(Sum([tikhonov, Tikhonov(Euclidean(3), 2.0)], 0.5)(m)) == pytest.approx(
        0.25 * (0.7 * float(m @ GRAM @ m) + 2 * float(m @ m))
    )
    with pytest.raises(GliodeError, match="at least one"):
        Sum([])


def proximable() -> list[Proximable]:
    image = TotalVariation(ImageGradient((2, 2), 0.5), 0.3, tolerance=1e-7)
    gram = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]).double()) + 0.3
    field = GramSpace(4, lambda a: gram @ a, lambda d: torch.linalg.solve(gram, d))
    box = Box(Euclidean(4, 2.0), -0.2, torch.full((4,), 0.6).double())
    return [
        Tikhonov(field, 0.7, torch.ones(4).double()),
        Sparsity(Diagonal(torch.tensor([0.5, 1.0, 2.0, 4.0])), 0.4),
        Positivity(Euclidean(4)),
        box,
        image,
    ]


@pytest.mark.parametrize("which", range(5))
def test_every_prox_is_that_of_its_value(which: int) -> None:
    """No other point is lower, near or far; and two proxes are no farther apart than their points."""
    r, step = proximable()[which], 0.6
    m, other = torch.randn(2, 4, dtype=torch.float64)
    z = r.prox(m, step)

    def objective(x: torch.Tensor) -> float:
        return float(r(x)) + r.space.norm(x - m) ** 2 / (2 * step)

    best = objective(z)
    for size in (1e-4, 1e-2, 1.0):
        for _ in range(40):
            assert objective(z + size * torch.randn(4, dtype=torch.float64)) >= best - 1e-12
    assert r.space.norm(r.prox(other, step) - z) <= r.space.norm(other - m) * (1 + 1e-6)
    assert not z.requires_grad and z.data_ptr() != m.data_ptr()
    assert r.separable == (which in (1, 2, 3))


def test_a_weight_that_is_not_positive_is_refused() -> None:
    for weight in (0.0, -1.0, float("nan")):
        with pytest.raises(GliodeError, match="Sum: the weight"):
            Sum([Tikhonov(Euclidean(1))], weight)
        with pytest.raises(GliodeError, match="weight"):
            Tikhonov(Euclidean(1), weight)
        with pytest.raises(GliodeError, match="weight"):
            Seminorm(lambda a: a, weight)
    with pytest.raises(GliodeError, match="reference"):
        Tikhonov(Euclidean(1), 1.0, torch.zeros(2))
