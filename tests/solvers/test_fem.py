"""Meshes, the diffusion operator and sampling, against DOLFINx's own assembly and closed forms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import basix
import dolfinx
import meshio
import numpy as np
import pytest
import torch
import ufl
from dolfinx import fem
from mpi4py import MPI
from torch import Tensor

from solvers.errors import GliodeError
from solvers.fem import kernels
from solvers.fem.mesh import Domain, ball, box, from_mesh, interval, read, voxels
from solvers.fem.operators import DiffusionOperator
from solvers.fem.sampling import Sampling, cell_means

SELF = MPI.COMM_SELF
SPACING = (1.0, 1.5, 3.0)


def scan_affine() -> Any:
    """Voxels of 1 x 1.5 x 3 mm, turned by 30 degrees and flipped, far from the origin."""
    c, s = np.cos(np.pi / 6), np.sin(np.pi / 6)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, -1.0]]) @ np.diag(SPACING)
    affine[:3, 3] = 40.0, -25.0, 10.0
    return affine


def scan(comm: MPI.Comm = SELF) -> Domain:
    """An L-shaped region of the turned grid with a hole."""
    mask = np.ones((6, 5, 4), dtype=bool)
    mask[3:, 3:] = False
    mask[1, 1, 1] = False
    index = np.arange(mask.size, dtype=np.float64).reshape(mask.shape)
    return voxels(mask, scan_affine(), {"index": index}, comm)


def tetrahedra(comm: MPI.Comm = SELF) -> Domain:
    return from_mesh(
        dolfinx.mesh.create_box(
            comm, [[0, 0, 0], [2, 1, 1.5]], [4, 3, 3], ghost_mode=dolfinx.mesh.GhostMode.none
        )
    )


def skewed() -> Domain:
    """Hexahedra that are no bricks."""
    mesh = dolfinx.mesh.create_box(SELF, [[0, 0, 0], [2, 1, 1]], [3, 3, 2], dolfinx.mesh.CellType.hexahedron)
    x = mesh.geometry.x
    x[:, 0] += 0.2 * x[:, 1] * x[:, 2] + 0.1 * x[:, 0] ** 2
    return from_mesh(mesh)


def diffusivity(domain: Domain, tensor: bool) -> Tensor:
    """Different in every cell; a tensor is symmetric positive definite."""
    generator = torch.Generator().manual_seed(3)
    if not tensor:
        return 0.1 + torch.rand(domain.n_cells, generator=generator, dtype=torch.float64)
    d = domain.mesh.geometry.dim
    root = torch.rand(domain.n_cells, d, d, generator=generator, dtype=torch.float64)
    return root @ root.transpose(1, 2) + 0.1 * torch.eye(d, dtype=torch.float64)


def assembled(domain: Domain, D: Tensor, metadata: dict[str, Any]) -> Any:
    """int grad(v) . D grad(u) as DOLFINx assembles it, dense."""
    d = domain.mesh.geometry.dim
    shape = () if D.ndim == 1 else (d, d)
    coefficient = fem.Function(fem.functionspace(domain.mesh, ("DG", 0, shape)))
    coefficient.x.array[:] = D.numpy().ravel()
    u, v = ufl.TrialFunction(domain.V), ufl.TestFunction(domain.V)
    flux = coefficient * ufl.grad(u) if D.ndim == 1 else ufl.dot(coefficient, ufl.grad(u))
    form = fem.form(ufl.inner(flux, ufl.grad(v)) * ufl.dx(metadata=metadata))
    return fem.assemble_matrix(form).to_dense()


VERTEX, FULL = {"quadrature_rule": "vertex", "quadrature_degree": 1}, {"quadrature_degree": 2}
CASES: dict[str, tuple[Callable[[], Domain], bool, dict[str, Any]]] = {
    "bricks": (scan, False, VERTEX),
    "bricks, tensor": (scan, True, FULL),
    "skewed hexahedra": (skewed, False, FULL),
    "skewed hexahedra, tensor": (skewed, True, FULL),
    "tetrahedra": (tetrahedra, False, FULL),
    "tetrahedra, tensor": (tetrahedra, True, FULL),
    "interval": (lambda: interval(3.0, 7, SELF), False, FULL),
}


@pytest.mark.parametrize("case", CASES)
def test_stiffness_is_what_dolfinx_assembles(case: str) -> None:
    make, tensor, metadata = CASES[case]
    domain = make()
    D = diffusivity(domain, tensor)
    expected = assembled(domain, D, metadata)
    operator = DiffusionOperator(domain, tensor, rtol=1e-13)
    w = operator.conductances(D)
    u = torch.rand(domain.n_owned, dtype=torch.float64)
    np.testing.assert_allclose(operator.stiffness(w, u), expected @ u.numpy(), rtol=0, atol=1e-12)
    tau = torch.tensor(0.7, dtype=torch.float64)
    solved = operator.solve(u, w, tau)
    matrix = np.diag(domain.mass) + 0.7 * expected
    np.testing.assert_allclose(solved, np.linalg.solve(matrix, u.numpy()), rtol=1e-10, atol=1e-12)


def test_bricks_have_seven_entries_a_row_and_an_m_matrix() -> None:
    domain = scan()
    operator = DiffusionOperator(domain)
    assert (operator.conductances(diffusivity(domain, False)) > 0).all()
    ends = torch.cat([operator.conductances.first, operator.conductances.second])
    assert torch.bincount(ends).max() == 6


@pytest.mark.parametrize("make", [scan, tetrahedra, skewed])
def test_lumped_mass_and_integral(make: Callable[[], Domain]) -> None:
    domain = make()
    v = ufl.TestFunction(domain.V)
    one = dolfinx.fem.Constant(domain.mesh, 1.0)
    rows = fem.assemble_vector(fem.form(one * v * ufl.dx(metadata={"quadrature_degree": 4}))).array
    np.testing.assert_allclose(domain.mass, rows, rtol=1e-12)
    x = ufl.SpatialCoordinate(domain.mesh)
    exact = fem.assemble_scalar(
        fem.form((2 * x[0] - x[1] + 3 * x[2]) * ufl.dx(metadata={"quadrature_degree": 4}))
    )
    linear = domain.interpolate(lambda x: x @ np.array([2.0, -1.0, 3.0]))
    assert domain.integral(linear) == pytest.approx(exact, rel=1e-12)
    assert float(domain.cell_volumes.sum()) == pytest.approx(float(domain.mass.sum()), rel=1e-12)


def test_voxels_sit_where_the_affine_says() -> None:
    domain, affine = scan(), scan_affine()
    grid = domain.grid
    assert grid is not None
    np.testing.assert_allclose(grid.spacing, SPACING)
    centres = domain.mesh.geometry.x[domain.mesh.geometry.dofmap].mean(axis=1)
    expected = grid.cell_voxel @ affine[:3, :3].T + affine[:3, 3]
    np.testing.assert_allclose(centres, expected, atol=1e-12)
    corners = (grid.dof_corner - 0.5) @ affine[:3, :3].T + affine[:3, 3]
    np.testing.assert_allclose(domain.points, corners, atol=1e-12)
    index = np.ravel_multi_index(tuple(grid.cell_voxel.T), grid.shape)
    np.testing.assert_array_equal(domain.cell_data["index"], index)
    np.testing.assert_allclose(domain.cell_volumes, np.prod(SPACING))
    assert domain.n_cells == 6 * 5 * 4 - 3 * 2 * 4 - 1


def test_a_ball_of_voxels() -> None:
    domain = ball(5.0, 1.0, SELF)
    centres = domain.mesh.geometry.x[domain.mesh.geometry.dofmap].mean(axis=1)
    assert np.linalg.norm(centres, axis=1).max() <= 5.0
    r = np.arange(-9, 10, 2) / 2
    assert domain.n_cells == np.count_nonzero(r[:, None, None] ** 2 + r[:, None] ** 2 + r**2 <= 25.0)


def test_projection_keeps_the_integral_and_adds_the_least_variance() -> None:
    """A Gaussian as narrow as the mesh: its mass is kept, its variance grows by h^2/12 a direction."""
    domain = box((12.0, 12.0, 12.0), (12, 12, 12), SELF)
    width, centre = 0.8, np.array([6.2, 5.7, 6.0])
    u = domain.project(lambda x: np.exp(-((x - centre) ** 2).sum(1) / (2 * width**2)), refine=8)
    mass = (2 * np.pi * width**2) ** 1.5
    assert domain.integral(u) == pytest.approx(mass, rel=1e-4)
    moment = domain.integral(u * torch.from_numpy((domain.points[:, 0] - centre[0]) ** 2)) / mass
    assert moment == pytest.approx(width**2 + 1 / 12, rel=1e-2)
    constant = tetrahedra().project(lambda x: np.full(len(x), 0.3))
    torch.testing.assert_close(constant, torch.full_like(constant, 0.3), rtol=1e-12, atol=0)


@pytest.mark.parametrize("make", [scan, skewed, tetrahedra])
def test_sampling_is_exact_for_the_finite_element_function(make: Callable[[], Domain]) -> None:
    domain = make()
    slope = np.array([0.3, -1.2, 0.7])
    u = domain.interpolate(lambda x: x @ slope + 2.0).requires_grad_()
    mesh, generator = domain.mesh, np.random.default_rng(0)
    share = generator.dirichlet(np.ones(domain.cell_dofs.shape[1]), domain.n_cells)
    points = np.einsum("cn,cnd->cd", share, mesh.geometry.x[mesh.geometry.dofmap])
    sampling = Sampling(domain, points)
    values = sampling(u)
    np.testing.assert_allclose(values.detach(), points @ slope + 2.0, atol=1e-10)
    # Also for a function that is not linear, against DOLFINx; the derivative is the transposed map.
    rough = torch.rand(domain.n_owned, dtype=torch.float64)
    expected = domain.function(rough).eval(points, np.arange(domain.n_cells))[:, 0]
    np.testing.assert_allclose(sampling(rough), expected, atol=1e-10)
    g = torch.rand(len(points), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(values, u, g)
    assert float(torch.dot(gradient, rough)) == pytest.approx(float(torch.dot(g, sampling(rough))), rel=1e-12)


def test_points_past_the_edge_take_the_nearest_value_within_reach() -> None:
    domain = box((2.0, 2.0, 2.0), (2, 2, 2), SELF)
    u = domain.interpolate(lambda x: x[:, 0])
    outside = np.array([[2.4, 1.0, 0.5], [-0.3, 0.2, 1.9]])
    np.testing.assert_allclose(Sampling(domain, outside, reach=0.5)(u), [2.0, 0.0], atol=1e-15)
    with pytest.raises(
        GliodeError, match=r"1 lie outside the mesh \(more than 0.35 mm\), the first at \[2.4, 1.0"
    ):
        Sampling(domain, outside, reach=0.35)
    with pytest.raises(GliodeError, match="lie outside the mesh"):
        Sampling(tetrahedra(), np.array([[2.5, 0.5, 0.5]]))
    with pytest.raises(GliodeError, match=r"expected \(n, 3\) finite coordinates"):
        Sampling(domain, np.array([[0.0, np.nan, 0.0]]))


def test_cell_means() -> None:
    """The mean of a linear function over a voxel is its value at the centre; voxels outside show 0."""
    domain, affine = scan(), scan_affine()
    assert domain.grid is not None
    volume = cell_means(domain, domain.interpolate(lambda x: x[:, 1] + 100.0))
    voxel = np.argwhere(volume)
    centres = voxel @ affine[:3, :3].T + affine[:3, 3]
    np.testing.assert_allclose(volume[tuple(voxel.T)], centres[:, 1] + 100.0)
    assert len(voxel) == domain.n_cells and volume[1, 1, 1] == 0.0
    with pytest.raises(GliodeError, match="not made from voxels"):
        cell_means(tetrahedra(), torch.zeros(80, dtype=torch.float64))


def test_bad_voxels_are_refused() -> None:
    with pytest.raises(GliodeError, match="no voxel is inside"):
        voxels(np.zeros((3, 3, 3), dtype=bool), np.eye(4))
    sheared = np.eye(4)
    sheared[0, 1] = 0.2
    with pytest.raises(GliodeError, match="not perpendicular"):
        voxels(np.ones((2, 2, 2), dtype=bool), sheared)
    operator = DiffusionOperator(box((1.0, 1.0, 1.0), (2, 2, 2), SELF))
    with pytest.raises(GliodeError, match=r"D: shape \(3,\), expected \(8,\)"):
        operator.conductances(torch.ones(3, dtype=torch.float64))


# ---- Files ------------------------------------------------------------------------------------------------


def write_brick(path: Path, cells: str, **kwargs: Any) -> Any:
    """Two unit cubes side by side, or as five tetrahedra each, with labels 1 and 2; the points written."""
    points = np.array([[i, j, k] for k in (0, 1) for j in (0, 1) for i in (0, 1, 2)], dtype=np.float64)
    cube = np.array([0, 1, 4, 3, 6, 7, 10, 9])
    hexahedra = np.array([cube, cube + 1])
    five = np.array([[0, 1, 2, 5], [0, 2, 3, 7], [0, 5, 7, 4], [2, 5, 6, 7], [0, 2, 5, 7]])
    mirrored = np.array([[1, 0, 3, 4], [1, 3, 2, 6], [1, 4, 6, 5], [3, 4, 7, 6], [1, 3, 4, 6]])
    blocks = {"hexahedron": hexahedra, "tetra": np.concatenate([hexahedra[0][five], hexahedra[1][mirrored]])}
    labels = np.repeat([1, 2], len(blocks[cells]) // 2)
    outline = np.array([[0, 1], [1, 2]])  # cells of lower dimension, as gmsh writes them, are left out
    mesh = meshio.Mesh(
        points * 2.0,
        [("line", outline), (cells, blocks[cells])],
        cell_data={"label": [np.array([7, 7]), labels]},
    )
    mesh.write(path, **kwargs)
    return points * 2.0


@pytest.mark.parametrize("cells", ["hexahedron", "tetra"])
@pytest.mark.parametrize("suffix", [".vtu", ".msh", ".xdmf"])
def test_meshes_are_read_with_their_labels(cells: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"brick{suffix}"
    points = write_brick(path, cells, **({"file_format": "gmsh22"} if suffix == ".msh" else {}))
    domain = read(path, SELF)
    found = domain.points.round(9) + 0.0
    np.testing.assert_array_equal(found[np.lexsort(found.T)], points[np.lexsort(points.T)])
    centres = domain.mesh.geometry.x[domain.mesh.geometry.dofmap].mean(axis=1)
    np.testing.assert_array_equal(domain.cell_data["label"], np.where(centres[:, 0] < 2.0, 1, 2))
    # Wrongly ordered vertices would change volumes and flip determinants.
    half = float((domain.cell_volumes * (domain.cell_data["label"] == 1)).sum())
    assert half == pytest.approx(8.0)
    assert float(domain.mass.sum()) == pytest.approx(16.0)


def test_unreadable_mesh_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(GliodeError, match=r"absent.vtu: no such mesh file"):
        read(tmp_path / "absent.vtu", SELF)
    for name in ("broken.vtu", "broken.msh", "broken.xdmf", "mesh.unknown"):
        (tmp_path / name).write_text("not a mesh")
        with pytest.raises(GliodeError, match=f"{name}: meshio cannot read it"):
            read(tmp_path / name, SELF)
    points = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    meshio.Mesh(points, [("vertex", np.array([[0], [1]]))]).write(tmp_path / "points.vtu")
    with pytest.raises(GliodeError, match=r"points.vtu: cells \['vertex'\] are not supported"):
        read(tmp_path / "points.vtu", SELF)
    meshio.Mesh(points * np.nan, [("tetra", np.array([[0, 1, 2, 3]]))]).write(tmp_path / "nan.vtu")
    with pytest.raises(GliodeError, match=r"nan.vtu: .*not finite"):
        read(tmp_path / "nan.vtu", SELF)
    meshio.Mesh(points, [("triangle", np.array([[0, 1, 2], [0, 1, 3]]))]).write(tmp_path / "surface.vtu")
    with pytest.raises(GliodeError, match=r"surface.vtu: a curved surface mesh"):
        read(tmp_path / "surface.vtu", SELF)


def test_a_missing_compiler_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kernels._compiled.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    try:
        with pytest.raises(GliodeError, match="no-such-compiler"):
            kernels.Stage(np.array([0, 1, 1]), np.array([1]))
    finally:
        kernels._compiled.cache_clear()


def test_the_vertex_rule_is_basix_s_cube() -> None:
    """The pairs of a brick are its twelve edges."""
    domain = box((1.0, 1.0, 1.0), (1, 1, 1), SELF)
    pairs = DiffusionOperator(domain).conductances
    corner = basix.geometry(basix.CellType.hexahedron)
    ends = domain.points[torch.stack([pairs.first, pairs.second])]
    assert len(pairs.first) == 12 and len(corner) == 8
    np.testing.assert_allclose(np.abs(ends[0] - ends[1]).sum(1), 1.0)
