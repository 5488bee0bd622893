"""Regularized sources on a small head: against closed forms, difference quotients, the linearisation."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from inverse.regularizers.learned import files
from inverse.regularizers.learned.files import Card
from inverse.regularizers.learned.mesh import MeshRidge
from inverse.regularizers.learned.ridge import Ridge
from solvers.errors import GliodeError
from solvers.fem import mesh
from tests.tumour import heads
from tumour import case_source, priors, shapes
from tumour.anatomy import Anatomy
from tumour.model import Seed, TumourModel, domain_of
from tumour.source import Known, SourceProblem, positive
from tumour.source_foci import relative_error
from tumour.source_prior import minimised, of_source, penalty_of, problem_with, smoothed_norm
from tumour.source_search import Locator, Settings
from tumour.source_training import Linearised, SourceTraining, fresh, linearised, trained

KNOWN, CENTRE = Known(0.3, 0.06, 0.02, 80.0), np.array([3.0, -4.0, 2.0])
SOURCE = shapes.ball(CENTRE, 9.0)


def layer(spacing: float) -> Anatomy:
    whole = heads.head(2.5, radius=34, side=80)
    return whole.resample([spacing, spacing, 5.0]).slab("z", tuple(CENTRE))


@pytest.fixture(scope="module")
def plane() -> SourceProblem:
    """One density of a ball of 0.5, grown on 2.5 mm, looked for on 5 mm."""
    case = priors.SourceCase("ball", KNOWN, CENTRE, lambda points: 0.5 * SOURCE(points), 1)
    fine = layer(2.5)
    model = TumourModel(domain_of(fine), step=2.5)
    u = priors.boxed(model.domain, case.shape, 2)
    numbers = [torch.tensor(x, dtype=torch.float64) for x in (KNOWN.D_white, KNOWN.D_grey, KNOWN.rho, 80.0)]
    with torch.no_grad():
        D = model.diffusivity(numbers[0], numbers[1])
        state = model.evolve(u, D, numbers[2], numbers[3])[0]
    brain = layer(5.0)
    scan = priors.Grown(case, model, u, state).scan(brain)
    return SourceProblem(KNOWN, brain, [scan], finer=fine)


@pytest.fixture(scope="module")
def truth(plane: SourceProblem) -> torch.Tensor:
    return 0.5 * priors.boxed(plane.domain, SOURCE)


def test_penalties_of_a_linear_field_in_closed_form() -> None:
    domain = mesh.voxels(np.ones((4, 3, 5), bool), np.diag([2.0, 2.0, 2.0, 1.0]))
    slope, volume = torch.tensor([0.03, -0.01, 0.02], dtype=torch.float64), 60 * 8.0
    points = torch.from_numpy(domain.points)
    u = 0.5 + points @ slope
    square = float(slope @ slope)
    assert float(penalty_of("h1", domain)(u)) == pytest.approx(volume * square / 2)
    assert float(penalty_of("tv", domain)(u)) == pytest.approx(volume * math.sqrt(square + 0.002**2))
    middle = torch.tensor([3.0, 2.0, 4.0], dtype=torch.float64)  # of the bricks
    assert float(penalty_of("sparsity", domain)(u)) == pytest.approx(volume * float(0.5 + middle @ slope))


def test_a_box_mean_is_that_of_the_seed() -> None:
    domain = domain_of(layer(5.0))
    model = TumourModel(domain, seed=Seed(0.5, 6.0))
    exact = model.seed_state(torch.from_numpy(CENTRE))
    variance = 36 - 25 / 12  # the seed's is reduced by the box's, its mass is kept
    found = 0.5 * (36 / variance) ** 1.5 * priors.boxed(domain, shapes.bump(CENTRE, [variance**0.5] * 3), 6)
    torch.testing.assert_close(found, exact, atol=1e-3, rtol=0)


def test_cases_are_repeated_and_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(priors, "brain", lambda spacing: heads.head(spacing, radius=36, side=80))
    one, again, other, odd = (
        priors.source_case("test", 1),
        priors.source_case("test", 1),
        priors.source_case("train", 1),
        priors.source_case("test", 1, "odd"),
    )
    points = one.centre + np.random.default_rng(0).normal(size=(200, 3)) * 8
    np.testing.assert_array_equal(one.shape(points), again.shape(points))
    assert one.known == again.known and len({one.known, other.known, odd.known}) == 3
    assert one.shape(points).min() >= 0 and 0.1 < one.shape(points).max() <= 0.95


def test_the_gradient_of_a_regularized_problem(plane: SourceProblem, truth: torch.Tensor) -> None:
    zero = torch.zeros_like(plane.data)
    problem = problem_with(plane, zero, of_source(penalty_of("tv", plane.domain), 0.05))
    generator = torch.Generator().manual_seed(0)
    m = truth + 0.05 * torch.randn(truth.shape, generator=generator, dtype=torch.float64)
    d = torch.randn(truth.shape, generator=generator, dtype=torch.float64)
    step = 1e-6
    quotient = (problem.value(m + step * d) - problem.value(m - step * d)) / (2 * step)
    assert float(problem.value_and_gradient(m)[1] @ d) == pytest.approx(quotient, rel=1e-4)


def test_the_discrepancy_sets_the_weight_of_total_variation(
    plane: SourceProblem, truth: torch.Tensor
) -> None:
    found = Locator(plane, Settings(regularizer="tv")).run()
    assert found.stopping["rule"] == "Discrepancy" and found.stopping["alpha"] > 0
    norm = smoothed_norm(plane, found.defect, found.u)
    assert norm == pytest.approx(1.05 * plane.delta, rel=0.011) == found.residual_norm
    assert relative_error(plane.domain, found.u, truth) < 0.25
    # and from the truth, at that weight, nothing lower is found
    problem = problem_with(
        plane, found.defect, of_source(penalty_of("tv", plane.domain), found.stopping["alpha"])
    )
    assert problem.value(found.m) <= 1.02 * minimised(problem, truth).value


def test_an_interrupted_search_goes_on_to_the_same_source(plane: SourceProblem) -> None:
    memories: list[dict[str, np.ndarray]] = []
    settings = Settings(regularizer="h1")
    whole = Locator(plane, settings, save=lambda memory: memories.append(dict(memory))).run()
    again = Locator(plane, settings, resume=memories[len(memories) // 2]).run()
    torch.testing.assert_close(again.u, whole.u, rtol=0, atol=1e-12)
    assert again.stopping == whole.stopping


def saved(path: Path, energy: torch.nn.Module) -> str:
    files.save(path, energy, Card(name="test", data="none", command="none"))
    return str(path)


def test_weights_from_a_file_that_are_total_variation(
    plane: SourceProblem, truth: torch.Tensor, tmp_path: Path
) -> None:
    weights = saved(tmp_path / "tv.safetensors", MeshRidge((0.0, 4.0), ((1.0, 0.0, 0.002),)))
    trained, tv = penalty_of("learned", plane.domain, weights), penalty_of("tv", plane.domain)
    generator = torch.Generator().manual_seed(1)
    u = truth + 0.1 * torch.rand(
        truth.shape, generator=generator, dtype=torch.float64
    )  # slopes far above eps
    assert float(trained(u)) == pytest.approx(float(tv(u)), rel=0.1)
    found, other = (
        positive(minimised(problem_with(plane, torch.zeros_like(plane.data), of_source(R, 0.05)), truth).m)
        for R in (trained, tv)
    )
    assert relative_error(plane.domain, found, other) < 0.1


def test_weights_that_are_not_of_a_mesh(plane: SourceProblem, tmp_path: Path) -> None:
    weights = saved(tmp_path / "ridge.safetensors", Ridge((9,), (3,)))
    with pytest.raises(GliodeError, match="mesh_ridge"):
        penalty_of("learned", plane.domain, weights)
    with pytest.raises(GliodeError, match="missing"):
        penalty_of("learned", plane.domain, tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    "bad, match",
    [
        ({"regularizer": "lasso"}, "not one of"),
        ({"regularizer": "tv", "unknown": "sparse"}, "unknown: field"),
        ({"regularizer": "tv", "length": 5.0}, "length"),
        ({"weights": "some.safetensors"}, "learned"),
    ],
)
def test_settings_that_do_not_go_together(bad: dict[str, str], match: str) -> None:
    with pytest.raises(GliodeError, match=match):
        Settings(**bad)  # type: ignore[arg-type]


def test_the_word_in_a_case() -> None:
    assert case_source.Locate(regularizer="learned").regularizer == "learned"
    assert case_source.Locate().regularizer == Settings().regularizer == "stopping"


@pytest.fixture(scope="module")
def linear(plane: SourceProblem, truth: torch.Tensor) -> Linearised:
    return linearised(plane, truth, torch.zeros_like(plane.data), 10**6)


def test_the_linearisation_with_all_directions_is_that_of_the_growth(
    plane: SourceProblem, truth: torch.Tensor, linear: Linearised
) -> None:
    generator = torch.Generator().manual_seed(2)
    v = torch.randn(truth.shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        ahead, back = (plane.growing.images(truth + s * v) / plane.sd for s in (1e-5, -1e-5))
        exact = (ahead - back) / 2e-5
        r = (plane.growing.images(truth) - plane.data) / plane.sd
    # Q is a rotation then: norms and products stay
    assert float((linear.B @ v).norm()) == pytest.approx(float(exact.norm()), rel=1e-5)
    here = linear.B @ truth - linear.d
    assert float(here.norm()) == pytest.approx(float(r.norm()), rel=1e-6)
    assert float(here @ (linear.B @ v)) == pytest.approx(float(r @ exact), rel=1e-4)


def test_the_slope_of_the_training_against_a_difference_quotient() -> None:
    domain = mesh.voxels(np.ones((4, 3, 3), bool), np.diag([5.0, 5.0, 5.0, 1.0]))
    generator = torch.Generator().manual_seed(3)
    B = torch.randn((30, domain.n_owned), generator=generator, dtype=torch.float64)
    truth = 0.5 + 0.1 * torch.randn(domain.n_owned, generator=generator, dtype=torch.float64)
    d = B @ truth + 0.3 * torch.randn(30, generator=generator, dtype=torch.float64)
    energy = MeshRidge((0.0, 4.0), ((0.5, 0.0, 0.05),), ((1e-2, 0.0, 0.1),)).double()
    cases = [Linearised(domain, B, d, truth), Linearised(domain, 2 * B, d, truth)]
    training = SourceTraining(energy, cases, iterations=200, tolerance=1e-7, rtol=1e-7, most=100)
    rows = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    training(rows).sum().backward()
    slope = energy.log_weight.grad
    assert slope is not None
    for k in range(2):
        values = []
        for step in (1e-3, -1e-3):
            with torch.no_grad():
                energy.log_weight[k] += step
                values.append(float(training(rows).sum()))
                energy.log_weight[k] -= step
        assert float(slope[k]) == pytest.approx((values[0] - values[1]) / 2e-3, rel=0.01)


def test_a_training_makes_linearised_sources_better() -> None:
    domain = mesh.voxels(np.ones((5, 5, 4), bool), np.diag([5.0, 5.0, 5.0, 1.0]))
    generator = torch.Generator().manual_seed(4)
    B = torch.randn((12, domain.n_owned), generator=generator, dtype=torch.float64)
    middle = torch.tensor([12.0, 12.0, 10.0], dtype=torch.float64)
    away = (torch.from_numpy(domain.points) - middle).norm(dim=1)
    cases = []
    for radius in (7.0, 9.0, 11.0):
        truth = 0.45 * torch.sigmoid((radius - away) / 1.5)
        cases.append(Linearised(domain, B, B @ truth, truth))
    said: list[str] = []
    energy, figures = trained((3, 0), cases[:2], cases[2:], said.append)
    assert len(said) == 3
    with torch.no_grad():
        before = float(SourceTraining(fresh(), cases[2:])(torch.zeros(1, 1)))
    assert figures["its mean"][0] / 100 < before
    assert energy.settings() == fresh().settings()
