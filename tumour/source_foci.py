"""The foci of a source: where it is, stated so that it can be measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from solvers.errors import GliodeError
from solvers.fem.mesh import Domain
from tumour.source import corner_values


@dataclass(frozen=True)
class Focus:
    """One focus: its centre (x, y, z) in RAS mm, the integral of its density in mm^3, its largest density."""

    centre: tuple[float, float, float]
    cells: float
    peak: float


def foci_of(domain: Domain, u: Tensor, level: float = 0.5) -> list[Focus]:
    """The foci of a density u (owned dofs,), most cells first.

    A focus is a connected set of mesh vertices (neighbours along edges and diagonals) at which u >=
    level times the largest u; its centre is the mean of their positions, weighted by u times volume.
    Raises GliodeError where u is zero.
    """
    grid = domain.grid
    if grid is None:
        raise GliodeError("foci: the domain must be made of voxels")
    density = corner_values(domain, u)
    cells = corner_values(domain, u * domain.mass)
    largest = float(density.max())
    if not largest > 0:
        raise GliodeError("source: the density found is zero; loosen the regularization, or check the scans")
    names, count = ndimage.label(density >= level * largest, structure=np.ones((3, 3, 3)))
    found = []
    for name in range(1, count + 1):
        at = np.argwhere(names == name)
        weight = cells[names == name]
        middle = (at * weight[:, None]).sum(0) / weight.sum() - 0.5
        x, y, z = grid.affine[:3, :3] @ middle + grid.affine[:3, 3]
        peak = float(density[names == name].max())
        found.append(Focus((float(x), float(y), float(z)), float(weight.sum()), peak))
    return sorted(found, key=lambda focus: -focus.cells)


def distances(foci: list[Focus], truth: np.ndarray) -> list[float]:
    """For each true centre (n, 3) the distance to the nearest focus, mm."""
    centres = np.array([focus.centre for focus in foci])
    return [float(np.linalg.norm(centres - at, axis=1).min()) for at in truth]


def relative_error(domain: Domain, u: Tensor, truth: Tensor) -> float:
    """||u - truth|| / ||truth|| in L2 of the domain."""
    return float(np.sqrt(domain.integral((u - truth) ** 2) / domain.integral(torch.square(truth))))
