"""The learned prior of coefficient fields: cohorts, penalty against H1's closed form, curvature, training."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from mpi4py import MPI

from inverse.regularizers.learned.files import Card, save
from inverse.regularizers.learned.mesh import MeshRidge
from solvers.errors import GliodeError
from solvers.fem import mesh
from solvers.fem.multiscale import Multiscale
from solvers.spaces import Euclidean
from tests.tumour.test_fields import micron, problem
from tumour import case as cases
from tumour import fields_training
from tumour.case_fields import FieldSearch as FieldSection
from tumour.fields import Coefficients
from tumour.fields_learned import LearnedPenalty, lanczos
from tumour.fields_search import FieldSearch, FieldSettings
from tumour.fields_training import FieldTraining, linearised
from tumour.priors_fields import FACTORS, STRENGTH, cube, field_case

LENGTH = 20.0
FLAT = 1e3  # an edge above all that occurs: psi is quadratic


def quadratic() -> MeshRidge:
    """w = edge makes it 1/2 int |grad a|^2 + a^2 / LENGTH^2, H1's own."""
    return MeshRidge((0.0,), ((FLAT, 0.0, FLAT),), ((FLAT / LENGTH**2, 0.0, FLAT),)).double()


def prior() -> MeshRidge:
    slopes = ((0.05, 0.0, 0.1), (0.02, 8.0, 0.05))
    energy = MeshRidge((0.0, 8.0), slopes, ((0.001, 0.0, 0.5), (0.0004, 0.0, 0.5)), "student", True).double()
    assert energy.shift is not None
    with torch.no_grad():
        energy.shift.copy_(torch.tensor([0.0, 2.6]))
    return energy


def file_of(energy: MeshRidge, folder: Path, weight: float = 1.0) -> Path:
    path = folder / "weights.safetensors"
    save(path, energy, Card(name="test", data="none", command="none", weight=weight))
    return path


@pytest.mark.parametrize("of", [("D",), ("D", "rho")])
def test_of_a_quadratic_the_search_finds_what_h1_finds(of: tuple[str, ...], tmp_path: Path) -> None:
    forward, _ = problem(of)  # type: ignore[arg-type]
    start = torch.zeros(len(of) * forward.coefficients.size, dtype=torch.float64)
    h1 = FieldSearch(forward, FieldSettings("h1", length=LENGTH))
    ours = FieldSearch(
        forward, FieldSettings("learned", length=LENGTH, weights=file_of(quadratic(), tmp_path))
    )
    m = torch.randn(len(start), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        ours.penalty.weighted(0.7)(m), h1.penalty.weighted(0.7)(m), rtol=1e-4, atol=0.0
    )
    torch.testing.assert_close(
        ours.penalty.space(m).gram(m), h1.penalty.space(m).gram(m), rtol=1e-4, atol=1e-6
    )
    if len(of) == 2:
        return
    a, b = (search.solve(2.0, start) for search in (h1, ours))
    assert b.residual_norm == pytest.approx(a.residual_norm, rel=1e-2)
    assert float((a.m - b.m).norm() / a.m.norm()) < 0.05


def test_of_a_quadratic_the_posterior_is_that_of_h1(tmp_path: Path) -> None:
    forward, _ = problem()
    ours = FieldSearch(
        forward, FieldSettings("learned", length=LENGTH, weights=file_of(quadratic(), tmp_path))
    )
    h1 = FieldSearch(forward, FieldSettings("h1", length=LENGTH))
    found = ours.run()
    one, two = (search.posterior(found, 0.01).variance() for search in (ours, h1))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=0.0)
    low, high = ours.penalty.curvature(found.m)  # type: ignore[union-attr]
    assert low == pytest.approx(1.0, abs=1e-3) and high == pytest.approx(1.0, abs=1e-3)
    assert "indefinite" not in found.why and "H1 metric" in found.why


def test_an_indefinite_hessian_is_said(tmp_path: Path) -> None:
    """Against all eigenvalues of the dense pencil, where the slopes are beyond Student's inflection."""
    forward, _ = problem()
    energy = MeshRidge((0.0,), ((1.0, 0.0, 0.02),), ((0.01, 0.0, 0.5),), "student").double()
    penalty = LearnedPenalty(forward.coefficients, file_of(energy, tmp_path, weight=2.0), LENGTH)
    points = forward.model.domain.points
    m = torch.from_numpy(0.3 * points[:, 0] + 0.1 * points[:, 1])
    units = torch.eye(len(m), dtype=torch.float64)
    H = torch.stack([penalty._R.hessian_action(m, unit) for unit in units])
    G = torch.stack([penalty.space(m).gram(unit) for unit in units])
    root = torch.linalg.cholesky(G)
    half = torch.linalg.solve_triangular(
        root, torch.linalg.solve_triangular(root, H, upper=False).mT, upper=False
    )
    exact = torch.linalg.eigvalsh(half)
    low, high = penalty.curvature(m)
    assert float(exact[0]) < 0 and "indefinite" in penalty.said(m)
    assert low == pytest.approx(float(exact[0]), rel=0.1) and high == pytest.approx(float(exact[-1]), rel=0.1)


def test_lanczos_against_a_spectrum() -> None:
    values = torch.tensor([-2.0, 0.5, 1.0, 7.0], dtype=torch.float64)
    found = lanczos(Euclidean(4), lambda v: values * v, torch.ones(4, dtype=torch.float64))
    assert found == pytest.approx((-2.0, 7.0))


def test_cohorts_keep_to_their_word() -> None:
    case, again = field_case("train", 3), field_case("train", 3)
    points = case.seed + np.random.default_rng(0).uniform(-40, 40, (2000, 3))
    np.testing.assert_array_equal(case.departure(points), again.departure(points))
    for split, family in (("validation", "smooth"), ("test", "smooth"), ("train", "odd")):
        other = field_case(split, 3, family)  # type: ignore[arg-type]
        assert np.linalg.norm(other.seed - case.seed) > 1e-6
    most = math.log(max(FACTORS[0])) * (1 + STRENGTH)
    for k in range(4):
        for family in ("smooth", "odd"):
            values = field_case("test", k, family).departure(points)  # type: ignore[arg-type]
            assert np.abs(values).max() <= most * 1.2
    with pytest.raises(GliodeError, match="no 'exam'"):
        field_case("exam", 0)  # type: ignore[arg-type]


def test_cubes_hold_the_same_brain() -> None:
    """White matter is kept by exact averages on all voxels that fill the cube."""
    seed = field_case("train", 0).seed
    volumes = [cube(seed, h).white.sum() * h**3 for h in (6.0, 4.0, 3.0)]
    np.testing.assert_allclose(volumes, volumes[0], rtol=1e-12)
    with pytest.raises(GliodeError, match="no whole number of voxels"):
        cube(seed, 5.0)


def test_the_linearised_problem_has_the_solution_of_the_growth() -> None:
    problem = field_case("train", 1).problem(12.0)
    assert float(problem.error(torch.zeros_like(problem.truth))) == pytest.approx(1.0)
    case = linearised(problem)
    space = fields_training._posterior(case)
    m = space.riesz(case.B.T @ case.d)
    torch.testing.assert_close(space.gram(m), case.B.T @ case.d, rtol=1e-6, atol=1e-6)
    search = FieldSearch(problem.forward, FieldSettings("h1", length=LENGTH))
    found = search.solve(fields_training.STRENGTH, torch.zeros_like(m)).m
    apart = float((case.weight @ (m - found) ** 2) / (case.weight @ found**2)) ** 0.5
    assert apart < 0.3 and abs(float(case.error(m) - problem.error(found))) < 0.1


def test_the_hypergradient_of_the_cohort_against_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of a value and of a slope: how the error of a case's minimiser moves with them."""
    monkeypatch.setattr(fields_training, "GAP", 1e-10)
    case = linearised(field_case("train", 1).problem(12.0), 40)
    energy = prior()
    model = FieldTraining(energy, [case], iterations=40)
    model._lower[0][0].rtol, model._lower[0][0].most = 1e-6, 300
    number = torch.zeros((1, 1), dtype=torch.float64)
    model(number)
    error = model(number).sum()
    (slopes,) = torch.autograd.grad(error, energy.log_weight)

    def at(step: float, entry: int) -> float:
        with torch.no_grad():
            energy.log_weight[entry] += step
            found = float(model(number))
            energy.log_weight[entry] -= step
        return found

    for entry in (0, 2):
        difference = (at(0.02, entry) - at(-0.02, entry)) / 0.04
        assert float(slopes[entry]) == pytest.approx(difference, rel=0.02, abs=1e-5)


def test_bad_input_names_the_key(tmp_path: Path) -> None:
    forward, _ = problem()
    model = forward.model
    with pytest.raises(GliodeError, match="by: tissue"):
        LearnedPenalty(Coefficients(model, ["D"], forward.coefficients.reference, "tissue"), None, LENGTH)
    with pytest.raises(GliodeError, match=r"fields\.weights: tv has none"):
        FieldSettings("tv", weights=tmp_path / "weights.safetensors")
    with pytest.raises(GliodeError, match="missing or no safetensors file"):
        LearnedPenalty(forward.coefficients, tmp_path / "none.safetensors", LENGTH)
    path = tmp_path / "other.safetensors"
    save(path, quadratic(), Card(name="test", data="none", command="none", units="mm"))
    with pytest.raises(GliodeError, match="units 'mm'"):
        LearnedPenalty(forward.coefficients, path, LENGTH)
    assert FieldSection(regularizer="learned").weights is None
    text = {"anatomy": {"source": "mni152"}, "visits": [{"day": 0}]}
    for field, key in (
        ({"regularizer": "tv", "weights": str(path)}, "weights: only with"),
        ({"regularizer": "learned", "by": "tissue"}, "learned is of fields"),
        ({"regularizer": "learned", "weights": "none"}, "no such file"),
    ):
        with pytest.raises(GliodeError, match=key):
            cases.parse({**text, "identify": {"unknown": "field", "field": field}})


def test_the_mesh_is_the_coefficients_own(tmp_path: Path) -> None:
    """One set of weights on two meshes of one box: R of the same smooth field agrees."""
    energy = prior()
    values = []
    for n in (8, 16):
        h = 32.0 / n
        mask = np.ones((n, n, n), dtype=bool)
        domain = mesh.voxels(mask, np.diag([h, h, h, 1.0]), {"white": mask * 1.0, "grey": mask * 0.0})
        corner = torch.from_numpy(domain.points - domain.points.min(0)) / 32.0
        m = 1.2 * torch.cos(math.pi * corner[:, 0]) * torch.cos(math.pi * corner[:, 1])
        values.append(float(energy.on(Multiscale(domain, energy.lengths))(m[None])))
    assert values[1] == pytest.approx(values[0], rel=0.03)


@pytest.mark.mpi
def test_two_ranks_find_what_one_finds_by_a_learned_prior(tmp_path: Path) -> None:
    paths = MPI.COMM_WORLD.allgather(str(file_of(prior(), tmp_path)))
    settings = FieldSettings("learned", max_iterations=4, weights=Path(paths[MPI.COMM_WORLD.rank]))
    searches = [FieldSearch(problem(("D",), comm)[0], settings) for comm in (MPI.COMM_SELF, MPI.COMM_WORLD)]
    one, two = (
        search.solve(1.0, torch.zeros(search.forward.coefficients.size, dtype=torch.float64))
        for search in searches
    )
    assert two.residual_norm == pytest.approx(one.residual_norm, rel=1e-6)
    other, domain = (search.forward.model.domain for search in searches)
    at = {tuple(p): float(v) for p, v in zip(micron(other.points), one.m, strict=True)}
    expected = [at[tuple(p)] for p in micron(domain.points[: domain.n_owned])]
    np.testing.assert_allclose(two.m.numpy(), expected, rtol=0, atol=1e-4)
