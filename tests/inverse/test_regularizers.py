"""Regularizers: value, dual gradient and Hessian action against dense algebra and the tape."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from inverse.regularizers.sobolev import Seminorm
from inverse.regularizers.tikhonov import Tikhonov
from solvers.errors import GliodeError
from solvers.spaces import DepthSobolev, Euclidean, GramSpace, Product, Space

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


def test_a_weight_that_is_not_positive_is_refused() -> None:
    for weight in (0.0, -1.0, float("nan")):
        with pytest.raises(GliodeError, match="weight"):
            Tikhonov(Euclidean(1), weight)
        with pytest.raises(GliodeError, match="weight"):
            Seminorm(lambda a: a, weight)
    with pytest.raises(GliodeError, match="reference"):
        Tikhonov(Euclidean(1), 1.0, torch.zeros(2))
