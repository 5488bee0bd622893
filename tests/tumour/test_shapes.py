"""Random shapes against volumes and moments in closed form, sampled distances, and statistics of a field."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from solvers.errors import GliodeError
from tumour import shapes

H = 0.5
AXIS = np.arange(-24.0, 24.0, H) + H / 2
GRID = np.stack(np.meshgrid(AXIS, AXIS, AXIS, indexing="ij"), -1).reshape(-1, 3)
FEW = GRID.reshape(96, 96, 96, 3)[::6, ::6, ::6].reshape(-1, 3)
CENTRE = np.array([1.0, -2.0, 0.5])
TURN = shapes.rotation(np.random.default_rng(3))


def volume(shape: shapes.Shape) -> float:
    return float(shape(GRID).sum() * H**3)


def test_a_rotation_turns() -> None:
    np.testing.assert_allclose(TURN @ TURN.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(TURN) == pytest.approx(1)


def test_volumes_of_soft_balls_and_ellipsoids() -> None:
    # int 4 pi d^2 / (1 + exp((d - r) / e)) = 4 pi / 3 (r^3 + pi^2 e^2 r), but for exp(-r / e)
    r, e = 9.0, 1.5
    exact = 4 * math.pi / 3 * (r**3 + math.pi**2 * e**2 * r)
    assert volume(shapes.ball(CENTRE, r, e)) == pytest.approx(exact, rel=2e-3)
    thin = shapes.ellipsoid(CENTRE, (6.0, 8.0, 12.0), TURN, 0.3)
    assert volume(thin) == pytest.approx(4 * math.pi / 3 * 6 * 8 * 12, rel=0.02)  # soft: 1.3 % more
    assert volume(shapes.box(CENTRE, (6.0, 5.0, 8.0), TURN, 0.2)) == pytest.approx(8 * 240, rel=0.015)


def test_half_of_it_on_the_surface_of_an_ellipsoid() -> None:
    generator, semi = np.random.default_rng(1), np.array([5.0, 8.0, 12.0])
    units = np.array([shapes.direction(generator) for _ in range(50)])
    on = CENTRE + (units * semi) @ TURN.T
    np.testing.assert_allclose(shapes.ellipsoid(CENTRE, semi, TURN)(on), 0.5, atol=1e-9)


def test_a_bump_has_its_moments() -> None:
    widths = np.array([2.0, 3.0, 5.0])
    value = shapes.bump(CENTRE, widths, TURN)(GRID)
    assert value.sum() * H**3 == pytest.approx((2 * math.pi) ** 1.5 * widths.prod(), rel=1e-3)
    away = GRID - value @ GRID / value.sum()
    second = (value[:, None] * away).T @ away / value.sum()
    np.testing.assert_allclose(second, TURN @ np.diag(widths**2) @ TURN.T, atol=0.05)


def test_the_covariance_of_a_texture() -> None:
    length, lag = 6.0, np.array([0.0, 4.0, 9.0])
    points = np.stack([lag, np.zeros(3), np.zeros(3)], 1)
    generator = np.random.default_rng(2)
    draws = np.array([shapes.texture(generator, length)(points) for _ in range(4000)])
    np.testing.assert_allclose(draws.mean(0), 0, atol=0.07)
    np.testing.assert_allclose(draws.T @ draws[:, 0] / 4000, np.exp(-(lag**2) / (2 * length**2)), atol=0.08)


def test_a_tube_against_its_densely_sampled_line() -> None:
    line = np.array([[-9.0, 0.0, 2.0], [0.0, 5.0, 0.0], [8.0, -3.0, 1.0]])
    at = np.concatenate([np.linspace(a, b, 4000) for a, b in pairwise(line)])
    points = np.random.default_rng(4).uniform(-14, 14, (60, 3))
    distance = np.linalg.norm(points[:, None] - at, axis=2).min(1)
    exact = 1 / (1 + np.exp((distance - 4.0) / 1.5))
    np.testing.assert_allclose(shapes.tube(line, 4.0)(points), exact, atol=1e-3)


def test_a_crescent_is_a_ball_less_a_bite() -> None:
    # two balls of radius r, d apart, share the volume pi (4 r + d) (2 r - d)^2 / 12
    r, d = 10.0, 7.0
    shared = math.pi * (4 * r + d) * (2 * r - d) ** 2 / 12
    found = volume(shapes.crescent(CENTRE, r, np.array([0.0, d, 0.0]), 0.2))
    assert found == pytest.approx(4 / 3 * math.pi * r**3 - shared, rel=0.01)


def test_sums_and_textures_stay_in_their_bounds() -> None:
    both = shapes.total([shapes.ball(CENTRE, 9.0), shapes.ball(CENTRE, 6.0)], [0.7, 0.6], 0.95)
    assert both(FEW).max() == 0.95
    plain = shapes.ball(CENTRE, 9.0)
    rough = shapes.modulated(plain, shapes.texture(np.random.default_rng(5), 6.0), 0.5)
    ratio = rough(FEW) / plain(FEW)
    assert 0.5 <= ratio.min() < 0.8 and 1.2 < ratio.max() <= 1.5


@pytest.mark.parametrize("family", ["smooth", "odd"])
def test_draws_are_repeated_by_their_seed_and_of_like_size(family: shapes.Family) -> None:
    volumes = []
    for seed in range(12):
        one, two = (shapes.drawn(np.random.default_rng(seed), CENTRE, (5.0, 12.0), family)(FEW) for _ in "ab")
        np.testing.assert_array_equal(one, two)
        assert one.min() >= 0 and 0.3 < one.max() <= 1
        volumes.append(one.sum() * (6 * H) ** 3)
    assert 4 / 3 * math.pi * 5**3 < np.median(volumes) < 4 / 3 * math.pi * 12**3
    assert len({round(v) for v in volumes}) == 12


def test_what_is_no_shape() -> None:
    with pytest.raises(GliodeError, match="positive"):
        shapes.ellipsoid(CENTRE, (1.0, -1.0, 2.0))
    with pytest.raises(GliodeError, match="three finite"):
        shapes.ball((0.0, 1.0), 3.0)
    with pytest.raises(GliodeError, match="two or more corners"):
        shapes.tube(np.zeros((1, 3)), 3.0)
    with pytest.raises(GliodeError, match="family"):
        shapes.drawn(np.random.default_rng(0), CENTRE, (5.0, 9.0), "round")  # type: ignore[arg-type]
    with pytest.raises(GliodeError, match="strength"):
        shapes.modulated(shapes.ball(CENTRE, 3.0), shapes.ball(CENTRE, 3.0), 1.0)
