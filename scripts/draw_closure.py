"""Draw the benchmark `closure`: the learned laws, and the profiles of later days beside rivals.

scripts/env python scripts/draw_closure.py [--out FILE] [--seconds PROCESS_SECONDS_EACH]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.benchmarks.closure import LENGTH, METHODS, PLACES, SECONDS, SHOTS, TRUTHS, Data, Outcome

OUT = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "closure.png"
INK, SHADE = "#1F2933", "#E4E7EB"
COLOURS = {"ours": "#D55E00", "local": "#0072B2", "dense": "#009E73", "PINN": "#CC79A7"}
SEED = 1


def draw_law(axes: Axes, data: Data, found: dict[str, Outcome]) -> None:
    """rho g of those that have it, the truth, and the densities that were visited."""
    u = torch.linspace(0, 1, 300, dtype=torch.float64)
    axes.axvspan(0, data.visited, color=SHADE, linewidth=0, label="visited up to day 100")
    axes.plot(u, data.truth.rate(u.numpy()), color=INK, linewidth=3.0, alpha=0.5, label="truth")
    for name, outcome in found.items():
        if outcome.rate is not None:
            with torch.no_grad():
                axes.plot(u, outcome.rate(u), color=COLOURS[name], linewidth=1.6, label=name)
    axes.set_title(f"{data.truth.name}: growth in 1/day", fontsize=10, color=INK, loc="left")
    axes.set_xlabel("density u", fontsize=9, color=INK)
    axes.set_xlim(0, 1)
    axes.set_ylim(0)


def draw_profiles(axes: Axes, data: Data, found: dict[str, Outcome]) -> None:
    """u at the last day seen and at the last day asked for."""
    x = torch.linspace(0, LENGTH, PLACES, dtype=torch.float64)
    axes.plot(x, data.y[-1], ".", color=INK, markersize=3, label="data, day 100")
    axes.plot(x, data.states[-1], color=INK, linewidth=3.0, alpha=0.5, label="truth, day 150")
    for name, outcome in found.items():
        label = f"{name} ({outcome.later(data):.1f} %)"
        axes.plot(x, outcome.states[-1], color=COLOURS[name], linewidth=1.4, label=label)
    title = f"{data.truth.name}: density at day {100 * len(data.states) // SHOTS}"
    axes.set_title(f"{title} (error, days 110 to 150)", fontsize=10, color=INK, loc="left")
    axes.set_xlabel("x in mm", fontsize=9, color=INK)
    axes.set_xlim(0, LENGTH)
    axes.set_ylim(0, 1.35 * float(data.states[-1].max()))


def draw(path: Path, seconds: float) -> None:
    """A row for each truth."""
    torch.set_num_threads(1)
    figure = Figure(figsize=(9, 6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for row, truth in zip(figure.subplots(2, 2), TRUTHS.values(), strict=True):
        data = Data.of(truth, SEED)
        found = {name: method(data, SEED, seconds) for name, method in METHODS.items()}
        for axes, drawn in zip(row, (draw_law, draw_profiles), strict=True):
            drawn(axes, data, found)
            axes.tick_params(colors=INK, labelsize=8)
        row[0].legend(fontsize=8, frameon=False, loc="lower center")
        row[1].legend(fontsize=8, frameon=False, loc="upper right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": "Gliode"})


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    options = parser.parse_args()
    draw(options.out, options.seconds)


if __name__ == "__main__":
    main()
