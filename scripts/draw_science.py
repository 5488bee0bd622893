"""Draw the picture of docs/studies/science.md: docs/pictures/science.png (a few minutes).

scripts/env python scripts/draw_science.py [--out FOLDER]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.benchmarks import _science_contests as contests
from scripts.benchmarks import _science_rivals as rivals
from scripts.benchmarks import science

OUT = Path(__file__).resolve().parents[1] / "docs" / "pictures"
INK = "#1F2933"
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"  # told apart by the colour-blind
TIMES = (0.5, 1.0, 2.0, 4.0, 8.0)


def steps(axes: Axes) -> None:
    counts = (12, 24, 48)
    for (scheme, order), colour in zip(science.SCHEMES.items(), (PINK, GREEN, BLUE, ORANGE), strict=True):
        state, rate = zip(*(science.step_errors(scheme, n) for n in counts), strict=True)
        axes.loglog(counts, state, "o-", color=colour, label=f"{scheme}, order {order}")
        axes.loglog(counts, rate, "o--", color=colour, fillstyle="none")
    axes.set(title="error against the steps: state, and rate (dashed)", xlabel="steps")
    axes.set_xticks(counts, [str(n) for n in counts], minor=False)
    axes.minorticks_off()


def depth(axes: Axes) -> None:
    rows = science.resolved(len(science.SEEDS))
    for noise, colour in zip(science.LEVELS, (BLUE, GREEN, ORANGE), strict=True):
        own = [row for row in rows if row.noise == noise]
        knots = [row.knots for row in own]
        axes.loglog(knots, [row.observed for row in own], "o", color=colour, label=f"{100 * noise:g} % noise")
        axes.loglog(knots, [row.predicted for row in own], "-", color=colour)
    axes.set(title="error of a control w(t); line: predicted", xlabel="knots")
    axes.set_xticks(science.KNOTS, [str(k) for k in science.KNOTS], minor=False)
    axes.minorticks_off()


def contest(axes: Axes, name: str, title: str, own: list[rivals.Result], seeds: Sequence[int]) -> None:
    """Error against seconds: ours by refinement, each rival trained anew for each time; means over seeds."""
    axes.loglog(*times_and_errors([[r] for r in own]), "o-", color=BLUE, label="science-activated")
    for (rival, train), colour in zip(
        contests.contests()[name].others.items(), (ORANGE, GREEN), strict=False
    ):
        times = TIMES[:1] if rival.startswith("ours") else TIMES
        found = [[train(seconds, seed) for seed in seeds] for seconds in times]
        axes.loglog(*times_and_errors(found), "s-", color=colour, label=rival)
    axes.set(title=title, xlabel="seconds of one core")


def times_and_errors(found: list[list[rivals.Result]]) -> tuple[list[float], list[float]]:
    seconds, errors = (
        [sum(r[key] for r in results) / len(results) for results in found] for key in ("seconds", "error")
    )
    return seconds, errors


def draw(folder: Path) -> None:
    torch.set_num_threads(1)
    rivals.logistic_ours(8)  # what is imported and compiled at first is not timed
    figure = Figure(figsize=(9.6, 6.4), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    (a, b, c), (d, e, f) = figure.subplots(2, 3)
    steps(a)
    depth(b)
    sizes = ((16, 10), (32, 20), (64, 40), (128, 80), (256, 160), (512, 320))
    growth = [rivals.logistic_ours(10 * 2**k) for k in range(8)]
    contest(c, "logistic growth, direct", "logistic growth", growth, (1,))
    contest(d, "heat, direct", "heat", [rivals.heat_ours(*size) for size in sizes], (1,))
    contest(e, "Poisson, direct", "Poisson", [rivals.poisson_ours(8 * 2**k) for k in range(5)], (1,))
    name = "Lotka-Volterra, 4 rates at 1 % noise"
    fits = [contests.prey_identified(seed) for seed in science.SEEDS]
    seconds, errors = times_and_errors([fits])
    ours = {"seconds": seconds[0], "error": errors[0]}
    contest(f, name, "4 rates at 1 % noise, mean of 3 seeds", [ours], science.SEEDS)
    f.set_xlim(0.2, 20)
    for axes in (a, b, c, d, e, f):
        axes.legend(fontsize=7, frameon=False)
        axes.title.set_fontsize(9)
        axes.tick_params(labelsize=8)
    for axes in (a, d):
        axes.set_ylabel("relative error", color=INK)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "science.png", metadata={"Software": "Gliode"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    draw(parser.parse_args().out)
