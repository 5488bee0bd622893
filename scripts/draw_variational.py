#!/usr/bin/env python3
"""The picture of docs/theory/variational.md: curves, orders, iterations, an unknown force, boundary control.

scripts/env python scripts/draw_variational.py [--out docs/pictures/variational.png]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inverse.optimizers import conjugate_gradients
from inverse.stopping import GradientTolerance, MaxIterations
from scripts.benchmarks.equation_rows.variational import CURVES
from scripts.benchmarks.variational import in_points, in_weights
from scripts.variational_studies import Bar, force
from tumour.pictures import style

COLOURS = (style.TRUTH, style.RECOVERED, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
KNOTS = (5, 9, 17, 33, 65)


def curves(axes: Axes) -> None:
    """The four in a plane: closed form as a line, 9 knots as dots; y of the falling bead downward."""
    s = torch.linspace(0, 1, 201, dtype=torch.float64)
    shown = ("hyperbolic line", "catenary of revolution", "chain of given length", "brachistochrone")
    for curve, colour in zip((c for c in CURVES if c.name in shown), COLOURS, strict=False):
        sign = -1.0 if curve.name == "brachistochrone" else 1.0
        exact = curve.exact(s)
        path, result = curve.solve(9)
        found = curve.points(path, result.m)
        axes.plot(exact[:, 0], sign * exact[:, 1], color=colour, linewidth=1.2, label=curve.name)
        axes.plot(found[:, 0], sign * found[:, 1], "o", color=colour, markersize=3.5)
    axes.set(aspect="equal", xlim=(-0.9, 2.6), ylim=(-1.45, 1.45))
    axes.set_title("closed forms, and the paths of 9 knots")
    axes.legend(fontsize=7, frameon=False, loc="center right", bbox_to_anchor=(1.0, 0.6))


def errors(axes: Axes) -> None:
    """Largest error of each curve over its size."""
    for curve, colour in zip(CURVES, COLOURS, strict=True):
        axes.loglog(
            KNOTS, [curve.errors(k)[0] for k in KNOTS], "o-", color=colour, markersize=3, label=curve.name
        )
    axes.loglog((9, 65), [3e-4 / (k / 9) ** 4 for k in (9, 65)], "--", color=style.MUTED, label="order 4")
    plain(axes, KNOTS, ())
    axes.set_title("error of the curve against knots")
    axes.legend(fontsize=7, frameon=False)


def plain(axes: Axes, x: Sequence[int], y: Sequence[int]) -> None:
    """Logarithmic axes with ticks at plain numbers (none given: as they are)."""
    for axis, ticks in ((axes.xaxis, x), (axes.yaxis, y)):
        if ticks:
            axis.set_ticks(ticks, [str(tick) for tick in ticks])
            axis.set_ticks([], minor=True)


def iterations(axes: Axes) -> None:
    """Of conjugate gradients on the great circle."""
    rules = (GradientTolerance(1e-6), MaxIterations(2000))
    cases = (
        ("points, Euclidean", in_points),
        ("weights in H1, length 0.1", lambda k: in_weights(k, 0.1)),
        ("weights in L2", lambda k: in_weights(k, 0.0)),
    )
    for (name, problem), colour in zip(cases, COLOURS, strict=False):
        counts = [conjugate_gradients.minimise(*problem(k), stopping=rules).iterations for k in KNOTS[1:]]
        axes.loglog(KNOTS[1:], counts, "o-", color=colour, markersize=3, label=name)
    plain(axes, KNOTS[1:], (20, 50, 100, 200))
    axes.set_title("iterations on the great circle against knots")
    axes.legend(fontsize=7, frameon=False)


def ill_posed(axes: Axes) -> None:
    """The force behind noisy positions."""
    good, bad = force(1, 0.0, True), force(1, 0.0, False)
    axes.plot(bad.grid, bad.found, color=style.MUTED, linewidth=0.7, label="60 iterations")
    axes.plot(good.grid, good.truth, color=style.TRUTH, linewidth=1.4, label="true")
    axes.plot(good.grid, good.found, color=style.RECOVERED, linewidth=1.4, label="discrepancy principle")
    axes.set(ylim=(-4, 4))
    axes.set_title("a force from positions with 1 % noise")
    axes.legend(fontsize=7, framealpha=1.0, loc="upper right")


def control(flux: Axes, state: Axes) -> None:
    """Flux through one end of a bar, and the state that it reaches."""
    bar = Bar("boundary")
    w, end, _ = bar.train()
    times = torch.linspace(0, bar.T, 401, dtype=torch.float64)
    best, reached, _ = bar.dense(times)
    flux.plot(times, best, color=style.TRUTH, linewidth=1.4, label="linear algebra")
    flux.plot(
        torch.linspace(0, bar.T, len(w)),
        w,
        "o",
        color=style.RECOVERED,
        markersize=3,
        label="network's weights",
    )
    flux.set_title("boundary control w(t) of the heat equation")
    flux.legend(fontsize=7, frameon=False)
    x = torch.linspace(0, 1, len(end))
    state.plot(x, bar.system()[3], "--", color=style.MUTED, label="target")
    state.plot(x, reached, color=style.TRUTH, linewidth=1.4, label="linear algebra")
    state.plot(x, end, "o", color=style.RECOVERED, markersize=3, label="network")
    state.set_title("u(x) at T = 0.5")
    state.legend(fontsize=7, frameon=False)


def main() -> None:
    """Six panels."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/variational.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    drawing = style.figure((1200, 730))
    panels = drawing.subplots(2, 3).ravel()
    drawing.subplots_adjust(left=0.05, right=0.985, top=0.95, bottom=0.06, wspace=0.18, hspace=0.25)
    for panel, draw in zip(panels, (curves, errors, iterations, ill_posed), strict=False):
        draw(panel)
    control(*panels[4:])
    for panel in panels:
        panel.tick_params(colors=style.INK, labelsize=8)
        panel.title.set(size=9, color=style.INK)
    style.save(drawing, options.out)


if __name__ == "__main__":
    main()
