"""What stands around a rendering: title, legend, scale bar, the directions of the body."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from tumour.pictures import style
from tumour.pictures.rendering import View
from tumour.pictures.results import ResultFolder


def title(drawing: Figure, results: ResultFolder, day: float) -> None:
    """The case's name and the day, top left."""
    case = str(results.report.get("case", results.path.name))
    drawing.text(0.035, 0.965, case, size=15, weight="bold", color=style.INK, va="top")
    drawing.text(0.035, 0.925, style.day_name(day), size=10, color=style.MUTED, va="top")


Entry = tuple[str, str, float, float | None]
"""Text, colour, opacity, and the width in points where it is drawn as rings (None: as a surface)."""


def legend(drawing: Figure, entries: list[Entry], columns: int) -> None:
    """What the surfaces and rings are, surfaces first."""
    handles: list[Patch | Line2D] = []
    for text, colour, opacity, width in sorted(entries, key=lambda entry: entry[3] is not None):
        if width is None:
            handles.append(Patch(facecolor=colour, alpha=opacity, label=text))
        else:
            handles.append(Line2D([], [], color=colour, linewidth=width, label=text))
    place = {"loc": "lower left", "bbox_to_anchor": (0.155, 0.02)}
    drawing.legend(handles=handles, ncols=columns, frameon=False, fontsize=9.5, **place)


def scale_bar(drawing: Figure, view: View, place: tuple[float, float], share: float = 0.1) -> None:
    """A bar of a round length (the projection is parallel); `place`: its left end in shares of the figure."""
    length = style.nice_length(share / view.shares(1.0))
    left, bottom = place
    drawing.add_artist(
        Line2D(
            [left, left + view.shares(length)],
            [bottom] * 2,
            color=style.INK,
            linewidth=3,
            solid_capstyle="butt",
        )
    )
    drawing.text(
        left + view.shares(length) / 2, bottom + 0.012, f"{length:g} mm", size=9, color=style.INK, ha="center"
    )


def triad(drawing: Figure, view: View, place: tuple[float, float], reach: float = 0.032) -> None:
    """Where the patient's right, front and head are."""
    wide, tall = drawing.get_size_inches()
    for vector, letter in (
        (np.array([1.0, 0, 0]), "R"),
        (np.array([0, 1.0, 0]), "A"),
        (np.array([0, 0, 1.0]), "S"),
    ):
        flat = view.axes @ vector * reach * np.array([1.0, wide / tall])
        end = np.array(place) + flat
        drawing.add_artist(Line2D([place[0], end[0]], [place[1], end[1]], color=style.MUTED, linewidth=1.4))
        at = np.array(place) + flat * (1 + 0.012 / max(float(np.hypot(*flat)), 0.012))
        look = {"size": 9, "color": style.INK, "weight": "bold", "ha": "center", "va": "center"}
        drawing.text(*at, letter, **look)
