"""Adversarial costs against closed forms, and trained critics against the best ones."""

from typing import Any

import pytest
import torch
from torch import Tensor

from inverse.losses import Mean
from inverse.methods import Adam
from inverse.regularizers.learned.energy import NOTHING, Energy, Guarantee
from inverse.trainers.adversarial import Adversarial, artefacts, balanced_weight, pairs
from inverse.training import evaluate, train
from solvers.errors import GliodeError


class Linear(Energy):
    """c . x, and curvature / 2 |x|^2."""

    def __init__(self, n: int, c: float = 0.0, curvature: float = 0.0) -> None:
        super().__init__()
        self.c = torch.nn.Parameter(torch.full((n,), c, dtype=torch.float64))
        self.curvature = curvature

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.c + self.curvature / 2 * x.square().flatten(1).sum(1)

    def guarantee(self) -> Guarantee:
        return NOTHING

    def settings(self) -> dict[str, Any]:
        return {"n": len(self.c)}


def draw(n: int, size: int, seed: int) -> Tensor:
    return torch.randn(n, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_cost_is_its_formula() -> None:
    true, naive = draw(5, 8, 0), draw(5, 8, 1)
    costs = Adversarial(Linear(8, 1.5, 2.0), penalty=3.0).eval()(pairs(true, naive)[0])
    middle = 1.5 + 2.0 * (true + naive) / 2
    apart = 1.5 * (true - naive).sum(1) + true.square().sum(1) - naive.square().sum(1)
    slope = (middle.square().sum(1) / 8).sqrt()
    assert bool((slope > 1).all())
    torch.testing.assert_close(costs, (apart / 8 + 3.0 * (slope - 1) ** 2)[:, None])


def test_a_flat_energy_has_a_cost_whose_gradient_is_finite() -> None:
    model = Adversarial(Linear(8))
    costs = model(pairs(draw(5, 8, 0), draw(5, 8, 1))[0])
    (gradient,) = torch.autograd.grad(costs.sum(), list(model.parameters()))
    expected = (draw(5, 8, 0) - draw(5, 8, 1)).sum(0) / 8
    torch.testing.assert_close(gradient, expected)


def test_training_finds_the_best_critic_of_two_distributions_that_are_shifts() -> None:
    """naive = true + d: |c| = 1 + |d| / (2 penalty) along d, at the cost -|d| - |d|^2 / (4 penalty)."""
    d = torch.tensor([0.3, -0.1, 0.0, 0.2], dtype=torch.float64)
    true = draw(64, 4, 2)
    model = Adversarial(Linear(4), penalty=2.0)
    found = train(model, Mean(), pairs(true, true + d), Adam(0.05, cosine=True), epochs=400)
    size = float(d.square().mean().sqrt())
    assert isinstance(model.energy, Linear)
    torch.testing.assert_close(model.energy.c.detach(), d / size * (1 + size / 4.0), rtol=1e-3, atol=1e-3)
    assert found.history[-1]["objective"] == pytest.approx(-size - size**2 / 8, rel=1e-3)


def test_the_cost_does_not_know_the_number_of_values() -> None:
    true, naive = draw(3, 16, 3), draw(3, 16, 4)
    doubled = [torch.cat([x, x], 1) for x in (true, naive)]
    few = Adversarial(Linear(16, 0.7, 1.0)).eval()(pairs(true, naive)[0])
    many = Adversarial(Linear(32, 0.7, 1.0)).eval()(pairs(doubled[0], doubled[1])[0])
    torch.testing.assert_close(few, many)


def test_evaluation_is_the_same_at_every_call_and_training_is_not() -> None:
    model, data = Adversarial(Linear(8, 1.0, 2.0)), pairs(draw(5, 8, 0), draw(5, 8, 1))
    assert evaluate(model, Mean(), data) == evaluate(model, Mean(), data)
    assert not torch.equal(model(data[0]), model(data[0]))


def test_artefacts_are_what_is_wrong() -> None:
    true, naive = draw(3, 4, 0), draw(3, 4, 1)
    inputs, targets = artefacts(true, naive)
    torch.testing.assert_close(inputs - targets, torch.cat([true, true]))


def test_at_the_balanced_weight_the_noise_and_a_unit_slope_balance() -> None:
    """White noise through an orthogonal map: |A^T e| = sd."""
    Q = torch.linalg.qr(draw(400, 400, 5))[0]
    weight = balanced_weight(lambda y: Q.mT @ y, 0.1 * draw(1, 400, 6)[0], 0.1)
    assert weight == pytest.approx(10.0, rel=0.1)


def test_bad_input_is_refused() -> None:
    with pytest.raises(GliodeError, match="penalty must be positive"):
        Adversarial(Linear(4), 0.0)
    with pytest.raises(GliodeError, match=r"give \(n, 2"):
        Adversarial(Linear(4))(draw(3, 4, 0))
    with pytest.raises(GliodeError, match="a naive one for each"):
        pairs(draw(3, 4, 0), draw(2, 4, 0))
