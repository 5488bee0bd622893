"""The DOLFINx calls that differ between 0.9 and 0.11, as far as they are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dolfinx
import numpy as np


def cell_partitioner(ghosts: dolfinx.mesh.GhostMode) -> Callable[..., Any]:
    """The default partitioner with a ghost mode; newer ones also want the most cells a facet may have (2)."""
    try:
        return dolfinx.mesh.create_cell_partitioner(ghosts, 2)
    except TypeError:
        return dolfinx.mesh.create_cell_partitioner(ghosts)


def geometry_dofmap(mesh: dolfinx.mesh.Mesh) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Nodes of each local cell, (cells, nodes per cell): `dofmap`, which is now `dofmaps[0]`."""
    maps = getattr(mesh.geometry, "dofmaps", None)
    return np.asarray(maps[0] if isinstance(maps, list) else mesh.geometry.dofmap)
