"""The tumour at several days side by side, at one scale and from one side, with its volume against time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from tumour.pictures import furniture, glass, rendering, style
from tumour.pictures.plots import tidy
from tumour.pictures.rendering import View
from tumour.pictures.results import Inapplicable, ResultFolder
from tumour.pictures.surfaces import Surfaces

FRAMES = 5
"""At most this many days are drawn, evenly chosen; the curves show all."""


def frames(results: ResultFolder) -> list[float]:
    """The days that are drawn. Errors: Inapplicable where there are fewer than two."""
    days = list(results.days("density"))
    if len(days) < 2:
        raise Inapplicable(
            f"{results.path}/maps has {len(days)} density_day<T>.nii.gz; growth needs two or more days"
        )
    chosen = np.unique(np.rint(np.linspace(0, len(days) - 1, min(len(days), FRAMES))).astype(int))
    return [days[index] for index in chosen]


def draw(surfaces: Surfaces, size: tuple[int, int], path: Path) -> Path:
    """The picture growth.png: a column a day, a row for the truth (where known) and one for the recovery."""
    results = surfaces.results
    days = frames(results)
    glass.require_surface(results, days[-1])
    rows = ["Truth"] if any(day in results.days("truth") for day in days) else []
    rows.append(results.label)
    towards = glass.direction(results)
    shell = glass.glass(surfaces, towards)
    drawing = style.figure(size)
    wide, tall = size
    left, right, top, bottom = 0.045, 0.985, 0.895, 0.315 if len(rows) == 2 else 0.42
    width, height = (right - left) / len(days), (top - bottom) / len(rows)
    pixels = (round(width * wide), round(height * tall))
    view = View.fit(np.asarray(shell.surface.points), towards, pixels, (0.03, 0.03, 0.97, 0.97))
    for number, label in enumerate(rows):
        base = top - (number + 1) * height
        for column, day in enumerate(days):
            outlines = [outline for outline in results.outlines(day) if outline.label == label]
            layers = [item.layer for item in glass.tumours(surfaces, outlines)]
            panel = drawing.add_axes((left + column * width, base, width, height))
            panel.imshow(rendering.render([shell, *layers], view, plain=True), aspect="auto")
            panel.axis("off")
            if number == 0:
                panel.set_title(style.day_name(day), size=11, weight="bold", color=style.INK, pad=3)
        middle = base + height / 2
        drawing.text(
            0.026,
            middle,
            label,
            size=11,
            weight="bold",
            color=style.COLOURS[label],
            rotation=90,
            ha="center",
            va="center",
        )
    case = str(results.report.get("case", results.path.name))
    drawing.text(0.022, 0.975, f"{case}: growth", size=13, weight="bold", color=style.INK, va="top")
    whole = View(view.towards, view.centre, view.height / height, size)
    furniture.scale_bar(drawing, whole, (0.89, 0.945), share=0.08)
    curves(drawing.add_axes((0.085, 0.075, 0.88, bottom - 0.11)), results)
    return style.save(drawing, path)


def curves(panel: Axes, results: ResultFolder) -> None:
    """Volumes above both imaging levels against time, all days, cm^3."""
    for label, prefix in (("Truth", "truth"), (results.label, "density")):
        found = results.days(prefix)
        for level, dashes, marker in zip(style.LEVELS, ("solid", (0, (4, 2))), ("o", "s"), strict=True):
            volumes = [results.map(name).volume(level) for name in found.values()]
            if found:
                look: dict[str, Any] = {
                    "color": style.COLOURS[label],
                    "clip_on": False,
                    "linewidth": 1.8,
                    "marker": marker,
                    "markersize": 6,
                    "markeredgecolor": "white",
                }
                panel.plot(list(found), volumes, linestyle=dashes, label=f"{label}, u > {level:g}", **look)
    panel.set_xlabel("day", size=9.5, color=style.INK, labelpad=2)
    panel.set_ylabel("volume (cm³)", size=9.5, color=style.INK)
    panel.set_ylim(bottom=0)
    panel.legend(frameon=False, fontsize=9, loc="upper left", handlelength=3.2)
    tidy(panel)
