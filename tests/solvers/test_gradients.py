"""The gradient operator against known slopes, the stiffness matrix and dense eigenvalues, serial and MPI."""

import dolfinx
import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from solvers.errors import GliodeError
from solvers.fem import mesh
from solvers.fem.gradients import Gradient
from solvers.fem.mesh import Domain
from solvers.fem.operators import DiffusionOperator

COMM = MPI.COMM_WORLD
NONE = dolfinx.mesh.GhostMode.none
ROTATED = np.array([[0.6, -1.6, 0.0, 1.0], [0.8, 1.2, 0.0, 2.0], [0.0, 0.0, 3.0, -1.0], [0.0, 0.0, 0.0, 1.0]])


def domain(kind: str, comm: MPI.Comm = COMM) -> Domain:
    if kind == "bricks":  # 1 x 2 x 3 mm, turned, with a notch
        mask = np.ones((4, 3, 3), dtype=bool)
        mask[0, 0] = False
        return mesh.voxels(mask, ROTATED, comm=comm)
    if kind == "interval":
        return mesh.interval(3.0, 12, comm)
    if kind == "hexahedra":
        made = dolfinx.mesh.create_box(
            comm, [[0, 0, 0], [2, 1, 1]], [4, 3, 2], dolfinx.mesh.CellType.hexahedron, ghost_mode=NONE
        )
        made.geometry.x[:, 0] += 0.3 * made.geometry.x[:, 1]
        return mesh.from_mesh(made)
    if kind == "triangles":
        made = dolfinx.mesh.create_rectangle(comm, [[0, 0], [2, 1]], [6, 5], ghost_mode=NONE)
    else:
        made = dolfinx.mesh.create_box(comm, [[0, 0, 0], [2, 1, 1]], [4, 3, 2], ghost_mode=NONE)
    made.geometry.x[:, 0] **= 1.5  # unequal cells
    return mesh.from_mesh(made)


KINDS = ["bricks", "interval", "hexahedra", "triangles", "tetrahedra"]


def total(x: Tensor) -> float:
    return float(COMM.allreduce(float(x.sum())))


def noise(size: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(COMM.rank)
    return torch.randn(size, *shape, dtype=torch.float64, generator=generator)


@pytest.mark.mpi
@pytest.mark.parametrize("kind", KINDS)
def test_linear_functions_have_their_slope_everywhere(kind: str) -> None:
    where = domain(kind)
    D, slope = Gradient(where), torch.tensor([0.5, -2.0, 0.7]).double()[: where.mesh.geometry.dim]
    found = D(where.interpolate(lambda x: 3 + x[:, : len(slope)] @ slope.numpy()))
    torch.testing.assert_close(found, slope.expand_as(found), rtol=1e-10, atol=1e-10)
    assert total(D.weights) == pytest.approx(total(where.mass), rel=1e-12)


@pytest.mark.mpi
@pytest.mark.parametrize("kind", KINDS)
def test_the_transpose_is_that_of_the_pairings(kind: str) -> None:
    where = domain(kind)
    D, u = Gradient(where), noise(where.n_owned)
    q = noise(len(D.weights), where.mesh.geometry.dim)
    assert total(D(u) * q) == pytest.approx(total(u * D.adjoint(q)), rel=1e-12)


@pytest.mark.mpi
@pytest.mark.parametrize("kind", ["bricks", "interval", "triangles", "tetrahedra"])
def test_with_its_weights_it_makes_the_stiffness_matrix(kind: str) -> None:
    where = domain(kind)
    D, u, operator = Gradient(where), noise(where.n_owned), DiffusionOperator(where)
    expected = operator.stiffness(operator.conductances(torch.ones(where.n_cells).double()), u)
    torch.testing.assert_close(D.adjoint(D.weights[:, None] * D(u)), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_is_above_the_operator_and_not_far(kind: str) -> None:
    where = domain(kind, MPI.COMM_SELF)
    D = Gradient(where)
    dense = torch.stack([D(e).reshape(-1) for e in torch.eye(where.n_owned).double()], 1)
    root = (D.weights / D.bound).sqrt().repeat_interleave(where.mesh.geometry.dim)[:, None]
    scaled = root * dense * where.mass.rsqrt()
    largest = float(torch.linalg.matrix_norm(scaled, 2)) ** 2
    assert 0.5 < largest <= 1 + 1e-12


@pytest.mark.parametrize("kind", ["bricks", "tetrahedra"])
def test_it_lives_on_the_tape(kind: str) -> None:
    where = domain(kind, MPI.COMM_SELF)
    D, u = Gradient(where), noise(where.n_owned).requires_grad_()
    assert gradcheck(lambda v: D(v)[:20].square(), (u,), check_forward_ad=True)
    assert gradgradcheck(lambda v: D.adjoint(D(v) ** 3)[:3], (u,))


@pytest.mark.mpi
def test_a_rank_without_cells_is_one() -> None:
    """One voxel on two ranks, and on one."""
    where = mesh.voxels(np.ones((1, 1, 1), dtype=bool), np.eye(4))
    D = Gradient(where)
    u = where.interpolate(lambda x: x[:, 2])
    assert COMM.allreduce(float((D.weights * D(u)[:, 2]).sum())) == pytest.approx(1.0)


def test_an_embedded_surface_is_refused() -> None:
    points = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 1]])
    made = mesh._create(MPI.COMM_SELF, np.array([[0, 1, 2]]), points, "triangle")
    with pytest.raises(GliodeError, match="embedded"):
        Gradient(mesh.from_mesh(made))
