"""Files of states: ParaView's, and restart files that any number of ranks can read.

A restart file is a .npz without pickles: states in the order of the mesh's input (the numbering that its
maker gave the vertices, which no partition changes), a record in JSON, and a key that says what the states
belong to; `fingerprint` gives the mesh's part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import dolfinx
import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from solvers.errors import GliodeError
from solvers.fem.compat import geometry_dofmap
from solvers.fem.mesh import Domain
from solvers.files import read_arrays, write_arrays

Array = np.ndarray[Any, np.dtype[Any]]
T = TypeVar("T")


def on_root(comm: MPI.Comm, work: Callable[[], T]) -> T:
    """The result of work(), done on rank 0, on every rank; its errors become GliodeError on all of them."""
    result, message = None, None
    if comm.rank == 0:
        try:
            result = work()
        except (GliodeError, OSError) as error:
            message = str(error)
    message, result = comm.bcast((message, result))
    if message is not None:
        raise GliodeError(message)
    return result  # type: ignore[return-value]


class Film:
    """Densities against time for ParaView: `with Film(folder / "density", domain) as film: film.add(day, u)`.

    VTX (NAME.bp) where DOLFINx has ADIOS2, else XDMF (NAME.xdmf and NAME.h5); `path` says which. An old file
    of the name must be gone. Collective.
    """

    def __init__(self, stem: str | Path, domain: Domain, name: str = "density") -> None:
        stem = Path(stem)
        on_root(domain.comm, lambda: stem.parent.mkdir(parents=True, exist_ok=True))
        self._domain = domain
        self._function = domain.function(torch.zeros(domain.n_owned, dtype=torch.float64), name)
        self._vtx = hasattr(dolfinx.io, "VTXWriter")
        self.path = stem.with_name(stem.name + (".bp" if self._vtx else ".xdmf"))
        if self._vtx:
            policy = dolfinx.io.VTXMeshPolicy.reuse
            self._writer: Any = dolfinx.io.VTXWriter(
                domain.comm, self.path, [self._function], engine="BP4", mesh_policy=policy
            )
        else:
            self._writer = dolfinx.io.XDMFFile(domain.comm, self.path, "w")
            self._writer.write_mesh(domain.mesh)

    def add(self, day: float, u: Tensor) -> None:
        """Append the state u at a time, later than the one before."""
        self._function.x.array[: self._domain.n_owned] = u.detach().numpy()
        self._function.x.scatter_forward()
        if self._vtx:
            self._writer.write(float(day))
        else:
            self._writer.write_function(self._function, float(day))

    def __enter__(self) -> Film:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()


def input_numbers(domain: Domain) -> Array:
    """The vertex number in the mesh's input of each owned degree of freedom, (n_owned,)."""
    return np.asarray(domain.mesh.geometry.input_global_indices, dtype=np.int64)[_nodes(domain)]


def _nodes(domain: Domain) -> Array:
    """The mesh's geometry node at each owned degree of freedom, (n_owned,)."""
    nodes = np.zeros(len(domain.points), dtype=np.int64)
    nodes[domain.cell_dofs] = geometry_dofmap(domain.mesh)[: domain.n_cells]
    # Vertices of another rank's cells alone are not owned here, so every owned one was met.
    return nodes[: domain.n_owned]


def _gathered(comm: MPI.Comm, numbers: Array, values: Array) -> Array | None:
    """The rows `values` of all ranks, put at their numbers; on rank 0, None elsewhere."""
    parts = comm.gather((numbers, values))
    if parts is None:
        return None
    whole = np.zeros((sum(len(n) for n, _ in parts), *values.shape[1:]), dtype=values.dtype)
    for where, part in parts:
        whole[where] = part
    return whole


def fingerprint(domain: Domain) -> str:
    """A hash of the mesh (points, cells, cell data) that does not depend on the number of ranks."""
    numbers = input_numbers(domain)
    cells = domain.cell_numbers
    node_of = np.asarray(domain.mesh.geometry.input_global_indices)
    corners = node_of[geometry_dofmap(domain.mesh)[: domain.n_cells]]
    tables = [
        _gathered(domain.comm, numbers, np.asarray(domain.mesh.geometry.x)[_nodes(domain)]),
        _gathered(domain.comm, cells, np.sort(corners, axis=1)),
        *(_gathered(domain.comm, cells, domain.cell_data[name].numpy()) for name in sorted(domain.cell_data)),
    ]
    digest = hashlib.sha256()
    for table in tables:
        if table is not None:
            digest.update(np.ascontiguousarray(table).tobytes())
    return str(domain.comm.bcast(digest.hexdigest()))


@dataclass(frozen=True)
class Restart:
    """What a restart file holds: named states (owned dofs,) and a record of plain JSON values."""

    states: Mapping[str, Tensor]
    record: Mapping[str, Any]


def write_restart(
    path: str | Path, domain: Domain, key: str, states: Mapping[str, Tensor], record: Mapping[str, Any]
) -> None:
    """Write a restart file, atomically. Collective; every rank gives its part of the same states."""
    numbers = input_numbers(domain)
    whole = {name: _gathered(domain.comm, numbers, u.detach().numpy()) for name, u in states.items()}

    arrays = {name: u for name, u in whole.items() if u is not None}  # on rank 0 all of them
    about = np.frombuffer(json.dumps(dict(record)).encode(), dtype=np.uint8)
    on_root(domain.comm, lambda: write_arrays(path, key, {"record": about, **arrays}))


def read_restart(path: str | Path, domain: Domain, key: str) -> Restart | None:
    """What a restart file holds; None where there is none, or it belongs to something else (another key).

    Raises GliodeError naming the file where it is damaged. Collective.
    """
    found = on_root(domain.comm, lambda: read_arrays(path, key))
    if found is None:
        return None
    about = found.pop("record")
    wrong = [name for name, u in found.items() if u.shape != (domain.n_global,) or u.dtype != np.float64]
    if wrong:
        raise GliodeError(f"{path}: the states {wrong} do not fit the mesh; start anew with --fresh")
    numbers = input_numbers(domain)
    states = {name: torch.from_numpy(u[numbers].copy()) for name, u in found.items()}
    return Restart(states, json.loads(about.tobytes()))
