#!/usr/bin/env python3
"""Draw docs/pictures/source_prior.png: held-out sources, and what regularizers find of them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from scripts.benchmarks.source_prior import ALPHAS
from tumour import priors
from tumour.source import corner_values, positive
from tumour.source_foci import relative_error
from tumour.source_prior import minimised, of_source, penalty_of, problem_with
from tumour.source_search import Locator

ROWS = (("smooth", 0), ("smooth", 3), ("odd", 0))
SPACING = 4.0


def main() -> None:
    """Rows: two sources like those trained on, one of another shape; the slice that holds most of each."""
    torch.set_num_threads(1)
    figure, axes = plt.subplots(len(ROWS), 5, figsize=(10, 6.2), layout="constrained")
    for place, (family, number) in enumerate(ROWS):
        row = axes[place]
        case = priors.source_case("test", number, family)  # type: ignore[arg-type]
        problem = priors.grown(case).problem(SPACING)
        domain, truth = problem.domain, priors.boxed(problem.domain, case.shape)
        locator = Locator(problem)
        _, defect = locator.corrected()
        fields = {"early stopping": Locator(problem).run().u}
        for name, title in (("tv", "total variation"), ("learned", "learned")):
            R = of_source(penalty_of(name, domain), ALPHAS[name])  # type: ignore[arg-type]
            fields[title] = positive(minimised(problem_with(problem, defect, R), locator.start).m)
        volume = corner_values(domain, truth, np.nan)
        at = int(np.nansum(volume**2, axis=(0, 1)).argmax())
        inside = np.argwhere(np.isfinite(volume[:, :, at]))
        (i0, j0), (i1, j1) = inside.min(0), inside.max(0) + 1
        scan = np.where(problem.region, problem.scans[0].values, np.nan)[
            i0:i1, j0:j1, min(at, scan_top(problem))
        ]
        row[0].imshow(scan.T, origin="lower", vmin=0, vmax=1, cmap="magma")
        row[0].set_title("scan after 120 days" if place == 0 else "", fontsize=9)
        for axis, (title, u) in zip(row[1:], {"truth": truth, **fields}.items(), strict=True):
            shown = corner_values(domain, u, np.nan)[i0:i1, j0:j1, at]
            axis.imshow(shown.T, origin="lower", vmin=0, vmax=0.6, cmap="magma")
            text = title if place == 0 else ""
            if title != "truth":
                text += f"\nerror {relative_error(domain, u, truth):.2f}"
            axis.set_title(text.strip(), fontsize=9)
    for axis in axes.ravel():
        axis.set_xticks([])
        axis.set_yticks([])
    path = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "source_prior.png"
    figure.savefig(path, dpi=90)
    print(path)


def scan_top(problem: object) -> int:
    """The last layer of the scans' voxels."""
    return int(problem.region.shape[2]) - 1  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
