"""Exported problems against DOLFINx's own products, and the same file from any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import basix.ufl
import dolfinx
import numpy as np
import pytest
import torch
import ufl
from dolfinx import fem
from mpi4py import MPI
from torch import Tensor

from solvers.errors import GliodeError
from solvers.fem.export import affine, export, gathered, scattered
from solvers.fem.mesh import Domain, from_mesh, interval, voxels
from solvers.fem.operators import DiffusionOperator
from solvers.semidiscrete import SemiDiscrete, Sparse
from tumour.anatomy import mni152
from tumour.model import domain_of

SELF, WORLD = MPI.COMM_SELF, MPI.COMM_WORLD
NONE = dolfinx.mesh.GhostMode.none


def notched() -> Any:
    mask = np.ones((5, 4, 3), dtype=bool)
    mask[3:, 2:] = False
    return mask


def bricks(comm: MPI.Comm = SELF) -> Domain:
    """Voxels of 1 x 1.5 x 3 mm with a notch, turned."""
    mask = notched()
    affine = np.eye(4)
    affine[:3, :3] = np.array([[0.6, -0.8, 0], [0.8, 0.6, 0], [0, 0, -1]]) @ np.diag([1, 1.5, 3])
    affine[:3, 3] = 40, -25, 10
    white = np.linspace(0, 1, mask.size).reshape(mask.shape)
    return voxels(mask, affine, {"white": white, "grey": 1 - white}, comm=comm)


def tetrahedra(comm: MPI.Comm = SELF) -> Domain:
    return from_mesh(dolfinx.mesh.create_box(comm, [[0, 0, 0], [5, 4, 4]], [3, 2, 2], ghost_mode=NONE))


def triangles(comm: MPI.Comm = SELF) -> Domain:
    return from_mesh(dolfinx.mesh.create_rectangle(comm, [[0, 0], [2, 1]], [5, 4], ghost_mode=NONE))


def line(comm: MPI.Comm = SELF) -> Domain:
    return interval(2.0, 9, comm)


DOMAINS = [bricks, tetrahedra, triangles, line]


def cell_values(domain: Domain) -> Tensor:
    """A value for each cell that depends on its number in the mesh's input."""
    return torch.from_numpy(1.0 + np.sin(domain.cell_numbers.astype(float)))


def wave(x: Any) -> Any:
    """A state of the coordinates (n, 3)."""
    return np.sin(x[:, 0] + 0.3) + x[:, 1] * np.cos(x[:, 2])


# ---- Diffusion --------------------------------------------------------------------------------------------


@pytest.mark.mpi
@pytest.mark.parametrize("make", DOMAINS)
def test_the_exported_diffusion_is_that_of_the_operator(make: Callable[[MPI.Comm], Domain]) -> None:
    domain = make(WORLD)
    problem, operator = export(domain, "a test"), DiffusionOperator(domain)
    assert problem.conductances is not None and problem.n == domain.n_global
    D, u = cell_values(domain), domain.interpolate(wave)
    expected = operator.stiffness(operator.conductances(D), u)
    n = problem.conductances.n_cells
    ours = problem.conductances(1.0 + torch.arange(n, dtype=torch.float64).sin())
    found = problem.conductances.stiffness(ours, gathered(domain.V, u))
    torch.testing.assert_close(scattered(domain.V, found), expected, rtol=1e-12, atol=1e-12)
    assert isinstance(problem.mass, Tensor)
    torch.testing.assert_close(scattered(domain.V, problem.mass), domain.mass, rtol=1e-13, atol=0)
    points = torch.from_numpy(domain.points[: domain.n_owned, : problem.points.shape[1]])
    found = torch.stack([scattered(domain.V, x) for x in problem.points.T], 1)
    torch.testing.assert_close(found, points, rtol=0, atol=1e-12)


def test_a_tensor_is_exported_too() -> None:
    domain = bricks()
    problem, operator = export(domain, "a test", tensor=True), DiffusionOperator(domain, tensor=True)
    root = torch.rand(domain.n_cells, 3, 3, dtype=torch.float64)
    D, u = root @ root.transpose(1, 2), domain.interpolate(wave)
    assert problem.conductances is not None and problem.conductances.tensor
    in_file = torch.zeros_like(D).index_copy(0, torch.tensor(domain.cell_numbers), D)
    found = problem.conductances.stiffness(problem.conductances(in_file), gathered(domain.V, u))
    expected = operator.stiffness(operator.conductances(D), u)
    torch.testing.assert_close(scattered(domain.V, found), expected, rtol=1e-12, atol=1e-12)


def test_the_grid_places_cells_and_vertices() -> None:
    problem = export(bricks(), "a test")
    assert problem.grid is not None
    voxel = np.argwhere(notched())
    assert torch.equal(problem.grid.voxel, torch.from_numpy(voxel).int())
    white = np.linspace(0, 1, 60).reshape(5, 4, 3)
    assert torch.equal(problem.fractions["white"], torch.from_numpy(white[tuple(voxel.T)]))
    index = problem.grid.corner @ torch.tensor([20, 4, 1], dtype=torch.int32)
    assert bool((index.diff() > 0).all())  # numbered along the grid


def same(ours: SemiDiscrete, theirs: SemiDiscrete) -> int:
    """Compare the files of two problems; returns the number of tensors."""
    from solvers.semidiscrete import _parts

    (a, told), (b, heard) = _parts(ours), _parts(theirs)
    assert told == heard and a.keys() == b.keys()
    for key in a:
        if a[key].is_floating_point():
            assert torch.allclose(a[key], b[key], rtol=1e-13, atol=1e-13), key
        else:
            assert torch.equal(a[key], b[key]), key
    return len(a)


@pytest.mark.mpi
@pytest.mark.parametrize("make", DOMAINS)
def test_all_ranks_make_the_file_of_one(make: Callable[[MPI.Comm], Domain]) -> None:
    assert same(export(make(WORLD), "a test"), export(make(SELF), "a test")) >= 6


def test_the_brain_at_3_mm_fits_in_16_mb(tmp_path: Path) -> None:
    """With coordinates, tissue fractions and voxels; it says so itself."""
    domain = domain_of(mni152(3.0))
    problem = export(domain, "MNI152")
    problem.save(tmp_path / "brain.safetensors")
    size = (tmp_path / "brain.safetensors").stat().st_size
    assert 7e6 < size < 16e6
    found = SemiDiscrete.load(tmp_path / "brain.safetensors")
    assert found.n == domain.n_global > 70_000 and set(found.fractions) == {"white", "grey"}
    assert found.conductances is not None and found.grid is not None and len(found.points) == found.n
    most = torch.bincount(torch.cat([found.conductances.first, found.conductances.second])).max()
    assert int(most) == 6  # 7 entries in a row
    assert isinstance(found.mass, Tensor)
    assert float(found.mass.sum()) == pytest.approx(27.0 * domain.n_cells)
    torch.testing.assert_close(
        found.fractions["white"] + found.fractions["grey"], torch.ones(domain.n_cells).double()
    )


# ---- UFL --------------------------------------------------------------------------------------------------


def spaces(mesh: dolfinx.mesh.Mesh) -> dict[str, Any]:
    """Of all kinds: nodes, more nodes, vectors, discontinuous, no nodes at all."""
    cell = mesh.basix_cell()
    P2, P1 = basix.ufl.element("P", cell, 2, shape=(2,)), basix.ufl.element("P", cell, 1)
    return {
        "P1": ("P", 1),
        "P2": ("P", 2),
        "vector": ("P", 1, (2,)),
        "DG1": ("DG", 1),
        "Taylor-Hood": basix.ufl.mixed_element([P2, P1]),
    }


KINDS = ["P1", "P2", "vector", "DG1", "Taylor-Hood"]


def forms(V: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A mass, an unsymmetric operator with a coefficient, and a load."""
    u, v, x = ufl.TrialFunction(V), ufl.TestFunction(V), ufl.SpatialCoordinate(V.mesh)
    advection = ufl.inner(u.dx(0), v) * (1 + x[1]) * ufl.dx
    diffusion = -ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.exp(x[0]) * ufl.dx
    one = v if v.ufl_shape == () else sum(v[i] * (i + 1) for i in range(v.ufl_shape[0]))
    mass = ufl.inner(u, v) * (1 + x[0]) * ufl.dx
    return mass, {"advection": advection, "diffusion": diffusion}, {"source": x[0] * one * ufl.dx}


def exported(comm: MPI.Comm, kind: str, lumped: bool = False) -> tuple[Any, SemiDiscrete]:
    mesh = triangles(comm).mesh
    V = fem.functionspace(mesh, spaces(mesh)[kind])
    mass, operators, loads = forms(V)
    return V, affine(mass, operators, loads, "a test", lumped=lumped)


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_act_as_the_forms_do(kind: str) -> None:
    V, problem = exported(SELF, kind)
    u = fem.Function(V)
    u.x.array[:] = np.random.default_rng(0).standard_normal(len(u.x.array))
    x = gathered(V, torch.from_numpy(u.x.array.copy()))
    mass, operators, loads = forms(V)
    assert isinstance(problem.mass, Sparse)
    for form, matrix in [
        (mass, problem.mass),
        *zip(operators.values(), problem.operators.values(), strict=True),
    ]:
        b = dolfinx.fem.assemble_vector(fem.form(ufl.action(form, u))).array
        torch.testing.assert_close(
            scattered(V, matrix.dense() @ x), torch.from_numpy(b), rtol=1e-11, atol=1e-12
        )
    b = dolfinx.fem.assemble_vector(fem.form(loads["source"])).array
    torch.testing.assert_close(scattered(V, problem.loads["source"]), torch.from_numpy(b))
    torch.testing.assert_close(scattered(V, x), torch.from_numpy(u.x.array))
    assert (problem.coordinates is None) == (kind == "Taylor-Hood")
    if problem.coordinates is not None and kind != "vector":
        torch.testing.assert_close(problem.points, gathered_points(V))


def gathered_points(V: Any) -> Tensor:
    points = torch.from_numpy(V.tabulate_dof_coordinates())
    return torch.stack([gathered(V, points[:, axis].clone()) for axis in range(2)], 1)


@pytest.mark.mpi
@pytest.mark.parametrize("kind", KINDS)
def test_all_ranks_make_the_matrices_of_one(kind: str) -> None:
    (V, ours), (_, theirs) = exported(WORLD, kind), exported(SELF, kind)
    assert same(ours, theirs) >= 10
    x = torch.arange(ours.n, dtype=torch.float64)
    assert torch.equal(gathered(V, scattered(V, x)), x)


@pytest.mark.mpi
def test_higher_spaces_on_bricks_too() -> None:
    """Bricks taken straight from a grid have no cell numbers of DOLFINx's."""
    found = []
    for comm in (WORLD, SELF):
        domain = bricks(comm)
        V = fem.functionspace(domain.mesh, ("P", 2))
        found.append(affine(ufl.TrialFunction(V) * ufl.TestFunction(V) * ufl.dx, {}))
    assert same(*found) == 4
    M = found[0].mass
    assert isinstance(M, Sparse) and float(M.values.sum()) == pytest.approx(48 * 4.5)


@pytest.mark.mpi
def test_homogeneous_conditions_hold_what_they_fix() -> None:
    """-u'' = 1 on (0, 2), u = 0 at both ends: u = x (2 - x)/2 at the nodes, exactly in one dimension."""
    V = line(WORLD).V
    u, v = ufl.TrialFunction(V), ufl.TestFunction(V)
    ends = fem.locate_dofs_geometrical(V, lambda x: np.isclose(x[0], 0) | np.isclose(x[0], 2))
    bc = fem.dirichletbc(0.0, ends, V)
    K, b = {"diffusion": -u.dx(0) * v.dx(0) * ufl.dx}, {"source": v * ufl.dx}
    for lumped in (False, True):
        problem = affine(u * v * ufl.dx, K, b, bcs=[bc], lumped=lumped)
        x = problem.points[:, 0]
        A, f = problem.operators["diffusion"].dense(), problem.loads["source"]
        fixed = torch.isclose(x * (2 - x), torch.zeros(1).double())
        assert int(fixed.sum()) == 2 and not A[fixed].any() and not A[:, fixed].any() and not f[fixed].any()
        solution = torch.linalg.solve(-A + torch.diag(fixed.double()), f)
        torch.testing.assert_close(solution, x * (2 - x) / 2)
        M = problem.mass.dense() if isinstance(problem.mass, Sparse) else torch.diag(problem.mass)
        assert float(M[fixed][:, fixed].diagonal().min()) > 0 and not M[fixed][:, ~fixed].any()


def test_what_cannot_be_exported_is_refused() -> None:
    V = triangles().V
    W = fem.functionspace(V.mesh, ("P", 2))
    u, v = ufl.TrialFunction(V), ufl.TestFunction(V)
    mass = u * v * ufl.dx
    with pytest.raises(GliodeError, match="bcs: only homogeneous"):
        affine(mass, {}, bcs=[fem.dirichletbc(1.0, np.array([0], dtype=np.int32), V)])
    with pytest.raises(GliodeError, match="A: its test or trial function is of another space"):
        affine(mass, {"A": u * ufl.TestFunction(W) * ufl.dx})
    with pytest.raises(GliodeError, match="A: mass and operators are bilinear"):
        affine(mass, {"A": v * ufl.dx})
    p, q = ufl.TrialFunction(W), ufl.TestFunction(W)
    with pytest.raises(GliodeError, match="row sums are not positive"):
        affine(p * q * ufl.dx, {}, lumped=True)
