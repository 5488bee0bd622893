#!/usr/bin/env python3
"""Draw docs/pictures/field_prior.png: D(x) of two held-out cases, by H1, TV and the trained prior."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.benchmarks.field_prior import COARSE
from tumour.fields_search import FieldSearch, FieldSettings
from tumour.priors_fields import field_case

ALPHAS = {"h1": 1.5, "tv": 0.08, "learned": 1.4}  # as the benchmark tunes them
NAMES = {"h1": "H1", "tv": "TV", "learned": "learned"}
CASES = (("smooth", 0), ("odd", 0))


def main() -> None:
    """The axial plane through each case's largest departure, where the tumour has been."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    torch.set_num_threads(1)
    figure, axes = plt.subplots(len(CASES), 1 + len(ALPHAS), figsize=(9.2, 5.0), layout="constrained")
    for row, (family, number) in zip(axes, CASES, strict=True):
        problem = field_case("test", number, family).problem(COARSE)  # type: ignore[arg-type]
        points = problem.domain.points
        seen = (problem.weight > 0).numpy()
        weight = problem.weight.numpy() * problem.truth.numpy() ** 2
        levels = np.round(points[:, 2], 3)
        level = max(np.unique(levels), key=lambda z: float(weight[levels == z].sum()))
        plane = levels == level
        found = {"truth": problem.truth}
        for name, alpha in ALPHAS.items():
            search = FieldSearch(problem.forward, FieldSettings(name, max_iterations=20))  # type: ignore[arg-type]
            found[name] = search.solve(alpha, torch.zeros_like(problem.truth)).m
        for axis, (name, m) in zip(row, found.items(), strict=True):
            x, y = (np.rint((points[plane, k] - points[:, k].min()) / COARSE).astype(int) for k in (0, 1))
            image = np.full((y.max() + 1, x.max() + 1), np.nan)
            image[y, x] = np.where(seen[plane], m.numpy()[plane], np.nan)
            drawn = axis.imshow(image, origin="lower", cmap="RdBu_r", vmin=-1.7, vmax=1.7)
            axis.set_facecolor("0.85")
            error = "" if name == "truth" else f", error {float(problem.error(m)):.2f}"
            axis.set_title(f"{NAMES.get(name, name)}{error}", fontsize=10)
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel({"smooth": "ellipsoids", "odd": "never trained on"}[family])
    figure.colorbar(drawn, ax=axes, label="log D / D_ref", shrink=0.8)
    figure.savefig(Path(__file__).resolve().parents[1] / "docs" / "pictures" / "field_prior.png", dpi=110)


if __name__ == "__main__":
    main()
