"""Two plain figures from result.json: how the search converged and stopped; truth, estimate and interval."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from solvers.errors import GliodeError
from tumour.pictures import style
from tumour.pictures.results import Array, Estimate, Inapplicable, ResultFolder

TITLES = {"misfit": "Misfit", "gradient_norm": "Norm of the gradient"}
COLUMNS = (("truth", 0.600, "left"), ("estimate", 0.690, "left"), ("interval", 0.972, "right"))


def _history(results: ResultFolder) -> tuple[Array, Array, dict[str, Array]]:
    """Iterations and stages (n,) and the curves by name, each (n,); NaN where a row has no such value."""
    rows = results.report.get("history") or []
    if not rows:
        raise Inapplicable(f"{results.path}/result.json has no history: only identify.py searches")
    try:
        iterations = np.array([row["iteration"] for row in rows], dtype=float)
        stages = np.array([row.get("stage", 0) for row in rows], dtype=float)
        curves = {
            name: np.array([np.nan if row.get(name) is None else row[name] for row in rows], dtype=float)
            for name in TITLES
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        wanted = "iteration, misfit and gradient_norm in each row"
        raise GliodeError(f"{results.path}/result.json: history needs {wanted}") from error
    return iterations, stages, {name: curve for name, curve in curves.items() if np.isfinite(curve).any()}


def stopping(results: ResultFolder) -> str:
    """The rule that fired, in words (StepTolerance: step tolerance), from stopping or stopping.rule."""
    rule = results.report.get("stopping")
    if isinstance(rule, dict):
        rule = rule.get("rule")
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", str(rule or "")).lower()
    return words or "not recorded"


def convergence(results: ResultFolder, size: tuple[int, int], path: Path) -> Path:
    """The picture convergence.png."""
    iterations, stages, curves = _history(results)
    drawing = style.figure(size)
    panels = drawing.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
    drawing.subplots_adjust(left=0.115, right=0.97, top=0.835, bottom=0.095, hspace=0.16)
    for panel, (name, curve) in zip(panels, curves.items(), strict=True):
        panel.set_yscale("log" if 0 < 10 * np.nanmin(curve) < np.nanmax(curve) else "linear")
        _curve(panel, iterations, stages, curve, style.RECOVERED if name == "misfit" else style.TRUTH)
        panel.set_ylabel(TITLES[name], size=11, color=style.INK)
        tidy(panel)
    panels[-1].set_xlabel("Iteration", size=11, color=style.INK)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    case = str(results.report.get("case", results.path.name))
    counts = (results.report.get("counts") or {}).items()
    solves = ", ".join(f"{number} {name}" for name, number in counts if isinstance(number, int) and number)
    drawing.text(0.115, 0.965, f"{case}: convergence", size=15, weight="bold", color=style.INK, va="top")
    lines = [f"stopped after iteration {iterations[-1]:g} by the rule: {stopping(results)}"]
    lines += [f"solves: {solves}"] if solves else []
    for number, line in enumerate(lines):
        drawing.text(0.115, 0.92 - 0.03 * number, line, size=10, color=style.MUTED, va="top")
    return style.save(drawing, path)


def _curve(panel: Axes, iterations: Array, stages: Array, curve: Array, colour: str) -> None:
    """One curve, broken where a new stage of the search begins (its misfit is another), the stop marked."""
    panel.axvline(iterations[-1], color=style.INK, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    for start in iterations[1:][np.diff(stages) != 0]:
        panel.axvline(start - 0.5, color=style.MUTED, linewidth=0.9, linestyle=(0, (1, 3)), zorder=1)
    dot: dict[str, Any] = {"marker": "o", "markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.8}
    for stage in np.unique(stages):
        part = stages == stage
        panel.plot(iterations[part], curve[part], color=colour, linewidth=2.0, **dot)
    last = np.flatnonzero(np.isfinite(curve))[-1]
    ring: dict[str, Any] = {"markersize": 9, "markeredgecolor": colour, "markeredgewidth": 2.2}
    panel.plot(iterations[last], curve[last], "o", color="white", **ring)
    panel.set_xlim(right=iterations[-1] + 0.09 * max(float(np.ptp(iterations)), 1.0))
    place: dict[str, Any] = {"xytext": (10, 0), "textcoords": "offset points", "va": "center"}
    panel.annotate(_short(curve[last]), (iterations[last], curve[last]), size=10, color=style.INK, **place)


def tidy(panel: Axes) -> None:
    """Light grid, no box."""
    panel.grid(True, which="major", color="#DDE3E9", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=9.5, color=style.MUTED, labelcolor=style.INK)
    for name, side in panel.spines.items():
        side.set_visible(name in ("left", "bottom"))
        side.set_color(style.MUTED)


def estimates(results: ResultFolder, size: tuple[int, int], path: Path) -> Path:
    """The picture estimates.png: a row a parameter, each on its own axis."""
    rows = results.estimates
    if not rows:
        raise Inapplicable(
            f"{results.path}/result.json has no estimates: only identify.py estimates parameters"
        )
    drawing = style.figure(size)
    top, bottom = 0.845, 0.03
    pitch = min((top - bottom) / len(rows), 0.16)
    columns = COLUMNS if any(row.truth is not None for row in rows) else COLUMNS[1:]
    for number, row in enumerate(rows):
        base = top - (number + 1) * pitch
        middle = base + 0.65 * pitch
        _row(drawing.add_axes((0.15, base + 0.42 * pitch, 0.42, 0.46 * pitch)), row)
        text = {"color": style.INK, "va": "center"}
        drawing.text(0.035, middle + 0.012, style.pretty(row.name), size=13, **text)
        drawing.text(0.035, middle - 0.020, style.pretty_unit(row.unit), size=8.5, **text)
        for name, left, align in columns:
            drawing.text(left, middle, numbers(row)[name], size=10.5, ha=align, **text)
    share = f"{100 * float(results.report.get('level') or 0.9):g} % interval"
    for name, left, align in columns:
        drawing.text(
            left, top + 0.012, share if name == "interval" else name, size=9, color=style.MUTED, ha=align
        )
    case = str(results.report.get("case", results.path.name))
    drawing.text(0.035, 0.965, f"{case}: what was found", size=15, weight="bold", color=style.INK, va="top")
    looks: dict[str, dict[str, Any]] = {
        "truth": {"marker": "D", "linestyle": "", "color": style.TRUTH, "markersize": 7},
        "estimate": {"marker": "o", "linestyle": "", "color": style.RECOVERED, "markersize": 8},
        "interval": {"color": style.RECOVERED, "linewidth": 5, "alpha": 0.4},
    }
    marks = [
        Line2D([], [], label=share if name == "interval" else name, **looks[name]) for name, _, _ in columns
    ]
    place = {"loc": "upper left", "bbox_to_anchor": (0.142, 0.925)}
    drawing.legend(handles=marks, ncols=3, frameon=False, fontsize=9.5, **place)
    return style.save(drawing, path)


def _short(value: float) -> str:
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def numbers(row: Estimate) -> dict[str, str]:
    """Truth, estimate and interval as text, with the digits that show two of the interval's width."""
    width = 0.0 if row.interval is None else row.interval[1] - row.interval[0]

    def text(value: float) -> str:
        if width <= 0:
            return style.minus(f"{value:.4g}")
        return style.minus(f"{value:.{max(0, 1 - math.floor(math.log10(width)))}f}")

    return {
        "truth": "" if row.truth is None else text(row.truth),
        "estimate": text(row.value),
        "interval": "" if row.interval is None else " to ".join(map(text, row.interval)),
    }


def _row(panel: Axes, row: Estimate) -> None:
    """One parameter: interval as a bar, estimate as a dot, truth as a diamond."""
    values = np.array([row.value, *(row.interval or ()), *(() if row.truth is None else (row.truth,))])
    low, high = float(values.min()), float(values.max())
    if low > 0 and high > 3 * low:
        panel.set_xscale("log")
        panel.set_xlim(low / (high / low) ** 0.15, high * (high / low) ** 0.15)
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1,)))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
    else:
        margin = 0.15 * (high - low) or 0.15 * abs(high) or 1.0
        panel.set_xlim(low - margin, high + margin)
        panel.xaxis.set_major_locator(MaxNLocator(6))
    if row.interval is not None:
        panel.plot(
            row.interval, [0, 0], color=style.RECOVERED, linewidth=7, alpha=0.35, solid_capstyle="butt"
        )
        panel.plot(row.interval, [0, 0], "|", color=style.RECOVERED, markersize=11, markeredgewidth=1.8)
    panel.plot(
        row.value,
        0,
        "o",
        color=style.RECOVERED,
        markersize=9,
        markeredgecolor="white",
        markeredgewidth=1.2,
        clip_on=False,
    )
    if row.truth is not None:
        panel.plot(
            row.truth,
            0,
            "D",
            color=style.TRUTH,
            markersize=7,
            markeredgecolor="white",
            markeredgewidth=1.0,
            zorder=5,
        )
    panel.set_ylim(-1, 1)
    panel.set_yticks([])
    panel.tick_params(labelsize=8.5, color=style.MUTED, labelcolor=style.MUTED, length=3, pad=2)
    panel.patch.set_alpha(0)
    for name, side in panel.spines.items():
        side.set_visible(name == "bottom")
        side.set(color="#AEB8C2", linewidth=0.9)
