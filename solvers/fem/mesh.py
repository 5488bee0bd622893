"""Meshes: voxel bricks of a label volume, boxes, balls, intervals and files, each as a `Domain`.

A `Domain` is a mesh with its continuous P1/Q1 space V and what the steps need of it. A state is a torch
float64 tensor of the rank's owned degrees of freedom of V (on these meshes: the vertices). Lengths are in mm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import basix.ufl
import dolfinx
import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from solvers.errors import GliodeError
from solvers.fem.bricks import CORNERS, Bricks, bricks
from solvers.fem.compat import cell_partitioner, geometry_dofmap
from solvers.fem.ghosts import Ghosts

FloatArray = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Grid:
    """The voxel grid a brick mesh was cut from.

    shape: voxels per axis; affine: 4 x 4, voxel index to RAS mm (voxel centres at whole indices);
    cell_number: (local cells,) place of each cell in the list of the mask's voxels; cell_voxel: (local cells,
    3) voxel of each cell; dof_corner: (local dofs, 3) grid corner of each dof, corner (i, j, k) sitting at
    voxel coordinates (i - 1/2, j - 1/2, k - 1/2).
    """

    shape: tuple[int, int, int]
    affine: FloatArray
    cell_number: np.ndarray[Any, np.dtype[np.int64]]
    cell_voxel: np.ndarray[Any, np.dtype[np.int64]]
    dof_corner: np.ndarray[Any, np.dtype[np.int64]]

    @cached_property
    def spacing(self) -> FloatArray:
        """Voxel edge lengths in mm, (3,)."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @cached_property
    def voxel_cell(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Local cell of each voxel, -1 where the mesh (or this rank) has none; shape `shape`."""
        table = np.full(self.shape, -1, dtype=np.int32)
        table[tuple(self.cell_voxel.T)] = np.arange(len(self.cell_voxel), dtype=np.int32)
        return table

    def coordinates(self, points: FloatArray) -> FloatArray:
        """Voxel coordinates of points (n, 3) given in RAS mm."""
        inverse = np.linalg.inv(self.affine)
        return points @ inverse[:3, :3].T + inverse[:3, 3]


@dataclass(frozen=True)
class Domain:
    """A mesh, its space V of continuous piecewise (multi)linear functions, and data per cell.

    cell_data: name -> tensor (local cells,). grid: the voxel grid, or None on a general mesh.
    """

    mesh: dolfinx.mesh.Mesh
    V: dolfinx.fem.FunctionSpace
    cell_data: Mapping[str, Tensor] = field(default_factory=dict)
    grid: Grid | None = None

    @property
    def comm(self) -> MPI.Comm:
        """The mesh's communicator."""
        return self.mesh.comm

    @cached_property
    def n_cells(self) -> int:
        """Cells this rank owns (meshes are made without ghost cells)."""
        return int(self.mesh.topology.index_map(self.mesh.topology.dim).size_local)

    @cached_property
    def n_owned(self) -> int:
        """Degrees of freedom this rank owns: the length of a state."""
        return int(self.V.dofmap.index_map.size_local)

    @cached_property
    def n_global(self) -> int:
        """Degrees of freedom on all ranks."""
        return int(self.V.dofmap.index_map.size_global)

    @cached_property
    def cell_dofs(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """(local cells, vertices per cell): local dofs, ghosts numbered behind the owned ones."""
        return np.array(self.V.dofmap.list[: self.n_cells])

    @cached_property
    def points(self) -> FloatArray:
        """(local dofs, 3) coordinates in mm, ghosts last."""
        return np.asarray(self.V.tabulate_dof_coordinates())

    @cached_property
    def cell_numbers(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The number in the mesh's input of each local cell, (local cells,): no partition changes it."""
        return original_cells(self.mesh) if self.grid is None else self.grid.cell_number

    @cached_property
    def ghosts(self) -> Ghosts:
        """Exchange of the dofs shared with other ranks."""
        return Ghosts(self.V)

    @cached_property
    def cell_volumes(self) -> Tensor:
        """(local cells,) in mm^d."""
        weights, _ = cell_geometry(self)
        return torch.from_numpy(np.array(np.broadcast_to(weights.sum(1), (self.n_cells,))))

    @cached_property
    def mass(self) -> Tensor:
        """Lumped mass, (owned dofs,): the integral of each basis function (row sums of the mass matrix)."""
        weights, tables = cell_geometry(self)
        per_vertex = np.broadcast_to(weights @ tables.values, self.cell_dofs.shape)
        local = torch.zeros(len(self.points), dtype=torch.float64)
        local.index_add_(
            0, torch.from_numpy(self.cell_dofs.ravel()), torch.from_numpy(np.array(per_vertex).ravel())
        )
        return self.ghosts.gather(local)

    def integral(self, u: Tensor) -> float:
        """Integral of a state over the domain (all ranks)."""
        return float(self.comm.allreduce(float(torch.dot(self.mass, u))))

    def interpolate(self, values: Any) -> Tensor:
        """Nodal interpolation of a callable of points (n, 3) -> (n,)."""
        return torch.as_tensor(values(self.points[: self.n_owned]), dtype=torch.float64)

    def project(self, values: Any, refine: int = 4) -> Tensor:
        """Control-volume means: u_i is the mean of f over the part of each cell nearest to vertex i.

        values: callable of points (n, 3) -> (n,), integrated by a composite rule of `refine` points a
        direction on each cell. Keeps integral(u) = int f to the accuracy of the rule, as nodal interpolation
        of a seed narrower than the mesh does not, and smears f half as much as a projection on the basis
        functions (variance h^2/12 instead of h^2/6 a direction).
        """
        weights, tables = cell_geometry(self, refine)
        nearest = tables.values == tables.values.max(axis=1, keepdims=True)
        shares = nearest / nearest.sum(axis=1, keepdims=True)
        nodes = self.mesh.geometry.x[geometry_dofmap(self.mesh)[: self.n_cells]]
        moments = torch.zeros(2, len(self.points), dtype=torch.float64)
        chunk = max(1, 2_000_000 // tables.values.shape[0])
        for start in range(0, self.n_cells, chunk):
            part = slice(start, start + chunk)
            at = np.einsum("qn,cnd->cqd", tables.values, nodes[part])
            f = np.asarray(values(at.reshape(-1, 3)), dtype=np.float64).reshape(at.shape[:2])
            weight = np.broadcast_to(weights if len(weights) == 1 else weights[part], f.shape)
            dofs = torch.from_numpy(self.cell_dofs[part].ravel())
            for row, integrand in enumerate((weight * f, weight)):
                moments[row].index_add_(0, dofs, torch.from_numpy((integrand @ shares).ravel()))
        integrals, volumes = self.ghosts.gather(moments[0]), self.ghosts.gather(moments[1])
        return integrals / volumes

    def function(self, u: Tensor, name: str = "u") -> dolfinx.fem.Function:
        """A DOLFINx function holding a copy of the state, ghosts updated."""
        f = dolfinx.fem.Function(self.V, name=name)
        f.x.array[: self.n_owned] = u.detach().numpy()
        f.x.scatter_forward()
        return f


@dataclass(frozen=True)
class Tables:
    """Basis functions at the quadrature points: values (q, n) and reference derivatives (dim, q, n)."""

    values: FloatArray
    derivatives: FloatArray


def _rule(cell: str, dim: int, refine: int | None) -> tuple[FloatArray, FloatArray]:
    """Points and weights on the reference cell: exact for the lumped mass, or composite when `refine` is
    given.
    """
    import basix

    kind = getattr(basix.CellType, cell)
    if refine is None:
        return basix.make_quadrature(kind, 2)
    if cell in ("interval", "quadrilateral", "hexahedron"):
        one = (np.arange(refine) + 0.5) / refine
        mesh = np.meshgrid(*[one] * dim, indexing="ij")
        points = np.stack([m.ravel() for m in mesh], axis=1)
        return points, np.full(len(points), 1.0 / len(points))
    return basix.make_quadrature(kind, min(2 * refine, 12))


def cell_geometry(domain: Domain, refine: int | None = None) -> tuple[FloatArray, Tables]:
    """Quadrature weights times |det J|, (cells or 1, q), and the basis tables; one row serves all equal
    bricks.
    """
    cell = domain.mesh.topology.cell_name()
    dim = domain.mesh.topology.dim
    points, weights = _rule(cell, dim, refine)
    tables = tabulate(cell, points)
    jacobian = jacobians(domain, tables)
    determinant = (
        np.abs(np.linalg.det(jacobian))
        if jacobian.shape[-1] == jacobian.shape[-2]
        else np.sqrt(np.linalg.det(np.swapaxes(jacobian, -1, -2) @ jacobian))
    )
    return determinant * weights, tables


def tabulate(cell: str, points: FloatArray) -> Tables:
    """Tabulate the P1/Q1 basis of a cell at points."""
    element = basix.ufl.element("Lagrange", cell, 1)
    table = element.tabulate(1, points)
    return Tables(np.asarray(table[0]), np.asarray(table[1:]))


def jacobians(domain: Domain, tables: Tables) -> FloatArray:
    """J = dx/dX at the quadrature points, (cells or 1, q, gdim, dim); one cell stands for all on a voxel
    grid.
    """
    count = min(domain.n_cells, 1) if domain.grid is not None else domain.n_cells
    nodes = domain.mesh.geometry.x[geometry_dofmap(domain.mesh)[:count]][:, :, : domain.mesh.geometry.dim]
    if domain.grid is not None and count == 0:
        return np.tile(np.eye(3), (1, tables.values.shape[0], 1, 1))  # of no cell, but it can be inverted
    return np.einsum("dqn,cng->cqgd", tables.derivatives, nodes)


def _share(comm: MPI.Comm, n: int) -> slice:
    """This rank's contiguous part of n rows."""
    bounds = np.linspace(0, n, comm.size + 1).astype(int)
    return slice(int(bounds[comm.rank]), int(bounds[comm.rank + 1]))


def _create(comm: MPI.Comm, cells: np.ndarray[Any, Any], points: FloatArray, cell: str) -> dolfinx.mesh.Mesh:
    """A distributed mesh of cells and points that every rank knows."""
    return dolfinx.mesh.create_mesh(
        comm,
        cells=np.ascontiguousarray(cells[_share(comm, len(cells))], dtype=np.int64),
        e=basix.ufl.element("Lagrange", cell, 1, shape=(points.shape[1],)),
        x=np.ascontiguousarray(points[_share(comm, len(points))], dtype=np.float64),
        partitioner=cell_partitioner(dolfinx.mesh.GhostMode.none),
    )


def _local(values: Mapping[str, Any], cells: np.ndarray[Any, Any]) -> dict[str, Tensor]:
    """Each array's rows for these cells, as float64."""
    chosen = {name: np.asarray(array)[cells] for name, array in values.items()}
    return {name: torch.from_numpy(np.array(array, dtype=np.float64)) for name, array in chosen.items()}


def original_cells(mesh: dolfinx.mesh.Mesh) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The input number of each local cell."""
    owned = mesh.topology.index_map(mesh.topology.dim).size_local
    return np.asarray(mesh.topology.original_cell_index[:owned], dtype=np.int64)


def voxels(
    mask: np.ndarray[Any, np.dtype[np.bool_]],
    affine: FloatArray,
    cell_data: Mapping[str, np.ndarray[Any, Any]] | None = None,
    comm: MPI.Comm = MPI.COMM_WORLD,
) -> Domain:
    """Conforming hexahedra, one for each voxel of `mask` (nx, ny, nz), placed in RAS mm by the affine.

    cell_data: name -> volume of the mask's shape, kept for the cells. The voxel axes must be perpendicular
    (rotations, flips and different edge lengths are fine). Raises GliodeError for an empty mask or a sheared
    affine.
    """
    affine = np.asarray(affine, dtype=np.float64)
    if mask.ndim != 3 or not mask.any():
        raise GliodeError("mask: no voxel is inside; choose tissues that are present, or a finer spacing")
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    if not np.allclose(axes.T @ axes, np.eye(3), atol=1e-4):
        raise GliodeError(
            "affine: the voxel axes are not perpendicular; resample the image to a grid without shear"
        )
    voxel = np.argwhere(mask)
    made = bricks(comm, voxel, mask.shape, affine) or _general_bricks(comm, voxel, mask.shape, affine)
    V = dolfinx.fem.functionspace(made.mesh, ("Lagrange", 1))
    cells, dofs = voxel[made.cells], V.dofmap.index_map
    corner = np.empty((dofs.size_local + dofs.num_ghosts, 3), dtype=np.int64)
    for vertex, offset in enumerate(CORNERS):
        corner[V.dofmap.list[: len(cells), vertex]] = cells + offset
    grid = Grid((mask.shape[0], mask.shape[1], mask.shape[2]), affine, made.cells, cells, corner)
    data = {name: np.asarray(values)[mask] for name, values in (cell_data or {}).items()}
    return Domain(made.mesh, V, _local(data, made.cells), grid)


def _general_bricks(
    comm: MPI.Comm, voxel: np.ndarray[Any, Any], shape: tuple[int, ...], affine: FloatArray
) -> Bricks:
    """What `bricks` makes, by DOLFINx's general way."""
    sides = tuple(n + 1 for n in shape)
    strides = np.array([sides[1] * sides[2], sides[2], 1])
    cells = (voxel @ strides)[:, None] + CORNERS @ strides
    used = np.zeros(int(np.prod(sides)), dtype=bool)
    used[cells] = True
    number = np.cumsum(used) - 1
    corner = np.stack(np.unravel_index(np.flatnonzero(used), sides), axis=1)
    points = (corner - 0.5) @ affine[:3, :3].T + affine[:3, 3]
    mesh = _create(comm, number[cells], points, "hexahedron")
    return Bricks(mesh, original_cells(mesh))


def box(
    lengths: tuple[float, float, float], cells: tuple[int, int, int], comm: MPI.Comm = MPI.COMM_WORLD
) -> Domain:
    """The brick [0, Lx] x [0, Ly] x [0, Lz] in equal voxels."""
    h = np.asarray(lengths, dtype=np.float64) / np.asarray(cells)
    affine = np.diag([*h, 1.0])
    affine[:3, 3] = h / 2
    return voxels(np.ones(cells, dtype=bool), affine, comm=comm)


def ball(radius: float, h: float, comm: MPI.Comm = MPI.COMM_WORLD) -> Domain:
    """The voxels of edge h whose centres lie in the ball of the given radius about the origin."""
    n = int(np.ceil(radius / h))
    centres = (np.arange(2 * n) - n + 0.5) * h
    x, y, z = np.meshgrid(centres, centres, centres, indexing="ij")
    affine = np.diag([h, h, h, 1.0])
    affine[:3, 3] = centres[0]
    return voxels(x**2 + y**2 + z**2 <= radius**2, affine, comm=comm)


def interval(length: float, cells: int, comm: MPI.Comm = MPI.COMM_WORLD) -> Domain:
    """[0, length] in equal cells."""
    mesh = dolfinx.mesh.create_interval(comm, cells, [0.0, length], ghost_mode=dolfinx.mesh.GhostMode.none)
    return from_mesh(mesh)


def from_mesh(mesh: dolfinx.mesh.Mesh, cell_data: Mapping[str, Tensor] | None = None) -> Domain:
    """A Domain on a DOLFINx mesh of one cell type, made without ghost cells."""
    cells = mesh.topology.index_map(mesh.topology.dim)
    if cells.num_ghosts and mesh.comm.size > 1:
        raise GliodeError(
            "mesh: made with ghost cells; create it with ghost_mode=dolfinx.mesh.GhostMode.none"
        )
    return Domain(mesh, dolfinx.fem.functionspace(mesh, ("Lagrange", 1)), cell_data or {})


_MESHIO_CELLS = {
    "tetra": "tetrahedron",
    "hexahedron": "hexahedron",
    "triangle": "triangle",
    "line": "interval",
}
_VTK_HEXAHEDRON = [0, 1, 3, 2, 4, 5, 7, 6]


def read(path: str | Path, comm: MPI.Comm = MPI.COMM_WORLD) -> Domain:
    """Any mesh meshio reads, with its per-cell numbers as `cell_data` (coordinates taken as mm).

    The cells of the highest dimension are kept. Raises GliodeError naming the file where it is missing,
    unreadable, holds no supported cells, or has data that do not fit.
    """
    import meshio

    path = Path(path)
    if not path.is_file():
        raise GliodeError(f"{path}: no such mesh file")
    try:
        mesh = meshio.read(path)
    except (meshio.ReadError, ValueError, LookupError, OSError, SyntaxError, SystemExit) as error:
        raise GliodeError(
            f"{path}: meshio cannot read it ({error}); convert it, e.g. to .vtu or .msh"
        ) from error
    kind = next((k for k in _MESHIO_CELLS if any(block.type == k for block in mesh.cells)), None)
    if kind is None:
        found = sorted({block.type for block in mesh.cells})
        raise GliodeError(f"{path}: cells {found} are not supported; use linear {sorted(_MESHIO_CELLS)}")
    chosen = [index for index, block in enumerate(mesh.cells) if block.type == kind]
    cells = np.concatenate([mesh.cells[index].data for index in chosen]).astype(np.int64)
    if kind == "hexahedron":
        cells = cells[:, _VTK_HEXAHEDRON]
    used = np.unique(cells)
    if used.size == 0 or used[-1] >= len(mesh.points) or not np.isfinite(mesh.points).all():
        raise GliodeError(f"{path}: empty, or its points are missing or not finite")
    number = np.full(len(mesh.points), -1, dtype=np.int64)
    number[used] = np.arange(len(used))
    data = {}
    for name, blocks in mesh.cell_data.items():
        values = np.concatenate([np.asarray(blocks[index]) for index in chosen])
        if values.ndim == 1 and np.issubdtype(values.dtype, np.number):
            data[name] = values
    gdim = 3 if kind in ("tetra", "hexahedron") else _flat_dimension(path, mesh.points[used])
    made = from_mesh(_create(comm, number[cells], mesh.points[used][:, :gdim], _MESHIO_CELLS[kind]))
    return Domain(made.mesh, made.V, _local(data, made.cell_numbers))


def _flat_dimension(path: Path, points: FloatArray) -> int:
    """2 for a triangle mesh in the plane z = constant, 1 for an interval on the x axis; curved ones are
    refused.
    """
    extents = np.ptp(points, axis=0)
    used = int(np.max(np.flatnonzero(extents > 1e-12), initial=0)) + 1
    if used > 2:
        raise GliodeError(f"{path}: a curved surface mesh; give a volume mesh (tetra or hexahedron)")
    return used
