"""Draw the ridge regularizers that ship: their filters, what their potentials ask, and a photograph denoised.

scripts/env python scripts/draw_learned.py [--out FILE]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inverse.datasets.images import photograph, square
from inverse.regularizers.learned import files
from inverse.regularizers.learned.ridge import Ridge
from scripts.benchmarks._images import psnr
from scripts.benchmarks.denoise import by_learned, noisy, total_variation

OUT = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "learned.png"
INK = "#1F2933"
COLOURS = {"crr": "#0072B2", "wcrr": "#D55E00"}
NAMES = {"crr": "CRR, convex", "wcrr": "WCRR, weakly convex"}
SIGMA, SHOWN, SEED, TV = 25 / 255, slice(88, 184), 3, 0.7  # TV's weight in units of sigma


def draw_filters(axes: Axes, energy: Ridge, title: str) -> None:
    """All filters, each to its own scale."""
    kernel = energy.kernel().detach()[:, 0]
    size, columns = kernel.shape[-1], 12
    rows = -(-len(kernel) // columns)
    sheet = np.full((rows * (size + 1) - 1, columns * (size + 1) - 1), np.nan)
    for i, k in enumerate(kernel):
        row, column = (n * (size + 1) for n in divmod(i, columns))
        sheet[row : row + size, column : column + size] = k / k.abs().max()
    axes.imshow(sheet, cmap="gray", vmin=-1, vmax=1)
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_axis_off()


def draw_slopes(axes: Axes, energies: dict[str, Ridge]) -> None:
    """psi' of every channel."""
    line = torch.linspace(0, 0.12, 400, dtype=torch.float64)
    for name, energy in energies.items():
        with torch.no_grad():
            slopes = energy.potential.slope(line.expand(1, energy.potential.channels, -1))[0]
        for i, slope in enumerate(slopes):
            label = None if i else NAMES[name]
            axes.plot(line, slope, color=COLOURS[name], linewidth=0.7, alpha=0.6, label=label)
    axes.set_title("slope psi' of each potential over the response", fontsize=10, color=INK, loc="left")
    axes.set_ylim(0)
    axes.set_xlim(0, 0.12)
    axes.legend(fontsize=8, frameon=False)


def draw_picture(axes: Axes, picture: Tensor, truth: Tensor, title: str) -> None:
    """A part of it; the figure is of the whole."""
    figure = "" if picture is truth else f", {psnr(picture, truth):.2f} dB"
    axes.imshow(picture[SHOWN, SHOWN], cmap="gray", vmin=0, vmax=1)
    axes.set_title(title + figure, fontsize=9, color=INK, loc="left")
    axes.set_axis_off()


def draw(path: Path) -> None:
    """Filters and slopes above, pictures below."""
    torch.set_num_threads(1)
    energies: dict[str, Ridge] = {}
    pictures = {}
    truth = square(photograph("camera"), 256)
    y = noisy(truth, SIGMA, SEED)
    pictures["noisy, sigma 25"] = y
    pictures["total variation"] = total_variation((256, 256), TV * SIGMA)(y)[0]
    for name in NAMES:
        energy, card = files.load_energy(files.shipped(name))
        assert isinstance(energy, Ridge)
        energies[name] = energy.double()
        weight = (
            min(card.weight * card.noise[1] ** 2, 1.0) if name == "wcrr" else card.weight * card.noise[1] ** 2
        )
        pictures[NAMES[name]] = by_learned(energy, weight, card.noise[1] / SIGMA)(y)[0]
    pictures["truth"] = truth
    figure = Figure(figsize=(10, 5.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    left, middle, right = above.subplots(1, 3)
    draw_filters(left, energies["crr"], "filters of CRR")
    draw_filters(middle, energies["wcrr"], "filters of WCRR")
    draw_slopes(right, energies)
    for axes, (title, picture) in zip(below.subplots(1, len(pictures)), pictures.items(), strict=True):
        draw_picture(axes, picture.clamp(0, 1), truth, title)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT, help=f"default {OUT.name} in docs/pictures")
    draw(parser.parse_args().out)


if __name__ == "__main__":
    main()
