"""Many solves with one symmetric positive matrix: factorised where that pays, else by multigrid."""

from __future__ import annotations

from typing import Any

import numpy as np
from mpi4py import MPI
from petsc4py import PETSc

from solvers.errors import GliodeError
from solvers.fem.mesh import Domain

DIRECT, DIRECT_FLAT = 3_000, 200_000  # dofs up to which to factorise: solids, and planes and lines


class Inverse:
    """b -> A^-1 b, arrays of owned dofs, for a PETSc matrix A on a domain's dofs.

    Cholesky on planes, lines and small solids, elsewhere conjugate gradients with algebraic multigrid to
    `rtol`. failure, remedy: what a GliodeError says where they do not converge.
    """

    def __init__(self, domain: Domain, matrix: Any, rtol: float, failure: str, remedy: str) -> None:
        self._failure, self._remedy = failure, remedy
        self._x, self._b = matrix.createVecs()
        flat = thin_axis(domain) is not None or domain.mesh.topology.dim < 3
        self._ksp = PETSc.KSP().create(matrix.comm)
        self._ksp.setOperators(matrix)
        pc = self._ksp.getPC()
        if domain.n_global <= (DIRECT_FLAT if flat else DIRECT):
            self._ksp.setType(PETSc.KSP.Type.PREONLY)
            pc.setType(PETSc.PC.Type.CHOLESKY)
            if PETSc.Sys.hasExternalPackage("mumps"):
                pc.setFactorSolverType("mumps")
        else:
            self._ksp.setType(PETSc.KSP.Type.CG)
            pc.setType(PETSc.PC.Type.GAMG)
            self._ksp.setTolerances(rtol=rtol, atol=1e-300, max_it=1000)
        self._ksp.setUp()

    def __call__(self, b: Any) -> Any:
        """A^-1 b, a new array."""
        self._b.array_w[:] = b
        self._ksp.solve(self._b, self._x)
        if (reason := self._ksp.getConvergedReason()) < 0:
            raise GliodeError(f"{self._failure} (PETSc reason {reason}); {self._remedy}")
        return self._x.array_r.copy()


def thin_axis(domain: Domain) -> int | None:
    """The voxel axis along which a brick mesh is one voxel thick (a slab, standing for a plane), or None."""
    if domain.grid is None:
        return None
    voxel = domain.grid.cell_voxel
    low, high = np.full(3, np.iinfo(np.int64).max), np.full(3, -1)
    domain.comm.Allreduce(voxel.min(axis=0, initial=low[0]), low, MPI.MIN)
    domain.comm.Allreduce(voxel.max(axis=0, initial=-1), high, MPI.MAX)
    thin = np.flatnonzero(high == low)
    return int(thin[0]) if len(thin) == 1 else None
