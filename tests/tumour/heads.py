"""A head in closed form, the same at every spacing up to the voxels' means."""

from __future__ import annotations

import numpy as np

from tumour.anatomy import Anatomy


def head(spacing: float, radius: float, side: float) -> Anatomy:
    """A ball of a radius in a cube of a side (mm): white matter with grey walls."""
    n = round(side / spacing)
    fine = (np.arange(2 * n) + 0.5) * spacing / 2 - side / 2
    x, y, z = np.meshgrid(fine, fine, fine, indexing="ij")
    inside = (x**2 + y**2 + z**2 <= radius**2).astype(float)
    white = inside * (np.abs(np.sin(x / 9)) > 0.35)

    def means(a: np.ndarray) -> np.ndarray:
        return a.reshape(n, 2, n, 2, n, 2).mean((1, 3, 5))

    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = -side / 2 + spacing / 2
    tissue = means(inside)
    return Anatomy(means(white), tissue - means(white), np.zeros_like(tissue), affine)
