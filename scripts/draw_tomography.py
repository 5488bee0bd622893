"""Draw docs/pictures/tomography.png: two test pictures of the benchmark `tomography` by some of its methods.

python scripts/draw_tomography.py [--out FOLDER]

Each method is tuned as in the benchmark, so this takes some minutes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inverse.image_problems import TEST_NAMES, image_problem, test_truths
from scripts.benchmarks._image_contest import TEST_NOISE, contest, methods, pool
from scripts.benchmarks._images import psnr

OUT = Path(__file__).resolve().parents[1] / "docs" / "pictures"
PICTURES = ("chelsea", "ellipses 4")
LABELS = ("H1", "TV", "CRR", "WCRR", "AR", "unrolled")  # the first of each in the table
INK = "#1F2933"


def draw(folder: Path) -> None:
    """Truth, naive inversion and methods, with the PSNR of each."""
    names = [
        next((name for name in methods("tomography") if name.partition(" (")[0] == label), None)
        for label in LABELS
    ]
    with pool() as workers:
        found = contest(workers, "tomography", [name for name in names if name is not None])
    truths, problem = test_truths(), image_problem("tomography")
    columns: dict[str, Tensor] = {
        "truth": truths,
        "back-projection": problem.naive(problem.measured(truths, TEST_NOISE)),
        **{
            name.partition(" (")[0]: torch.cat([images for _, images in of.values()])
            for name, of in found.items()
        },
    }
    figure = Figure(figsize=(1.5 * len(columns), 1.8 * len(PICTURES) + 0.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(PICTURES), len(columns))
    for row, name in zip(panels, PICTURES, strict=True):
        number = TEST_NAMES.index(name)
        for axes, (title, images) in zip(row, columns.items(), strict=True):
            axes.imshow(images[number].clamp(0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            if title != "truth":
                axes.set_xlabel(f"{psnr(images[number], truths[number]):.1f} dB", color=INK, fontsize=8)
    for axes, title in zip(panels[0], columns, strict=True):
        axes.set_title(title, color=INK, fontsize=9)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "tomography.png", metadata={"Software": "Gliode"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the picture")
    draw(parser.parse_args().out)
