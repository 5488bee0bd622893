"""Potentials: slopes and curvature by differences, bounds that hold for any weights and are attained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from inverse.regularizers.learned.potentials import POTENTIALS, Potential
from solvers.errors import GliodeError

CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {"a": 2.0, "h": 3.0}) for name in POTENTIALS),
    ("spline", {"a": 2.0, "h": 3.0, "pieces": 4, "modulus": 1.0}),
]


def shaken(name: str, options: dict[str, Any], seed: int = 0, size: float = 0.7) -> Potential:
    """With weights as a training may leave them."""
    potential = POTENTIALS[name](3, **options).double()
    generator = torch.Generator().manual_seed(seed)
    for p in potential.parameters():
        p.data += size * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return potential


def line(n: int = 60001, far: float = 6.0) -> Tensor:
    """(1, 3, n): the same points for three channels."""
    return torch.linspace(-far, far, n, dtype=torch.float64).expand(1, 3, n)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_slope_is_the_derivative_and_the_potential_even(name: str, options: dict[str, Any]) -> None:
    potential = shaken(name, options)
    t = line(401).clone().requires_grad_()
    value, slope = potential.value_and_slope(t)
    (by_tape,) = torch.autograd.grad(value.sum(), t)
    torch.testing.assert_close(slope, by_tape, rtol=1e-9, atol=1e-12)
    h = 1e-6
    by_differences = (potential(t + h) - potential(t - h)) / (2 * h)
    torch.testing.assert_close(slope, by_differences, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(value, potential(-t))
    assert torch.equal(potential(torch.zeros(1, 3, 1, dtype=torch.float64)), torch.zeros(1, 3, 1).double())


@pytest.mark.parametrize(("name", "options"), CASES)
def test_curvature_is_within_its_bounds_and_comes_near_them(name: str, options: dict[str, Any]) -> None:
    for seed in range(4):
        potential = shaken(name, options, seed)
        with torch.no_grad():
            slope = potential.slope(line(400001, 40.0))[0]
        bend = slope.diff() / (80.0 / 400000)
        low, high = potential.curvature()
        assert bool((bend.amax(1) <= high * (1 + 1e-9) + 1e-9).all())
        assert bool((bend.amin(1) >= -low * (1 + 1e-9) - 1e-9).all())
        if name != "saturating":  # whose h counts both of its parts
            torch.testing.assert_close(bend.amax(1), high, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(-bend.amin(1), low, rtol=1e-3, atol=1e-3)


def test_known_values() -> None:
    """Huber's function, its difference and log cosh at points, by their closed forms."""
    t = torch.tensor([0.25, 2.0], dtype=torch.float64).reshape(1, 1, 2)
    found = POTENTIALS["smooth_l1"](1, 2.0, 3.0).double()(t).flatten().tolist()
    assert found == pytest.approx([3 * 0.25**2 / 2, 3 * (0.5 * 2 - 0.5**2 / 2)])
    found = POTENTIALS["log_cosh"](1, 2.0, 3.0).double()(t).flatten().tolist()
    assert found == pytest.approx([0.75 * torch.cosh(torch.tensor(2 * u)).log().item() for u in (0.25, 2.0)])
    saturating = POTENTIALS["saturating"](1, 2.0, 3.0, 1e-9).double()
    far = torch.tensor([1.5, 4.0, 9.0], dtype=torch.float64).reshape(1, 1, 3)
    torch.testing.assert_close(saturating.slope(far), torch.zeros_like(far), atol=1e-6, rtol=0)
    assert saturating.slope(far[..., :1] / 3).item() == pytest.approx(3 * 0.5 - 0.5, rel=1e-5)  # t = 1/a


def test_a_spline_is_convex_or_of_its_modulus_whatever_its_weights() -> None:
    for modulus in (0.0, 1.0):
        potential = shaken("spline", {"pieces": 6, "modulus": modulus}, size=30.0)
        low, high = potential.curvature()
        assert float(low.max()) <= modulus and (modulus == 0 or float(low.max()) > 0.99)
        assert bool((high >= 0).all())


def test_bad_settings_are_refused() -> None:
    with pytest.raises(GliodeError, match="h above 1"):
        POTENTIALS["saturating"](2, h=0.5)
    with pytest.raises(GliodeError, match="2 or more"):
        POTENTIALS["spline"](2, pieces=1)
    with pytest.raises(GliodeError, match="above 0"):
        POTENTIALS["smooth_l1"](2, a=-1.0)
