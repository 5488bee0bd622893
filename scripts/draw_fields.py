"""Draw docs/pictures/fields.png: truth, H1 and TV of the first two truths of the benchmark `fields`.

scripts/env python scripts/draw_fields.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.benchmarks import fields  # noqa: E402


def image(values: np.ndarray, domain: Any) -> np.ndarray:
    """The mean over each voxel of the slab, NaN outside the brain, radiological: (y, x) with x falling."""
    cells = np.full(domain.grid.shape, np.nan)
    cells[tuple(domain.grid.cell_voxel.T)] = values[domain.cell_dofs].mean(1)
    return cells[::-1, :, 0].T


def main() -> None:
    """Run the two truths and draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from tumour.model import domain_of

    domain = domain_of(fields.slab(fields.SPACING))
    drawing = Figure(figsize=(8.4, 6.2), dpi=90, layout="constrained")
    FigureCanvasAgg(drawing)
    rows = drawing.subplots(2, 3)
    drawn = None
    for row, kind in zip(rows, ("ball", "bump"), strict=True):
        found = fields.trial((0, kind))
        shown = {"Truth": found["true"]}
        for name, title in (("h1", "H1"), ("tv", "TV")):
            shown[f"{title}: error {found[name]['error']:.2f}"] = found[name]["m"]
        for panel, (title, values) in zip(row, shown.items(), strict=True):
            drawn = panel.imshow(image(values, domain), origin="lower", cmap="viridis", vmin=-0.3, vmax=1.7)
            panel.set_title(title, size=11)
            panel.set(xticks=[], yticks=[])
    assert drawn is not None
    drawing.colorbar(drawn, ax=rows, shrink=0.6, label="log (D / reference)")
    path = ROOT / "docs" / "pictures" / "fields.png"
    drawing.savefig(path, metadata={"Software": "Gliode"})
    print(path)


if __name__ == "__main__":
    main()
