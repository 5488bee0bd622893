"""Fields of any mesh on a regular grid of points, and back by the exact transpose: for what works on volumes.

    x = P m,    x_v = m(p_v) at the grid's points p_v within the mesh, the value at the nearest point without

The points stand at whole multiples of the spacing from the lower corner of the mesh's box, along R, A and S:
on bricks of the same spacing and axes they are the vertices, and P leaves the values as they are. Beyond the
surface a field goes on as it is there, as under the natural condition of no flux: no edge is made up at the
surface, and every voxel within is seen by all windows that hold it.
"""

from __future__ import annotations

import math
from typing import Any

import dolfinx
import numpy as np
import torch
from mpi4py import MPI
from scipy import sparse
from scipy.spatial import cKDTree
from torch import Tensor

from solvers.errors import GliodeError
from solvers.fem.compat import geometry_dofmap
from solvers.fem.mesh import Domain, FloatArray
from solvers.fem.sampling import Sampling, _all
from solvers.fem.spaces import lumped
from solvers.scales import linear
from solvers.spaces import reduce

MOST = 50_000_000  # points
_IN = 1e-3  # of a cell, by which a vertex is moved into one that it belongs to


class VoxelGrid:
    """P of a domain: fields (batch, owned dofs) -> volumes (batch, *shape), the same on every rank.

    spacing: of the points, in mm; shape: points per axis; gain: ||P m||^2 <= gain ||m||^2, sums of squares on
    the left, L2 with the lumped mass on the right (rows of P are convex combinations). A deep copy is the
    object itself. Raises GliodeError unless the mesh is solid and the spacing positive and not far too fine.
    """

    def __init__(self, domain: Domain, spacing: float) -> None:
        if domain.mesh.topology.dim != 3:
            raise GliodeError(
                f"voxel grid: a solid is needed, this mesh has {domain.mesh.topology.dim} dimensions"
            )
        if not (math.isfinite(spacing) and spacing > 0):
            raise GliodeError(f"voxel grid: the spacing must be positive and finite, got {spacing}")
        self.spacing, self.space, self._ghosts = float(spacing), lumped(domain), domain.ghosts
        low, high = _box(domain)
        sides = np.floor((high - low) / spacing + 1e-6) + 1
        if sides.prod() > MOST:
            raise GliodeError(
                f"voxel grid: {sides.prod():.0f} points at {spacing} mm; take a coarser spacing"
            )
        self.shape = (int(sides[0]), int(sides[1]), int(sides[2]))
        points = low + spacing * np.argwhere(np.ones(self.shape, dtype=bool))
        at = (
            Sampling(domain, points, np.inf)
            if domain.grid is not None
            else Sampling(domain, _into(domain, points))
        )
        corners = at._weights.shape[1]
        rows = np.repeat(at.rows, corners)
        shape = (len(points), len(domain.points))
        P = sparse.coo_array((at._weights.numpy().ravel(), (rows, at._dofs.numpy().ravel())), shape)
        self._P = P.tocsr()
        self._made: dict[torch.dtype, tuple[Any, Any]] = {}
        columns = domain.ghosts.gather(torch.from_numpy(np.asarray(self._P.sum(0)).ravel()))
        worst = float((columns / domain.mass).max()) if domain.n_owned else 0.0
        self.gain = float(domain.comm.allreduce(worst, op=MPI.MAX))

    def __deepcopy__(self, memo: dict[int, Any]) -> VoxelGrid:
        return self

    def sample(self, m: Tensor) -> Tensor:
        """P m, (batch, *shape), on the tape."""
        part = linear(m, self._sample, self._spread)
        return reduce(part, self.space.comm).unflatten(1, self.shape)

    def _matrices(self, kind: torch.dtype) -> tuple[Any, Any]:
        if kind not in self._made:
            P = self._P.astype(torch.zeros(0, dtype=kind).numpy().dtype)
            self._made[kind] = P, P.T.tocsr()
        return self._made[kind]

    def _sample(self, m: Tensor) -> Tensor:
        P = self._matrices(m.dtype)[0]
        return torch.stack([torch.from_numpy(P @ self._ghosts.extend(u.double()).to(u).numpy()) for u in m])

    def _spread(self, x: Tensor) -> Tensor:
        transposed = self._matrices(x.dtype)[1]
        local = [torch.from_numpy(transposed @ v.numpy()) for v in x.contiguous()]
        return torch.stack([self._ghosts.gather(v.double()).to(v) for v in local])


def _box(domain: Domain) -> tuple[FloatArray, FloatArray]:
    """The lower and upper corner of the mesh's box."""
    low, high = np.full(3, np.inf), np.full(3, -np.inf)
    domain.comm.Allreduce(domain.points.min(axis=0, initial=np.inf), low, MPI.MIN)
    domain.comm.Allreduce(domain.points.max(axis=0, initial=-np.inf), high, MPI.MAX)
    return low, high


def _into(domain: Domain, points: FloatArray) -> FloatArray:
    """The points, each that lies off a general mesh moved to its nearest vertex, a little inside."""
    mesh = domain.mesh
    tree = dolfinx.geometry.bb_tree(mesh, 3, padding=1e-9)
    candidates = dolfinx.geometry.compute_collisions_points(tree, points)
    cells = dolfinx.geometry.compute_colliding_cells(mesh, candidates, points)
    found = _all(domain.comm, np.diff(cells.offsets) > 0, MPI.LOR)
    nodes = mesh.geometry.x[geometry_dofmap(mesh)[: domain.n_cells]]
    inner = nodes + _IN * (nodes.mean(axis=1, keepdims=True) - nodes)
    _, first = np.unique(domain.cell_dofs, return_index=True)
    vertices = np.concatenate(domain.comm.allgather(nodes.reshape(-1, 3)[first]))
    inside = np.concatenate(domain.comm.allgather(inner.reshape(-1, 3)[first]))
    out = points.copy()
    out[~found] = inside[cKDTree(vertices).query(points[~found])[1]]
    return out
