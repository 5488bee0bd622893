"""The planar sets follow their published laws, the Bayes accuracies are right, the digits part as asked."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, special, stats
from sklearn.datasets import load_digits

from inverse.datasets import PLANAR, bayes_accuracy, densities, digits, planar
from solvers.errors import GliodeError

NAMES = list(PLANAR)
PRIOR = {"donut1d": 1 / 3, "donut2d": 1 / 2, "spiral": 1 / 2, "squares": 1 / 2}  # of label 1


def published_centres(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centres, weights P(label) P(centre | label) and labels as the published program states them.

    Donuts: a discrete law on 100 (100 x 100) grid points of [-1, 1]; spiral: 500 places an arm, its ends at
    half weight, which is the limit of many places.
    """
    if name == "spiral":
        angle, radius = np.linspace(0.1, 2 * np.pi, 500), np.linspace(0.1, 1, 500)
        arms = [
            np.stack([radius * np.cos(angle + turn), radius * np.sin(angle + turn)], 1) for turn in (np.pi, 0)
        ]
        weights = np.r_[0.5, np.ones(498), 0.5] / 998
        return np.concatenate(arms), np.concatenate([weights, weights]), np.repeat([1, 0], 500)
    axis = np.linspace(-1, 1, 100)
    other = axis if name == "donut2d" else np.zeros(1)
    grid = np.stack(np.meshgrid(axis, other), -1).reshape(-1, 2)
    r = np.linalg.norm(grid, axis=1)
    inner, outer = np.exp(-(r**2) / (2 * 0.1**2)), np.exp(-((r - 0.5) ** 2) / (2 * 0.1**2))
    weights = [PRIOR[name] * inner / inner.sum(), (1 - PRIOR[name]) * outer / outer.sum()]
    return np.concatenate([grid, grid]), np.concatenate(weights), np.repeat([1, 0], len(grid))


def brute_force(name: str, points: np.ndarray) -> np.ndarray:
    """Densities (m, 2) of the published centres with Gaussian noise."""
    centres, weights, labels = published_centres(name)
    variance = PLANAR[name].noise ** 2
    squared = ((points[:, None] - centres) ** 2).sum(2)
    each = weights * np.exp(-squared / (2 * variance)) / (2 * np.pi * variance)
    return np.stack([each[:, labels == c].sum(1) for c in (0, 1)], 1)


@pytest.mark.parametrize("name", ["donut1d", "donut2d", "spiral"])
def test_densities_are_those_of_the_published_program(name: str) -> None:
    """Neither the donuts' grid nor the spiral's places leave a trace after the noise."""
    points = np.random.default_rng(0).uniform(-0.9, 0.9, (200, 2))
    expected = brute_force(name, points)
    found = densities(name, torch.from_numpy(points)).numpy()
    assert np.abs(found - expected).max() < 5e-5 * expected.max()


def test_the_density_of_the_squares_is_a_sum_of_integrals_over_squares() -> None:
    def integral(y: float, low: float, high: float) -> float:
        return integrate.quad(lambda c: stats.norm.pdf(y, c, 0.1), low, high, epsabs=1e-13)[0] / 1.4

    for y, z in [(0.3, 0.05), (-0.02, 0.69), (-0.6, -0.8), (0.95, -0.1)]:
        p = [[integral(v, *side) for side in ((-0.7, 0), (0, 0.7))] for v in (y, z)]
        expected = [p[0][0] * p[1][1] + p[0][1] * p[1][0], p[0][0] * p[1][0] + p[0][1] * p[1][1]]
        found = densities("squares", torch.tensor([[y, z]], dtype=torch.float64))[0].tolist()
        assert found == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_points_fall_into_each_cell_as_often_as_the_density_says(name: str) -> None:
    n, cells, fine = 20_000, 13, 8
    points, labels = planar(name, n, 3, dtype=torch.float64)
    edges = np.linspace(-1.3, 1.3, cells + 1)
    axis = torch.linspace(-1.3, 1.3, cells * fine + 1, dtype=torch.float64)
    middles = (axis[1:] + axis[:-1]) / 2
    density = densities(name, torch.cartesian_prod(middles, middles)) * float(axis[1] - axis[0]) ** 2
    assert density.sum(0).tolist() == pytest.approx([1 - PRIOR[name], PRIOR[name]], abs=2e-4)
    expected = n * density.reshape(cells, fine, cells, fine, 2).sum((1, 3)).numpy()
    for label in (0, 1):
        x = points[labels == label].numpy()
        counts = np.histogram2d(x[:, 0], x[:, 1], [edges, edges])[0]
        enough = expected[..., label] > 5
        chi2 = ((counts - expected[..., label])[enough] ** 2 / expected[..., label][enough]).sum()
        assert enough.sum() > 10 and stats.chi2.sf(chi2, int(enough.sum())) > 1e-3


def donut1d_accuracy() -> float:
    """Three Gaussians of equal weight and sd sqrt(0.02), 0.5 apart: four tails beyond a quarter are wrong."""
    return 1 - 4 / 3 * stats.norm.cdf(-0.25 / math.sqrt(0.02))


def donut2d_accuracy() -> float:
    """The best disc as the region of label 1; |circle of radius s + noise|^2 is a noncentral chi-square."""

    def ring(s: float) -> float:
        return s * math.exp(-((s - 0.5) ** 2) / 0.02)

    total = integrate.quad(ring, 0, 1.5)[0]

    def wrong(r: float) -> float:
        def inside(s: float) -> float:
            return ring(s) / total * stats.ncx2.cdf(r**2 / 0.01, 2, s**2 / 0.01)

        return (math.exp(-(r**2) / 0.04) + integrate.quad(inside, 0, 1.5)[0]) / 2

    return 1 - optimize.minimize_scalar(wrong, bounds=(0.1, 0.5), method="bounded").fun


def squares_accuracy() -> float:
    """Each sign is guessed alone with accuracy a; the product's is right if both are right or both wrong."""
    a = 1 - integrate.quad(lambda c: stats.norm.cdf(-c / 0.1), 0, 0.7)[0] / 0.7
    return a**2 + (1 - a) ** 2


@pytest.mark.parametrize(
    ("name", "exact"),
    [("donut1d", donut1d_accuracy), ("donut2d", donut2d_accuracy), ("squares", squares_accuracy)],
)
def test_the_bayes_accuracy_is_that_of_the_closed_form(name: str, exact: Callable[[], float]) -> None:
    assert bayes_accuracy(name) == pytest.approx(exact(), abs=5e-5)


def test_the_bayes_accuracy_of_the_spiral_is_that_of_quasi_random_points() -> None:
    """Errors are rare (1 in 1800) and lie where the arms begin."""
    points = 0.4 * (2 * stats.qmc.Sobol(2, rng=0).random_base2(13) - 1)
    wrong = 0.8**2 * np.concatenate([brute_force("spiral", part) for part in np.split(points, 8)]).min(1)
    assert 1 - bayes_accuracy("spiral") == pytest.approx(wrong.mean(), abs=1e-5)


def test_the_accuracy_follows_the_noise() -> None:
    tail = special.ndtr(-0.25 / math.sqrt(0.01 + 0.05**2))
    assert bayes_accuracy("donut1d", 0.05) == pytest.approx(1 - 4 / 3 * tail, abs=5e-5)


def test_without_noise_a_point_is_its_centre() -> None:
    x, labels = planar("donut1d", 3000, 1, noise=0, dtype=torch.float64)
    assert (x[:, 1] == 0).all() and x[labels == 1, 0].abs().max() < 0.5
    assert stats.kstest(x[labels == 0, 0].abs(), stats.norm(0.5, 0.1).cdf).pvalue > 0.01
    x, labels = planar("donut2d", 4000, 1, noise=0, dtype=torch.float64)
    radius = x[labels == 0].norm(dim=1).numpy()
    table = np.linspace(0, 1.1, 2001)
    cdf = integrate.cumulative_simpson(table * np.exp(-((table - 0.5) ** 2) / 0.02), x=table, initial=0)
    assert stats.kstest(radius, lambda r: np.interp(r, table, cdf / cdf[-1])).pvalue > 0.01
    x, labels = planar("squares", 3000, 1, noise=0, dtype=torch.float64)
    assert ((x.prod(1) > 0) == labels.bool()).all() and 0.69 < x.abs().max() <= 0.7
    x, labels = planar("spiral", 1000, 1, noise=0, dtype=torch.float64)
    centres, _, expected = published_centres("spiral")
    for label in (0, 1):
        mine, theirs = x[labels == label].numpy(), centres[expected == label]
        assert np.abs(mine[np.argsort((mine**2).sum(1))] - theirs).max() < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_the_noise_is_gaussian_and_scales(name: str) -> None:
    clean, noisy, wild = (planar(name, 4000, 5, noise=s, dtype=torch.float64)[0] for s in (0, 0.1, 0.3))
    noise = (noisy - clean) / 0.1
    assert stats.kstest(noise.flatten(), "norm").pvalue > 0.01
    assert ((wild - clean) / 0.3 - noise).abs().max() < 1e-12


@pytest.mark.parametrize(("name", "ones"), [("donut1d", 34), ("donut2d", 51), ("spiral", 51)])
def test_classes_have_their_share_in_random_order(name: str, ones: int) -> None:
    x, labels = planar(name, 101, 0)
    assert x.shape == (101, 2) and x.dtype == torch.float32
    assert labels.dtype == torch.int64 and labels.sum() == ones
    assert (labels.diff() != 0).sum() > 20


def test_a_seed_fixes_the_points_whatever_the_dtype_and_a_generator_goes_on() -> None:
    x, labels = planar("donut2d", 50, 4)
    assert torch.equal(planar("donut2d", 50, 4, dtype=torch.float64)[0].float(), x)
    assert not torch.equal(planar("donut2d", 50, 5)[0], x)
    generator = torch.Generator().manual_seed(4)
    first, second = planar("donut2d", 50, generator), planar("donut2d", 50, generator)
    assert torch.equal(first[0], x) and torch.equal(first[1], labels) and not torch.equal(second[0], x)


def test_the_registry_says_what_the_literature_trains_on() -> None:
    assert {name: (law.noise, law.size) for name, law in PLANAR.items()} == {
        "donut1d": (0.1, 500),
        "donut2d": (0.1, 1000),
        "spiral": (0.05, 1000),
        "squares": (0.1, 1000),
    }


def test_bad_input_of_planar_is_refused() -> None:
    with pytest.raises(GliodeError, match=r"no set is called 'moons'.*donut1d, donut2d, spiral, squares"):
        planar("moons", 10, 0)
    with pytest.raises(GliodeError, match="n must be at least 1"):
        planar("spiral", 0, 0)
    for noise in (-0.1, math.nan, math.inf):
        with pytest.raises(GliodeError, match="noise"):
            planar("spiral", 10, 0, noise)
    with pytest.raises(GliodeError, match=r"squares: noise .* at least 0.01"):
        bayes_accuracy("squares", 0.0)


def rows(*parts: tuple[torch.Tensor, torch.Tensor]) -> list[tuple[float, ...]]:
    """Pictures with their labels, in an order of their own."""
    return sorted(tuple([*x.tolist(), int(y)]) for part in parts for x, y in zip(*part, strict=True))


def test_digits_are_parted_into_three_with_each_class_at_its_share() -> None:
    split = digits(3, test=360, validation=200, dtype=torch.float64)
    assert [len(part[1]) for part in split] == [1237, 200, 360]
    pixels, labels = load_digits(return_X_y=True)
    assert rows(*split) == rows((torch.from_numpy(pixels) / 16, torch.from_numpy(labels)))
    share = np.bincount(labels) / len(labels)
    for x, y in split:
        assert x.shape[1] == 64 and x.min() == 0 and x.max() == 1 and y.dtype == torch.int64
        assert np.abs(np.bincount(y.numpy()) - len(y) * share).max() <= 1


def test_the_test_digits_depend_on_the_seed_alone() -> None:
    plain, validated, other = digits(3), digits(3, validation=200), digits(4)
    assert plain.train[0].shape == (1437, 64) and plain.validation[0].shape == (0, 64)
    assert plain.train[0].dtype == torch.float32
    assert torch.equal(plain.test[0], validated.test[0]) and torch.equal(plain.test[1], validated.test[1])
    assert not torch.equal(plain.test[0], other.test[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": 0, "test": 9}, "test must be at least 10"),
        ({"seed": 0, "validation": 5}, "validation must be at least 10"),
        ({"seed": 0, "validation": -1}, "validation must be at least 10"),
        ({"seed": 0, "test": 1700, "validation": 90}, "leaves fewer than 10"),
    ],
)
def test_bad_input_of_digits_is_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(GliodeError, match=message):
        digits(**arguments)  # type: ignore[arg-type]
