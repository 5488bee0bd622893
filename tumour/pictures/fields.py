"""fields.png: slices of recovered coefficient fields: truth, estimate, standard deviation, exceedance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from tumour.pictures import style
from tumour.pictures.results import Array, Inapplicable, Map, ResultFolder

UNITS = {"D": "mm²/day", "rho": "1/day"}


@dataclass(frozen=True)
class _Panel:
    """One map, its title and colours; `shared`: the map whose range it has."""

    name: str
    title: str
    colours: str
    shared: str | None = None


def draw(results: ResultFolder, size: tuple[int, int], path: Path) -> Path:
    """The picture fields.png: a row a field, axial slices of the slice with the most tumour."""
    fields = [name for name in UNITS if results.has(name)]
    if not fields:
        raise Inapplicable("the result has no coefficient fields (identify: {unknown: field})")
    drawing = style.figure(size)
    rows = [_panels(results, name) for name in fields]
    axes = drawing.subplots(len(rows), max(map(len, rows)), squeeze=False)
    drawing.subplots_adjust(left=0.05, right=0.97, top=0.87, bottom=0.07, wspace=0.28)
    for row, panels in zip(axes, rows, strict=True):
        for panel, what in zip(row, panels, strict=True):
            _paint(panel, results, what)
    drawing.text(0.022, 0.975, str(results.report.get("case", "")), size=13, weight="bold", va="top")
    text = "axial slices, radiological view; white: the density's outlines"
    drawing.text(0.981, 0.970, text, size=9, color=style.MUTED, va="top", ha="right")
    return style.save(drawing, path)


def _panels(results: ResultFolder, name: str) -> list[_Panel]:
    symbol, unit = style.pretty(name), UNITS[name]
    found = [
        _Panel(name, f"Estimate of {symbol} ({unit})", "viridis", f"{name}_truth"),
        _Panel(f"{name}_log_sd", rf"sd of $\log$ {symbol}", "magma"),
    ]
    if results.has(f"{name}_truth"):
        found.insert(0, _Panel(f"{name}_truth", f"True {symbol} ({unit})", "viridis", name))
    days = results.days("exceedance")
    if days:
        day, chance = next(iter(days.items()))
        found.append(_Panel(chance, f"Chance of a tumour, {style.day_name(day)}", "cividis"))
    return found


def _paint(panel: Axes, results: ResultFolder, what: _Panel) -> None:
    brain, density = results.map("brain"), results.map(results.densities(results.day)[results.label])
    k = int(np.argmax(density.values.sum(axis=(0, 1))))  # the slice with the most tumour
    field = results.map(what.name)
    other = results.map(what.shared) if what.shared and results.has(what.shared) else None
    low, high = _range(field, brain, other)
    inside = brain.values[:, :, k] > 0.5
    image = np.where(inside, field.values[:, :, k], np.nan)
    mm = abs(field.affine[0, 0]), abs(field.affine[1, 1])
    rightwards = field.affine[0, 0] > 0  # the patient's right is on the left
    shown = image[::-1] if rightwards else image
    extent = (0.0, image.shape[0] * mm[0], 0.0, image.shape[1] * mm[1])
    drawn = panel.imshow(
        shown.T,
        origin="lower",
        extent=extent,
        cmap=what.colours,
        vmin=low,
        vmax=high,
        interpolation="nearest",
    )
    u = density.values[:, :, k]
    levels = [level for level in style.LEVELS if u.min() < level < u.max()]
    if levels:
        x, y = ((np.arange(n) + 0.5) * side for n, side in zip(u.shape, mm, strict=True))
        panel.contour(x, y, (u[::-1] if rightwards else u).T, levels, colors="white", linewidths=1.0)
    panel.set_title(what.title, size=10, color=style.INK)
    panel.set(xticks=[], yticks=[])
    bar = panel.figure.colorbar(drawn, ax=panel, orientation="horizontal", fraction=0.05, pad=0.03)
    bar.ax.tick_params(labelsize=8, color=style.MUTED, labelcolor=style.INK)


def _range(field: Map, brain: Map, other: Map | None) -> tuple[float, float]:
    """The colours' range: of the field, and of the map it shares it with, in the brain."""
    values: list[Array] = [m.values[brain.values > 0.5] for m in (field, other) if m is not None]
    low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    return low, high if high > low else low + 1e-12
