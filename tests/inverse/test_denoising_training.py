"""Denoisers trained on Gaussian fields, whose best denoiser is known."""

from typing import Any

import pytest
import torch
from torch import Tensor

from inverse.losses import Mean, SquaredError
from inverse.methods import Adam
from inverse.regularizers.learned.energy import Energy, Guarantee
from inverse.trainers.denoising import Denoising, DenoisingScore
from inverse.training import evaluate, train
from solvers.errors import GliodeError


class Squares(Energy):
    """1/2 sum_k a_k x_k^2."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.zeros(n, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.a * x.square()).sum(1) / 2

    def guarantee(self) -> Guarantee:
        return Guarantee(0.0, float(self.a.max()), True)

    def settings(self) -> dict[str, Any]:
        return {"n": len(self.a)}


def draw(n: int, size: int, seed: int) -> Tensor:
    return torch.randn(n, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SPREADS = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)


def test_a_gradient_step_trained_on_pairs_is_the_regression_on_them() -> None:
    clean = draw(400, 3, 0) * SPREADS
    noisy = clean + 0.5 * draw(400, 3, 1)
    model = DenoisingScore(Squares(3), 0.5)
    train(model, SquaredError(), (noisy, clean), Adam(0.05, cosine=True), epochs=500)
    slope = (noisy * clean).sum(0) / noisy.square().sum(0)
    torch.testing.assert_close(model(noisy).detach(), slope * noisy, rtol=1e-3, atol=1e-3)


def test_score_matching_finds_the_density_of_the_noisy_fields() -> None:
    """Of N(0, spread^2) and noise s: R = |x|^2 / (2 (spread^2 + s^2))."""
    clean = draw(2000, 3, 2) * SPREADS
    model = Denoising(Squares(3), 0.5)
    train(model, Mean(), (clean, torch.zeros(len(clean))), Adam(0.05, cosine=True), epochs=20, batch=100)
    energy = model.energy
    assert isinstance(energy, Squares)
    torch.testing.assert_close(energy.a.detach(), 1 / (SPREADS**2 + 0.25), rtol=0.08, atol=0.02)


def test_several_levels_are_served_by_the_energy_that_is_best_for_all() -> None:
    """min over a of sum_s E (e - s a (x + s e))^2: a = sum s^2 / sum s^2 (spread^2 + s^2)."""
    levels = torch.tensor([0.3, 1.0], dtype=torch.float64)
    clean = draw(4000, 3, 3) * SPREADS
    model = Denoising(Squares(3), levels.tolist())
    train(model, Mean(), (clean, torch.zeros(len(clean))), Adam(0.05, cosine=True), epochs=20, batch=200)
    s2 = levels[:, None] ** 2
    assert isinstance(model.energy, Squares)
    torch.testing.assert_close(
        model.energy.a.detach(), s2.sum(0) / (s2 * (SPREADS**2 + s2)).sum(0), rtol=0.08, atol=0.02
    )


def test_the_cost_of_doing_nothing_is_a_half_at_every_level() -> None:
    data = draw(200, 30, 4), torch.zeros(200)
    for noise in (0.01, 3.0, [0.1, 1.0]):
        model = Denoising(Squares(30), noise)
        found = evaluate(model, Mean(), data)
        assert found[0] == pytest.approx(0.5, rel=0.05)
        assert found == evaluate(model, Mean(), data)
        model.energy.requires_grad_(False)
        assert not torch.equal(model(data[0]), model(data[0]))


def test_bad_levels_are_refused() -> None:
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(GliodeError, match="noise must be positive"):
            DenoisingScore(Squares(3), bad)
    with pytest.raises(GliodeError, match="no level"):
        Denoising(Squares(3), [])
