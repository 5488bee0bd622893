"""Taylor-Hood elements: the space of incompressible flow, boundary values, and observations of a state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import basix.ufl
import dolfinx
import numpy as np
import torch
import ufl
from dolfinx.fem import DirichletBC, Function, functionspace
from mpi4py import MPI
from torch import Tensor

from solvers.errors import GliodeError
from solvers.fem.equations.stationary import Array, Marker, dofs_on, zero
from solvers.fem.ghosts import Ghosts
from solvers.fem.sampling import locate


class TaylorHood:
    """Continuous velocity and pressure, piecewise quadratic and linear (on quadrilaterals in each direction).

    A state is the tensor of the rank's owned dofs of W = velocity x pressure. fixed: (marker, components)
    pairs, the parts of the boundary where these components of the velocity are given. pinned: a marker of one
    vertex where the pressure is zero: needed where the velocity through the boundary is fixed all around, and
    only there. Raises GliodeError where that, or a marker, is wrong.
    """

    def __init__(
        self,
        mesh: dolfinx.mesh.Mesh,
        fixed: Sequence[tuple[Marker, Sequence[int]]],
        pinned: Marker | None = None,
    ) -> None:
        name, self.dim = mesh.topology.cell_name(), mesh.geometry.dim
        velocity = basix.ufl.element("Lagrange", name, 2, shape=(self.dim,))
        pressure = basix.ufl.element("Lagrange", name, 1)
        self.mesh = mesh
        self.W = functionspace(mesh, basix.ufl.mixed_element([velocity, pressure]))
        self.bcs = [zero(self.W.sub(0).sub(i), marker) for marker, components in fixed for i in components]
        if self._enclosed() != (pinned is not None):
            raise GliodeError(
                "Taylor-Hood: nothing fixes the pressure's level; name a vertex where it is zero: `pinned`"
                if pinned is None
                else "Taylor-Hood: the outflow fixes the pressure already; leave out `pinned`"
            )
        if pinned is not None:
            self.bcs.append(self._pin(pinned))

    @property
    def comm(self) -> MPI.Comm:
        """The mesh's communicator."""
        return self.mesh.comm

    @property
    def n_owned(self) -> int:
        """Degrees of freedom this rank owns: the length of a state."""
        return int(self.W.dofmap.index_map.size_local)

    def zeros(self) -> Tensor:
        """The fluid at rest; also the boundary values of a box whose walls do not move."""
        return torch.zeros(self.n_owned, dtype=torch.float64)

    def state(self, velocity: Callable[[Array], Any], pressure: Callable[[Array], Any]) -> Tensor:
        """Interpolation of callables of points (3, n) -> (dim, n) and (n,)."""
        f = Function(self.W)
        f.sub(0).interpolate(velocity)
        f.sub(1).interpolate(pressure)
        return torch.from_numpy(f.x.array[: self.n_owned].copy())

    def boundary(self, velocity: Callable[[Array], Any], where: Marker) -> Tensor:
        """Boundary values: the velocity on a part of the boundary, zero elsewhere; sums of them are such."""
        values = self.state(velocity, lambda x: np.zeros(x.shape[1]))
        kept = torch.zeros_like(values)
        dofs = np.concatenate([dofs_on(self.W.sub(0).sub(i), where) for i in range(self.dim)])
        owned = torch.from_numpy(dofs[dofs < self.n_owned].astype(np.int64))
        kept[owned] = values[owned]
        return kept

    def function(self, u: Tensor) -> Function:
        """A state as a Function of W, ghosts filled."""
        f = Function(self.W)
        f.x.array[: self.n_owned] = u.detach().numpy()
        f.x.scatter_forward()
        return f

    def distance(self, u: Tensor, velocity: Any) -> float:
        """The L2 distance of a state's velocity from a UFL expression, relative to the latter."""
        x = ufl.dx(domain=self.mesh, metadata={"quadrature_degree": 8})
        off = ufl.split(self.function(u))[0] - velocity
        squares = [
            dolfinx.fem.assemble_scalar(dolfinx.fem.form(ufl.inner(f, f) * x)) for f in (off, velocity)
        ]
        above, below = self.comm.allreduce(np.array(squares), MPI.SUM)
        return float(np.sqrt(above / below))

    def _enclosed(self) -> bool:
        """Whether no free velocity flows through the boundary: the pressure then has no level of its own."""
        v, _ = ufl.TestFunctions(self.W)
        flux = dolfinx.fem.assemble_vector(
            dolfinx.fem.form(ufl.inner(v, ufl.FacetNormal(self.mesh)) * ufl.ds)
        )
        flux.scatter_reverse(dolfinx.la.InsertMode.add)
        through = np.abs(flux.array[: self.n_owned])
        largest = self.comm.allreduce(float(np.max(through, initial=0.0)), MPI.MAX)
        for bc in self.bcs:
            dofs, owned = bc.dof_indices()
            through[dofs[:owned]] = 0.0
        free = self.comm.allreduce(float(np.max(through, initial=0.0)), MPI.MAX)
        return bool(free < 1e-10 * largest)

    def _pin(self, where: Marker) -> DirichletBC:
        self.mesh.topology.create_connectivity(0, self.mesh.topology.dim)
        vertices = dolfinx.mesh.locate_entities_boundary(self.mesh, 0, where)
        dofs = np.asarray(dolfinx.fem.locate_dofs_topological(self.W.sub(1), 0, vertices))
        found = self.comm.allreduce(int(np.sum(dofs < self.n_owned)), MPI.SUM)
        if found != 1:
            raise GliodeError(f"Taylor-Hood: `pinned` marks {found} vertices of the boundary, expected one")
        return dolfinx.fem.dirichletbc(0.0, dofs, self.W.sub(1))


class Probe:
    """u -> velocity (n, dim) and pressure (n,) at points (n, dim), exact for the finite-element functions.

    rows: which points this rank evaluates (under MPI each point has one rank). Raises GliodeError for points
    outside the mesh.
    """

    def __init__(self, space: TaylorHood, points: Array) -> None:
        points = np.asarray(points, dtype=np.float64).reshape(-1, space.dim)
        self.rows, cells, at = locate(space.mesh, np.pad(points, ((0, 0), (0, 3 - space.dim))))
        self._ghosts = Ghosts(space.W)
        name, parts = space.mesh.topology.cell_name(), space.W.sub(0)
        spaces = [*(parts.sub(i) for i in range(space.dim)), space.W.sub(1)]
        self._dofs = [torch.from_numpy(np.asarray(s.dofmap.list)[cells].astype(np.int64)) for s in spaces]
        self._weights = []
        for degree in (2, 1):
            basis = basix.ufl.element("Lagrange", name, degree)
            self._weights.append(torch.from_numpy(basis.tabulate(0, at)[0].copy()))

    def velocity(self, u: Tensor) -> Tensor:
        """(len(rows), dim)."""
        local = self._ghosts.extend(u)
        return torch.stack([(local[dofs] * self._weights[0]).sum(1) for dofs in self._dofs[:-1]], 1)

    def pressure(self, u: Tensor) -> Tensor:
        """(len(rows),)."""
        return (self._ghosts.extend(u)[self._dofs[-1]] * self._weights[1]).sum(1)
