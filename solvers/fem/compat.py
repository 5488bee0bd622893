"""The DOLFINx calls that differ between 0.9 and 0.11, as far as they are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dolfinx
import numpy as np
import ufl
from mpi4py import MPI

Array = np.ndarray[Any, np.dtype[Any]]


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


def mesh_from_connectivity(
    comm: MPI.Comm,
    element: Any,
    cells: Array,
    points: Array,
    input_numbers: Array,
    ghosts: Array,
    ghost_owners: Array,
) -> dolfinx.mesh.Mesh | None:
    """A mesh of one cell type in exactly this numbering; None where the constructors differ (0.9 has them).

    cells: (local cells, vertices), local vertices, owned ones first; points: (local vertices, 3);
    input_numbers: (local vertices,); ghosts: the global numbers of the vertices that others own, and their
    owners. Collective.
    """
    if not dolfinx.__version__.startswith("0.9."):
        return None
    cpp = dolfinx.cpp
    count = len(points)
    owned = count - len(ghosts)
    vertices = cpp.common.IndexMap(
        comm, owned, np.ascontiguousarray(ghosts, np.int64), np.ascontiguousarray(ghost_owners, np.int32)
    )
    cells = np.ascontiguousarray(cells, dtype=np.int32)
    topology = cpp.mesh.Topology(comm, dolfinx.cpp.mesh.to_type(element.cell_type.name))
    dim = topology.dim
    topology.set_index_map(0, vertices)
    topology.set_index_map(dim, cpp.common.IndexMap(comm, len(cells)))
    one = np.arange(count + 1, dtype=np.int32)
    topology.set_connectivity(cpp.graph.AdjacencyList_int32(one[:-1], one), 0, 0)
    topology.set_connectivity(cpp.graph.AdjacencyList_int32(cells), dim, 0)
    geometry = cpp.mesh.Geometry_float64(
        vertices,
        cells,
        cpp.fem.CoordinateElement_float64(element.basix_element._e),
        np.ascontiguousarray(points, dtype=np.float64),
        np.ascontiguousarray(input_numbers, dtype=np.int64),
    )
    return dolfinx.mesh.Mesh(cpp.mesh.Mesh_float64(comm, topology, geometry), ufl.Mesh(element))
