"""From a mesh, or from UFL forms, to a `SemiDiscrete` that needs torch alone; serial and MPI.

Every rank gets the whole problem. Its numbering does not depend on the number of ranks: dofs at the nodes of
the mesh in the order of the mesh's input (on voxels: along the grid), others in the order in which the
input's cells first have them. `gathered` and `scattered` take states there and back.
"""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dolfinx
import numpy as np
import torch
import ufl
from mpi4py import MPI
from scipy.sparse import coo_matrix, diags
from torch import Tensor

from solvers.errors import GliodeError
from solvers.fem.compat import geometry_dofmap
from solvers.fem.mesh import Domain, cell_geometry, original_cells
from solvers.fem.operators import graph, pair_table
from solvers.semidiscrete import Grid, SemiDiscrete, Sparse

Array = np.ndarray[Any, np.dtype[Any]]


def export(domain: Domain, source: str, tensor: bool = False) -> SemiDiscrete:
    """Diffusion M x' = -K(D) x on a domain, lumped, with its conductances, cell data and coordinates.

    The stiffness is that of `DiffusionOperator`: the vertex rule on voxel bricks (7 entries a row), else, and
    for a diffusion `tensor`, the full rule. source: what the mesh is of, for the provenance. Collective.
    """
    comm, vertex_rule = domain.comm, domain.grid is not None and not tensor
    table, pairs = pair_table(domain, domain.mesh.topology.cell_name(), vertex_rule, tensor)
    weights, basis = cell_geometry(domain)
    mass = weights @ basis.values
    numbers = dof_numbers(domain.V)
    by_cell = _by_cell(comm, domain.cell_numbers)
    cell_dofs, n = by_cell(numbers[domain.cell_dofs]), domain.n_global
    if domain.grid is not None:  # all cells are equal
        table, mass = _first(comm, domain.n_cells, table), _first(comm, domain.n_cells, mass)
    else:
        table, mass = by_cell(table), by_cell(mass)
    voxel = by_cell(domain.grid.cell_voxel) if domain.grid is not None else None
    points, grid = None, None
    if domain.grid is not None and voxel is not None:
        corner = np.zeros((n, 3), dtype=np.int32)
        corner[cell_dofs] = by_cell(domain.grid.dof_corner[domain.cell_dofs])
        affine = torch.from_numpy(np.array(domain.grid.affine))
        grid = Grid(domain.grid.shape, affine, _whole(voxel), torch.from_numpy(corner))
    else:
        points = np.zeros((n, domain.mesh.geometry.dim))
        points[cell_dofs] = by_cell(domain.points[domain.cell_dofs][..., : points.shape[1]])
    total = np.bincount(cell_dofs.ravel(), np.broadcast_to(mass, cell_dofs.shape).ravel(), minlength=n)
    volume = f"mm^{domain.mesh.topology.dim}"
    rule = "vertex rule" if vertex_rule else "full rule"
    return SemiDiscrete(
        torch.from_numpy(total),
        conductances=graph(cell_dofs, pairs, table, n, voxel if vertex_rule else None),
        fractions={k: torch.from_numpy(by_cell(v.numpy())) for k, v in domain.cell_data.items()},
        coordinates=None if points is None else torch.from_numpy(points),
        grid=grid,
        units={"x": "mm", "t": "day", "D": "mm^2/day", "mass": volume, "conductances": f"{volume}/day"},
        provenance=_provenance(comm, source, domain.mesh) | {"stiffness": f"{rule}, lumped mass"},
    )


def affine(
    mass: ufl.Form,
    operators: Mapping[str, ufl.Form],
    loads: Mapping[str, ufl.Form] | None = None,
    source: str = "",
    bcs: Sequence[Any] = (),
    lumped: bool = False,
    units: Mapping[str, str] | None = None,
) -> SemiDiscrete:
    """M x' = sum_k w_k A_k x + sum_k w_k b_k from UFL forms: mass and operators bilinear, loads linear.

    Any space of DOLFINx; the forms' coefficients and constants enter as they are now. lumped: row sums. bcs:
    homogeneous Dirichlet conditions: rows and columns are cleared, the mass keeps its diagonal, so that
    values which start at 0 stay there. Raises GliodeError for other conditions, forms on different spaces,
    and a lumped mass that is not positive. Collective.
    """
    V = mass.arguments()[0].ufl_function_space()
    forms = {"mass": mass, **operators, **(loads or {})}
    for name, form in forms.items():
        if len(form.arguments()) != (1 if name in (loads or {}) else 2):
            raise GliodeError(f"{name}: mass and operators are bilinear forms, loads linear ones")
        if any(argument.ufl_function_space() != V for argument in form.arguments()):
            raise GliodeError(f"{name}: its test or trial function is of another space than the mass's")
    numbers = _unrolled(V, dof_numbers(V))
    n = int(V.dofmap.index_map.size_global) * V.dofmap.index_map_bs
    fixed = _fixed(V, bcs, numbers, n)
    free = diags(1.0 - fixed)

    def matrix(form: ufl.Form) -> Any:
        return _matrix(V, dolfinx.fem.form(form), numbers, n)

    def load(form: ufl.Form) -> Tensor:
        b = dolfinx.fem.assemble_vector(dolfinx.fem.form(form))
        b.scatter_reverse(dolfinx.la.InsertMode.add)
        owned = np.array(b.array[: _owned(V)])
        return torch.from_numpy(_placed(V, numbers, owned, n) * (1.0 - fixed))

    M = matrix(mass)
    if lumped:
        sums = np.asarray(M.sum(axis=1)).ravel()
        if not (sums > 1e-12 * np.abs(sums).max(initial=0.0)).all():
            raise GliodeError("mass: its row sums are not positive on this space; use lumped=False")
        weight: Tensor | Sparse = torch.from_numpy(sums)
    else:
        weight = Sparse.of(free @ M @ free + diags(M.diagonal() * fixed))
    return SemiDiscrete(
        weight,
        {name: Sparse.of(free @ matrix(form) @ free) for name, form in operators.items()},
        {name: load(form) for name, form in (loads or {}).items()},
        coordinates=_coordinates(V, numbers, n),
        units=dict(units or {}),
        provenance=_provenance(V.mesh.comm, source, V.mesh),
    )


def gathered(V: dolfinx.fem.FunctionSpace, u: Tensor) -> Tensor:
    """A state (owned dofs,) of DOLFINx's as one of the exported problem, (n,), on every rank. Collective."""
    n = int(V.dofmap.index_map.size_global) * V.dofmap.index_map_bs
    return torch.from_numpy(_placed(V, _unrolled(V, dof_numbers(V)), u.detach().numpy(), n))


def scattered(V: dolfinx.fem.FunctionSpace, x: Tensor) -> Tensor:
    """A state (n,) of the exported problem as the rank's state (owned dofs,) of DOLFINx's. Collective."""
    return x.detach().cpu()[_unrolled(V, dof_numbers(V))[: _owned(V)]].clone()


def dof_numbers(V: dolfinx.fem.FunctionSpace) -> Array:
    """The exported number of each local dof (each block of dofs), (local dofs,), ghosts last. Collective."""
    mesh, dofmap = V.mesh, V.dofmap
    comm, index_map = mesh.comm, dofmap.index_map
    count = mesh.topology.index_map(mesh.topology.dim).size_local
    dofs, nodes = np.asarray(dofmap.list)[:count], geometry_dofmap(mesh)[:count]
    keys = np.asarray(mesh.geometry.input_global_indices, dtype=np.int64)[nodes]
    if dofs.shape != nodes.shape or index_map.size_global != mesh.geometry.index_map().size_global:
        cells = _cell_numbers(mesh, keys)
        keys = cells[:, None] * dofs.shape[1] + np.arange(dofs.shape[1])
    first = np.full(index_map.size_local + index_map.num_ghosts, np.iinfo(np.int64).max)
    np.minimum.at(first, dofs, keys)
    everywhere = np.full(index_map.size_global, np.iinfo(np.int64).max)
    here = index_map.local_to_global(np.arange(len(first), dtype=np.int32))
    for where, found in comm.allgather((here, first)):
        np.minimum.at(everywhere, where, found)
    place = np.empty(len(everywhere), dtype=np.int64)
    place[np.argsort(everywhere, kind="stable")] = np.arange(len(everywhere))
    return place[here]


def _cell_numbers(mesh: dolfinx.mesh.Mesh, nodes: Array) -> Array:
    """A number for each local cell that no partition changes; nodes: (cells, k) input numbers."""
    try:
        return original_cells(mesh)
    except RuntimeError:  # bricks taken straight from a grid: each is the only one above its lowest node
        lowest: Array = nodes.min(axis=1, initial=np.iinfo(np.int64).max)
        return lowest


# ---- Parts of a problem from all ranks --------------------------------------------------------------------


def _whole(values: Array) -> Tensor:
    return torch.from_numpy(values.astype(np.int32))


def _by_cell(comm: MPI.Comm, cells: Array) -> Callable[[Array], Array]:
    """Puts values (local cells, ...) in the order of the mesh's input, on every rank."""
    order = np.argsort(np.concatenate(comm.allgather(cells)), kind="stable")

    def whole(values: Array) -> Array:
        found: Array = np.concatenate(comm.allgather(np.ascontiguousarray(values)))[order]
        return found

    return whole


def _first(comm: MPI.Comm, cells: int, values: Array) -> Array:
    """The values of the first rank that has cells."""
    found: Array = next(v for count, v in comm.allgather((cells, values)) if count)
    return found


def _owned(V: dolfinx.fem.FunctionSpace) -> int:
    return int(V.dofmap.index_map.size_local) * int(V.dofmap.index_map_bs)


def _unrolled(V: dolfinx.fem.FunctionSpace, blocks: Array) -> Array:
    """The numbers of dofs from those of their blocks."""
    size = V.dofmap.index_map_bs
    return (blocks[:, None] * size + np.arange(size)).ravel()


def _placed(V: dolfinx.fem.FunctionSpace, numbers: Array, values: Array, n: int) -> Array:
    """Values (owned dofs, ...) of all ranks at their numbers, on every rank."""
    whole = np.zeros((n, *values.shape[1:]), dtype=values.dtype)
    for where, part in V.mesh.comm.allgather((numbers[: len(values)], values)):
        whole[where] = part
    return whole


def _fixed(V: dolfinx.fem.FunctionSpace, bcs: Sequence[Any], numbers: Array, n: int) -> Array:
    """1 at the dofs that the conditions hold at 0, else 0, (n,)."""
    held, values = np.zeros(len(numbers)), np.zeros(len(numbers))
    for bc in bcs:
        held[bc.dof_indices()[0]] = 1.0
        bc.set(values)
    if V.mesh.comm.allreduce(bool(values.any()), op=MPI.LOR):
        raise GliodeError(
            "bcs: only homogeneous conditions can be exported; subtract a function that has the boundary "
            "values, and put what it does into the loads"
        )
    whole = np.zeros(n)
    for where, part in V.mesh.comm.allgather((numbers, held)):
        whole[where[part > 0]] = 1.0
    return whole


def _matrix(V: dolfinx.fem.FunctionSpace, form: Any, numbers: Array, n: int) -> Any:
    """A bilinear form's matrix, from all ranks on every rank, as SciPy's."""
    A = dolfinx.fem.assemble_matrix(form)
    A.scatter_reverse()
    local = A.to_scipy().tocoo()  # the owned rows; columns are local
    size, columns = V.dofmap.index_map_bs, A.index_map(1)
    of_column = columns.local_to_global(np.arange(columns.size_local + columns.num_ghosts, dtype=np.int32))
    place = np.empty(n, dtype=np.int64)  # DOLFINx's global number -> the exported one
    start = V.dofmap.index_map.local_range[0] * size
    for where, part in V.mesh.comm.allgather((start, numbers[: _owned(V)])):
        place[where : where + len(part)] = part
    of_column = (of_column[:, None] * size + np.arange(size)).ravel()
    kept = local.row < _owned(V)
    row, column, value = (x[kept] for x in (local.row, local.col, local.data))
    triplets = V.mesh.comm.allgather((numbers[row], place[of_column[column]], value))
    rows, cols, values = (np.concatenate(parts) for parts in zip(*triplets, strict=True))
    # What is zero but for rounding, which depends on the ranks, is left out.
    real = np.abs(values) > 1e-14 * np.abs(values).max(initial=0.0)
    return coo_matrix((values[real], (rows[real], cols[real])), shape=(n, n)).tocsr()


def _coordinates(V: dolfinx.fem.FunctionSpace, numbers: Array, n: int) -> Tensor | None:
    """The points of the dofs, None where they have none."""
    try:
        points = np.asarray(V.tabulate_dof_coordinates())
    except RuntimeError:  # mixed spaces, and moments instead of values
        return None
    points = np.repeat(points[:, : V.mesh.geometry.dim], V.dofmap.index_map_bs, axis=0)
    return torch.from_numpy(_placed(V, numbers, points[: _owned(V)], n))


def _provenance(comm: MPI.Comm, source: str, mesh: dolfinx.mesh.Mesh) -> dict[str, str]:
    try:
        gliode = importlib.metadata.version("gliode")
    except importlib.metadata.PackageNotFoundError:
        gliode = "a source checkout"
    cells = mesh.topology.index_map(mesh.topology.dim).size_global
    today = comm.bcast(datetime.datetime.now(datetime.UTC).date().isoformat())
    return {
        "source": source,
        "mesh": f"{cells} cells, {mesh.topology.cell_name()}",
        "gliode": gliode,
        "dolfinx": str(dolfinx.__version__),
        "date": today,
    }
