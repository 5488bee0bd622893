"""Values of a state at points, and on the voxel grid: the linear part of an observation."""

from __future__ import annotations

from typing import Any

import dolfinx
import numpy as np
import torch
from mpi4py import MPI
from scipy import ndimage
from torch import Tensor

from solvers.errors import GliodeError
from solvers.fem.compat import geometry_dofmap
from solvers.fem.mesh import Domain, FloatArray, tabulate


class Sampling:
    """u -> u(x_k) at points (n, 3) in mm, exact for the finite-element function.

    rows: which points this rank evaluates (under MPI each point has one rank). On a voxel mesh a point
    outside the mesh takes the nearest point of the nearest brick, if it is not farther than `reach` mm; on a
    general mesh, and beyond the reach, it is refused with a GliodeError.
    """

    def __init__(self, domain: Domain, points: FloatArray, reach: float = 0.0) -> None:
        points = np.ascontiguousarray(np.atleast_2d(points), dtype=np.float64)
        if points.shape[1] != 3 or not np.isfinite(points).all():
            raise GliodeError(f"points: shape {points.shape}, expected (n, 3) finite coordinates in mm")
        self._domain = domain
        self.n_points = len(points)
        self.rows, cells, weights = (_on_grid if domain.grid is not None else _on_mesh)(domain, points, reach)
        self._dofs = torch.from_numpy(domain.cell_dofs[cells].astype(np.int64))
        self._weights = torch.from_numpy(weights)

    def __call__(self, u: Tensor) -> Tensor:
        """Values at this rank's points, (len(rows),)."""
        local = self._domain.ghosts.extend(u)
        return (local[self._dofs] * self._weights).sum(1)


def _all(comm: MPI.Comm, array: np.ndarray, op: MPI.Op) -> np.ndarray:
    """The reduction of an array over the ranks."""
    total = np.ascontiguousarray(array).copy()
    comm.Allreduce(MPI.IN_PLACE, total, op=op)
    return total


def _refuse(where: FloatArray, reach: float) -> None:
    if len(where):
        raise GliodeError(
            f"points: {len(where)} lie outside the mesh (more than {reach:g} mm), the first at "
            f"{where[0].round(2).tolist()} mm;"
            " check the coordinates (those of a scan are RAS mm)"
        )


def _on_grid(domain: Domain, points: FloatArray, reach: float) -> tuple[Any, Any, FloatArray]:
    grid = domain.grid
    assert grid is not None
    at = grid.coordinates(points)
    own = grid.voxel_cell >= 0
    everyone = _all(domain.comm, own, MPI.LOR)
    voxel = np.clip(np.rint(at).astype(np.int64), 0, np.array(grid.shape) - 1)
    inside = everyone[tuple(voxel.T)]
    if not inside.all():
        nearest = ndimage.distance_transform_edt(
            ~everyone, sampling=grid.spacing, return_distances=False, return_indices=True
        )
        voxel = np.stack([axis[tuple(voxel.T)] for axis in nearest], axis=1)
    reference = np.clip(at - voxel + 0.5, 0.0, 1.0)
    gap = np.linalg.norm((at - voxel + 0.5 - reference) * grid.spacing, axis=1)
    _refuse(points[gap > reach + 1e-6 * grid.spacing.max()], reach)
    cells = grid.voxel_cell[tuple(voxel.T)]
    rows = np.flatnonzero(cells >= 0)
    x, y, z = reference[rows].T
    weights = np.stack(
        [
            (x if i else 1 - x) * (y if j else 1 - y) * (z if k else 1 - z)
            for k in (0, 1)
            for j in (0, 1)
            for i in (0, 1)
        ],
        axis=1,
    )
    return rows, cells[rows], weights


def _on_mesh(domain: Domain, points: FloatArray, reach: float) -> tuple[Any, Any, FloatArray]:
    rows, cells, reference = locate(domain.mesh, points, reach)
    name = domain.mesh.topology.cell_name()
    weights = np.empty((len(rows), domain.cell_dofs.shape[1]))
    for k in range(len(rows)):
        weights[k] = tabulate(name, reference[k : k + 1]).values[0]
    return rows, cells, weights


def locate(mesh: dolfinx.mesh.Mesh, points: FloatArray, reach: float = 0.0) -> tuple[Any, Any, FloatArray]:
    """The points (n, 3) that this rank evaluates (each has one rank), their cells, and where in these they
    lie in reference coordinates; a point off the mesh is refused with a GliodeError. Collective.
    """
    tree = dolfinx.geometry.bb_tree(mesh, mesh.topology.dim, padding=1e-9)
    candidates = dolfinx.geometry.compute_collisions_points(tree, points)
    colliding = dolfinx.geometry.compute_colliding_cells(mesh, candidates, points)
    found = np.diff(colliding.offsets) > 0
    first = np.full(len(points), -1, dtype=np.int64)
    first[found] = colliding.array[colliding.offsets[:-1][found]]
    # A point on an interface is found by several ranks: the lowest keeps it.
    rank = np.where(found, mesh.comm.rank, mesh.comm.size)
    owner = _all(mesh.comm, rank, MPI.MIN)
    _refuse(points[owner == mesh.comm.size], reach)
    rows = np.flatnonzero(owner == mesh.comm.rank)
    cells = first[rows]
    nodes_of, dim = geometry_dofmap(mesh), mesh.geometry.dim
    reference = np.empty((len(rows), mesh.topology.dim))
    for k, cell in enumerate(cells):
        nodes = mesh.geometry.x[nodes_of[cell]][:, :dim]
        reference[k] = mesh.geometry.cmap.pull_back(points[rows[k]][None, :dim], nodes)[0]
    return rows, cells, reference


def cell_means(domain: Domain, u: Tensor) -> FloatArray:
    """The mean of a state over each voxel of the domain's grid, 0 outside the mesh; the whole volume on every
    rank.
    """
    grid = domain.grid
    if grid is None:
        raise GliodeError("grid: this domain was not made from voxels; write it for ParaView instead")
    volume = np.zeros(grid.shape)
    local = domain.ghosts.extend(u.detach()).numpy()
    volume[tuple(grid.cell_voxel.T)] = local[domain.cell_dofs].mean(axis=1)
    if domain.comm.size > 1:
        domain.comm.Allreduce(MPI.IN_PLACE, volume, op=MPI.SUM)
    return volume
