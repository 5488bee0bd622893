"""The diffusion operator as a weighted graph Laplacian, and its implicit solves.

Every stiffness matrix K(D)_ij = int grad(phi_i) . D grad(phi_j) has zero row sums, so K = G^T diag(w) G,
where G takes the differences of a state along the pairs (i, j) of vertices that share a cell and w_ij = -K_ij
is linear in D. The weights w ("conductances") are the natural parameter of a diffusion step: a matrix is
refilled from them without assembly, and the derivative of lambda^T K(w) u is the product of two differences.

Quadrature. On voxel bricks with scalar D the vertex rule leaves only the brick's edges: 7 entries a row, an
M-matrix at any aspect ratio, second order. Tensors and general meshes use the full rule; their bound is not
guaranteed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor

from solvers.errors import Diverged, GliodeError
from solvers.fem.bricks import brick_pairs
from solvers.fem.mesh import Domain, _rule, jacobians, tabulate
from solvers.operators import Conductances


@dataclass
class SolveCount:
    """Linear solves and Krylov iterations since the last reset."""

    solves: int = 0
    iterations: int = 0


def conductances(domain: Domain, tensor: bool = False) -> Conductances:
    """The linear map D (per cell) -> w (per pair of local vertices) of a domain; `tensor`: D is a tensor."""
    cell, vertex_rule = domain.mesh.topology.cell_name(), domain.grid is not None and not tensor
    table, pairs = pair_table(domain, cell, vertex_rule, tensor)
    voxel = domain.grid.cell_voxel if domain.grid is not None and vertex_rule else None
    return graph(domain.cell_dofs, pairs, table, len(domain.points), voxel)


def graph(cell_dofs: Any, pairs: Any, table: Any, n: int, voxel: Any = None) -> Conductances:
    """Of the cells' vertices, a cell's pairs (k, 2) and their table; voxel: (cells, 3) of bricks, or None."""
    if voxel is not None:
        first, second, edge = brick_pairs(voxel, cell_dofs, pairs)
    else:
        first, second, edge = _general_pairs(cell_dofs.astype(np.int64), n, pairs)
    parts = [torch.from_numpy(np.ascontiguousarray(part)) for part in (first, second, edge, table)]
    return Conductances(parts[0], parts[1], parts[2], parts[3], n, voxel is not None)


def _general_pairs(dofs: Any, n: int, pairs: Any) -> tuple[Any, Any, Any]:
    """What `brick_pairs` gives, on any mesh."""
    i, j = dofs[:, pairs[:, 0]].ravel(), dofs[:, pairs[:, 1]].ravel()
    unique, inverse = _unique(np.minimum(i, j) * n + np.maximum(i, j))
    return unique // n, unique % n, inverse.reshape(len(dofs), len(pairs))


def _unique(key: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[Any, Any]:
    """Sorted unique keys and, for each key, its place among them (stable radix sort: keys are integers)."""
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    new = np.empty(len(key), dtype=bool)
    new[:1] = True
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    inverse = np.empty(len(key), dtype=np.int64)
    inverse[order] = np.cumsum(new) - 1
    return ordered[new], inverse


def pair_table(domain: Domain, cell: str, vertex_rule: bool, tensor: bool) -> tuple[Any, Any]:
    """-int grad(phi_i) . grad(phi_j) for the pairs i < j of a cell: (cells or 1, pairs[, d, d]) and (pairs,
    2).
    """
    import basix

    dim = domain.mesh.topology.dim
    if vertex_rule:
        points = np.asarray(basix.geometry(getattr(basix.CellType, cell)), dtype=np.float64)
        weights = np.full(len(points), 1.0 / len(points))
    else:
        points, weights = _rule(cell, dim, None)
    tables = tabulate(cell, points)
    J = jacobians(domain, tables)
    if J.shape[-1] != J.shape[-2]:
        raise GliodeError(
            "mesh: a curve or surface embedded in a higher dimension has no diffusion operator here"
        )
    gradients = np.einsum("dqn,cqdg->cqng", tables.derivatives, np.linalg.inv(J))
    scale = np.abs(np.linalg.det(J)) * weights
    n = gradients.shape[2]
    pairs = np.array([(i, j) for i in range(n) for j in range(i + 1, n)])
    a, b = gradients[:, :, pairs[:, 0]], gradients[:, :, pairs[:, 1]]
    if tensor:
        table = -np.einsum("cq,cqpg,cqph->cpgh", scale, a, b)
        return (table + np.swapaxes(table, -1, -2)) / 2, pairs
    table = -np.einsum("cq,cqpg,cqpg->cp", scale, a, b)
    if vertex_rule:
        kept = np.abs(table).max(0) > 1e-12 * np.abs(table).max()
        return table[:, kept], pairs[kept]
    return table, pairs


class DiffusionOperator:
    """M + tau K(w) on a domain: products, differences and preconditioned conjugate-gradient solves.

    The matrix is preallocated once; it is refilled only when w or tau changes, and the last few are kept, so
    every step and every gradient of a run shares them. rtol: relative tolerance of the preconditioned
    residual. Raises GliodeError when the solve does not converge.
    """

    def __init__(self, domain: Domain, tensor: bool = False, rtol: float = 1e-10) -> None:
        self.domain = domain
        self.rtol = rtol
        self.conductances = conductances(domain, tensor)
        self.count = SolveCount()
        self._i, self._j = self.conductances.first, self.conductances.second
        self._kept: list[tuple[Tensor, float, Any]] = []
        self._mass_local = torch.zeros(len(domain.points), dtype=torch.float64)
        self._mass_local[: domain.n_owned] = domain.mass

    def differences(self, u: Tensor) -> Tensor:
        """G u: differences of a state along the pairs, (pairs,)."""
        local = self.domain.ghosts.extend(u)
        return local[self._i] - local[self._j]

    def stiffness(self, w: Tensor, u: Tensor) -> Tensor:
        """K(w) u, a dual vector (owned dofs,)."""
        flux = w * self.differences(u)
        local = torch.zeros(len(self._mass_local), dtype=u.dtype)
        return self.domain.ghosts.gather(local.index_add(0, self._i, flux).index_add(0, self._j, -flux))

    def solve(self, b: Tensor, w: Tensor, tau: Tensor) -> Tensor:
        """u with (M + tau K(w)) u = b; differentiable in b, w and tau (0-d), in both modes, twice."""
        return _Solve.apply(b, w, tau, self)

    def matrix(self, w: Tensor, tau: float) -> Any:
        """M + tau K(w) as a PETSc matrix: the operator's own, so copy what is to be kept."""
        return self._solver(w, tau)[0].getOperators()[0]

    def _solve(self, b: Tensor, w: Tensor, tau: float) -> Tensor:
        ksp, rhs, solution = self._solver(w, tau)
        rhs.array_w[:] = b.detach().numpy()
        np.divide(rhs.array_r, self.domain.mass.numpy(), out=solution.array_w)
        ksp.solve(rhs, solution)
        self.count.solves += 1
        self.count.iterations += ksp.getIterationNumber()
        reason = ksp.getConvergedReason()
        if reason < 0:
            raise Diverged(
                f"diffusion solve did not converge (PETSc reason {reason}): "
                "check that D is positive and finite, or shorten the time step"
            )
        return torch.from_numpy(solution.array_r.copy())

    def _solver(self, w: Tensor, tau: float) -> tuple[Any, Any, Any]:
        """The solver of M + tau K(w), refilled only for new values."""
        w = w.detach()
        for place, (kept, kept_tau, solver) in enumerate(self._kept):
            if self._on_all(kept_tau == tau and torch.equal(kept, w)):
                if place:
                    self._kept.insert(0, self._kept.pop(place))
                return solver  # type: ignore[no-any-return]
        solver = self._kept.pop()[2] if len(self._kept) >= 2 else self._new_solver()
        diagonal = self._mass_local.clone()
        scaled = tau * w
        diagonal.index_add_(0, self._i, scaled).index_add_(0, self._j, scaled)
        if not self._on_all(bool(torch.isfinite(diagonal).all())):
            raise GliodeError("diffusion: D or the time step is not finite")
        ksp = solver[0]
        matrix = ksp.getOperators()[0]
        pointers, columns, rows, order = self._rows
        values = torch.cat([diagonal, -scaled, -scaled])[order].numpy()
        matrix.zeroEntries()
        matrix.setValuesIJV(pointers, columns, values, PETSc.InsertMode.ADD_VALUES, rows)
        matrix.assemble()
        ksp.setOperators(matrix)
        # A copy: the caller may change its tensor in place.
        self._kept.insert(0, (w.clone(), tau, solver))
        return solver  # type: ignore[no-any-return]

    def _on_all(self, here: bool) -> bool:
        """Whether it is so on all ranks: what follows is collective."""
        return bool(self.domain.comm.allreduce(here, op=MPI.LAND))

    @cached_property
    def _rows(self) -> tuple[Any, Any, Any, Tensor]:
        """The rank's contributions as compressed rows over its local dofs, which PETSc adds up where shared.

        Pointers, global columns, global rows, and the order of (diagonal, i to j, j to i) in it.
        """
        n, index_map = len(self.domain.points), self.domain.V.dofmap.index_map
        i, j = self._i.numpy(), self._j.numpy()
        rows, columns = np.concatenate([np.arange(n), i, j]), np.concatenate([np.arange(n), j, i])
        order = np.argsort(rows * n + columns, kind="stable")
        ids = index_map.local_to_global(np.arange(n, dtype=np.int32)).astype(PETSc.IntType)
        pointers = np.zeros(n + 1, dtype=PETSc.IntType)
        np.cumsum(np.bincount(rows, minlength=n), out=pointers[1:])
        return pointers, ids[columns[order]], ids, torch.from_numpy(order)

    def _new_solver(self) -> tuple[Any, Any, Any]:
        comm = self.domain.comm
        matrix = PETSc.Mat().create(comm)
        sizes = (self.domain.n_owned, self.domain.n_global)
        matrix.setSizes((sizes, sizes))
        matrix.setType(PETSc.Mat.Type.AIJ)
        widest = PETSc.IntType(np.diff(self._rows[0]).max(initial=1))
        matrix.setPreallocationNNZ((widest, widest if comm.size > 1 else 0))
        matrix.setOption(PETSc.Mat.Option.SPD, True)
        ksp = PETSc.KSP().create(comm)
        ksp.setOperators(matrix)
        ksp.setType(PETSc.KSP.Type.CG)
        ksp.getPC().setType(PETSc.PC.Type.JACOBI)
        ksp.setInitialGuessNonzero(True)
        ksp.setTolerances(rtol=self.rtol, atol=1e-300, max_it=2000)
        return ksp, matrix.createVecLeft(), matrix.createVecRight()


class _Solve(torch.autograd.Function):
    """u = (M + tau K(w))^-1 b. The matrix is symmetric, so the adjoint and the tangent are the same solve."""

    @staticmethod
    def forward(ctx: Any, b: Tensor, w: Tensor, tau: Tensor, operator: DiffusionOperator) -> Tensor:
        u = operator._solve(b, w, float(tau))
        ctx.operator = operator
        ctx.save_for_backward(u, w, tau)
        ctx.save_for_forward(u, w, tau)
        return u

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u, w, tau = ctx.saved_tensors
        adjoint = _Solve.apply(grads[0], w, tau, ctx.operator)
        grad_w = grad_tau = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            product = ctx.operator.differences(adjoint) * ctx.operator.differences(u)
            grad_w = -tau * product if ctx.needs_input_grad[1] else None
            grad_tau = -torch.dot(w, product) if ctx.needs_input_grad[2] else None
        return adjoint, grad_w, grad_tau, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        u, w, tau = ctx.saved_tensors
        db, dw, dtau, _ = tangents
        rhs = torch.zeros_like(u) if db is None else db
        if dw is not None:
            rhs = rhs - tau * ctx.operator.stiffness(dw, u)
        if dtau is not None:
            rhs = rhs - dtau * ctx.operator.stiffness(w, u)
        return _Solve.apply(rhs, w, tau, ctx.operator)
