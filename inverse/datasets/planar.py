"""Four sets of labelled points in the plane, drawn from laws whose best possible accuracy is known.

    points, labels = planar("donut2d", 1000, seed)
    bayes_accuracy("donut2d")  # no classifier does better on points it has not seen

A point is a centre, drawn by the law of its class, plus noise N(0, noise^2) in both coordinates. The laws are
those of the program published with Benning, Celledoni, Ehrhardt, Owren and Schönlieb, "Deep learning as
optimal control problems: models and numerical methods", J. Comput. Dyn. 6 (2019) 171 (arXiv:1904.05657);
docs/theory/planar_sets.md writes them out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from solvers.errors import GliodeError

RADIUS, WIDTH = 0.5, 0.1  # of the donuts: the outer class lies about |x| = RADIUS, both spread by WIDTH
SIDE = 0.7  # the squares fill [-SIDE, SIDE]^2
NARROWEST = 0.01  # least noise for a density: the quadratures grow as 1/noise and 1/noise^2
_CHUNK = 8192  # points at a time in a density: bounds its memory


@dataclass(frozen=True)
class Law:
    """A planar set: its noise (standard deviation a coordinate) and how many points the literature trains on.

    reach: centres lie in [-reach, reach]^2 (the donuts' to 3e-7 of their mass).
    """

    name: str
    description: str
    noise: float
    size: int
    reach: float
    centres: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    """(n, generator) -> centres (n, 2), labels (n,), in any order."""
    density: Callable[[Tensor, float], Tensor]
    """(points (m, 2), noise) -> (m, 2): P(label c) times the density of class c with its noise."""


def planar(
    name: str,
    n: int,
    generator_or_seed: torch.Generator | int,
    noise: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """n points (n, 2) of PLANAR[name], in random order, and their labels (n,), int64, 0 or 1.

    Label 1 is the inner class of a donut (exactly ceil(n/3) points of donut1d, ceil(n/2) of donut2d), one arm
    of the spiral (ceil(n/2)), and the squares where x_1 x_2 > 0 (n/2 on average). One seed gives the same
    points in every dtype; a generator must be one of the CPU. noise: the law's own unless given; 0 gives the
    centres. GliodeError: an unknown name, n < 1, a noise that is negative or not finite.
    """
    law = _law(name)
    if n < 1:
        raise GliodeError(f"planar: n must be at least 1, got {n}")
    spread = _spread(law, noise, 0.0)
    if isinstance(generator_or_seed, torch.Generator):
        generator = generator_or_seed
    else:
        generator = torch.Generator().manual_seed(generator_or_seed)
    centres, labels = law.centres(n, generator)
    points = centres + spread * _normal((n, 2), generator)
    order = torch.randperm(n, generator=generator)
    return points[order].to(dtype), labels[order]


def densities(name: str, points: Tensor, noise: float | None = None) -> Tensor:
    """P(label c) p(x | c) for c = 0 and 1 at points (m, 2): (m, 2) in float64, together of integral 1.

    The larger column is the label that the Bayes classifier gives. Integrals over a ring or an arm are taken
    by Gauss's rule, to rounding. GliodeError: an unknown name, noise below 0.01.
    """
    law = _law(name)
    spread = _spread(law, noise, NARROWEST)
    x = points.to(torch.float64)
    return torch.cat([law.density(part, spread) for part in x.split(_CHUNK)])


def bayes_accuracy(name: str, noise: float | None = None) -> float:
    """The share that the best classifier gets right: the integral of max_c P(c) p(x | c) over the plane.

    Sum over a lattice of spacing noise/6, within 5e-5. The integrand is smooth but for a kink at the boundary
    of the classes; the lattice is turned by an angle of slope (sqrt(5) - 1)/2, so that its rows meet straight
    boundaries at ever other places between two points and their errors cancel.
    """
    law = _law(name)
    spread = _spread(law, noise, NARROWEST)
    step, reach = spread / 6, law.reach + 7 * spread
    half = math.ceil(1.4 * reach / step)
    axis = step * torch.arange(-half, half + 1, dtype=torch.float64)
    angle = math.atan((math.sqrt(5) - 1) / 2)
    turn = [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
    lattice = torch.cartesian_prod(axis, axis) @ torch.tensor(turn, dtype=torch.float64)
    lattice = lattice[(lattice.abs() <= reach).all(1)]
    return float(densities(name, lattice, noise).amax(1).sum()) * step**2


def _law(name: str) -> Law:
    if name not in PLANAR:
        raise GliodeError(f"planar: no set is called {name!r}; there are {', '.join(PLANAR)}")
    return PLANAR[name]


def _spread(law: Law, noise: float | None, least: float) -> float:
    spread = law.noise if noise is None else noise
    if not (math.isfinite(spread) and spread >= least):
        raise GliodeError(
            f"{law.name}: noise must be a standard deviation of at least {least:g}, got {noise}"
        )
    return spread


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def _labels(ones: int, n: int) -> Tensor:
    return (torch.arange(n) < ones).long()


def _gauss(x: Tensor, mean: Tensor | float, variance: float) -> Tensor:
    return torch.exp(-(x - mean).square() / (2 * variance)) / math.sqrt(2 * math.pi * variance)


def _rule(a: float, b: float, scale: float) -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss's rule on [a, b] for integrands as narrow as a Gaussian of sd `scale`."""
    nodes, weights = np.polynomial.legendre.leggauss(64 + math.ceil(4 * (b - a) / scale))
    return torch.from_numpy((a + b) / 2 + (b - a) / 2 * nodes), torch.from_numpy((b - a) / 2 * weights)


def _donut1d_centres(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """On the x_1 axis: N(0, WIDTH^2) for a third, else N(+-RADIUS, WIDTH^2)."""
    labels = _labels(math.ceil(n / 3), n)
    side = torch.where(_uniform((n,), generator) < 0.5, -1.0, 1.0)
    x = WIDTH * _normal((n,), generator) + RADIUS * side * (1 - labels)
    return torch.stack([x, torch.zeros_like(x)], 1), labels


def _donut1d_density(x: Tensor, noise: float) -> Tensor:
    variance = WIDTH**2 + noise**2
    inner = _gauss(x[:, 0], 0.0, variance) / 3
    outer = (_gauss(x[:, 0], -RADIUS, variance) + _gauss(x[:, 0], RADIUS, variance)) / 3
    return torch.stack([outer, inner], 1) * _gauss(x[:, 1], 0.0, noise**2)[:, None]


def _donut2d_centres(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Densities exp(-r^2 / (2 WIDTH^2)) and exp(-(r - RADIUS)^2 / (2 WIDTH^2)) of the plane.

    The ring's radius R + W z has the density (R + W z) phi(z) ~ phi(z) (1 + z W/R): that of a normal |z|
    whose sign is + with probability (1 + |z| W/R) / 2. Beyond |z| = R/W = 5 (6e-7 of them) it is always +.
    """
    labels = _labels(math.ceil(n / 2), n)
    disc = WIDTH * _normal((n, 2), generator)
    z = _normal((n,), generator).abs()
    z = torch.where(_uniform((n,), generator) < (1 + z * WIDTH / RADIUS) / 2, z, -z)
    angle = 2 * math.pi * _uniform((n,), generator)
    ring = (RADIUS + WIDTH * z)[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return torch.where(labels[:, None] == 1, disc, ring), labels


def _donut2d_density(x: Tensor, noise: float) -> Tensor:
    """The ring is a mixture of circles; one of radius s under noise t has the density, I_0 being Bessel's,

    exp(-(r^2 + s^2) / (2 t^2)) I_0(r s / t^2) / (2 pi t^2).
    """
    r = x.square().sum(1).sqrt()
    inner = _gauss(x, 0.0, WIDTH**2 + noise**2).prod(1)
    s, weights = _rule(0.0, RADIUS + 8 * WIDTH, noise)
    weights = weights * s * _gauss(s, RADIUS, WIDTH**2)  # P(s) ds
    circles = _gauss(r[:, None], s, noise**2) * torch.special.i0e(r[:, None] * s / noise**2)
    outer = circles @ (weights / weights.sum()) / math.sqrt(2 * math.pi * noise**2)
    return torch.stack([outer, inner], 1) / 2


def _arm(t: Tensor) -> Tensor:
    """The spiral's arm of label 0 at t in [0, 1]; the other is its image under x -> -x."""
    radius, angle = 0.1 + 0.9 * t, 0.1 + (2 * math.pi - 0.1) * t
    return radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)


def _spiral_centres(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each arm at equal steps of its parameter, ends included: as published, nothing here is random."""
    ones = math.ceil(n / 2)
    arms = [-_arm(torch.linspace(0, 1, ones, dtype=torch.float64))]
    arms.append(_arm(torch.linspace(0, 1, n - ones, dtype=torch.float64)))
    return torch.cat(arms), _labels(ones, n)


def _spiral_density(x: Tensor, noise: float) -> Tensor:
    """The limit of many points: t uniform in [0, 1]."""
    t, weights = _rule(0.0, 1.0, noise / 4)  # an arm is about 4 long
    arm = _arm(t)
    both = []
    for side in (arm, -arm):
        squared = (x[:, None, 0] - side[:, 0]).square() + (x[:, None, 1] - side[:, 1]).square()
        both.append(torch.exp(-squared / (2 * noise**2)) @ weights)
    return torch.stack(both, 1) / (4 * math.pi * noise**2)


def _squares_centres(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Uniform in [-SIDE, SIDE]^2; the label is taken before the noise."""
    x = SIDE * (2 * _uniform((n, 2), generator) - 1)
    return x, (x.prod(1) > 0).long()


def _squares_density(x: Tensor, noise: float) -> Tensor:
    """Sums over the four squares of products of one-dimensional densities."""
    cdf = torch.special.ndtr

    def half(y: Tensor) -> Tensor:
        """The integral of N(y; c, noise^2) over 0 < c < SIDE, by the tails that do not cancel."""
        near, far = y / noise, (y - SIDE) / noise
        return torch.where(y < SIDE / 2, cdf(near) - cdf(far), cdf(-far) - cdf(-near))

    left, right = (half(-x) / (2 * SIDE)).T, (half(x) / (2 * SIDE)).T
    return torch.stack([left[0] * right[1] + right[0] * left[1], left.prod(0) + right.prod(0)], 1)


_DONUT1D = "a class in the middle of a line, the other on both sides of it, lifted to the plane"
_REACH = RADIUS + 5 * WIDTH
PLANAR = {
    law.name: law
    for law in (
        Law("donut1d", _DONUT1D, 0.1, 500, _REACH, _donut1d_centres, _donut1d_density),
        Law("donut2d", "a disc inside a ring", 0.1, 1000, _REACH, _donut2d_centres, _donut2d_density),
        Law("spiral", "two interleaved arms of one turn", 0.05, 1000, 1.0, _spiral_centres, _spiral_density),
        Law("squares", "a 2 x 2 checkerboard", 0.1, 1000, SIDE, _squares_centres, _squares_density),
    )
}
