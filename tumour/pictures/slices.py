"""slices.png: three slices through the seed: T1, density in colour, outlines of truth and recovery."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from scipy import ndimage

from tumour.pictures import style
from tumour.pictures.results import Array, Map, Outline, ResultFolder

VISIBLE = 0.01
"""Densities above this are coloured."""
FINEST = 0.5
"""Slices are resampled at a step of one pixel of the picture, but not below this, mm."""


@dataclass(frozen=True)
class Plane:
    """A slice: `across` and `upwards` are its RAS axes (0, 1, 2); `letters`: its left, right, bottom, top.

    Radiological convention: the patient's right is on the left; sagittal slices have the front on the left.
    """

    name: str
    normal: int
    across: int
    upwards: int
    letters: tuple[str, str, str, str]


PLANES = (
    Plane("Axial", 2, 0, 1, ("R", "L", "P", "A")),
    Plane("Coronal", 1, 0, 2, ("R", "L", "I", "S")),
    Plane("Sagittal", 0, 1, 2, ("A", "P", "I", "S")),
)


@dataclass(frozen=True)
class Window:
    """The part of a plane that a panel shows, RAS mm; `across` falls from left to right (radiological)."""

    plane: Plane
    through: Array
    middle: Array
    half: tuple[float, float]
    step: float

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom, top in mm."""
        across, upwards = self.middle[self.plane.across], self.middle[self.plane.upwards]
        return across + self.half[0], across - self.half[0], upwards - self.half[1], upwards + self.half[1]

    def grid(self) -> tuple[Array, Array, Array]:
        """Coordinates across (m,), upwards (n,), and RAS points (n, m, 3)."""
        left, right, bottom, top = self.extent
        across = np.linspace(left, right, round((left - right) / self.step) + 1)
        upwards = np.linspace(bottom, top, round((top - bottom) / self.step) + 1)
        points = np.empty((len(upwards), len(across), 3))
        points[..., self.plane.normal] = self.through[self.plane.normal]
        points[..., self.plane.across] = across
        points[..., self.plane.upwards] = upwards[:, None]
        return across, upwards, points


class Painter:
    """Draws windows of one result's last day: background, density, outlines as functions of RAS points."""

    def __init__(self, results: ResultFolder) -> None:
        day = results.day
        densities = {label: results.map(name) for label, name in results.densities(day).items()}
        background, brain = _background(results), results.map("brain")
        self.brain = brain.sample
        self.background = _spline(background)
        inside = background.values[_inside(brain, background)]
        self.brightest = 1.08 * float(np.quantile(inside, 0.995)) if inside.size else 1.0
        self.label = results.label
        self.density = _spline(densities[self.label])
        self.outlines = [(outline, _spline(results.map(outline.name))) for outline in results.outlines(day)]
        self.seeds = dict(zip((self.label, "Truth"), results.seed(), strict=True))
        self.whole = _bounds(brain, brain.values > 0.5)
        seen = np.any([field.values > VISIBLE for field in densities.values()], axis=0)
        self.tumour = _bounds(densities[self.label], seen) if seen.any() else None

    def paint(self, panel: Axes, window: Window) -> None:
        """One panel: T1 in grey, the density over it, outlines with dark edges, the seed."""
        across, upwards, points = window.grid()
        extent = window.extent
        grey = np.clip(self.background(points) / self.brightest, 0.0, 1.0)
        panel.imshow(
            grey, extent=extent, origin="lower", cmap="gray", vmin=0, vmax=1, interpolation="bilinear"
        )
        inside = self.brain(points) > 0.5
        u = np.where(inside, np.clip(self.density(points), 0.0, 1.0), 0.0)
        colours = density_colours()(u)
        colours[..., 3] = np.where(u > VISIBLE, 0.30 + 0.38 * np.sqrt(u), 0.0)
        panel.imshow(colours, extent=extent, origin="lower", interpolation="bilinear")
        for outline, field in self.outlines:
            values = np.where(inside, field(points), 0.0)
            if values.min() < outline.edge < values.max():
                look = line(outline)
                lines = panel.contour(
                    across,
                    upwards,
                    values,
                    [outline.edge],
                    colors=[look["color"]],
                    linewidths=look["linewidth"],
                )
                lines.set(linestyle=look["linestyle"], path_effects=look["path_effects"])
        for label, place in self.seeds.items():
            if place is not None:
                self._mark(panel, window, place, label)
        panel.set(xlim=extent[:2], ylim=extent[2:])

    def _mark(self, panel: Axes, window: Window, place: Array, label: str) -> None:
        colour = style.ON_DARK[label]
        x, y = place[window.plane.across], place[window.plane.upwards]
        marker = "x" if label == "Truth" else "+"
        panel.plot(x, y, marker, color=colour, markersize=8, markeredgewidth=1.8, **_edge(3.4))


def _edge(width: float) -> dict[str, Any]:
    """A dark edge, so that a line is seen on any colour; `width`: of line and edge together, points."""
    return {"path_effects": [withStroke(linewidth=width, foreground="#000000B0")]}


def line(outline: Outline) -> dict[str, Any]:
    """An outline's line: colour by whose, width by level, a recovery dashed so that both show."""
    dashes = (0, (3.2, 1.4)) if outline.label == "Recovered" else "solid"
    width = 1.9 if outline.level == max(style.LEVELS) else 1.1
    colour = style.ON_DARK[outline.label]
    return {"color": colour, "linewidth": width, "linestyle": dashes} | _edge(width + 1.3)


def density_colours() -> Colormap:
    """Density 0 to 1, dark violet to yellow."""
    return matplotlib.colormaps["viridis"]


def _background(results: ResultFolder) -> Map:
    """The T1, or, where the patient has none, a picture made of the tissue fractions."""
    if results.has("t1"):
        return results.map("t1")
    white, grey = results.map("white"), results.map("grey")
    return Map(0.95 * white.values + 0.6 * grey.values, white.affine)


def _inside(brain: Map, field: Map) -> Array:
    """Which voxels of `field` lie in the brain."""
    index = np.moveaxis(np.indices(field.values.shape), 0, -1)
    return brain.sample(field.points(index)) > 0.5


def _spline(field: Map) -> Callable[[Array], Array]:
    """The map as a cubic spline, a function of RAS points (..., 3)."""
    filtered = Map(ndimage.spline_filter(field.values, order=3), field.affine)
    return lambda points: filtered.sample(points, order=3, prefilter=False)


def _bounds(field: Map, mask: Array) -> tuple[Array, Array]:
    """Smallest and largest RAS coordinates (3,) of a mask's voxels."""
    points = field.points(np.argwhere(mask))
    return points.min(axis=0), points.max(axis=0)


def windows(painter: Painter, aspect: float, pixels: float, close: bool) -> list[Window]:
    """One window a plane, all `pixels` high and equally large: around the brain or (`close`) the tumour."""
    low, high = painter.tumour if close and painter.tumour is not None else painter.whole
    margin = 5.0 if close else 9.0
    half = (high - low) / 2 + margin
    tall = max(max(half[plane.upwards], half[plane.across] / aspect) for plane in PLANES)
    through = painter.seeds[painter.label]
    assert through is not None
    step = max(FINEST, 2 * tall / pixels)
    return [Window(plane, through, (low + high) / 2, (tall * aspect, tall), step) for plane in PLANES]


def draw(results: ResultFolder, size: tuple[int, int], path: Path) -> Path:
    """The picture slices.png: whole slices above, the tumour below, at one scale a row."""
    painter = Painter(results)
    drawing = style.figure(size)
    wide, tall = drawing.get_size_inches()
    width, left, gap = 0.276, 0.062, 0.050
    rows = [(0.505, 0.40, False)] + ([(0.125, 0.325, True)] if painter.tumour is not None else [])
    for bottom, height, close in rows:
        aspect = width * wide / (height * tall)
        for column, window in enumerate(windows(painter, aspect, height * size[1], close)):
            panel = drawing.add_axes(
                (left + column * (width + gap), bottom, width, height), facecolor="black"
            )
            painter.paint(panel, window)
            decorate(panel, window, close)
    heading(drawing, results)
    key(drawing, painter)
    return style.save(drawing, path)


def decorate(panel: Axes, window: Window, close: bool) -> None:
    """Ticks in mm, the plane's name and position, the letters of the sides."""
    plane = window.plane
    axis, where = "xyz"[plane.normal], style.minus(f"{window.through[plane.normal]:.1f}")
    panel.tick_params(labelsize=7.5, color=style.MUTED, labelcolor=style.INK, length=2.5, pad=2)
    panel.locator_params(nbins=6, steps=[1, 2, 4, 5, 10])
    panel.set_xlabel(f"{'xyz'[plane.across]} (mm)", size=8, color=style.INK, labelpad=1)
    panel.set_ylabel(f"{'xyz'[plane.upwards]} (mm)", size=8, color=style.INK, labelpad=0)
    for side in panel.spines.values():
        side.set(color=style.MUTED, linewidth=0.6)
    if close:
        return
    panel.set_title(f"{plane.name}, {axis} = {where} mm", size=10, weight="bold", color=style.INK)
    at = ((0.03, 0.5), (0.97, 0.5), (0.5, 0.035), (0.5, 0.965))
    for letter, (x, y) in zip(plane.letters, at, strict=True):
        panel.text(
            x,
            y,
            letter,
            size=10,
            color="white",
            weight="bold",
            ha="center",
            va="center",
            transform=panel.transAxes,
        )


def heading(drawing: Figure, results: ResultFolder) -> None:
    """The case, the day and the convention."""
    case = str(results.report.get("case", results.path.name))
    drawing.text(0.022, 0.975, case, size=13, weight="bold", color=style.INK, va="top")
    text = f"{style.day_name(results.day)}, slices through the seed, radiological view"
    drawing.text(0.981, 0.970, text, size=9, color=style.MUTED, va="top", ha="right")


def key(drawing: Figure, painter: Painter) -> None:
    """Legend of the outlines and the colour bar of the density, along the bottom."""
    handles = []
    for outline, _ in sorted(painter.outlines, key=lambda item: -item[0].level):
        handles.append(Line2D([], [], label=f"{outline.label}, u = {outline.level:g}", **line(outline)))
    for label, place in painter.seeds.items():
        if place is not None:
            look: dict[str, Any] = {"color": style.ON_DARK[label]}
            marker = "x" if label == "Truth" else "+"
            handles.append(
                Line2D([], [], linestyle="", marker=marker, markersize=7, label=f"{label}, seed", **look)
            )
    drawing.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0.03, 0.004), ncols=3, fontsize=8.5, frameon=False
    )
    bar = drawing.add_axes((0.722, 0.050, 0.260, 0.016))
    scale = drawing.colorbar(
        ScalarMappable(Normalize(0, 1), density_colours()), cax=bar, orientation="horizontal"
    )
    ticks = [0.0, style.LEVELS[0], 0.4, style.LEVELS[1], 0.8, 1.0]
    scale.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.tick_params(labelsize=8, color=style.MUTED, labelcolor=style.INK)
    bar.set_title(
        f"{painter.label} density u (coloured where u > {VISIBLE:g})", size=8.5, color=style.INK, pad=3
    )
