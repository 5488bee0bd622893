r"""Random shapes in a brain: points (n, 3) in mm -> values (n,); sources and fields are made of them.

    ball, ellipsoid      1 inside, 0 outside: 1 / (1 + exp(d / edge)), d the signed distance to the surface
    bump                 exp(-|S^-1 R^T (x - c)|^2 / 2)
    texture              a Gaussian field of mean 0, variance 1, covariance exp(-|x - z|^2 / (2 length^2)),
                         by random cosines (Rahimi and Recht 2007)
    tube, crescent, box  the family that nothing is trained on: as large and as sharp, of another form

Distances to an ellipsoid are exact on its surface and to first order near it. A draw is decided by the
generator alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
from scipy import special

from solvers.errors import GliodeError
from solvers.fem.mesh import FloatArray

Shape = Callable[[FloatArray], FloatArray]
Family = Literal["smooth", "odd"]

EDGE = 1.5
"""mm over which a shape ends: its density falls from 0.88 to 0.12 over 4 EDGE = 6 mm."""


def _inside(distance: FloatArray, edge: float) -> FloatArray:
    """1 where a signed distance in mm is far below 0, 0 far above."""
    value: FloatArray = special.expit(-distance / edge)
    return value


def ellipsoid(
    centre: Sequence[float] | FloatArray,
    semi: Sequence[float] | FloatArray,
    rotation: FloatArray | None = None,
    edge: float = EDGE,
) -> Shape:
    """1 within the semi-axes (3,) mm along the columns of `rotation` (3, 3), default x, y, z."""
    middle, sides = _vector("centre", centre), _lengths("semi-axes", semi)
    turn = np.eye(3) if rotation is None else rotation

    def values(points: FloatArray) -> FloatArray:
        at = (points - middle) @ turn
        scaled = np.linalg.norm(at / sides, axis=1)
        slope = np.linalg.norm(at / sides**2, axis=1) / np.maximum(scaled, 1e-12)
        distance = (scaled - 1) / np.maximum(slope, 1 / sides.max())
        return _inside(distance, edge)

    return values


def ball(centre: Sequence[float] | FloatArray, radius: float, edge: float = EDGE) -> Shape:
    """1 within `radius` mm."""
    return ellipsoid(centre, (radius, radius, radius), None, edge)


def bump(
    centre: Sequence[float] | FloatArray,
    widths: Sequence[float] | FloatArray,
    rotation: FloatArray | None = None,
) -> Shape:
    """A Gaussian of standard deviations `widths` (3,) mm along the columns of `rotation`, 1 at its centre."""
    middle, sides = _vector("centre", centre), _lengths("widths", widths)
    turn = np.eye(3) if rotation is None else rotation

    def values(points: FloatArray) -> FloatArray:
        at = (points - middle) @ turn / sides
        value: FloatArray = np.exp(-0.5 * np.square(at).sum(1))
        return value

    return values


def texture(generator: np.random.Generator, length: float, terms: int = 256) -> Shape:
    """A draw of the Gaussian field of correlation length `length` mm; normal in the limit of many `terms`."""
    waves = generator.normal(0.0, 1 / _lengths("length", [length]), (terms, 3))
    phases = generator.uniform(0.0, 2 * np.pi, terms)

    def values(points: FloatArray) -> FloatArray:
        value: FloatArray = np.cos(points @ waves.T + phases).sum(1) * np.sqrt(2 / terms)
        return value

    return values


def tube(line: FloatArray, radius: float, edge: float = EDGE) -> Shape:
    """1 within `radius` mm of a polygonal line (k, 3) of k >= 2 corners."""
    if line.ndim != 2 or len(line) < 2 or line.shape[1] != 3:
        raise GliodeError(f"tube: a line of shape {line.shape}; give two or more corners (k, 3)")
    thick = float(_lengths("radius", [radius])[0])

    def values(points: FloatArray) -> FloatArray:
        distance = np.full(len(points), np.inf)
        for k in range(len(line) - 1):
            a, step = line[k], line[k + 1] - line[k]
            along = (points - a) @ step / max(float(step @ step), 1e-12)
            near = a + np.clip(along, 0, 1)[:, None] * step
            distance = np.minimum(distance, np.linalg.norm(points - near, axis=1))
        return _inside(distance - thick, edge)

    return values


def crescent(
    centre: Sequence[float] | FloatArray, radius: float, shift: FloatArray, edge: float = EDGE
) -> Shape:
    """A ball without the equal ball whose centre is `shift` (3,) mm away."""
    middle = _vector("centre", centre)
    whole, bite = ball(middle, radius, edge), ball(middle + _vector("shift", shift), radius, edge)
    return lambda points: whole(points) * (1 - bite(points))


def box(
    centre: Sequence[float] | FloatArray,
    semi: Sequence[float] | FloatArray,
    rotation: FloatArray | None = None,
    edge: float = EDGE,
) -> Shape:
    """1 in a box of half sides `semi` (3,) mm along the columns of `rotation`."""
    middle, sides = _vector("centre", centre), _lengths("half sides", semi)
    turn = np.eye(3) if rotation is None else rotation
    return lambda points: _inside((np.abs((points - middle) @ turn) - sides).max(1), edge)


def total(shapes: Sequence[Shape], factors: Sequence[float], largest: float = np.inf) -> Shape:
    """sum_i factors_i shapes_i, at most `largest`."""

    def values(points: FloatArray) -> FloatArray:
        parts = [factor * shape(points) for factor, shape in zip(factors, shapes, strict=True)]
        return np.minimum(np.sum(parts, axis=0), largest)

    return values


def modulated(shape: Shape, pattern: Shape, strength: float) -> Shape:
    """A shape times 1 + strength tanh(pattern): textured, with 0 <= strength < 1 never negative."""
    if not 0 <= strength < 1:
        raise GliodeError(f"texture: a strength of {strength} is not in [0, 1)")
    return lambda points: shape(points) * (1 + strength * np.tanh(pattern(points)))


def rotation(generator: np.random.Generator) -> FloatArray:
    """A rotation (3, 3), uniform (QR of a Gaussian matrix with its signs undone, Mezzadri 2007)."""
    q, r = np.linalg.qr(generator.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    turn: FloatArray = q if np.linalg.det(q) > 0 else q[:, ::-1]
    return turn


def direction(generator: np.random.Generator) -> FloatArray:
    """A unit vector (3,), uniform."""
    vector = generator.normal(size=3)
    unit: FloatArray = vector / np.linalg.norm(vector)
    return unit


def drawn(
    generator: np.random.Generator,
    centre: FloatArray,
    sizes: tuple[float, float],
    family: Family = "smooth",
    edge: float = EDGE,
) -> Shape:
    """One shape about a centre, its semi-axes uniform in `sizes` mm, values in [0, 1].

    smooth: a ball, an ellipsoid or a bump (of 0.6 times the size, so of like volume), each as likely as the
    others; odd: a bent tube, a crescent or a box.
    """
    if family not in get_args(Family):
        raise GliodeError(f"shapes: the family {family!r} is not one of {', '.join(get_args(Family))}")
    low, high = sizes
    if not 0 < low <= high:
        raise GliodeError(f"shapes: sizes {sizes} mm; give two positive lengths, the smaller one first")
    kind, semi, turn = generator.integers(3), generator.uniform(low, high, 3), rotation(generator)
    size = float(semi.mean())
    if family == "smooth":
        made: list[Callable[[], Shape]] = [
            lambda: ball(centre, size, edge),
            lambda: ellipsoid(centre, semi, turn, edge),
            lambda: bump(centre, 0.6 * semi, turn),
        ]
        return made[kind]()
    bend = direction(generator)
    line = centre + np.array([-1.4 * size * turn[0] + 0.7 * size * bend, np.zeros(3), 1.4 * size * turn[0]])
    made = [
        lambda: tube(line, 0.55 * size, edge),
        lambda: crescent(centre - 0.4 * size * turn[0], 1.25 * size, 0.8 * size * turn[0], edge),
        lambda: box(centre, 0.8 * semi, turn, edge),
    ]
    return made[kind]()


def _vector(name: str, value: Sequence[float] | FloatArray) -> FloatArray:
    vector = np.asarray(value, dtype=np.float64)
    if vector.shape != (3,) or not np.isfinite(vector).all():
        raise GliodeError(f"shapes: {name} {value}: give three finite coordinates in mm")
    return vector


def _lengths(name: str, value: Sequence[float] | FloatArray) -> FloatArray:
    lengths = np.asarray(value, dtype=np.float64)
    if not (np.isfinite(lengths).all() and (lengths > 0).all()):
        raise GliodeError(f"shapes: {name} {value}: lengths in mm must be positive and finite")
    return lengths
