"""Smoothing and slopes of a domain against its PETSc solves and its gradient operator, serial and MPI."""

import dolfinx
import numpy as np
import pytest
import torch
from mpi4py import MPI

from solvers.fem import mesh
from solvers.fem.gradients import Gradient
from solvers.fem.mesh import Domain
from solvers.fem.multiscale import Multiscale
from solvers.fem.spaces import sobolev

COMM = MPI.COMM_WORLD
NONE = dolfinx.mesh.GhostMode.none
LENGTHS = (0.0, 0.1, 0.3)
KINDS = ["bricks", "interval", "triangles", "tetrahedra"]


def domain(kind: str) -> Domain:
    if kind == "bricks":  # 0.4 x 0.3 x 0.5 mm, with a notch
        mask = np.ones((5, 4, 3), dtype=bool)
        mask[0, 0] = False
        return mesh.voxels(mask, np.diag([0.4, 0.3, 0.5, 1.0]))
    if kind == "interval":
        return mesh.interval(3.0, 12)
    if kind == "triangles":
        made = dolfinx.mesh.create_rectangle(COMM, [[0, 0], [2, 1]], [6, 5], ghost_mode=NONE)
    else:
        made = dolfinx.mesh.create_box(COMM, [[0, 0, 0], [2, 1, 1]], [4, 3, 2], ghost_mode=NONE)
    made.geometry.x[:, 0] **= 1.2  # unequal cells
    return mesh.from_mesh(made)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(COMM.rank))


@pytest.mark.mpi
@pytest.mark.parametrize("kind", KINDS)
def test_smoothing_is_the_riesz_map_of_h1(kind: str) -> None:
    where = domain(kind)
    operators, m = Multiscale(where, LENGTHS), noise(2, where.n_owned)
    found = operators.smooth(m)
    assert torch.equal(found[:, 0], m)
    for k, length in enumerate(LENGTHS[1:], 1):
        space = sobolev(where, length)
        expected = torch.stack([space.riesz(where.mass * row) for row in m])
        torch.testing.assert_close(found[:, k], expected, rtol=0, atol=1e-7)
        assert operators.space.norm(found[0, k]) < operators.space.norm(m[0])


@pytest.mark.mpi
@pytest.mark.parametrize("kind", KINDS)
def test_slopes_and_bound_are_those_of_the_gradient(kind: str) -> None:
    where = domain(kind)
    operators, D, m = Multiscale(where, LENGTHS), Gradient(where), noise(2, where.n_owned)
    q = operators.slopes(m)
    for row, slopes in zip(m, q, strict=True):
        torch.testing.assert_close(slopes.T, D(row), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(operators.weights, D.weights)
    dual = torch.stack([D.adjoint(part.T) for part in q])
    torch.testing.assert_close(operators.slopes_adjoint(q), dual, rtol=1e-12, atol=1e-12)
    assert operators.bound == pytest.approx(COMM.allreduce(float(D.bound.max()), MPI.MAX))


@pytest.mark.mpi
def test_the_transpose_is_that_of_the_pairings() -> None:
    where = domain("tetrahedra")
    operators, m = Multiscale(where, LENGTHS), noise(2, where.n_owned)
    y = noise(2, len(LENGTHS), where.n_owned)
    sides = [float((operators.smooth(m) * y).sum()), float((m * operators.smooth_adjoint(y)).sum())]
    left, right = (COMM.allreduce(side) for side in sides)
    assert left == pytest.approx(right, rel=1e-10)
