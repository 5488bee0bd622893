r"""Discontinuous Galerkin on DOLFINx for conservation laws u_t + div f(u; w) = 0: facet integrals in UFL.

    (u_t, v) = int f(u) . grad v dx - int f*(u-, u+; n) . [v] dS - int f*(u, u_outside; n) . v ds

with the laws, the flux f* and the limiter of `solvers.node.science` (written once for both forms). `FemDG` is
f(t, u, *w) of the rank's owned degrees of freedom u, (n,), assembled by DOLFINx; the block-diagonal mass is
inverted once. Its derivatives are those of the form (solvers.fem.implicit), to any order; serial and MPI.
"""

from __future__ import annotations

from typing import Any

import basix
import basix.ufl
import dolfinx
import numpy as np
import torch
import ufl
from dolfinx.fem import Constant, Function, FunctionSpace, functionspace
from mpi4py import MPI
from torch import Tensor

from solvers.errors import GliodeError
from solvers.fem.compat import cell_partitioner, geometry_dofmap
from solvers.fem.ghosts import Ghosts
from solvers.fem.implicit import _fix_quadrature, _Frozen, _Functional, _Variable
from solvers.node.science.conservation import DG, Boundary
from solvers.node.science.elements import Elements, Reference, build
from solvers.node.science.laws import Law, courant, rusanov

CORNERS = {"interval": 2, "triangle": 3, "quadrilateral": 4}


def line(low: float, high: float, cells: int, comm: MPI.Comm = MPI.COMM_WORLD) -> dolfinx.mesh.Mesh:
    """[low, high] in equal cells, with the ghost cells that facet integrals need."""
    ghosts = dolfinx.mesh.GhostMode.shared_facet
    return dolfinx.mesh.create_interval(comm, cells, [low, high], ghost_mode=ghosts)


def ring(length: float, cells: int, comm: MPI.Comm = MPI.COMM_WORLD) -> dolfinx.mesh.Mesh:
    """A periodic interval: a regular polygon of this perimeter in the plane, its arc the coordinate."""
    if cells < 3:
        raise GliodeError(f"ring: {cells} cells; give 3 or more")
    angle = 2 * np.pi * np.arange(cells) / cells
    radius = length / cells / (2 * np.sin(np.pi / cells))
    points = radius * np.stack([np.cos(angle), np.sin(angle)], 1)
    numbers = np.arange(cells)
    edges = np.stack([numbers, (numbers + 1) % cells], 1)
    mine = np.array_split(numbers, comm.size)[comm.rank]
    return dolfinx.mesh.create_mesh(
        comm,
        cells=np.ascontiguousarray(edges[mine], dtype=np.int64),
        e=basix.ufl.element("Lagrange", "interval", 1, shape=(2,)),
        x=np.ascontiguousarray(points[mine]),
        partitioner=cell_partitioner(dolfinx.mesh.GhostMode.shared_facet),
    )


def rectangle(
    low: tuple[float, float],
    high: tuple[float, float],
    cells: tuple[int, int],
    triangles: bool = True,
    comm: MPI.Comm = MPI.COMM_WORLD,
) -> dolfinx.mesh.Mesh:
    """A rectangle in equal cells, each of two triangles or not, with ghost cells."""
    kind = dolfinx.mesh.CellType.triangle if triangles else dolfinx.mesh.CellType.quadrilateral
    ghosts = dolfinx.mesh.GhostMode.shared_facet
    return dolfinx.mesh.create_rectangle(comm, [low, high], list(cells), kind, ghost_mode=ghosts)


def arc(mesh: dolfinx.mesh.Mesh) -> Any:
    """The unit vector along a `ring`, counter-clockwise, in UFL."""
    x, J = ufl.SpatialCoordinate(mesh), ufl.Jacobian(mesh)
    column = ufl.as_vector([J[0, 0], J[1, 0]])
    turn = x[0] * column[1] - x[1] * column[0]
    return ufl.sign(turn) * column / ufl.sqrt(ufl.inner(column, column))


class FemDG:
    """f(t, u, *w) = u_t on a DOLFINx mesh; see `solvers.node.science.conservation.DG`, the same for arrays.

    mesh: of `line`, `ring`, `rectangle`, or any affine one made with GhostMode.shared_facet; u: the owned
    values of `space`; w: the law's parameters, 0-d tensors or numbers, in order or by name. Under MPI pass
    those that need a gradient through `solvers.spaces.replicate` (`Stepped` does). `elements` are this rank's
    cells and their neighbours; `to_arrays` and `from_arrays` lead from u to (cells, nodes, components) and
    back. With `SSPStep` it is limited as the arrays are.
    """

    def __init__(
        self,
        law: Law,
        mesh: dolfinx.mesh.Mesh,
        degree: int,
        boundary: Boundary = "outflow",
        tvb: float | None = None,
    ) -> None:
        courant(degree)
        if mesh.comm.size > 1 and not mesh.comm.allreduce(_ghost_cells(mesh)):
            raise GliodeError("mesh: no ghost cells; create it with ghost_mode=GhostMode.shared_facet")
        self.law, self.comm = law, mesh.comm
        self.space: FunctionSpace = functionspace(mesh, ("DG", degree, (law.components,)))
        dofmap = self.space.dofmap
        self.owned = int(dofmap.index_map.size_local) * law.components
        self.elements = exported(mesh, degree)
        self._dg = DG(law, self.elements, boundary, tvb)
        self._ghosts = _Blocks(self.space)
        self._cells = int(mesh.topology.index_map(mesh.topology.dim).size_local)
        components = np.arange(law.components)
        table = np.asarray(dofmap.list)[:, :, None] * law.components + components
        self._table = torch.from_numpy(table.astype(np.int64))
        self._place = torch.empty(self.owned, dtype=torch.int64)  # of each owned value in the arrays
        flat = self._table[: self._cells].reshape(-1)
        self._place[flat] = torch.arange(len(flat))
        e = self.elements
        quadrature = e.weights[..., None, None] * (e.values[:, :, None] * e.values[:, None, :])
        self._inverse_mass = torch.linalg.inv(quadrature.sum(1))
        self._inverse_mass = self._inverse_mass[: self._cells]
        self._form(mesh, degree, boundary)

    def _form(self, mesh: dolfinx.mesh.Mesh, degree: int, boundary: Boundary) -> None:
        law, u, v = self.law, Function(self.space), Function(self.space)
        u.name = "u"
        constants = [Constant(mesh, float(value)) for value in law.parameters.values()]
        variables = (_Variable(v), _Variable(u), *(_Variable(c) for c in constants))
        closed = mesh.geometry.dim > mesh.topology.dim
        normal = ufl.FacetNormal(mesh)
        units = [[float(i == j) for j in range(mesh.geometry.dim)] for i in range(mesh.geometry.dim)]
        along: list[Any] = [arc(mesh)] if closed else [ufl.as_vector(unit) for unit in units]
        meta = {"quadrature_degree": 2 * degree + 1}
        dx, dS, ds = (measure(domain=mesh, metadata=meta) for measure in (ufl.dx, ufl.dS, ufl.ds))
        parts, gradient = range(law.components), ufl.grad(v)

        def directions(side: str | None) -> list[Any]:
            if side is None:
                return [ufl.dot(normal, a) for a in along]
            return [ufl.dot(normal(side), a(side) if closed else a) for a in along]

        flux = law.flux([u[i] for i in parts], *constants)
        form = sum(
            flux[i][d] * ufl.dot(ufl.as_vector([gradient[i, g] for g in range(len(a))]), a) * dx
            for i in parts
            for d, a in enumerate(along)
        )
        inner, outer = [u[i]("+") for i in parts], [u[i]("-") for i in parts]
        across = rusanov(law, inner, outer, directions("+"), constants, ufl.max_value)
        form -= sum(across[i] * (v[i]("+") - v[i]("-")) for i in parts) * dS
        if not closed:
            here, n = [u[i] for i in parts], directions(None)
            beyond = here if boundary == "outflow" else law.mirror(here, n) if boundary == "wall" else None
            if beyond is None:
                beyond = [ufl.as_ufl(float(value)) for value in boundary]
            out = rusanov(law, here, beyond, n, constants, ufl.max_value)
            form -= sum(out[i] * v[i] for i in parts) * ds
        form = _fix_quadrature(form)
        frozen = _Frozen(form, variables)
        form = ufl.replace(form, {x.value: x.symbol for x in variables if not x.is_field})
        self._functional = _Functional(form, variables, frozen)

    def __call__(self, t: Any, u: Tensor, *given: Any, **named: Any) -> Tensor:
        """u_t, (owned dofs,)."""
        values = self._values(u, given, named)
        (residual,) = self._functional.gradient((0,), torch.zeros_like(u), u, *values)
        local = residual[self._table[: self._cells]]
        return (self._inverse_mass @ local).reshape(-1)[self._place]

    def limit(self, u: Tensor, *given: Any, **named: Any) -> Tensor:
        """The limiter of the arrays, on this rank's cells and their neighbours."""
        return self.from_arrays(self._dg.limit(self.to_arrays(u), *given, **named))

    def largest_step(self, u: Tensor, *given: Any, **named: Any) -> float:
        """The largest stable step on all ranks."""
        mine = self._dg.largest_step(self.to_arrays(u), *given, **named)
        return float(self.comm.allreduce(mine, MPI.MIN))

    def to_arrays(self, u: Tensor) -> Tensor:
        """(local cells, nodes, components): this rank's cells, then its neighbours'."""
        self._values(u, (), {})
        return self._ghosts.extend(u)[self._table]

    def from_arrays(self, arrays: Tensor) -> Tensor:
        """The owned values of arrays; neighbours are left out."""
        return arrays[: self._cells].reshape(-1)[self._place]

    def project(self, f: Any) -> Tensor:
        """`Elements.project` as owned values."""
        return self.from_arrays(self.elements.project(f))

    def integral(self, u: Tensor) -> Tensor:
        """int u over all ranks, (components,); no derivative under MPI."""
        means = self.elements.means(self.to_arrays(u))[: self._cells]
        volumes = self.elements.volumes[:, None]
        mine = (means * (volumes if len(volumes) == 1 else volumes[: self._cells])).sum(0)
        if self.comm.size == 1:
            return mine
        return torch.from_numpy(np.asarray(self.comm.allreduce(mine.detach().numpy())))

    def _values(self, u: Tensor, given: Any, named: Any) -> list[Tensor]:
        if tuple(u.shape) != (self.owned,) or u.dtype != torch.float64:
            raise GliodeError(f"state: {tuple(u.shape)} {u.dtype}; this rank's has ({self.owned},) float64")
        found = [torch.as_tensor(w, dtype=torch.float64) for w in self.law.values(given, named)]
        for name, value in zip(self.law.parameters, found, strict=True):
            if value.ndim:
                raise GliodeError(f"{name}: shape {tuple(value.shape)}; the DOLFINx form takes one number")
        return found


class _Blocks(Ghosts):
    """The exchange for a blocked space, entry by entry."""

    def __init__(self, V: FunctionSpace) -> None:
        super().__init__(V)
        size = int(V.dofmap.index_map_bs)
        self.n_owned, self.n_local = size * self.n_owned, size * self.n_local
        entries = np.arange(size)

        def spread(places: dict[int, Any]) -> dict[int, Any]:
            return {r: (place[:, None] * size + entries).reshape(-1) for r, place in places.items()}

        self._ghosts, self._shared = spread(self._ghosts), spread(self._shared)


def _ghost_cells(mesh: dolfinx.mesh.Mesh) -> int:
    return int(mesh.topology.index_map(mesh.topology.dim).num_ghosts)


def exported(mesh: dolfinx.mesh.Mesh, degree: int) -> Elements:
    """The rank's cells (and ghosts, last) as arrays for `solvers.node.science.conservation.DG`.

    The basis, nodes and quadrature are those of DOLFINx's ("DG", degree). Raises GliodeError for cells that
    are not affine images of an interval, a triangle or a square, or a rank without cells. Collective.
    """
    kind = mesh.topology.cell_name()
    x = mesh.geometry.x[geometry_dofmap(mesh)][:, :, : mesh.geometry.dim]
    if CORNERS.get(kind) != x.shape[1]:
        raise GliodeError(f"mesh: {kind} cells of {x.shape[1]} nodes; give straight ones of {list(CORNERS)}")
    if not mesh.comm.allreduce(len(x), MPI.MIN):
        raise GliodeError("mesh: a rank has no cells; use a finer mesh, or fewer ranks")
    corner, tdim = x[:, 0], mesh.topology.dim
    J = np.stack([x[:, d] - corner for d in range(1, tdim + 1)], -1)
    if kind == "quadrilateral" and np.abs(x[:, 3] - x[:, 1] - x[:, 2] + corner).max() > 1e-10 * np.ptp(x):
        raise GliodeError("mesh: its quadrilaterals are no parallelograms; use triangles")
    even = np.abs(J - J[:1]).max() < 1e-13 * np.abs(J).max()
    return build(_reference(kind, degree), corner, J[:1] if even else J)


def _reference(kind: str, degree: int) -> Reference:
    """The reference cell of basix."""
    cell, dim = getattr(basix.CellType, kind), 1 if kind == "interval" else 2
    element = basix.ufl.element("DG", kind, degree)
    points, weights = basix.make_quadrature(cell, 2 * degree + 1)
    table = element.tabulate(1, points)
    geometry, topology = basix.geometry(cell), basix.topology(cell)
    normals = basix.cell.facet_outward_normals(cell)
    if dim == 1:
        at, facet_weights = np.zeros((1, 0)), np.ones(1)
    else:
        at, facet_weights = basix.make_quadrature(basix.CellType.interval, 2 * degree + 1)
    face_points, face_weights = [], []
    for vertices in topology[dim - 1]:
        ends = geometry[vertices]
        edges = (ends[1:] - ends[:1]) if dim > 1 else np.zeros((0, 1))
        face_points.append(ends[:1] + at @ edges)
        face_weights.append(facet_weights * (np.linalg.norm(edges) if dim > 1 else 1.0))
    stacked = np.concatenate(face_points)
    count = len(facet_weights)
    return Reference(
        degree=degree,
        nodes=np.asarray(element.basix_element.points),
        points=points,
        weights=weights,
        values=np.asarray(table[0]),
        derivatives=np.asarray(table[1:]),
        face_points=stacked,
        face_weights=np.concatenate(face_weights),
        face_normals=np.repeat(np.asarray(normals), count, axis=0),
        face=np.repeat(np.arange(len(normals)), count),
        traces=np.asarray(element.tabulate(0, stacked)[0]),
    )
