"""Draw the picture of docs/theory/conservation.md: docs/pictures/conservation.png.

python scripts/draw_conservation.py [--out FOLDER]
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from solvers.evolution import Evolution
from solvers.node.science import riemann
from solvers.node.science.conservation import DG, SSPStep
from solvers.node.science.elements import interval
from solvers.node.science.kinetic import (
    BGK,
    GOLDSTEIN_TAYLOR,
    MicroMacro,
    fourier_mode,
    time_steps,
)
from solvers.node.science.laws import Burgers, Euler

OUT = Path(__file__).resolve().parents[1] / "docs" / "pictures"
INK = "#1F2933"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # told apart by the colour-blind
FINE = np.linspace(-1, 1, 2001)


def tube(axes: Axes) -> None:
    """Sod's tube by 100 cells."""
    law, x = Euler(), FINE / 2
    field = DG(law, interval(-0.5, 0.5, 100, 1), tvb=0.0)
    e = field.elements
    u = e.project(
        lambda x: law.state(
            0.125 + 0.875 * (x[..., 0] < 0).double(), [0 * x[..., 0]], 0.1 + 0.9 * (x[..., 0] < 0).double()
        )
    )
    u = e.means(Evolution(SSPStep(field))(u, 0.2, 110))
    found = [u[:, 0], u[:, 1] / u[:, 0], law.pressure(u.unbind(-1), 1.4)]
    centres = e.points.mean(1)[:, 0]
    names = ("density", "velocity", "pressure")
    for name, colour, mine, exact in zip(names, COLOURS, found, riemann.euler(x, 0.2), strict=False):
        axes.plot(x, exact, color=INK, linewidth=0.8)
        axes.plot(centres, mine, "o", color=colour, markersize=2.5, label=name)
    axes.set_title("Sod's tube, Euler, 100 cells of P1, t = 0.2")
    axes.legend(frameon=False, loc="center left")


def hat(axes: Axes) -> None:
    """A rarefaction and a shock of Burgers' equation."""
    field = DG(Burgers(), interval(-1, 1, 80, 1, periodic=True), tvb=0.0)
    e = field.elements
    u = e.project(lambda x: [1.5 * (x[..., 0].abs() < 0.5).double() - 0.5])
    centres = e.points.mean(1)[:, 0]
    for k, colour in enumerate(COLOURS[:3]):
        t = 0.25 * k
        fan, shock = riemann.burgers(FINE + 0.5, t, -0.5, 1.0), riemann.burgers(FINE - 0.5, t, 1.0, -0.5)
        axes.plot(FINE, np.where(FINE < 0.2, fan, shock), color=INK, linewidth=0.8)
        axes.plot(centres, e.means(u)[:, 0], "o", color=colour, markersize=2.5, label=f"t = {t:g}")
        u = Evolution(SSPStep(field))(u, 0.25, 30)
    axes.set_title("Burgers, 80 cells of P1: rarefaction and shock")
    axes.legend(frameon=False, loc="lower center")


def telegraph(axes: Axes) -> None:
    """A wave of Goldstein and Taylor's model at one time step for all eps."""
    duration, times = 0.12, np.linspace(0, 0.12, 121)
    for eps, colour in zip((1.0, 0.3, 0.1, 1e-4), COLOURS, strict=True):
        model = MicroMacro(GOLDSTEIN_TAYLOR, 1.0, 32, eps)
        wave = torch.cos(2 * math.pi * model.centres)
        exact = [
            np.real(fourier_mode(GOLDSTEIN_TAYLOR, eps, 1.0, 2 * math.pi, t, np.ones(2)).mean())
            for t in times
        ]
        axes.plot(times, exact, color=INK, linewidth=0.8)
        u, seen = model.start(wave), [1.0]
        steps = time_steps(duration / 20, 0.5 * model.h**2)
        for _ in range(20):
            u = Evolution(model)(u, duration / 20, steps, torch.tensor(1.0, dtype=torch.float64))
            seen.append(float(model.density(u) @ wave / (wave @ wave)))
        axes.plot(np.linspace(0, duration, 21), seen, "o", color=colour, markersize=3, label=f"ε = {eps:g}")
    axes.set_title("Goldstein-Taylor, Δt = h²/2 for every ε: cos 2πx")
    axes.set_xlabel("t")
    axes.set_ylim(-0.35, 1.3)
    axes.legend(frameon=False, ncols=2, loc="upper right")


def gas(axes: Axes) -> None:
    """BGK in Sod's tube from rare to dense."""
    for tau, colour in zip((0.1, 0.02, 1e-8), COLOURS, strict=False):
        model = BGK(-0.5, 0.5, 120, count=64)
        high = (model.centres < 0).double()
        u = model.equilibrium(0.125 + 0.875 * high, 0 * high, 0.1 + 0.9 * high)
        steps = time_steps(0.15, model.largest_step)
        u = Evolution(model)(u, 0.15, steps, torch.tensor(tau, dtype=torch.float64))
        axes.plot(model.centres, model.macroscopic(u)[0], color=colour, label=f"τ = {tau:g}")
    axes.plot(FINE / 2, riemann.euler(FINE / 2, 0.15)[0], color=INK, linewidth=0.8, label="Euler, exact")
    axes.set_title("BGK in Sod's tube, density at t = 0.15")
    axes.legend(frameon=False, loc="lower left")


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    out: Path = parser.parse_args(arguments).out
    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2)
    for draw, axes in zip((tube, hat, telegraph, gas), panels.flat, strict=True):
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "conservation.png", dpi=100)


if __name__ == "__main__":
    main()
