r"""BiLaplacian Gaussian fields N(0, C) on a domain, with sparse work only:

    C^-1 = A M^-1 A,    A = gamma K_Theta + delta M + beta B,    C = A^-1 M A^-1,

K_Theta_ij = int Theta grad(phi_i) . grad(phi_j), M the lumped mass, B the lumped mass of the boundary. As M
is diagonal, A^-1 M^(1/2) xi with white noise xi is an exact draw. In free space the fields are Matern's of
smoothness nu = 2 - d/2 (Lindgren, Rue & Lindstrom 2011; Bui-Thanh, Ghattas, Martin & Stadler 2013): with
kappa = sqrt(delta/gamma)

    variance  1/(4 kappa^3 gamma^2),   1/(4 pi gamma delta),   1/(8 pi kappa gamma^2)   for d = 1, 2, 3,

and points sqrt(8 nu)/kappa apart have a correlation near 0.14. (The mesh adds to the variance: 6 to 8 % at
five cells a correlation length.) Natural ends (beta = 0) double the variance at a flat wall and more in
corners; beta = sqrt(gamma delta)/1.42 takes most of that away (Roininen, Huttunen & Lasanen 2014, section 4;
hippylib's `robin_bc`).
"""

from __future__ import annotations

import math
from typing import Any

import dolfinx
import numpy as np
import torch
import ufl
from mpi4py import MPI
from torch import Tensor

from solvers.errors import GliodeError
from solvers.fem.compat import geometry_dofmap
from solvers.fem.mesh import Domain
from solvers.fem.operators import DiffusionOperator
from solvers.fem.spaces import communicator
from solvers.fem.spd import Inverse, thin_axis
from solvers.spaces import GramSpace

ROBIN = 1.42


class BiLaplacian:
    """N(0, C) on a domain: `space`, whose Gram matrix is C^-1 and whose Riesz map is C, and exact draws.

    A is factorised (Cholesky) on planes, lines and small solids; elsewhere it is solved by conjugate
    gradients with algebraic multigrid to `rtol`.
    """

    def __init__(
        self, domain: Domain, gamma: float, delta: float, tensor: Tensor | None, robin: bool, rtol: float
    ) -> None:
        self.domain, self.gamma, self.delta = domain, gamma, delta
        self._mass = domain.mass.numpy()
        thin = thin_axis(domain)
        self._matrix = _matrix(domain, gamma, delta, tensor)
        if robin:
            diagonal = self._matrix.createVecLeft()
            self._matrix.getDiagonal(diagonal)
            diagonal.array_w[:] += math.sqrt(gamma * delta) / ROBIN * boundary_mass(domain, thin).numpy()
            self._matrix.setDiagonal(diagonal)
        self._x, self._y = self._matrix.createVecs()
        self._inverse = Inverse(
            domain,
            self._matrix,
            rtol,
            "prior: the solve with A did not converge",
            "check that the field given is finite, or take a shorter correlation length (a smaller gamma /"
            " delta)",
        )
        self.space = GramSpace(domain.n_owned, self._precision, self._covariance, communicator(domain))

    def sample(self, generator: torch.Generator) -> Tensor:
        """A draw of N(0, C), (owned dofs,): A^-1 M^(1/2) xi.

        Under MPI seed the generators of all ranks alike: each draws the whole white noise, numbered as the
        mesh's input, and keeps its own entries, so that no partition changes the draw.
        """
        numbers = _dof_numbers(self.domain)
        size = 1 + self.domain.comm.allreduce(int(numbers.max(initial=-1)), MPI.MAX)
        white = torch.randn(size, dtype=torch.float64, generator=generator)[torch.from_numpy(numbers)]
        return torch.from_numpy(self._inverse(np.sqrt(self._mass) * white.numpy()))

    def _precision(self, a: Tensor) -> Tensor:
        return torch.from_numpy(self._product(self._product(a.numpy()) / self._mass))

    def _covariance(self, dual: Tensor) -> Tensor:
        return torch.from_numpy(self._inverse(self._mass * self._inverse(dual.numpy())))

    def _product(self, a: Any) -> Any:
        self._x.array_w[:] = a
        self._matrix.mult(self._x, self._y)
        return self._y.array_r.copy()


def bilaplacian(
    domain: Domain,
    gamma: float,
    delta: float,
    tensor: Tensor | None = None,
    robin: bool = False,
    rtol: float = 1e-10,
) -> BiLaplacian:
    """The field of given gamma and delta > 0; tensor: Theta, (d, d), constant (None: the identity).

    robin: beta = sqrt(gamma delta)/1.42 on the boundary (of a slab of one voxel: not on its two large faces).
    Raises GliodeError for values that make A no symmetric positive matrix.
    """
    for name, value in (("gamma", gamma), ("delta", delta)):
        if not (math.isfinite(value) and value > 0):
            raise GliodeError(f"bilaplacian: {name} must be positive and finite, got {value}")
    if tensor is not None:
        dim = domain.mesh.geometry.dim
        if tuple(tensor.shape) != (dim, dim) or not torch.equal(tensor, tensor.T):
            raise GliodeError(f"bilaplacian: the tensor must be symmetric and {dim} x {dim}")
        if not float(torch.linalg.eigvalsh(tensor).min()) > 0:
            raise GliodeError("bilaplacian: the tensor must be positive definite")
    return BiLaplacian(domain, gamma, delta, tensor, robin, rtol)


def matern(domain: Domain, sd: float, length: float, robin: bool = True, rtol: float = 1e-10) -> BiLaplacian:
    """The field of a pointwise standard deviation, away from walls, and a correlation length in mm (of 0.14).

    gamma and delta follow from the dimension: that of the mesh, or 2 for a slab of one voxel, in which the
    variance of the two layers of vertices about their mean is counted too. Raises GliodeError unless sd and
    length are positive and finite.
    """
    for name, value in (("sd", sd), ("length", length)):
        if not (math.isfinite(value) and value > 0):
            raise GliodeError(f"matern: {name} must be positive and finite, got {value}")
    thin = thin_axis(domain)
    d = domain.mesh.topology.dim if thin is None else 2
    nu = 2 - d / 2
    kappa = math.sqrt(8 * nu) / length
    if thin is not None:
        assert domain.grid is not None
        t = float(domain.grid.spacing[thin])
        square = (1 + kappa**2 / (kappa**2 + 4 / t**2)) / (4 * math.pi * kappa**2 * t)
    else:
        square = math.gamma(nu) / (math.gamma(2) * (4 * math.pi) ** (d / 2) * kappa ** (2 * nu))
    gamma = math.sqrt(square) / sd
    return bilaplacian(domain, gamma, gamma * kappa**2, robin=robin, rtol=rtol)


def boundary_mass(domain: Domain, thin: int | None = None) -> Tensor:
    """int phi_i over the boundary, (owned dofs,); thin: a voxel axis whose two faces are left out."""
    if domain.mesh.topology.dim == 1:  # DOLFINx takes an end of a rank's part for one of the whole
        cells = np.bincount(domain.cell_dofs.ravel(), minlength=len(domain.points)).astype(np.float64)
        return (domain.ghosts.gather(torch.from_numpy(cells)) == 1).to(torch.float64)
    v = ufl.TestFunction(domain.V)
    form = v * ufl.ds
    if thin is not None:
        assert domain.grid is not None
        axis = domain.grid.affine[:3, thin] / domain.grid.spacing[thin]
        n = ufl.FacetNormal(domain.mesh)
        form = (1 - ufl.dot(n, ufl.as_vector(axis.tolist())) ** 2) * v * ufl.ds
    vector = dolfinx.la.vector(domain.V.dofmap.index_map, 1)
    dolfinx.fem.assemble_vector(vector.array, dolfinx.fem.form(form))
    vector.scatter_reverse(dolfinx.la.InsertMode.add)
    return torch.from_numpy(vector.array[: domain.n_owned].copy())


def _matrix(domain: Domain, gamma: float, delta: float, tensor: Tensor | None) -> Any:
    """gamma K_Theta + delta M as a PETSc matrix."""
    operator = DiffusionOperator(domain, tensor=tensor is not None)
    if tensor is None:
        per_cell = torch.ones(domain.n_cells, dtype=torch.float64)
    else:
        per_cell = tensor.to(torch.float64).expand(domain.n_cells, *tensor.shape)
    matrix = operator.matrix(operator.conductances(per_cell), gamma / delta)
    matrix.scale(delta)
    return matrix


def _dof_numbers(domain: Domain) -> Any:
    """A number of each owned dof that no partition changes: the grid's corner, or the input's vertex."""
    if domain.grid is not None:
        sides = tuple(n + 1 for n in domain.grid.shape)
        return np.ravel_multi_index(tuple(domain.grid.dof_corner[: domain.n_owned].T), sides)
    mesh = domain.mesh
    nodes = np.empty(len(domain.points), dtype=np.int64)
    nodes[domain.cell_dofs] = geometry_dofmap(mesh)[: domain.n_cells]
    return np.asarray(mesh.geometry.input_global_indices)[nodes[: domain.n_owned]]
