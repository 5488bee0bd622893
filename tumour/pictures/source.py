"""source.png: where a tumour started: the density now; truth, estimate, sd and probability of the source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from tumour.pictures import style
from tumour.pictures.results import Array, Inapplicable, ResultFolder
from tumour.pictures.slices import PLANES, Plane, Window, decorate

MARGIN = 14.0  # mm around what is drawn


def draw(results: ResultFolder, size: tuple[int, int], path: Path) -> Path:
    """The picture source.png: one plane through the largest focus (a slice: its own), close to the tumour."""
    if not results.has("source"):
        raise Inapplicable("the result has no source (locate_source.py finds one)")
    density = results.densities(results.day)[results.label]
    panels = [
        (density, f"Recovered density, {style.day_name(results.day)}", "viridis", None),
        ("source_truth", "True source", "viridis", "source"),
        ("source", "Recovered source", "viridis", "source_truth"),
        ("source_sd", "Standard deviation", "magma", None),
        ("source_exceedance", "Chance of a source", "cividis", 1.0),
    ]
    shown = [panel for panel in panels if results.has(panel[0])]
    drawing = style.figure(size)
    window = _window(results, density)
    columns = min(3, len(shown))
    axes = drawing.subplots(-(-len(shown) // columns), columns, squeeze=False).ravel()
    drawing.subplots_adjust(left=0.06, right=0.94, top=0.88, bottom=0.08, wspace=0.55, hspace=0.32)
    for panel, (name, title, colours, scale) in zip(axes, shown, strict=False):
        largest = float(results.map(name).values.max())
        if isinstance(scale, float):
            largest = scale
        elif scale is not None and results.has(scale):
            largest = max(largest, float(results.map(scale).values.max()))
        _paint(panel, results, window, name, colours, largest)
        panel.set_title(title, size=10, color=style.INK)
    for panel in axes[len(shown) :]:
        panel.set_axis_off()
    drawing.text(0.022, 0.975, str(results.report.get("case", "")), size=13, weight="bold", va="top")
    plane = window.plane
    where = f"{'xyz'[plane.normal]} = {window.through[plane.normal]:.0f} mm"
    text = f"{plane.name.lower()}, {style.minus(where)}, radiological view; +: foci found, x: true centres"
    drawing.text(0.981, 0.970, text, size=9, color=style.MUTED, va="top", ha="right")
    return style.save(drawing, path)


def _plane(results: ResultFolder) -> Plane:
    """The plane of a slice, else the axial one."""
    brain = results.map("brain")
    thin = [axis for axis, count in enumerate(brain.values.shape) if count == 1]
    normal = int(np.abs(brain.affine[:3, thin[0]]).argmax()) if thin else 2
    return next(plane for plane in PLANES if plane.normal == normal)


def _window(results: ResultFolder, density: str) -> Window:
    plane, field = _plane(results), results.map(density)
    points = field.points(np.argwhere(field.values > 0.1 * field.values.max()))
    low, high = points.min(axis=0) - MARGIN, points.max(axis=0) + MARGIN
    half = (high - low) / 2
    side = float(max(half[plane.across], half[plane.upwards]))
    through, middle = results.seed()[0].copy(), (low + high) / 2
    if 1 in field.values.shape:
        through[plane.normal] = field.points(np.zeros(3))[plane.normal]
    return Window(plane, through, middle, (side, side), max(0.5, side / 150))


def _paint(
    panel: Axes, results: ResultFolder, window: Window, name: str, colours: str, largest: float
) -> None:
    _, _, points = window.grid()
    values = _nearest(results, name, points)
    inside = _nearest(results, "brain", points) > 0.5
    panel.set_facecolor("#20262D")
    drawn = panel.imshow(
        np.where(inside, values, np.nan),
        extent=window.extent,
        origin="lower",
        cmap=colours,
        vmin=0.0,
        vmax=largest or 1.0,
        interpolation="nearest",
    )
    plane = window.plane
    for focus in results.report.get("foci", []):
        _mark(panel, plane, focus["centre"], "+", style.ON_DARK["Recovered"])
    for centre in (results.report.get("truth") or {}).get("centres", []):
        _mark(panel, plane, centre, "x", style.ON_DARK["Truth"])
    decorate(panel, window, True)
    panel.set(xlim=window.extent[:2], ylim=window.extent[2:])
    bar = panel.figure.colorbar(drawn, ax=panel, fraction=0.045, pad=0.02)
    bar.ax.tick_params(labelsize=8, color=style.MUTED, labelcolor=style.INK)


def _mark(panel: Axes, plane: Plane, centre: list[float], marker: str, colour: str) -> None:
    panel.plot(
        centre[plane.across], centre[plane.upwards], marker, color=colour, markersize=9, markeredgewidth=2
    )


def _nearest(results: ResultFolder, name: str, points: Array) -> Array:
    """The map's voxels at RAS points (..., 3), 0 outside."""
    field = results.map(name)
    index = np.rint(field.index(points)).astype(int)
    on_grid = np.all((index >= 0) & (index < field.values.shape), axis=-1)
    at = np.where(on_grid[..., None], index, 0)
    return np.where(on_grid, field.values[tuple(np.moveaxis(at, -1, 0))], 0.0)
