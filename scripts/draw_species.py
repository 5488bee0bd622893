"""Draw docs/pictures/species.png: a necrotic tumour and a go-or-grow one in the MNI152 brain, an axial slice.

scripts/env python scripts/draw_species.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from solvers.fem.equations.species import on_domain  # noqa: E402
from solvers.fem.mesh import Domain  # noqa: E402
from solvers.node.science.species import GoOrGrow, Necrosis, Reaction  # noqa: E402
from tumour.anatomy import Anatomy, mni152  # noqa: E402
from tumour.model import domain_of  # noqa: E402

CENTRE, REACH = np.array([-27.0, -12.0, 27.0]), 38.0  # mm: the seed, and half the box's side
RUNS: dict[str, dict[str, Any]] = {
    "necrosis": {
        "reaction": Necrosis(),
        "D": ((0.2, 0.03), (0.0, 0.0), (2.0, 2.0)),  # white, grey; mm^2/day
        "rates": {"growth": 0.4, "death": 0.3, "uptake": 2.0, "supply": 0.3},
        "days": 30.0,
        "titles": ("Proliferating", "Necrotic", "Nutrient"),
    },
    "go or grow": {
        "reaction": GoOrGrow(0.3, 0.1),
        "D": ((0.005, 0.005), (0.5, 0.05)),
        "rates": {"growth": 0.12, "invasive_growth": 0.0, "go": 0.15, "grow": 0.05},
        "days": 90.0,
        "titles": ("Dividing", "Migrating", "Migrating share"),
    },
}


def mixed(domain: Domain, white: float, grey: float) -> Tensor:
    """D per cell, as `TumourModel.diffusivity`."""
    return (domain.cell_data["white"] * white ** (1 / 3) + domain.cell_data["grey"] * grey ** (1 / 3)) ** 3


def tumour(domain: Domain, reaction: Reaction, D: Any, rates: dict[str, float], days: float) -> Tensor:
    """The species after some days, (species, n), from a seed."""
    p = domain.interpolate(lambda x: 0.6 * np.exp(-((x - CENTRE) ** 2).sum(1) / 18))
    start = torch.stack([p, 0 * p, 1 + 0 * p][: len(reaction.species)])
    mobility = torch.stack([mixed(domain, *pair) for pair in D])
    return on_domain(domain, reaction).evolve(start, days, int(days), mobility, **rates)


def image(values: Tensor, domain: Domain, level: int) -> np.ndarray:
    """The mean over each voxel of an axial slice, NaN outside the brain, radiological: (y, x), x falling."""
    assert domain.grid is not None
    cells = np.full(domain.grid.shape, np.nan)
    cells[tuple(domain.grid.cell_voxel.T)] = values.numpy()[domain.cell_dofs].mean(1)
    return cells[::-1, :, level].T


def main() -> None:
    """Run both and draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    anatomy: Anatomy = mni152(2.0)
    where = np.argwhere(np.ones(anatomy.white.shape, dtype=bool)) @ anatomy.affine[:3, :3].T
    near = (np.abs(where + anatomy.affine[:3, 3] - CENTRE) < REACH).all(1).reshape(anatomy.white.shape)
    domain = domain_of(anatomy, near)
    level = int(round(float((np.linalg.inv(anatomy.affine) @ np.array([*CENTRE, 1.0]))[2])))
    used = np.argwhere(near)
    low, high = used.min(0), used.max(0) + 1
    size = near.shape[0]
    drawing = Figure(figsize=(9.0, 5.4), dpi=90, layout="constrained")
    FigureCanvasAgg(drawing)
    panels = drawing.subplots(2, 3)
    for row, (name, run) in zip(panels, RUNS.items(), strict=True):
        found = tumour(domain, run["reaction"], run["D"], run["rates"], run["days"])
        print(name, [f"{domain.integral(one):.0f} mm^3" for one in found], found.aminmax(dim=1))
        shown = list(found)
        if len(shown) == 2:
            total = found.sum(0)
            shown.append(torch.where(total > 0.02, found[1] / total, torch.nan))
        for panel, values, title in zip(row, shown, run["titles"], strict=True):
            panel.imshow(anatomy.white[::-1, :, level].T, origin="lower", cmap="gray", vmin=-0.3, vmax=1.6)
            top = float(values[~values.isnan()].max())
            shade = image(values, domain, level)
            if title != "Nutrient":
                shade = np.where(shade < 0.03 * top, np.nan, shade)  # where there is next to none, the brain
            drawn = panel.imshow(shade, origin="lower", cmap="inferno", vmin=0, vmax=top)
            panel.set(xlim=(size - high[0], size - low[0]), ylim=(low[1], high[1]), xticks=[], yticks=[])
            panel.set_title(title, size=11)
            drawing.colorbar(drawn, ax=panel, shrink=0.75)
        row[0].set_ylabel(f"{name}, day {run['days']:g}")
    path = ROOT / "docs" / "pictures" / "species.png"
    drawing.savefig(path, metadata={"Software": "Gliode"})
    print(path)


if __name__ == "__main__":
    main()
