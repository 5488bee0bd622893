"""Colours and small drawing helpers shared by all pictures (colour-blind safe: Okabe and Ito, 2008)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

LEVELS = (0.16, 0.6)
"""Densities at which a scan shows an outline: T2-FLAIR (oedema) and T1Gd (enhancing core)."""

TRUTH = "#0072B2"
RECOVERED = "#D55E00"
COLOURS = {"Truth": TRUTH, "Recovered": RECOVERED, "Simulated": RECOVERED, "Scan": "#3B4754"}
ON_DARK = {"Truth": "#63C3FF", "Recovered": "#FF9A3C", "Simulated": "#FF9A3C", "Scan": "#FFFFFF"}
INK = "#1F2933"
MUTED = "#6B7785"
PAPER = "#FFFFFF"
MIST = "#E9EEF3"

OFFSET = LinearSegmentedColormap.from_list(
    "gliode_offset", [TRUTH, "#8FC3E0", "#F4F1EC", "#EFB58A", RECOVERED]
)
"""Signed distance of the recovered surface: blue where the truth reaches further, orange where it does."""

INCHES = (10.0, 7.5)
"""Every figure is laid out at least this wide and high, so text keeps its share at any resolution."""


def figure(size: tuple[int, int]) -> Figure:
    """An empty figure of `size` (width, height) pixels, independent of any display or pyplot state."""
    dpi = min(size[0] / INCHES[0], size[1] / INCHES[1])
    drawing = Figure(figsize=(size[0] / dpi, size[1] / dpi), dpi=dpi, facecolor=PAPER)
    FigureCanvasAgg(drawing)
    return drawing


def save(drawing: Figure, path: Path) -> Path:
    """Write the figure as PNG, without a date, so that equal results give equal files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, format="png", dpi=drawing.dpi, metadata={"Software": "Gliode"})
    return path


def pretty(name: str) -> str:
    """A parameter's name as mathematics where it has a usual symbol: D_white, rho."""
    stem, _, index = name.partition("_")
    symbol = {"rho": r"\rho", "D": "D"}.get(stem)
    if symbol is None:
        return name.replace("_", " ")
    return f"${symbol}$" if not index else rf"${symbol}_{{\mathrm{{{index.replace('_', ' ')}}}}}$"


def minus(text: str) -> str:
    """The text with typographic minus signs."""
    return text.replace("-", "\N{MINUS SIGN}")


def day_name(day: float) -> str:
    """A day in words: day 60, day −12.5."""
    return f"day {minus(f'{day:g}')}"


def pretty_unit(unit: str) -> str:
    """mm^2/day -> mm²/day."""
    return unit.replace("^2", "²").replace("^3", "³")


def nice_length(limit: float) -> float:
    """The largest of 1, 2, 5 x 10^k that is not above `limit` (for scale bars, mm)."""
    power = 10.0 ** np.floor(np.log10(limit))
    return float(max(step * power for step in (1, 2, 5) if step * power <= limit))
