"""Close-ups of the recovered surfaces, coloured by their distance from the true (or the scan's) ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyvista
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from tumour.pictures import rendering, style
from tumour.pictures.rendering import Layer, View
from tumour.pictures.results import Array, Outline
from tumour.pictures.surfaces import Surfaces

LEFT, WIDTH, HEIGHT = 0.69, 0.285, 0.385
BOTTOMS = (0.545, 0.14)
PARTS = dict(zip(style.LEVELS, ("margin", "core"), strict=True))


def offset(recovered: pyvista.PolyData, truth: pyvista.PolyData) -> pyvista.PolyData:
    """The recovered surface with `offset`: signed distance to the true one, mm, positive beyond it."""
    measured = recovered.compute_implicit_distance(truth)
    measured.point_data["offset"] = measured.point_data.pop("implicit_distance")
    return measured


def draw(drawing: Figure, surfaces: Surfaces, outlines: list[Outline], towards: Array) -> None:
    """A column of two cards, margin and core, at the right edge of the figure, with their colour bar."""
    label = surfaces.results.label
    reference = next(outline.label for outline in outlines if outline.label != label)
    found = {(outline.label, outline.level): surfaces.of(outline) for outline in outlines}
    measured = {}
    for level in style.LEVELS:
        ours, theirs = found.get((label, level)), found.get((reference, level))
        if ours is not None and theirs is not None and ours.n_points and theirs.n_points:
            measured[level] = offset(ours, theirs)
    if not measured:
        return
    largest = max(float(np.quantile(np.abs(surface["offset"]), 0.95)) for surface in measured.values())
    limit = max(1.0, float(np.ceil(2 * largest)) / 2)
    points = np.concatenate([np.asarray(surface.points) for surface in measured.values()])
    wide, tall = drawing.get_size_inches() * drawing.dpi
    view = View.fit(points, towards, (round(WIDTH * wide), round(HEIGHT * tall)), (0.06, 0.05, 0.94, 0.80))
    known = f"the {reference.lower()}"
    for (level, surface), bottom in zip(measured.items(), BOTTOMS, strict=False):
        panel = drawing.add_axes((LEFT, bottom, WIDTH, HEIGHT))
        layer = Layer(surface, scalars="offset", cmap=style.OFFSET, clim=(-limit, limit))
        panel.imshow(rendering.render([layer], view, plain=True))
        error = float(np.sqrt(np.mean(np.asarray(surface["offset"]) ** 2)))
        _frame(panel, f"{label} {PARTS[level]}, u = {level:g}", f"{error:.1f} mm from {known} (rms)")
    bar = drawing.add_axes((LEFT + 0.03, 0.085, WIDTH - 0.06, 0.016))
    colours = ScalarMappable(Normalize(-limit, limit), style.OFFSET)
    ticks = [-limit, -limit / 2, 0.0, limit / 2, limit]
    scale = drawing.colorbar(colours, cax=bar, orientation="horizontal")
    scale.set_ticks(
        ticks,
        labels=[style.minus(f"{tick:+g}") if tick else "0" for tick in ticks],
    )
    bar.tick_params(labelsize=8.5, color=style.MUTED, labelcolor=style.INK)
    bar.set_title(f"short of {known}  ←  mm  →  beyond {known}", size=8.5, color=style.INK, pad=4)
    for side in bar.spines.values():
        side.set_visible(False)


def _frame(panel: Axes, heading: str, note: str) -> None:
    """A card: heading, note, no ticks, thin pale frame."""
    panel.set_xticks([])
    panel.set_yticks([])
    for side in panel.spines.values():
        side.set(color="#CBD3DB", linewidth=0.8)
    at: dict[str, Any] = {"va": "top", "transform": panel.transAxes}
    panel.text(0.04, 0.955, heading, size=9.5, weight="bold", color=style.INK, **at)
    panel.text(0.04, 0.885, note, size=8.5, color=style.MUTED, **at)
