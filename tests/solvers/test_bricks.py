"""Brick meshes made straight from the grid, against DOLFINx's general way of making a mesh."""

from __future__ import annotations

from typing import Any

import dolfinx
import numpy as np
import pytest
import torch
import ufl
from dolfinx import fem
from mpi4py import MPI

import solvers.fem.mesh
from solvers.fem.bricks import partition
from solvers.fem.diffusion import DiffusionStep
from solvers.fem.io import fingerprint
from solvers.fem.mesh import Domain, voxels
from solvers.fem.operators import DiffusionOperator
from solvers.fem.sampling import cell_means

SELF, WORLD = MPI.COMM_SELF, MPI.COMM_WORLD
AFFINE = np.diag([1.0, 2.0, 1.5, 1.0])


def mask() -> Any:
    """Two blocks that touch in one edge, and a cavity."""
    inside = np.zeros((9, 8, 7), dtype=bool)
    inside[:5, :4], inside[5:, 4:] = True, True
    inside[2, 2, 3] = False
    return inside


def make(comm: MPI.Comm, general: bool, monkeypatch: pytest.MonkeyPatch) -> Domain:
    if general:
        monkeypatch.setattr(solvers.fem.mesh, "bricks", lambda *_: None)
    index = np.arange(mask().size, dtype=np.float64).reshape(mask().shape)
    domain = voxels(mask(), AFFINE, {"index": index}, comm)
    monkeypatch.undo()
    return domain


def total(comm: MPI.Comm, form: Any) -> float:
    return float(comm.allreduce(fem.assemble_scalar(fem.form(form))))


@pytest.mark.mpi
@pytest.mark.parametrize("general", [False, True], ids=["direct", "general"])
def test_volume_surface_and_gradients(general: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forms over cells and facets, in parallel too: the mesh is a whole DOLFINx mesh."""
    domain = make(WORLD, general, monkeypatch)
    one = fem.Constant(domain.mesh, 1.0)
    inside = np.pad(mask(), 1).astype(int)
    areas = (3.0, 1.5, 2.0)  # of a voxel's face across each axis
    surface = sum(area * np.abs(np.diff(inside, axis=axis)).sum() for axis, area in enumerate(areas))
    assert total(WORLD, one * ufl.dx) == pytest.approx(3.0 * mask().sum())
    assert total(WORLD, one * ufl.ds) == pytest.approx(surface)
    u = domain.function(domain.interpolate(lambda x: 2 * x[:, 0] - x[:, 1] + 0.5 * x[:, 2]))
    assert total(WORLD, ufl.inner(ufl.grad(u), ufl.grad(u)) * ufl.dx) == pytest.approx(
        5.25 * 3 * mask().sum()
    )


@pytest.mark.mpi
def test_both_ways_give_the_same_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Volumes on the grid, cell data, fingerprint and a diffused state, on one rank or more."""
    results = []
    for comm, general in ((SELF, True), (WORLD, False), (WORLD, True)):
        domain = make(comm, general, monkeypatch)
        operator = DiffusionOperator(domain)
        D = 0.2 + 0.01 * domain.cell_data["index"]
        u = domain.interpolate(lambda x: np.exp(-((x - 3.0) ** 2).sum(1) / 8))
        u = DiffusionStep(operator, margin=np.inf)(u, 3.0, operator.conductances(D))
        assert domain.grid is not None
        index = np.ravel_multi_index(tuple(domain.grid.cell_voxel.T), mask().shape)
        np.testing.assert_array_equal(domain.cell_data["index"], index)
        numbers = np.sort(np.concatenate(comm.allgather(domain.cell_numbers)))
        np.testing.assert_array_equal(numbers, np.arange(mask().sum()))
        results.append((cell_means(domain, u), fingerprint(domain), domain.n_global, domain.integral(u)))
    for means, key, count, integral in results[1:]:
        np.testing.assert_allclose(means, results[0][0], rtol=0, atol=1e-14)
        assert (key, count) == results[0][1:3]
        assert integral == pytest.approx(results[0][3], rel=1e-12)


def test_the_direct_way_is_taken_where_it_is_known_to_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbering runs along the grid, so neighbours are near in memory."""
    domain = make(SELF, False, monkeypatch)
    if dolfinx.__version__.startswith("0.9."):
        np.testing.assert_array_equal(domain.cell_numbers, np.arange(domain.n_cells))


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 16])
def test_partition_is_balanced_and_compact(parts: int) -> None:
    voxel = np.argwhere(np.ones((12, 20, 9), dtype=bool))
    part = partition(voxel, parts)
    sizes = np.bincount(part, minlength=parts)
    assert sizes.min() > 0 and sizes.max() <= 1.05 * len(voxel) / parts + 1
    # Neighbours in different parts: no more than the cuts of a grid of boxes.
    volume = part.reshape(12, 20, 9)
    cut = sum(np.count_nonzero(np.diff(volume, axis=axis)) for axis in range(3))
    assert cut <= 2.2 * parts ** (1 / 3) * (12 * 20 + 20 * 9 + 12 * 9)


def test_more_parts_than_voxels() -> None:
    part = partition(np.array([[0, 0, 0], [0, 0, 1]]), 5)
    assert len(set(part)) == 2 and part.max() < 5


def test_the_pairs_are_those_of_the_general_search(monkeypatch: pytest.MonkeyPatch) -> None:
    domain = make(SELF, False, monkeypatch)
    pairs = DiffusionOperator(domain).conductances
    expected = set()
    for row in range(domain.n_cells):
        cell = np.asarray(domain.cell_dofs[row], dtype=np.int64)
        at = domain.points[cell]
        for a in range(8):
            for b in range(a + 1, 8):
                if np.count_nonzero(np.abs(at[a] - at[b]) > 1e-9) == 1:
                    expected.add((int(min(cell[a], cell[b])), int(max(cell[a], cell[b]))))
    found = list(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    assert set(found) == expected and len(found) == len(expected)
    assert found == sorted(found, key=lambda pair: pair[0])
    assert isinstance(pairs.first, torch.Tensor) and pairs.first.dtype == torch.int64
