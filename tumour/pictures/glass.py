"""glass.png: the brain as glass with the tumours in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyvista

from tumour.pictures import closeups, furniture, rendering, style
from tumour.pictures.rendering import Layer, View
from tumour.pictures.results import Array, Inapplicable, Outline, ResultFolder
from tumour.pictures.surfaces import Surfaces, rings

SULCUS = np.array([122.0, 84.0, 86.0])
GYRUS = np.array([236.0, 219.0, 208.0])
RING_STEP = 5.0
"""Distance between the planes of the rings, mm."""


def require_surface(results: ResultFolder, day: float) -> None:
    """Errors: Inapplicable where no density of the day reaches the lower imaging level."""
    peaks = {name: float(results.map(name).values.max()) for name in results.densities(day).values()}
    if max(peaks.values()) <= style.LEVELS[0]:
        name, peak = max(peaks.items(), key=lambda item: item[1])
        what = "is zero everywhere" if peak <= 0 else f"stays at or below {peak:.3g}"
        file = f"{results.path}/maps/{name}.nii.gz"
        raise Inapplicable(
            f"{file} {what}: no surface at u = {style.LEVELS[0]} to draw (the slices can still be made)"
        )


def direction(results: ResultFolder) -> Array:
    """Where to look from: in front, above, and on the side of the tumour's seed."""
    side = 1.0 if results.seed()[0][0] >= 0 else -1.0
    return np.array([0.62 * side, 0.80, 0.52])


def glass(surfaces: Surfaces, towards: Array) -> Layer:
    """The brain's surface with cortical shading: clear where it faces the eye, denser at edges, in sulci."""
    shell = surfaces.shell.copy()
    normals = np.asarray(shell.point_data["Normals"], dtype=np.float64)
    depth = 1.0 - np.asarray(shell["cortex"], dtype=np.float64)
    grazing = 1.0 - np.clip(normals @ (towards / np.linalg.norm(towards)), 0.0, 1.0)
    colour = GYRUS + (SULCUS - GYRUS) * depth[:, None]
    opacity = np.clip(0.10 + 0.34 * depth**1.5 + 0.55 * grazing**2.5, 0.0, 0.9)
    opacity *= 1.0 - 0.8 * hidden(shell, towards)
    shell["rgba"] = np.column_stack([colour, 255.0 * opacity]).astype(np.uint8)
    return Layer(shell, scalars="rgba", outside_only=True)


def hidden(surface: pyvista.PolyData, towards: Array) -> Array:
    """How far behind its own front each point of a surface lies: 0 in front, 1 from 10 mm on; (n,)."""
    points = np.asarray(surface.points, dtype=np.float64)
    view = View.fit(points, towards, (800, 800), (0.01, 0.01, 0.99, 0.99))
    front = rendering.front(surface, view)
    column, row = np.rint(view.pixels(points)).astype(int).T
    behind = front[row, column] - points @ view.towards
    return np.asarray(np.clip((behind - 3.0) / 7.0, 0.0, 1.0))


@dataclass(frozen=True)
class Drawn:
    """An outline's surface (`width` None) or its rings (`width`: their line in the legend, points)."""

    outline: Outline
    surface: pyvista.PolyData
    opacity: float
    width: float | None

    @property
    def layer(self) -> Layer:
        """How it is rendered."""
        colour = style.COLOURS[self.outline.label]
        return Layer(self.surface, colour, opacity=self.opacity, outside_only=self.opacity < 1)

    @property
    def text(self) -> str:
        """Its line in a legend."""
        return f"{self.outline.label}, u = {self.outline.level:g}"


def tumours(surfaces: Surfaces, outlines: list[Outline]) -> list[Drawn]:
    """The first label as surfaces (core opaque, margin translucent), any other as rings around them."""
    found = []
    for outline in sorted(outlines, key=lambda item: -item.level):
        surface, core = surfaces.of(outline), outline.level == max(style.LEVELS)
        if surface.n_points == 0:
            continue
        if outline.label == outlines[0].label:
            found.append(Drawn(outline, surface, 1.0 if core else 0.42, None))
        else:
            tubes = rings(surface, RING_STEP, 0.62 if core else 0.42)
            found.append(Drawn(outline, tubes, 1.0, 3.2 if core else 1.8))
    return found


def draw(surfaces: Surfaces, size: tuple[int, int], path: Path) -> Path:
    """The picture glass.png."""
    results = surfaces.results
    day = results.day
    require_surface(results, day)
    outlines = results.outlines(day)
    drawn = tumours(surfaces, outlines)
    towards = direction(results)
    compare = any(item.width is not None for item in drawn)
    box = (0.035, 0.12, 0.655 if compare else 0.965, 0.90)
    shell = glass(surfaces, towards)
    view = View.fit(np.asarray(shell.surface.points), towards, size, box)
    drawing = style.figure(size)
    image = rendering.render([shell, *(item.layer for item in drawn)], view)
    drawing.figimage(image, origin="upper", zorder=-10)
    furniture.title(drawing, results, day)
    legend = [(item.text, style.COLOURS[item.outline.label], item.opacity, item.width) for item in drawn]
    furniture.legend(drawing, legend, columns=len({item.outline.label for item in drawn}))
    furniture.scale_bar(drawing, view, (0.035, 0.045))
    furniture.triad(drawing, view, (0.60 if compare else 0.92, 0.075))
    if compare:
        closeups.draw(drawing, surfaces, outlines, towards)
    return style.save(drawing, path)
