r"""Pictures drawn by chance from seeds: dead leaves, ellipses, Gaussian textures; float64 in [0, 1].

    dead_leaves    opaque leaves over one another until next to none of the ground shows, radii of density
                   r^-3: edges at all scales, as in photographs (Lee, Mumford and Huang 2001)
    ellipses       a body with ellipses in it, as a section through a patient; zero outside the unit disc
    textures       Gaussian random fields of spectral density |k|^-beta, some stretched along a direction

All are drawn at twice the resolution and averaged, so that an edge is a pixel wide. One seed, one set: the
first n of a larger set with the same seed are those of the smaller.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from solvers.errors import GliodeError

Array = NDArray[np.float64]
FINER = 2  # the resolution at which they are drawn
SMALLEST = 8  # pixels of a side


def dead_leaves(n: int, size: int, seed: int) -> Tensor:
    """(n, size, size): discs, ellipses and polygons of radius r0 to size / 3, r0 of 2 to 10 pixels."""
    return _drawn("dead_leaves", _leaves, n, size, seed)


def ellipses(n: int, size: int, seed: int) -> Tensor:
    """(n, size, size): a body of grey 0.2 to 0.5 and 4 to 12 ellipses of added grey in it, cut to [0, 1]."""
    return _drawn("ellipses", _ellipses, n, size, seed)


def textures(n: int, size: int, seed: int) -> Tensor:
    """(n, size, size): mean 0.3 to 0.7, standard deviation 0.05 to 0.2, beta 2 to 4, cut to [0, 1]."""
    return _drawn("textures", _texture, n, size, seed)


def _drawn(
    name: str, draw: Callable[[int, np.random.Generator], Array], n: int, size: int, seed: int
) -> Tensor:
    if n < 1 or size < SMALLEST:
        raise GliodeError(f"{name}: {n} pictures of {size} pixels: ask for 1 or more of {SMALLEST} or more")
    if seed < 0:
        raise GliodeError(f"{name}: the seed must not be negative, got {seed}")
    pictures = [draw(FINER * size, np.random.default_rng([seed, number])) for number in range(n)]
    fine = torch.from_numpy(np.stack(pictures)).clamp(0, 1)
    return fine.reshape(n, size, FINER, size, FINER).mean((2, 4))


def _field(size: int, beta: float, draw: np.random.Generator) -> Array:
    """A Gaussian field of mean 0 and standard deviation 1, spectral density |k|^-beta, stretched or not."""
    k = np.stack(np.meshgrid(np.fft.fftfreq(size), np.fft.rfftfreq(size), indexing="ij"))
    angle, stretch = draw.uniform(0, np.pi), draw.choice([1.0, 1.0, 2.0, 4.0])
    along, across = np.cos(angle) * k[0] + np.sin(angle) * k[1], np.cos(angle) * k[1] - np.sin(angle) * k[0]
    square = stretch * along**2 + across**2 / stretch
    square[0, 0] = np.inf  # the mean is 0
    white = np.fft.rfft2(draw.standard_normal((size, size)))
    field: Array = np.fft.irfft2(white * square ** (-beta / 4), (size, size))
    return field / field.std()


def _texture(size: int, draw: np.random.Generator) -> Array:
    mean, spread, beta = draw.uniform(0.3, 0.7), draw.uniform(0.05, 0.2), draw.uniform(2, 4)
    return mean + spread * _field(size, beta, draw)


def _shape(x: Array, y: Array, draw: np.random.Generator) -> NDArray[np.bool_]:
    """Where a leaf of radius 1 covers the points: a disc, an ellipse, or a polygon of 3 to 6 sides."""
    kind, angle = draw.integers(3), draw.uniform(0, 2 * np.pi)
    if kind == 0:
        covered: NDArray[np.bool_] = x**2 + y**2 <= 1
        return covered
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    if kind == 1:
        return u**2 + (v / draw.uniform(0.3, 0.9)) ** 2 <= 1
    sides = draw.integers(3, 7)
    turns = 2 * np.pi * (np.arange(sides) + draw.uniform(-0.25, 0.25, sides)) / sides
    reach = draw.uniform(0.5, 0.8, sides)  # of each side from the centre
    inside = u**2 + v**2 <= 1
    for turn, far in zip(turns, reach, strict=True):
        inside &= np.cos(turn) * u + np.sin(turn) * v <= far
    return inside


def _leaves(size: int, draw: np.random.Generator) -> Array:
    """From the front to the back, each leaf where nothing lies yet."""
    low, high = FINER * min(np.exp(draw.uniform(np.log(2), np.log(10))), size / 12), size / 3
    fields = [_field(size, draw.uniform(2, 4), draw) for _ in range(3)]
    out = draw.uniform(0.2, 0.8) + 0.05 * fields[0]  # the ground, of which next to nothing is left
    free = np.ones((size, size), dtype=bool)
    contrast = draw.uniform(0.15, 0.35)  # of the leaves: pictures differ
    middle = draw.uniform(0.35, 0.65)
    left = size**2
    while left > size**2 / 200:
        # density r^-3 between the bounds, by its inverse distribution
        r = (low**-2 - draw.uniform() * (low**-2 - high**-2)) ** -0.5
        centre = draw.uniform(-r, size + r, 2)
        first = np.maximum(np.ceil(centre - r), 0).astype(int)
        last = np.minimum(np.floor(centre + r), size - 1).astype(int) + 1
        if (first >= last).any():
            continue
        part = (slice(first[0], last[0]), slice(first[1], last[1]))
        if not free[part].any():
            continue
        y, x = (np.arange(first[axis], last[axis]) - centre[axis] for axis in (0, 1))
        new = free[part] & _shape(x[None, :] / r, y[:, None] / r, draw)
        grey = np.clip(middle + contrast * draw.standard_normal(), 0.02, 0.98)
        slope = draw.normal(0, 0.3 * contrast, 2) / max(r, 10.0)  # light from one side
        amount = draw.choice([0.0, 0.02, 0.05, 0.1])
        shade = grey + slope[0] * y[:, None] + slope[1] * x[None, :]
        shade = shade + amount * fields[draw.integers(3)][part]
        out[part] = np.where(new, shade, out[part])
        free[part] &= ~new
        left -= int(new.sum())
    return out


def _ellipses(size: int, draw: np.random.Generator) -> Array:
    line = (np.arange(size) + 0.5) * 2 / size - 1

    def inside(centre: Array, axes: Array, angle: float) -> NDArray[np.bool_]:
        y, x = line[:, None] - centre[0], line[None, :] - centre[1]
        u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
        covered: NDArray[np.bool_] = (u / axes[0]) ** 2 + (v / axes[1]) ** 2 <= 1
        return covered

    body = inside(draw.uniform(-0.05, 0.05, 2), draw.uniform(0.7, 0.9, 2), draw.uniform(0, np.pi))
    out = np.where(body, draw.uniform(0.2, 0.5), 0.0)
    for _ in range(draw.integers(4, 13)):
        radius, angle = 0.7 * np.sqrt(draw.uniform()), draw.uniform(0, 2 * np.pi)
        centre = radius * np.array([np.sin(angle), np.cos(angle)])
        axes = np.exp(draw.uniform(np.log(0.04), np.log(0.35), 2))
        out += np.where(body & inside(centre, axes, draw.uniform(0, np.pi)), draw.uniform(-0.3, 0.4), 0.0)
    return np.clip(out, 0, 1)
