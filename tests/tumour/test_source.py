"""Source localisation on a small head: against closed forms, dense algebra, another mesh, other searches."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from mpi4py import MPI

from inverse.problem import LeastSquares
from solvers.errors import GliodeError
from solvers.fem.spaces import lumped
from tests.tumour import heads
from tumour.anatomy import Anatomy
from tumour.growth import exponential, gompertz, logistic
from tumour.imaging import Modality, add_noise, noise_sd
from tumour.model import Seed, TumourModel, domain_of
from tumour.patients import Scan, camera
from tumour.source import Growing, Known, SourceProblem, corner_values, inverse_positive, positive, prolonged
from tumour.source_foci import distances, foci_of, relative_error
from tumour.source_points import Points
from tumour.source_posterior import _moments, posterior_of
from tumour.source_search import Locator, Settings, Source

KNOWN = Known(0.3, 0.06, 0.02, 80.0)
SEED = Seed(0.5, 5.0)
CENTRE = np.array([3.0, -4.0, 2.0])


head = partial(heads.head, radius=34, side=80)


def layer(spacing: float) -> Anatomy:
    """The 5 mm thick layer at the centre, with voxels of `spacing` in it."""
    return head(2.5).resample([spacing, spacing, 5.0]).slab("z", CENTRE)


def scans(
    brain: Anatomy,
    truth: Anatomy,
    centres: np.ndarray,
    law: str = "logistic",
    kinds: tuple[str, ...] = ("density",),
    known: Known = KNOWN,
) -> list[Scan]:
    """Noisy scans of a tumour grown on another anatomy with half the time step."""
    laws = {"logistic": logistic, "gompertz": gompertz, "exponential": exponential}
    model = TumourModel(domain_of(truth), laws[law](), SEED, 2.5)
    values = [
        torch.tensor(v, dtype=torch.float64) for v in (known.D_white, known.D_grey, known.rho, known.age)
    ]
    with torch.no_grad():
        u = sum(model.seed_state(torch.from_numpy(c)) for c in np.atleast_2d(centres))
        D = model.diffusivity(values[0], values[1])
        state = model.evolve(u, D, values[2], values[3])[0]  # type: ignore[arg-type]
    modalities = [Modality(kind, 0.05) for kind in kinds]  # type: ignore[arg-type]
    images = camera(model, brain, brain.brain, 3)(state, modalities)
    generator, found = np.random.default_rng(1), []
    for modality, image in zip(modalities, images, strict=True):
        array = np.zeros(brain.shape)
        array[brain.brain] = add_noise(image.numpy(), modality, generator)
        found.append(Scan(0.0, modality, array, brain.brain, noise_sd(image.numpy(), modality)))
    return found


@pytest.fixture(scope="module")
def plane() -> SourceProblem:
    """One focus in a slice."""
    brain = layer(5.0)
    return SourceProblem(
        KNOWN, brain, scans(brain, layer(2.5), in_layer(CENTRE)), logistic(), SEED, finer=layer(2.5)
    )


def in_layer(centres: np.ndarray) -> np.ndarray:
    """Centres in the middle of the layer."""
    moved = np.atleast_2d(centres).copy()
    moved[:, 2] = layer(5.0).affine[2, 3]
    return moved


@pytest.fixture(scope="module")
def found(plane: SourceProblem) -> Source:
    return Locator(plane).run()


def truth_of(problem: SourceProblem, centres: np.ndarray) -> torch.Tensor:
    return sum(  # type: ignore[return-value]
        problem.growing.model.seed_state(torch.from_numpy(c)) for c in np.atleast_2d(centres)
    )


def test_the_positive_map() -> None:
    """Increasing onto (0, 1), the identity in between, and its inverse."""
    m = torch.linspace(-0.2, 1.2, 500, dtype=torch.float64)
    u = positive(m)
    assert bool((u.diff() > 0).all()) and 0 < float(u.min()) < 1e-8 and 1 - 1e-8 < float(u.max()) < 1
    middle = (m > 0.15) & (m < 0.85)
    assert torch.allclose(u[middle], m[middle], atol=1e-8)
    for value in (1e-4, 0.05, 0.5, 0.97):
        assert float(positive(torch.tensor(inverse_positive(value)).double())) == pytest.approx(
            value, rel=1e-6
        )


def test_smoothing_is_symmetric_and_its_noise_level_is_the_trace(plane: SourceProblem) -> None:
    n = len(plane.data)
    B = torch.stack([plane.smooth(row) for row in torch.eye(n, dtype=torch.float64)])
    assert torch.allclose(B, B.mT, atol=1e-14)
    assert plane.delta == pytest.approx(math.sqrt(float((B.mT @ B).trace())), rel=1e-12)


def test_the_gradient_of_the_field_problem(plane: SourceProblem) -> None:
    """Against central differences, along a random direction, from a density of every size."""
    problem = Locator(plane).field_problem(torch.zeros_like(plane.data))
    generator = torch.Generator().manual_seed(0)
    m, d = (torch.randn(plane.domain.n_owned, dtype=torch.float64, generator=generator) for _ in range(2))
    m = 0.05 * m
    slope = problem.space.pair(problem.value_and_gradient(m)[1], d)
    h = 2e-6  # the positive map bends over 0.01: the error is some (h / 0.01)^2
    difference = (problem.value(m + h * d) - problem.value(m - h * d)) / (2 * h)
    assert slope == pytest.approx(difference, rel=1e-6)
    assert float(torch.dot(problem.residual(m), problem.jvp(m, d))) == pytest.approx(slope, rel=1e-9)


def test_a_slab_is_two_dimensional(plane: SourceProblem) -> None:
    """Equal at both faces, and the layer next to the point is not there."""
    brain = head(5.0)
    slab = brain.slab("x", CENTRE)
    assert slab.shape == (1, *brain.shape[1:]) and abs(slab.affine[0, 3] - CENTRE[0]) <= 2.5
    assert slab.spacing == pytest.approx(brain.spacing)
    grown = plane.growing.states(truth_of(plane, in_layer(CENTRE)))[0]
    values = corner_values(plane.domain, grown, math.nan)
    assert np.nanmax(np.abs(values[:, :, 0] - values[:, :, 1])) < 1e-13
    with pytest.raises(GliodeError, match="slice axis"):
        brain.slab("w", CENTRE)
    with pytest.raises(GliodeError, match="outside the brain"):
        brain.slab("z", [0.0, 0.0, 39.0])


def test_the_source_of_a_slice_is_found(plane: SourceProblem, found: Source) -> None:
    assert found.stopping["rule"] == "Discrepancy" and found.residual_norm <= 1.05 * found.delta
    assert distances(found.foci[:1], in_layer(CENTRE))[0] < 2.0
    assert relative_error(plane.domain, found.u, truth_of(plane, in_layer(CENTRE))) < 0.5
    assert float(found.u.min()) > 0 and len(found.foci) == 1
    # The tumour grown from it explains the data: white noise and no more is left.
    left = (plane.growing.images(found.u) + found.defect - plane.data) / plane.sd
    assert abs(float(left.square().mean()) - 1) < 3 * math.sqrt(2 / len(left))


@pytest.mark.parametrize("law", ["exponential", "gompertz"])
def test_other_laws_and_outlines(law: str) -> None:
    """Malthus by its density; Gompertz by the outline of oedema alone."""
    brain = layer(5.0)
    kinds = ("oedema",) if law == "gompertz" else ("density",)
    makes = {"exponential": exponential, "gompertz": gompertz}
    known = replace(KNOWN, rho=0.006) if law == "gompertz" else KNOWN
    images = scans(brain, layer(2.5), in_layer(CENTRE), law, kinds, known)
    problem = SourceProblem(known, brain, images, makes[law](), SEED, finer=layer(2.5))
    result = Locator(problem).run()
    assert result.stopping["rule"] == "Discrepancy"
    assert distances(result.foci[:1], in_layer(CENTRE))[0] < 3.0


def test_two_foci_with_a_slice_of_data_missing() -> None:
    """In three dimensions; the scan has no data in a layer between the foci."""
    brain, centres = head(5.0), np.array([[-17.0, 0.0, 2.0], [18.0, 3.0, 0.0]])
    scan = scans(brain, head(2.5), centres)[0]
    mask = scan.mask.copy()
    mask[brain.shape[0] // 2] = False
    problem = SourceProblem(KNOWN, brain, [replace(scan, mask=mask)], logistic(), SEED, finer=head(2.5))
    result = Locator(problem, Settings(level=0.4)).run()
    assert result.stopping["rule"] == "Discrepancy" and len(result.foci) == 2
    assert max(distances(result.foci, centres)) < 3.0


def test_points_are_found_to_their_standard_deviation(plane: SourceProblem) -> None:
    """And their Gaussian posterior is that of the Jacobian by differences."""
    result = Locator(plane, Settings("points")).run()
    posterior = result.posterior
    assert posterior is not None and posterior.names == ["x1", "y1", "amplitude1"]
    truth = torch.tensor([*CENTRE[:2], math.log(0.5)], dtype=torch.float64)
    assert bool(((posterior.mean - truth).abs() < 4 * posterior.sd).all())
    points, h = Points(plane, 1), 1e-4
    steps = h * torch.eye(3, dtype=torch.float64)
    columns = [
        (
            plane.growing.images(points.source(result.m + s))
            - plane.growing.images(points.source(result.m - s))
        )
        / plane.sd
        for s in steps
    ]
    J = torch.stack(columns, 1) / (2 * h)
    precision = J.mT @ J + torch.diag(points.space.scale**-2)
    assert torch.allclose(posterior.sd, torch.linalg.inv(precision).diagonal().sqrt(), rtol=1e-4)


def test_a_sparse_source(plane: SourceProblem) -> None:
    """Most vertices empty, none negative, at the discrepancy."""
    result = Locator(plane, Settings("sparse")).run()
    assert result.stopping["rule"] == "Discrepancy" and result.stopping["alpha"] > 0
    assert float(result.u.min()) == 0.0
    assert int((result.u > 0).sum()) < 0.5 * len(result.u)
    assert distances(result.foci[:1], in_layer(CENTRE))[0] < 3.0


def test_the_defect_takes_most_of_the_mesh_error_away(plane: SourceProblem) -> None:
    """Against the same source grown on voxels and steps of a quarter."""
    u, finest = truth_of(plane, in_layer(CENTRE)), layer(1.25)
    growing = Growing(KNOWN, plane.anatomy, plane.scans, plane.region, logistic(), SEED, 1.25, finest)
    limit = growing.images(prolonged(plane.domain, u, growing.domain))
    raw = plane.growing.images(u) - limit
    assert float((raw + plane.defect(u)).norm()) < 0.5 * float(raw.norm())


def test_prolongation_is_exact_for_linear_functions() -> None:
    coarse, fine = domain_of(head(5.0)), domain_of(head(2.5))
    u = coarse.interpolate(lambda x: x @ np.array([0.3, -1.0, 2.0]) + 1.0)
    values = prolonged(coarse, u, fine).numpy()
    at = fine.points[: fine.n_owned]
    deep = np.linalg.norm(at, axis=1) < 26
    assert values[deep] == pytest.approx((at @ np.array([0.3, -1.0, 2.0]) + 1.0)[deep], abs=1e-10)


def test_foci_are_weighted_centroids() -> None:
    """Of two bumps: centres, order, and the level that tells them apart."""
    domain = domain_of(head(5.0))
    a, b = np.array([-12.0, 0.0, 0.0]), np.array([13.0, 5.0, -2.0])

    def bumps(x: np.ndarray) -> np.ndarray:
        return 0.5 * np.exp(-((x - a) ** 2).sum(1) / 60) + 0.3 * np.exp(-((x - b) ** 2).sum(1) / 60)

    u = domain.interpolate(bumps)
    foci = foci_of(domain, u, 0.5)
    assert len(foci) == 2 and foci[0].cells > foci[1].cells
    assert max(distances(foci, np.array([a, b]))) < 1.0
    assert len(foci_of(domain, u, 0.7)) == 1
    with pytest.raises(GliodeError, match="zero"):
        foci_of(domain, torch.zeros_like(u))


def test_moments_of_the_density() -> None:
    """Against a million draws."""
    mean, sd = torch.tensor([-0.05, 0.0, 0.2]).double(), torch.tensor([0.05, 0.1, 0.03]).double()
    draws = positive(
        mean + sd * torch.randn(1_000_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )
    first, deviation = _moments(mean, sd)
    assert torch.allclose(first, draws.mean(0), rtol=5e-3)
    assert torch.allclose(deviation, draws.std(0), rtol=5e-3)


def test_the_posterior(plane: SourceProblem, found: Source) -> None:
    """Wider than nothing where the tumour is, no wider than the prior, and sure of the source's place."""
    posterior = posterior_of(plane, found.m, found.defect, samples=10)
    assert 0 < posterior.laplace.kept < 100
    centre = np.linalg.norm(plane.domain.points[: plane.domain.n_owned] - in_layer(CENTRE), axis=1)
    assert float(posterior.exceedance[centre.argmin()]) > 0.9
    assert float(posterior.later[centre.argmin()]) > 0.9
    assert float(posterior.exceedance[centre > 25].max()) < 0.5
    sd = posterior.laplace.sd()
    assert float(sd[centre.argmin()]) < 0.8 * 0.1


def test_an_interrupted_search_goes_on_to_the_same_source(plane: SourceProblem, found: Source) -> None:
    class Stopped(Exception):
        pass

    saved: list[dict[str, np.ndarray]] = []

    def save(memory: dict[str, np.ndarray]) -> None:
        saved.append({name: array.copy() for name, array in memory.items()})
        if len(saved) == 8:
            raise Stopped

    with pytest.raises(Stopped):
        Locator(plane, save=save).run()
    again = Locator(plane, resume=saved[-1]).run()
    assert torch.allclose(again.u, found.u, rtol=1e-9, atol=1e-12)


def test_refusals(plane: SourceProblem) -> None:
    brain, scan = plane.anatomy, plane.scans[0]
    with pytest.raises(GliodeError, match=r"locate\.age.*positive"):
        Known(0.3, 0.06, 0.02, 0.0)
    with pytest.raises(GliodeError, match=r"locate\.rho.*positive"):
        Known(0.3, 0.06, math.nan, 100.0)
    with pytest.raises(GliodeError, match="none given"):
        SourceProblem(KNOWN, brain, [])
    with pytest.raises(GliodeError, match="shape"):
        SourceProblem(KNOWN, head(5.0), [scan])
    with pytest.raises(GliodeError, match="noise"):
        replace(scan, sd=0.0)
    with pytest.raises(GliodeError, match="nothing is visible"):
        SourceProblem(KNOWN, brain, [replace(scan, values=0 * scan.values)], seed=SEED)
    nowhere = np.zeros_like(scan.mask)
    with pytest.raises(GliodeError, match="covers no voxel"):
        SourceProblem(KNOWN, brain, [scan, replace(scan, mask=nowhere)], seed=SEED)
    for wrong in ({"tau": 1.0}, {"length": -1.0}, {"level": 1.0}, {"foci": 0}, {"unknown": "seed"}):
        with pytest.raises(GliodeError, match="locate"):
            Settings(**wrong)  # type: ignore[arg-type]


@pytest.mark.mpi
def test_ranks_share_the_search(plane: SourceProblem) -> None:
    """The source, gathered, is the one of a mesh that this rank alone has."""
    found = Locator(plane).run()
    norm = float(np.linalg.norm(corner_values(plane.domain, found.u)))
    everyone = MPI.COMM_WORLD.allgather(norm)
    assert everyone == [everyone[0]] * len(everyone)
    space = lumped(plane.domain)
    problem = Locator(plane).field_problem(found.defect)
    assert isinstance(problem, LeastSquares)
    d = found.u
    slope = space.pair(problem.value_and_gradient(found.m)[1], d)
    h = 1e-5
    difference = (problem.value(found.m + h * d) - problem.value(found.m - h * d)) / (2 * h)
    assert slope == pytest.approx(difference, rel=1e-5, abs=1e-9)
