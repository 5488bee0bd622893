"""Draw marginals of the benchmark `posterior`, Laplace against chains: docs/pictures/posterior.png.

scripts/env python scripts/draw_posterior.py [--out FILE]
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.benchmarks.posterior import LEVEL, Case, field, sampled, tumour

OUT = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "posterior.png"
CHAINS, LAPLACE, INK = "#0072B2", "#D55E00", "#1F2933"
LABELS = ("log D_white", "log rho", "log age")


def draw_marginal(axes: Axes, draws: Tensor, mean: float, sd: float, truth: float, prior: Tensor) -> None:
    """A histogram of the draws, Laplace's normal density, the prior's (mean, sd) and the truth."""
    axes.hist(draws.numpy(), bins=40, density=True, color=CHAINS, alpha=0.45, label="chains")
    low, high = float(draws.min()), float(draws.max())
    x = torch.linspace(min(low, mean - 3 * sd), max(high, mean + 3 * sd), 300, dtype=torch.float64)
    for centre, spread, style, name in (
        (mean, sd, {"color": LAPLACE, "linewidth": 1.8}, "Laplace"),
        (*prior.tolist(), {"color": INK, "linewidth": 1.0, "linestyle": ":"}, "prior"),
    ):
        density = torch.exp(-0.5 * ((x - centre) / spread) ** 2) / (spread * math.sqrt(2 * math.pi))
        axes.plot(x, density, label=name, **style)
    axes.axvline(truth, color=INK, linewidth=1.0, label="truth")
    axes.set_yticks([])


def draw_tumour(row: list[Axes], case: Case, draws: int, title: str) -> None:
    """The marginals of the three parameters."""
    flat = sampled(case, draws).samples.flatten(0, 1)
    prior = torch.stack([case.prior.mean, case.prior.variance().sqrt()], 1)
    mean, sd = case.laplace.mean, case.laplace.sd()
    for k, axes in enumerate(row):
        draw_marginal(axes, flat[:, k], float(mean[k]), float(sd[k]), float(case.truth[k]), prior[k])
        axes.set_xlabel(LABELS[k], fontsize=9, color=INK)
    row[0].set_ylabel(title, fontsize=9, color=INK)


def draw_field(axes: Axes, case: Case) -> None:
    """The field along the line: truth, and mean and 90 % intervals of both."""
    chains = sampled(case, 1000)
    order = sorted(range(len(case.truth)), key=case.places.tolist().__getitem__)
    x = case.places[order]
    low, high = case.laplace.interval(LEVEL)
    axes.fill_between(
        x, low[order], high[order], color=LAPLACE, alpha=0.25, label="Laplace, 90 %", linewidth=0
    )
    axes.plot(x, case.laplace.mean[order], color=LAPLACE, linewidth=1.8, label="Laplace, mean")
    for bound, name in zip(chains.interval(LEVEL), ("chains, 90 %", None), strict=True):
        axes.plot(x, bound[order], color=CHAINS, linewidth=1.0, linestyle="--", label=name)
    axes.plot(x, chains.mean()[order], color=CHAINS, linewidth=1.0, label="chains, mean")
    axes.plot(x, case.truth[order], color=INK, linewidth=1.2, label="truth")
    axes.set_xlabel("x in mm", fontsize=9, color=INK)
    axes.set_ylabel("log conductivity", fontsize=9, color=INK)
    axes.margins(x=0)
    axes.legend(fontsize=8, frameon=False, ncols=3)


def draw(path: Path) -> None:
    """Two rows of marginals, and the field below."""
    torch.set_num_threads(1)
    figure = Figure(figsize=(9, 7), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, 3)
    rows = [[figure.add_subplot(grid[i, k]) for k in range(3)] for i in (0, 1)]
    draw_tumour(rows[0], tumour(1, few=False), 1000, "two visits, 10 % noise")
    draw_tumour(rows[1], tumour(2, few=True), 2500, "one outline, few slices")
    rows[0][0].legend(fontsize=8, frameon=False)
    below = figure.add_subplot(grid[2, :])
    draw_field(below, field())
    for axes in (*rows[0], *rows[1], below):
        axes.tick_params(colors=INK, labelsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": "Gliode"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    draw(parser.parse_args().out)
