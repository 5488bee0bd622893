"""Learned regularizers on meshes: the same on any number of ranks, and on any mesh of the same body."""

from collections.abc import Callable

import dolfinx
import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import Tensor

from inverse.regularizers.learned.energy import Learned
from inverse.regularizers.learned.mesh import MeshRidge
from inverse.regularizers.learned.ridge import Ridge
from inverse.regularizers.learned.voxel import VoxelEnergy
from solvers.errors import GliodeError
from solvers.fem import mesh
from solvers.fem.mesh import Domain
from solvers.fem.multiscale import Multiscale
from solvers.fem.spaces import lumped
from solvers.fem.voxel_grid import VoxelGrid

COMM = MPI.COMM_WORLD
NONE = dolfinx.mesh.GhostMode.none
Make = Callable[..., Domain]
SIDES = np.array([36.0, 30.0, 24.0])


def ridge() -> MeshRidge:
    """Sharp and blunt terms, mixed."""
    energy = MeshRidge(
        (0.0, 4.0, 8.0),
        slopes=[(1.0, 0.0, 0.2), (0.5, 4.0, 0.2)],
        values=[(0.02, 0.0, 0.4), (0.05, 8.0, 0.2)],
        uneven=True,
        noise=0.2,
    ).double()
    energy.shift.data.copy_(torch.tensor([0.3, -0.5]))  # type: ignore[union-attr]
    return energy


def filters() -> Ridge:
    torch.manual_seed(0)
    return Ridge(channels=(4,), sizes=(3,), dim=3, potential="log_cosh").double()


def tetrahedra(h: float, comm: MPI.Comm = COMM) -> Domain:
    """The box of SIDES in unequal tetrahedra of about h mm."""
    made = dolfinx.mesh.create_box(
        comm, [[0, 0, 0], list(SIDES)], [int(side / h) for side in SIDES], ghost_mode=NONE
    )
    x = made.geometry.x
    at = x / SIDES
    x[:] = SIDES * (at + 0.06 * np.sin(2 * np.pi * at) * np.cos(np.pi * at[:, [1, 2, 0]]))
    return mesh.from_mesh(made)


def bricks(h: float, comm: MPI.Comm = COMM) -> Domain:
    return mesh.box(tuple(SIDES), tuple(int(side / h) for side in SIDES), comm)  # type: ignore[arg-type]


def ball(h: float, comm: MPI.Comm = COMM) -> Domain:
    return mesh.ball(18.0, h, comm)


def fields(domain: Domain) -> Tensor:
    """Three smooth ones, (3, n)."""
    x = np.pi * domain.points[: domain.n_owned] / SIDES
    wave = 0.5 + np.cos(x[:, 0]) * np.cos(x[:, 1]) + 0.4 * np.cos(x[:, 2])
    return torch.from_numpy(
        np.stack([wave, np.cos(x[:, 0]) * np.cos(x[:, 1]) - np.cos(2 * x[:, 2]), 0.3 + np.cos(2 * x[:, 0])])
    )


def gathered(domain: Domain, dual: Tensor) -> np.ndarray:
    """Of all ranks, in the order of the points."""
    points = np.concatenate(domain.comm.allgather(domain.points[: domain.n_owned])).round(6)
    return np.concatenate(domain.comm.allgather(dual.detach().numpy()))[np.lexsort(points.T)]


@pytest.mark.mpi
@pytest.mark.parametrize("make", [bricks, tetrahedra])
@pytest.mark.parametrize("kind", ["ridge", "voxels"])
def test_value_dual_and_training_are_those_of_one_rank(make: Make, kind: str) -> None:
    found = []
    for comm in (MPI.COMM_SELF, COMM):
        domain = make(6.0, comm)
        if kind == "ridge":
            whole = ridge()
            energy = whole.on(Multiscale(domain, whole.lengths))
        else:
            energy = VoxelEnergy(filters(), VoxelGrid(domain, 5.0), 5.0)  # type: ignore[assignment]
        m = fields(domain)[:2]
        value, dual = energy(m), energy.gradient(m)
        weights = [p for p in energy.parameters() if p.requires_grad]
        slopes = torch.autograd.grad(value.sum(), weights)
        found.append((value.detach(), gathered(domain, dual[0]), torch.cat([s.reshape(-1) for s in slopes])))
    for alone, spread in zip(*found, strict=True):
        np.testing.assert_allclose(spread, alone, rtol=1e-6, atol=1e-7 * float(abs(alone).max()))


def observed(domain: Domain) -> np.ndarray:
    """R(m), and R'(m) along two smooth directions."""
    energy, m = ridge(), fields(domain)
    on = energy.on(Multiscale(domain, energy.lengths))
    with torch.no_grad():
        return np.array([float(on(m[:1])), *(m[1:] @ on.gradient(m[:1])[0]).tolist()])


def test_trained_weights_mean_the_same_on_every_mesh() -> None:
    """6 and 3 mm, bricks and unequal tetrahedra, against bricks of 3 and 2 mm extrapolated: second order."""
    half, fine = (observed(bricks(h, MPI.COMM_SELF)) for h in (3.0, 2.0))
    limit = fine + (fine - half) * 4 / (9 - 4)
    coarse = observed(bricks(6.0, MPI.COMM_SELF))
    tetra = [observed(tetrahedra(h, MPI.COMM_SELF)) for h in (6.0, 3.0)]
    for first, second in ((coarse, half), tetra):
        first, second = np.abs(first / limit - 1), np.abs(second / limit - 1)
        assert first.min() > 1e-4 and first.max() < 0.06
        assert (np.log2(first / second) > 1.75).all()


def test_on_bricks_of_its_spacing_it_is_the_energy_of_the_values() -> None:
    domain, energy, h = bricks(6.0, MPI.COMM_SELF), filters(), 6.0
    grid = VoxelGrid(domain, h)
    assert grid.shape == (7, 6, 5)
    m = fields(domain)
    order = np.lexsort(domain.points.round(6).T[::-1])
    volume = m[:, order].reshape(3, 7, 6, 5)
    torch.testing.assert_close(grid.sample(m), volume)
    on = VoxelEnergy(energy, grid, h)
    torch.testing.assert_close(on(m), h**3 * energy(volume))
    expected = h**3 * energy.gradient(volume).reshape(3, -1)
    torch.testing.assert_close(on.gradient(m)[:, order], expected)


@pytest.mark.mpi
@pytest.mark.parametrize(("make", "convex"), [(bricks, True), (tetrahedra, True), (ball, False)])
def test_interpolation_is_exact_and_its_transpose_too(make: Make, convex: bool) -> None:
    """Linear fields of a convex body come out as they are; constants everywhere."""
    domain = make(6.0)
    grid = VoxelGrid(domain, 4.5)
    slope = torch.tensor([0.2, -0.1, 0.3]).double()
    where = torch.from_numpy(domain.points[: domain.n_owned])
    m = torch.stack([torch.ones(domain.n_owned).double(), where @ slope])
    volume = grid.sample(m)
    torch.testing.assert_close(volume[0], torch.ones(grid.shape).double(), rtol=0, atol=1e-9)
    if convex:
        axes = torch.meshgrid(*(torch.arange(n).double() * 4.5 for n in grid.shape), indexing="ij")
        torch.testing.assert_close(volume[1], torch.stack(axes, -1) @ slope, rtol=0, atol=1e-7)
    y = torch.randn(2, *grid.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    leaf = m.clone().requires_grad_()
    (dual,) = torch.autograd.grad((grid.sample(leaf) * y).sum(), leaf)
    assert COMM.allreduce(float((dual * m).sum())) == pytest.approx(float((volume * y).sum()), rel=1e-9)
    # and the gain bounds it
    space = lumped(domain)
    for row in torch.randn(
        5, domain.n_owned, dtype=torch.float64, generator=torch.Generator().manual_seed(COMM.rank)
    ):
        assert float(grid.sample(row[None]).square().sum()) <= grid.gain * space.norm(row) ** 2


def test_what_it_guarantees_holds_and_bad_input_is_refused() -> None:
    domain, energy = mesh.ball(18.0, 6.0, MPI.COMM_SELF), filters()
    on = VoxelEnergy(energy, VoxelGrid(domain, 4.5), 4.5)
    space, said = lumped(domain), on.guarantee()
    assert said.convex and not said.coercive
    for seed in range(5):
        x, z = torch.randn(
            2, 1, domain.n_owned, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        change = (on.gradient(x) - on.gradient(z)).detach()[0]
        assert space.dual_norm(change) <= said.lipschitz * space.norm((x - z)[0])
        assert space.pair(change, (x - z)[0]) >= 0
    with pytest.raises(GliodeError, match="VoxelGrid"):
        VoxelEnergy(energy, VoxelGrid(domain, 4.0), 4.5)
    with pytest.raises(GliodeError, match="VoxelGrid"):
        Learned(on, lumped(bricks(6.0, MPI.COMM_SELF)))
    with pytest.raises(GliodeError, match="spacing"):
        VoxelGrid(domain, 0.0)
    with pytest.raises(GliodeError, match="coarser"):
        VoxelGrid(domain, 1e-3)
    with pytest.raises(GliodeError, match="solid"):
        VoxelGrid(mesh.interval(3.0, 4, MPI.COMM_SELF), 1.0)


def test_a_learned_one_is_a_regularizer_with_a_prox() -> None:
    """The prox solves z + step R'(z) = m, in L2 of the mesh."""
    domain, energy = bricks(6.0, MPI.COMM_SELF), ridge()
    operators = Multiscale(domain, energy.lengths)
    learned = Learned(energy.on(operators), operators.space, weight=0.5, tolerance=1e-8)
    assert isinstance(learned.energy, MeshRidge) and learned.energy.operators is operators
    m, step = fields(domain)[0], 2.0
    z = learned.prox(m, step)
    rest = z + step * operators.space.riesz(learned.gradient(z)) - m
    assert operators.space.norm(rest) < 1e-6 * operators.space.norm(m)
    assert float(learned(z)) < float(learned(m))
