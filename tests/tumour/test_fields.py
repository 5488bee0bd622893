"""Coefficient fields: the map against the parameters' own, derivatives, penalties, the search, two ranks."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import Tensor

from inverse.problem import LeastSquares
from solvers.errors import GliodeError
from solvers.fem import mesh
from solvers.fem.mesh import Domain
from solvers.spaces import Euclidean
from tumour.anatomy import Anatomy
from tumour.fields import (
    FARTHEST,
    Coefficients,
    FieldMap,
    Name,
    Reference,
    Start,
    smoothed_density,
    vertex_means,
)
from tumour.fields_search import EDGE, PULL, FieldSearch, FieldSettings, FoundFields, Penalty
from tumour.imaging import Modality
from tumour.model import Seed, TumourModel
from tumour.patients import Scan, scans_of
from tumour.patients import camera as look_at

SIDES = (11, 8, 1)  # a slab of voxels of 3 mm, white on the left, grey on the right
REFERENCE = Reference(0.3, 0.1, 0.03)
CENTRE = torch.tensor([12.0, 10.5, 0.0], dtype=torch.float64)
AGE, DAYS = 60.0, [0.0, 30.0]


def slab() -> Anatomy:
    white = np.zeros(SIDES)
    white[:7] = 1.0
    return Anatomy(white, 1.0 - white, np.zeros(SIDES), np.diag([3.0, 3.0, 3.0, 1.0]), None, "slab")


def model_on(comm: MPI.Comm = MPI.COMM_SELF) -> TumourModel:
    brain = slab()
    cells = {"white": brain.white, "grey": brain.grey}
    return TumourModel(mesh.voxels(brain.brain, brain.affine, cells, comm), seed=Seed(0.5, 4.0), step=20.0)


def micron(points: np.ndarray) -> list[list[int]]:
    found: list[list[int]] = np.rint(1000 * points).astype(int).tolist()
    return found


def tensors(values: dict[str, float]) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def departure(points: np.ndarray) -> Tensor:
    """Twice the reference's D in a disc beside the seed."""
    return torch.from_numpy(math.log(4.0) * (np.hypot(points[:, 0] - 20, points[:, 1] - 10.5) < 8))


def problem(
    of: tuple[Name, ...] = ("D",), comm: MPI.Comm = MPI.COMM_SELF, noise: float = 0.01, by: str = "vertex"
) -> tuple[FieldMap, Tensor]:
    """A map with noisy scans of a known departure, and that departure."""
    model, brain = model_on(comm), slab()
    coefficients = Coefficients(model, of, REFERENCE, by)  # type: ignore[arg-type]
    start = Start(model.seed_state(CENTRE), -AGE)
    true = departure(model.domain.points[: model.domain.n_owned])
    whole = Coefficients(model, ("D",), REFERENCE)
    modality = Modality("density", noise)
    with torch.no_grad():
        D, rho = whole.D(true), whole.rho(None)
        states = model.evolve(start.u, D, rho, torch.tensor(AGE, dtype=torch.float64), DAYS)
        scans = scans_of(states, look_at(model, brain, brain.brain), brain, DAYS, [modality], 3)
    return FieldMap(coefficients, start, scans, brain, brain.brain), true


def test_no_departure_is_the_reference_and_tissues_are_the_parameters() -> None:
    """By tissue the images are those of `TumourModel.states` with the tissues' D; by vertex 0 likewise."""
    forward, _ = problem(by="tissue")
    values = {"D_white": 0.3 * math.exp(0.4), "D_grey": 0.1 * math.exp(-0.7), "rho": 0.03, "age": AGE}
    values |= dict(zip("xyz", CENTRE.tolist(), strict=True))
    exact = forward.model.states(tensors(values), DAYS)
    found = forward.states(torch.tensor([0.4, -0.7], dtype=torch.float64))
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-14)
    values |= {"D_white": 0.3, "D_grey": 0.1}
    exact = forward.model.states(tensors(values), DAYS)
    nodal = Coefficients(forward.model, ("rho", "D"), REFERENCE)
    assert nodal.of == ("D", "rho")
    fields = FieldMap(nodal, forward.start, forward.scans, slab(), slab().brain)
    zero = torch.zeros(2 * nodal.size, dtype=torch.float64)
    torch.testing.assert_close(fields.states(zero), exact, rtol=1e-12, atol=1e-14)


def test_a_constant_departure_by_vertex_is_one_by_tissue() -> None:
    forward, _ = problem(("D", "rho"))
    tissue = Coefficients(forward.model, ("D", "rho"), REFERENCE, "tissue")
    m = torch.tensor([0.3, 0.3, -0.2, -0.2], dtype=torch.float64)
    everywhere = torch.cat(
        [torch.full((forward.coefficients.size,), v, dtype=torch.float64) for v in (0.3, -0.2)]
    )
    coefficients = forward.coefficients
    for one, other in ((tissue, m), (coefficients, everywhere)):
        parts = one.parts(other)
        torch.testing.assert_close(one.D(parts["D"]), coefficients.D_reference * math.exp(0.3))
        rho = one.rho(parts["rho"])
        torch.testing.assert_close(rho, torch.full_like(rho, 0.03 * math.exp(-0.2)))


@pytest.mark.parametrize("by", ["vertex", "tissue"])
def test_gradient_and_gauss_newton_against_differences(by: str) -> None:
    forward, _ = problem(("D", "rho"), by=by)
    space = forward.coefficients.space(6.0)
    at = 0.2 * torch.sin(torch.arange(space.size, dtype=torch.float64))
    d = torch.cos(3 * torch.arange(space.size, dtype=torch.float64))
    ours = LeastSquares(space, forward, forward.data, forward.noise)
    h = 1e-5
    difference = (ours.value(at + h * d) - ours.value(at - h * d)) / (2 * h)
    here = ours.evaluate(at)
    assert space.pair(here.gradient(), d) == pytest.approx(difference, rel=1e-6)
    slope = (ours.residual(at + h * d) - ours.residual(at - h * d)) / (2 * h)
    torch.testing.assert_close(ours.jvp(at, d), slope, rtol=1e-5, atol=1e-5 * float(slope.abs().max()))
    assert space.pair(here.gauss_newton_action(d), d) == pytest.approx(float(slope @ slope), rel=1e-6)


def test_beyond_the_farthest_departure_the_map_is_not_a_number() -> None:
    forward, _ = problem()
    m = forward.coefficients.space().zeros()
    m[0] = FARTHEST + 0.1
    assert not torch.isfinite(forward(m)).any()


def test_missing_slices_and_a_missing_modality() -> None:
    """What a scan does not cover leaves the data; the other entries stay what they were."""
    forward, true = problem()
    brain = slab()
    mask = brain.brain.copy()
    mask[:5] = False
    first, second = forward.scans
    outline = Scan(30.0, Modality("oedema"), second.values, brain.brain, 0.05)
    scans = [first, replace(second, mask=mask), outline]
    partial = FieldMap(forward.coefficients, forward.start, scans, brain, brain.brain)
    count = int(brain.brain.sum())
    sizes = [count, int(mask.sum()), count]
    images, whole = partial(true).split(sizes), forward(true).split(count)
    torch.testing.assert_close(images[0], whole[0])
    torch.testing.assert_close(images[1], whole[1][torch.from_numpy(mask[brain.brain])])
    assert 0.0 < float(images[2].min()) < 0.2 and float(images[2].max()) > 0.9
    empty = replace(second, mask=np.zeros_like(mask))
    with pytest.raises(GliodeError, match=r"scan of day 30 \(density\): covers no voxel"):
        FieldMap(forward.coefficients, forward.start, [first, empty], brain, brain.brain)


def test_total_variation_is_the_perimeter_times_the_jump() -> None:
    """Of a jump across a straight edge: its length times its height, up to EDGE; and what H1 is."""
    forward, _ = problem()
    coefficients = forward.coefficients
    domain = coefficients.domain
    a = torch.from_numpy((domain.points[: domain.n_owned, 0] > 15.0) * 1.5)
    slope, face, volume = 1.5 / 3.0, 24.0 * 3.0, 24.0 * 3.0 * 33.0  # one layer of cells carries the jump
    pull = PULL / 2 * float((domain.mass * a * a).sum())
    tv = float(Penalty(coefficients, "tv", 20.0, 1.0).weighted(2.0)(a)) / 2 - pull
    assert tv == pytest.approx(face * 3.0 * math.hypot(slope, EDGE) + (volume - face * 3.0) * EDGE, rel=1e-10)
    h1 = float(Penalty(coefficients, "h1", 20.0, 1.0).weighted(2.0)(a)) / 2
    expected = 0.5 * (face * 3.0 * slope**2 + float((domain.mass * a * a).sum()) / 400.0)
    assert h1 == pytest.approx(expected, rel=1e-10)


def test_the_metric_of_total_variation_is_near_its_lagged_second_derivative() -> None:
    """In any direction within a factor of 2: one weight a cell for one a point."""
    forward, _ = problem()
    tv = Penalty(forward.coefficients, "tv", 20.0, 1.0)
    generator = torch.Generator().manual_seed(4)
    a = 0.4 * torch.randn(forward.coefficients.size, dtype=torch.float64, generator=generator)
    space = tv.space(a)
    torch.testing.assert_close(space.riesz(space.gram(a)), a, rtol=1e-8, atol=1e-8)
    leaf = a.clone().requires_grad_()
    (slope,) = torch.autograd.grad(tv.weighted(1.0)(leaf), leaf, create_graph=True)
    for _ in range(5):
        d = torch.randn(len(a), dtype=torch.float64, generator=generator)
        (action,) = torch.autograd.grad(slope, leaf, d, retain_graph=True)
        assert 0.5 < float(action @ d) / space.inner(d, d) < 2.0


@pytest.mark.parametrize("kind", ["h1", "tv"])
def test_the_search_meets_the_discrepancy_at_a_stationary_point(kind: str) -> None:
    forward, true = problem()
    search = FieldSearch(forward, FieldSettings(kind, tau=1.05))  # type: ignore[arg-type]
    found = search.run()
    assert found.met and found.residual_norm == pytest.approx(1.05 * math.sqrt(found.data), rel=2e-3)
    space, penalty = search.penalty.space(found.m), search.penalty.weighted(found.alpha)
    ours = LeastSquares(space, forward, forward.data, forward.noise, penalty)
    start = space.dual_norm(ours.evaluate(torch.zeros_like(found.m)).gradient())
    assert space.dual_norm(ours.evaluate(found.m).gradient()) < 0.02 * start
    domain = forward.model.domain
    before = domain.integral(true.square())
    assert domain.integral((found.m - true).square()) < 0.6 * before
    inside, outside = found.m[true > 0].mean(), found.m[true == 0].mean()
    assert inside > outside + 0.5


def test_few_numbers_by_tissue_are_found_with_a_prior() -> None:
    """The same search as for fields; the truth has the reference's tissues but for D in the white matter."""
    forward, _ = problem(by="tissue")
    truth = torch.tensor([0.5, 0.0], dtype=torch.float64)
    with torch.no_grad():
        forward.data = forward(truth)
    found = FieldSearch(forward, FieldSettings()).run()
    assert isinstance(forward.coefficients.space().spaces["D"], Euclidean)
    assert found.alpha == 1.0 and float((found.m - truth).abs().max()) < 0.02


def test_a_stopped_search_goes_on_to_the_same_numbers() -> None:
    forward, _ = problem()
    settings = FieldSettings("tv", tau=1.3, max_iterations=8)
    whole = FieldSearch(forward, settings).run()
    kept: dict[str, np.ndarray] = {}

    class Stopped(Exception):
        pass

    def save(memory: dict[str, np.ndarray]) -> None:
        kept.update(memory)
        if len(kept) > 8:
            raise Stopped

    with pytest.raises(Stopped):
        FieldSearch(forward, settings, save).run()
    again = FieldSearch(forward, settings, resume=kept).run()
    assert again.alpha == pytest.approx(whole.alpha, rel=1e-3)
    torch.testing.assert_close(again.m, whole.m, rtol=0, atol=1e-3)
    assert again.counts["forward"] < whole.counts["forward"]


@pytest.mark.parametrize("kind", ["h1", "tv"])
def test_the_posterior_against_dense_linear_algebra(kind: str) -> None:
    forward, _ = problem()
    search = FieldSearch(forward, FieldSettings(kind))  # type: ignore[arg-type]
    m = 0.3 * torch.sin(0.1 * torch.arange(forward.coefficients.size, dtype=torch.float64))
    found = FoundFields(m, 2.0, "", True, [], 1.0, 1, {}, [])
    posterior = search.posterior(found, 0.01)
    ours = LeastSquares(forward.coefficients.space(), forward, forward.data, forward.noise)
    J = ours.jacobian(m)
    space = search.penalty.space(m)
    units = torch.eye(len(m), dtype=torch.float64)
    G = found.alpha * torch.stack([space.gram(unit) for unit in units], 1)
    exact = torch.linalg.inv(J.mT @ J + G).diagonal()
    torch.testing.assert_close(posterior.variance(), exact, rtol=2e-2, atol=0.0)
    prior = search.penalty.prior(m, found.alpha)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([prior.sample(generator) for _ in range(2000)])
    torch.testing.assert_close(draws.square().mean(0), torch.linalg.inv(G).diagonal(), rtol=0.2, atol=0.0)


def test_a_start_from_a_noisy_density() -> None:
    """Near the density where there is much, nothing where there is none."""
    forward, _ = problem(noise=0.05)
    model, brain = forward.model, slab()
    with torch.no_grad():
        u = forward.states(0 * departure(model.domain.points[: model.domain.n_owned]))[0]
    scan = scans_of([u], look_at(model, brain, brain.brain), brain, [0.0], [Modality("density", 0.05)], 1)[0]
    found = smoothed_density(model.domain, brain, scan)
    away = (found - u) / u.max()
    assert float(away.abs().max()) < 0.2 and float(away.square().mean().sqrt()) < 0.07
    assert not found[u < 1e-4].any() and model.domain.integral(found) == pytest.approx(
        model.domain.integral(u), rel=0.1
    )


def test_vertex_means_keep_integrals() -> None:
    domain: Domain = model_on().domain
    values = torch.linspace(0.0, 1.0, domain.n_cells, dtype=torch.float64)
    means = vertex_means(domain, values)
    assert domain.integral(means) == pytest.approx(float(values @ domain.cell_volumes), rel=1e-12)
    assert float(vertex_means(domain, torch.ones_like(values)).sub(1).abs().max()) < 1e-14


def test_bad_input() -> None:
    model = model_on()
    with pytest.raises(GliodeError, match="give D, rho, or both, each once"):
        Coefficients(model, ("D", "D"), REFERENCE)
    with pytest.raises(GliodeError, match=r"reference.rho: -1 must be positive"):
        Reference(0.3, 0.1, -1)
    forward, _ = problem()
    brain = slab()
    with pytest.raises(GliodeError, match="day 0 is not before the first scan, day 0"):
        FieldMap(forward.coefficients, Start(forward.start.u, 0.0), forward.scans, brain, brain.brain)
    with pytest.raises(GliodeError, match="no scan after the start"):
        FieldMap(forward.coefficients, forward.start, [], brain, brain.brain)
    for bad in ({"kind": "l1"}, {"length": 0.0}, {"spread": math.inf}, {"tau": 1.0}, {"max_iterations": 0}):
        with pytest.raises(GliodeError, match=r"^fields"):
            FieldSettings(**bad)  # type: ignore[arg-type]


@pytest.mark.mpi
@pytest.mark.parametrize("kind", ["h1", "tv"])
def test_two_ranks_find_what_one_finds(kind: str) -> None:
    settings = FieldSettings(kind, max_iterations=4)  # type: ignore[arg-type]
    serial, shared = problem(("D", "rho")), problem(("D", "rho"), MPI.COMM_WORLD)
    searches = [FieldSearch(forward, settings) for forward, _ in (serial, shared)]
    one, two = (
        search.solve(3.0, search.penalty.space(m).zeros())
        for search in searches
        for m in [torch.zeros(2 * search.forward.coefficients.size, dtype=torch.float64)]
    )
    assert two.residual_norm == pytest.approx(one.residual_norm, rel=1e-8)
    for name, part in shared[0].coefficients.parts(two.m).items():
        domain, other = shared[0].model.domain, serial[0].model.domain
        whole = serial[0].coefficients.parts(one.m)[name]
        # Whole microns name a vertex on any partition.
        at = {tuple(p): float(v) for p, v in zip(micron(other.points), whole, strict=True)}
        expected = [at[tuple(p)] for p in micron(domain.points[: domain.n_owned])]
        np.testing.assert_allclose(part.numpy(), expected, rtol=0, atol=1e-5)
