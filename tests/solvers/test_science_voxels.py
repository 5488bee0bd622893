"""The matrix-free operator against the finite elements' own numbers and against UFL's assembled matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import Tensor

from solvers.errors import GliodeError
from solvers.fem.mesh import Domain, voxels
from solvers.fem.operators import DiffusionOperator
from solvers.node.science.voxels import VoxelOperator
from solvers.operators import mixture, monomials
from solvers.semidiscrete import Grid

SPACING = (1.0, 1.5, 3.0)
TIGHT: Any = {"rtol": 1e-13, "atol": 1e-13}


def region() -> Domain:
    """Voxels of 1 x 1.5 x 3 mm, turned and flipped, in a larger grid: a notch, a hole, a corner."""
    mask = np.zeros((9, 8, 7), dtype=bool)
    mask[2:8, 1:6, 1:5] = True
    mask[5:, 4:, :] = False
    mask[3, 2, 2] = False
    mask[5, 4, 4] = True
    c, s = np.cos(0.5), np.sin(0.5)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, -1.0]]) @ np.diag(SPACING)
    affine[:3, 3] = 40.0, -25.0, 10.0
    return voxels(mask, affine, comm=MPI.COMM_SELF)


def grid_of(domain: Domain) -> Grid:
    assert domain.grid is not None
    g = domain.grid
    parts = (torch.from_numpy(np.array(x)) for x in (g.affine, g.cell_voxel, g.dof_corner))
    return Grid(g.shape, *parts)


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_products_and_mass_are_those_of_the_finite_elements() -> None:
    domain = region()
    reference, operator = DiffusionOperator(domain), VoxelOperator(grid_of(domain))
    D, u = 0.02 + random(5, domain.n_cells), random(5, domain.n_owned, seed=2)
    found = operator.states(operator.stiffness(operator.conductances(D), operator.box(u)))
    expected = torch.stack(
        [reference.stiffness(reference.conductances(d), v) for d, v in zip(D, u, strict=True)]
    )
    torch.testing.assert_close(found, expected, **TIGHT)
    mass = operator.states(operator.mass[None])[0]
    torch.testing.assert_close(mass, domain.mass, **TIGHT)
    torch.testing.assert_close(operator.states(operator.box(u)), u, rtol=0, atol=0)
    assert float(operator.box(u).sum()) == pytest.approx(float(u.sum()))  # nothing outside the domain


def test_products_are_those_of_the_assembled_matrix_where_the_rules_agree() -> None:
    """On linear functions the vertex rule is exact, so UFL's full integral is the same energy."""
    import dolfinx
    import ufl

    domain = region()
    operator = VoxelOperator(grid_of(domain))
    D = random(1, domain.n_cells)
    x = domain.points[: domain.n_owned]
    u = torch.from_numpy(x @ [0.3, -0.7, 0.2])[None]
    energy = float((operator.box(u) * operator.stiffness(operator.conductances(D), operator.box(u))).sum())
    f, D_ = (
        dolfinx.fem.Function(domain.V),
        dolfinx.fem.Function(dolfinx.fem.functionspace(domain.mesh, ("DG", 0))),
    )
    f.x.array[:], D_.x.array[:] = u[0].numpy(), D[0].numpy()
    form = dolfinx.fem.form(D_ * ufl.inner(ufl.grad(f), ufl.grad(f)) * ufl.dx)
    assert energy == pytest.approx(dolfinx.fem.assemble_scalar(form), rel=1e-12)


def test_mixtures_of_tissues_are_fields_like_any_other() -> None:
    domain = region()
    white = random(domain.n_cells)
    fields = mixture(torch.stack([white, 1 - white]))
    D = torch.tensor([[0.4, 0.05], [0.2, 0.1]], dtype=torch.float64)
    direct = (white * D[:, :1] ** (1 / 3) + (1 - white) * D[:, 1:] ** (1 / 3)) ** 3
    mixed = VoxelOperator(grid_of(domain), fields)
    for found, expected in zip(mixed.weights(monomials(D)), mixed.conductances(direct), strict=True):
        torch.testing.assert_close(found, expected, **TIGHT)


def test_single_precision_agrees_within_its_rounding() -> None:
    domain = region()
    single, double = (VoxelOperator(grid_of(domain), dtype=t) for t in (torch.float32, torch.float64))
    D, u = random(2, domain.n_cells), random(2, domain.n_owned, seed=2)
    found = single.stiffness(single.conductances(D.float()), single.box(u.float()))
    expected = double.stiffness(double.conductances(D), double.box(u))
    assert found.dtype == torch.float32
    assert float((found - expected).abs().max()) < 1e-6 * float(expected.abs().max())


def test_derivatives_by_differences() -> None:
    domain = region()
    operator = VoxelOperator(grid_of(domain))
    cells = random(1, domain.n_cells)

    def product(scale: Tensor, u: Tensor) -> Tensor:
        w = operator.conductances(cells * (1 + scale * torch.arange(domain.n_cells)) ** 2)
        return operator.states(operator.stiffness(w, operator.box(u)))[:, ::29]

    at = torch.tensor([[0.1]], dtype=torch.float64), random(1, domain.n_owned, seed=2)
    assert torch.autograd.gradcheck(product, [x.requires_grad_() for x in at])


def test_what_does_not_fit() -> None:
    grid = grid_of(region())
    operator = VoxelOperator(grid)
    with pytest.raises(GliodeError, match=r"D: shape .* expected \(batch, "):
        operator.conductances(torch.ones(len(grid.voxel)))
    with pytest.raises(GliodeError, match=r"fields: shape"):
        VoxelOperator(grid, torch.ones(4, 3))
    with pytest.raises(GliodeError, match=r"not the corners"):
        VoxelOperator(Grid(grid.shape, grid.affine, grid.voxel[1:], grid.corner))
