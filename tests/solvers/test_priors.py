"""BiLaplacian fields: dense linear algebra, Matern's variance, walls, slabs, draws on any partition."""

import math
from collections.abc import Callable

import dolfinx
import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import Tensor

from solvers.errors import GliodeError
from solvers.fem import mesh, priors
from solvers.fem.mesh import Domain
from solvers.fem.spd import thin_axis

COMM = MPI.COMM_WORLD


def square(n: int, side: float = 1.0) -> Domain:
    made = dolfinx.mesh.create_rectangle(
        COMM,
        [[0.0, 0.0], [side, side]],
        [n, n],
        ghost_mode=dolfinx.mesh.GhostMode.none,
    )
    return mesh.from_mesh(made)


def gathered(domain: Domain, u: Tensor) -> np.ndarray:
    """The field on all ranks, in the order of its points, which no partition changes."""
    points = np.concatenate(COMM.allgather(domain.points[: domain.n_owned]))
    values = np.concatenate(COMM.allgather(u.numpy()))
    return values[np.lexsort(np.round(points, 9).T)]


def covariance(field: priors.BiLaplacian, at: list[float]) -> tuple[Tensor, float]:
    """The column of C of the vertex nearest to a point, and that vertex's variance."""
    distance = np.linalg.norm(field.domain.points[: field.domain.n_owned] - at, axis=1)
    least = COMM.allreduce(float(distance.min()), op=MPI.MIN)
    owner = COMM.allreduce(COMM.rank if distance.min() == least else COMM.size, op=MPI.MIN)
    unit = torch.zeros(field.domain.n_owned, dtype=torch.float64)
    if owner == COMM.rank:
        unit[int(distance.argmin())] = 1.0
    column = field.space.riesz(unit)
    return column, COMM.allreduce(float(column @ unit))


def test_the_precision_is_a_m_inverse_a_of_the_assembled_forms() -> None:
    """A by DOLFINx's own forms: consistent stiffness, mass and boundary mass lumped by row sums."""
    import ufl

    domain = mesh.from_mesh(dolfinx.mesh.create_unit_square(MPI.COMM_SELF, 5, 4))
    gamma, delta = 0.1, 0.5
    theta = torch.tensor([[1.25, 0.75], [0.75, 1.25]], dtype=torch.float64)
    u, v = ufl.TrialFunction(domain.V), ufl.TestFunction(domain.V)

    def assemble(form: ufl.Form) -> np.ndarray:
        return dolfinx.fem.assemble_matrix(dolfinx.fem.form(form)).to_scipy().toarray()

    K = assemble(ufl.inner(ufl.as_matrix(theta.tolist()) * ufl.grad(u), ufl.grad(v)) * ufl.dx)
    M, B = (np.diag(assemble(u * v * measure).sum(1)) for measure in (ufl.dx, ufl.ds))
    A = gamma * K + delta * M + math.sqrt(gamma * delta) / 1.42 * B
    precision = A @ np.linalg.inv(M) @ A
    field = priors.bilaplacian(domain, gamma, delta, theta, robin=True)
    a = torch.from_numpy(np.random.default_rng(0).standard_normal(30))
    np.testing.assert_allclose(field.space.gram(a), precision @ a.numpy(), rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(field.space.riesz(a), np.linalg.solve(precision, a.numpy()), rtol=1e-9)


@pytest.mark.mpi
def test_gram_and_riesz_are_inverse_where_the_solve_is_iterative() -> None:
    domain = mesh.box((60.0, 60.0, 60.0), (15, 15, 15))
    field = priors.matern(domain, 0.5, 20.0)
    assert field._inverse._ksp.getType() == "cg"
    a = domain.interpolate(lambda x: np.sin(x[:, 0] / 9) * np.cos(x[:, 1] / 7) + x[:, 2] / 60)
    found = field.space.riesz(field.space.gram(a))
    assert COMM.allreduce(float((found - a).abs().max()), op=MPI.MAX) < 1e-7


@pytest.mark.parametrize(
    ("domain", "centre", "wall"),
    [
        (lambda: mesh.interval(400.0, 200), [200.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
        (lambda: square(60, 200.0), [100.0, 100.0, 0.0], [0.0, 100.0, 0.0]),
        (lambda: mesh.box((200.0, 200.0, 4.0), (50, 50, 1)), [100.0, 100.0, 0.0], [0.0, 100.0, 0.0]),
        (lambda: mesh.box((80.0, 80.0, 80.0), (20, 20, 20)), [40.0, 40.0, 40.0], [0.0, 40.0, 40.0]),
    ],
    ids=["line", "square", "slab", "cube"],
)
@pytest.mark.mpi
def test_sd_and_length_are_matern_s_away_from_walls(
    domain: Callable[[], Domain], centre: list[float], wall: list[float]
) -> None:
    """The variance to the mesh's error (6 cells a length), 0.14 a length away; and at walls."""
    field = priors.matern(domain(), 0.7, 24.0)
    column, variance = covariance(field, centre)
    assert variance == pytest.approx(0.49, rel=0.09)
    distance = np.linalg.norm(field.domain.points[: field.domain.n_owned] - centre, axis=1)
    near = column[torch.from_numpy(np.abs(distance - 24.0) < 1.0)]
    total = COMM.allreduce(float(near.sum())) / COMM.allreduce(len(near))
    assert total / variance == pytest.approx(0.135, abs=0.02)
    assert covariance(field, wall)[1] == pytest.approx(0.49, rel=0.35)
    natural = priors.matern(field.domain, 0.7, 24.0, robin=False)
    assert covariance(natural, wall)[1] == pytest.approx(2 * variance, rel=0.03)


def test_draws_have_the_covariance() -> None:
    """1,500 draws on 12 vertices against C column by column: 5 standard errors of every entry."""
    domain = mesh.box((30.0, 20.0, 10.0), (2, 1, 1), comm=MPI.COMM_SELF)
    field = priors.matern(domain, 0.5, 20.0)
    C = torch.stack([field.space.riesz(e) for e in torch.eye(12, dtype=torch.float64)])
    generator = torch.Generator().manual_seed(1)
    n = 1500
    draws = torch.stack([field.sample(generator) for _ in range(n)])
    spread = (C.diag()[:, None] * C.diag() + C**2).sqrt() / math.sqrt(n)
    assert ((draws.T @ draws / n - C).abs() < 5 * spread).all()
    assert (draws.mean(0).abs() < 5 * (C.diag() / n).sqrt()).all()


@pytest.mark.mpi
def test_a_draw_is_that_of_one_rank() -> None:
    parallel, serial = (
        priors.matern(mesh.box((40.0, 30.0, 20.0), (8, 6, 4), comm=comm), 0.5, 20.0)
        for comm in (COMM, MPI.COMM_SELF)
    )
    mine, whole = (f.sample(torch.Generator().manual_seed(3)) for f in (parallel, serial))
    order = np.lexsort(np.round(serial.domain.points, 9).T)
    np.testing.assert_allclose(gathered(parallel.domain, mine), whole.numpy()[order], atol=1e-8)


@pytest.mark.mpi
def test_a_draw_on_a_general_mesh_has_its_entries_once() -> None:
    """Every vertex its own number, on any number of ranks."""
    domain = square(9)
    numbers = COMM.allgather(priors._dof_numbers(domain))
    assert sorted(np.concatenate(numbers)) == list(range(100))


@pytest.mark.mpi
def test_the_boundary_mass_is_the_surface_with_or_without_the_large_faces() -> None:
    slab = mesh.box((60.0, 40.0, 4.0), (15, 10, 1))
    assert thin_axis(slab) == 2 and thin_axis(mesh.box((8.0, 8.0, 8.0), (2, 2, 2))) is None
    for thin, area in ((None, 2 * (60 * 40 + 60 * 4 + 40 * 4)), (2, 2 * (60 * 4 + 40 * 4))):
        total = COMM.allreduce(float(priors.boundary_mass(slab, thin).sum()))
        assert total == pytest.approx(area, rel=1e-12)
    for domain, size in ((square(9), 4.0), (mesh.interval(7.0, 30), 2.0)):
        assert COMM.allreduce(float(priors.boundary_mass(domain).sum())) == pytest.approx(size, rel=1e-12)


def test_bad_values_are_named() -> None:
    domain = mesh.interval(1.0, 4, comm=MPI.COMM_SELF)
    with pytest.raises(GliodeError, match="gamma must be positive"):
        priors.bilaplacian(domain, 0.0, 1.0)
    with pytest.raises(GliodeError, match="length must be positive"):
        priors.matern(domain, 1.0, math.nan)
    with pytest.raises(GliodeError, match="1 x 1"):
        priors.bilaplacian(domain, 1.0, 1.0, torch.eye(2).double())
    with pytest.raises(GliodeError, match="definite"):
        priors.bilaplacian(domain, 1.0, 1.0, -torch.eye(1).double())
