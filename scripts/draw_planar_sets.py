"""Draw the four planar sets with the boundary that no classifier betters: docs/pictures/planar_sets.png.

python scripts/draw_planar_sets.py [--out FILE]
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

from inverse.datasets import PLANAR, bayes_accuracy, densities, planar

OUT = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "planar_sets.png"
COLOURS = ("#D55E00", "#0072B2")  # labels 0 and 1, as in tumour.pictures: told apart by the colour-blind
MARKERS = ("x", "o")
INK = "#1F2933"
LIMIT = 1.25  # the plane from -LIMIT to LIMIT
SEED = 0


def draw_set(axes: Axes, name: str) -> None:
    """A training set of PLANAR[name], and where its two densities are equal."""
    law = PLANAR[name]
    points, labels = planar(name, law.size, SEED)
    for label in (0, 1):
        x, y = points[labels == label].T.numpy()
        axes.plot(
            x, y, MARKERS[label], color=COLOURS[label], markersize=2.2, markeredgewidth=0.6, fillstyle="none"
        )
    axis = torch.linspace(-LIMIT, LIMIT, 241, dtype=torch.float64)
    p = densities(name, torch.cartesian_prod(axis, axis)).log().reshape(len(axis), len(axis), 2)
    axes.contour(axis, axis, (p[..., 1] - p[..., 0]).T, levels=[0], colors=INK, linewidths=1.2)
    axes.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    axes.tick_params(colors=INK, labelsize=8)
    axes.set_title(f"{name}: at best {100 * bayes_accuracy(name):.2f} %", fontsize=10, color=INK)


def draw(path: Path) -> None:
    """All four in a row."""
    figure = Figure(figsize=(12, 3.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, len(PLANAR)), PLANAR, strict=True):
        draw_set(axes, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": "Gliode"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    draw(parser.parse_args().out)
