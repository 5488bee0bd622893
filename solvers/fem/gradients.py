r"""The gradient of a state at quadrature points, its transpose, and the weights of the points.

    (D u)_q = grad u(x_q),    sum_q w_q f(grad u(x_q)) = int f(grad u) dx

on simplices exactly, from the one gradient of each cell; on bricks (and on other quadrilaterals and
hexahedra) by the vertex rule, whose K = D^T W D is the stiffness matrix of `DiffusionOperator`, W = diag(w).
What total variation needs of a mesh. A point lies inside one cell, so under MPI every rank holds its own.
"""

from __future__ import annotations

import basix
import numpy as np
import torch
from torch import Tensor

from solvers.errors import GliodeError
from solvers.fem.mesh import Domain, FloatArray, cell_geometry, jacobians, tabulate
from solvers.fem.spaces import lumped


class Gradient:
    """D of a domain, on the tape: a state (owned dofs,) -> slopes (points, d) in units of the state per mm.

    space: L2 with the lumped mass M, in which the states live; weights: (points,) in mm^d; bound: (points,)
    a diagonal b >= 0 with D M^-1 D^T W <= b, the largest eigenvalue of each cell's stiffness against its
    mass, so 1/b is a safe step for each point by itself, however much the cells differ. Raises GliodeError
    for a curve or a surface embedded in a higher dimension.
    """

    def __init__(self, domain: Domain) -> None:
        self.space = lumped(domain)
        self._ghosts, self._local = domain.ghosts, len(domain.points)
        self._dofs = torch.from_numpy(domain.cell_dofs.astype(np.int64))
        slopes, weights, bound = _tables(domain)
        self._slopes = torch.from_numpy(slopes)  # (cells or 1, points of a cell, vertices, d)
        self._shape = (domain.n_cells, weights.shape[1])
        self.weights = self._spread(weights)
        self.bound = self._spread(bound[:, None])

    def _spread(self, values: FloatArray) -> Tensor:
        """Values (cells or 1, points of a cell or 1) for all points."""
        return torch.from_numpy(np.broadcast_to(values, self._shape).reshape(-1).copy())

    def __call__(self, u: Tensor) -> Tensor:
        """The slopes D u."""
        at = self._ghosts.extend(u)[self._dofs]
        if len(self._slopes) == 1:
            return torch.einsum("cn,qnd->cqd", at, self._slopes[0]).flatten(0, 1)
        return torch.einsum("cn,cqnd->cqd", at, self._slopes).flatten(0, 1)

    def adjoint(self, q: Tensor) -> Tensor:
        """The dual D^T q (owned dofs,) of q (points, d); no weights in it."""
        parts = q.unflatten(0, self._shape)
        if len(self._slopes) == 1:
            each = torch.einsum("cqd,qnd->cn", parts, self._slopes[0])
        else:
            each = torch.einsum("cqd,cqnd->cn", parts, self._slopes)
        local = torch.zeros(self._local, dtype=q.dtype).index_add(0, self._dofs.reshape(-1), each.reshape(-1))
        return self._ghosts.gather(local)


def _tables(domain: Domain) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Slopes (cells, points, vertices, d), weights (cells, points) and bound (cells,); one row for bricks."""
    cell, dim = domain.mesh.topology.cell_name(), domain.mesh.topology.dim
    kind = getattr(basix.CellType, cell)
    if cell in ("interval", "triangle", "tetrahedron"):
        points, part = basix.make_quadrature(kind, 1)
    else:
        points = np.asarray(basix.geometry(kind), dtype=np.float64)
        part = np.full(len(points), 1.0 / len(points))
    tables = tabulate(cell, points)
    if domain.grid is not None:  # also where this rank has no cell
        jacobian = np.broadcast_to(domain.grid.affine[:3, :3], (1, len(points), 3, 3))
    else:
        jacobian = jacobians(domain, tables)
    if jacobian.shape[-1] != dim or jacobian.shape[-2] != dim:
        raise GliodeError("mesh: a curve or surface embedded in a higher dimension has no gradient here")
    slopes = np.einsum("dqn,cqdg->cqng", tables.derivatives, np.linalg.inv(jacobian))
    weights = np.abs(np.linalg.det(jacobian)) * part
    stiffness = np.einsum("cq,cqng,cqmg->cnm", weights, slopes, slopes)
    if domain.grid is not None:
        mass = np.full((1, slopes.shape[2]), weights.sum() / slopes.shape[2])
    else:
        scale, values = cell_geometry(domain)
        mass = scale @ values.values
    root = 1 / np.sqrt(mass)
    bound = np.linalg.eigvalsh(root[:, :, None] * stiffness * root[:, None, :])[:, -1]
    return slopes, weights, bound
