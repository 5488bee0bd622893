"""Draw the pictures of docs/studies/regularization.md: docs/pictures/regularization_{pictures,rules}.png.

python scripts/draw_regularization.py [--out FOLDER]
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inverse.choice import (
    SpectralTikhonov,
    discrepancy,
    gcv,
    l_curve,
    oracle,
    quasi_optimality,
    sweep,
)
from inverse.linear_problems import LinearMap, convolution, gaussian, inpainting, phantom, tomography
from scripts.benchmarks.regularization import smooth_space
from solvers.spaces import Euclidean, Space

OUT = Path(__file__).resolve().parents[1] / "docs" / "pictures"
SIDE, LEVEL, SEED = 40, 0.03, 0
INK = "#1F2933"
GREYS = colormaps["gray"].with_extremes(bad="#9DB7D5")  # what is not seen
COLOURS = {  # told apart by the colour-blind
    "discrepancy": "#0072B2",
    "gcv": "#D55E00",
    "l_curve": "#009E73",
    "quasi_optimality": "#CC79A7",
    "oracle": INK,
}


def problems() -> dict[str, tuple[LinearMap, Space]]:
    """Name -> map, space of the regularizer."""
    seen = torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(SEED)) < 0.4
    flat = Euclidean(SIDE**2)
    return {
        "deconvolution": (convolution((SIDE, SIDE), gaussian(1.5, 2)), flat),
        "tomography": (tomography(SIDE, 40, SIDE), flat),
        "inpainting": (inpainting(seen), smooth_space(SIDE, 1.0)),
    }


def shown(forward: LinearMap, data: Tensor, name: str) -> Tensor:
    """The data as a picture."""
    if name != "inpainting":
        return data.view(forward.data_shape)
    unseen = forward.adjoint(torch.ones_like(data)) == 0
    return forward.adjoint(data).masked_fill(unseen, math.nan)


def draw(folder: Path) -> None:
    """Both pictures."""
    truth = phantom(SIDE).reshape(-1)
    found = problems()
    pictures = Figure(figsize=(9.6, 5.9), dpi=90, layout="constrained")
    rules = Figure(figsize=(9.6, 3.1), dpi=90, layout="constrained")
    for figure in (pictures, rules):
        FigureCanvasAgg(figure)
    panels, curves = pictures.subplots(len(found), 5), rules.subplots(1, len(found))
    for row, curve, (name, (forward, space)) in zip(panels, curves, found.items(), strict=True):
        svd, l2 = SpectralTikhonov(forward, space), Euclidean(SIDE**2)
        clean = forward(truth).reshape(-1)
        sd = LEVEL * float(clean.norm()) / math.sqrt(len(clean))
        noise = torch.randn(len(clean), generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
        problem, largest = svd.problem(clean + sd * noise, sd), float(svd.values[0] / sd) ** 2
        alphas = [largest * 10 ** (k / 4) for k in range(-24, 5)]
        trials = sweep(problem.solve, space.zeros(), alphas)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            choices = {
                "oracle": oracle(trials, truth, l2),
                "discrepancy": discrepancy(
                    problem.solve, space.zeros(), math.sqrt(problem.size), 1.02, largest / 100
                ),
                "gcv": gcv(trials, problem.freedom, problem.size),
                "l_curve": l_curve(trials),
                "quasi_optimality": quasi_optimality(trials, l2),
            }
        chosen = choices["discrepancy"].alpha or 1.0
        images = {
            "data": shown(forward, clean + sd * noise, name),
            "a hundredth of it": problem.solve(chosen / 100, truth).m.view(SIDE, SIDE),
            "alpha by discrepancy": choices["discrepancy"].solution.view(SIDE, SIDE),
            "a hundred times it": problem.solve(chosen * 100, truth).m.view(SIDE, SIDE),
            "truth": truth.view(SIDE, SIDE),
        }
        for axes, (title, image) in zip(row, images.items(), strict=True):
            limits = (None, None) if title == "data" else (0.0, 1.0)
            axes.imshow(image, cmap=GREYS, vmin=limits[0], vmax=limits[1], interpolation="nearest")
            axes.set(xticks=[], yticks=[], title=title if axes in panels[0] else "")
        row[0].set_ylabel(name, color=INK)
        errors = [float((t.m - truth).norm() / truth.norm()) for t in trials.entries]
        curve.loglog([t.at for t in trials.entries], errors, color=INK)
        for rule, choice in choices.items():
            error = float((choice.solution - truth).norm() / truth.norm())
            _mark(curve, rule, choice.alpha or 1.0, error)
        curve.set(title=name, xlabel="alpha")
    curves[0].set_ylabel("relative error")
    curves[0].legend(fontsize=7, frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    pictures.savefig(folder / "regularization_pictures.png", metadata={"Software": "Gliode"})
    rules.savefig(folder / "regularization_rules.png", metadata={"Software": "Gliode"})


def _mark(axes: Axes, rule: str, alpha: float, error: float) -> None:
    hollow = rule == "oracle"
    axes.plot(
        alpha,
        error,
        "o",
        label=rule.replace("_", "-"),
        color=COLOURS[rule],
        markersize=11 if hollow else 6,
        fillstyle="none" if hollow else "full",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    draw(parser.parse_args().out)
