"""The tumour model: seeds, diffusivity, treatments, and every derivative against differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import dolfinx
import numpy as np
import pytest
import torch
from mpi4py import MPI
from scipy.integrate import solve_ivp
from torch import Tensor
from torch.autograd import forward_ad

from solvers.errors import GliodeError
from solvers.fem.diffusion import Scheme
from solvers.fem.mesh import Domain, box, from_mesh, voxels
from solvers.fem.sampling import cell_means
from solvers.spaces import reduce
from tumour.anatomy import Anatomy
from tumour.growth import exponential, gompertz, logistic
from tumour.model import PARAMETERS, Seed, TumourModel, domain_of
from tumour.therapy import Radiotherapy, Resection, course

SELF, WORLD = MPI.COMM_SELF, MPI.COMM_WORLD
VALUES = {"D_white": 0.4, "D_grey": 0.08, "rho": 0.03, "x": 1.0, "y": -2.0, "z": 0.5, "age": 60.0}


def head(comm: MPI.Comm = SELF, spacing: tuple[float, float, float] = (2.0, 2.0, 3.0)) -> Domain:
    """A ball of voxels about the origin, white inside, grey outside, mixed between."""
    spacing_ = np.array(spacing)
    shape = np.ceil(2 * 13.0 / spacing_).astype(int)
    affine = np.diag([*spacing_, 1.0])
    affine[:3, 3] = -(shape - 1) / 2 * spacing_
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) * spacing_ + affine[:3, 3]
    r = np.linalg.norm(grid, axis=-1)
    white = np.clip((9.0 - r) / 3.0, 0.0, 1.0)
    return voxels(r < 13.0, affine, {"white": white, "grey": 1.0 - white}, comm)


def point(**changes: float) -> dict[str, Tensor]:
    return {k: torch.tensor(v, dtype=torch.float64) for k, v in {**VALUES, **changes}.items()}


def leaves(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.clone().requires_grad_() for k, v in values.items()}


# ---- Seeds and tissue -------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 2.0, 2.0), (4.0, 4.0, 4.0), (1.0, 1.5, 3.0)])
def test_the_seed_has_its_mass_and_variance_at_any_spacing(spacing: tuple[float, float, float]) -> None:
    """And wherever its centre lies between the vertices."""
    cells = tuple(int(round(48.0 / h)) for h in spacing)
    domain = box((48.0, 48.0, 48.0), (cells[0], cells[1], cells[2]), SELF)
    cell = {"white": torch.ones(domain.n_cells).double(), "grey": torch.zeros(domain.n_cells).double()}
    model = TumourModel(Domain(domain.mesh, domain.V, cell, domain.grid), seed=Seed(0.5, 3.0))
    for centre in ((24.0, 24.0, 24.0), (23.3, 24.9, 22.1)):
        u = model.seed_state(torch.tensor(centre, dtype=torch.float64))
        mass = 0.5 * (2 * math.pi * 9.0) ** 1.5
        # Sums over a grid are exact but for aliasing, exp(-2 (pi width / h)^2).
        tolerance = 3 * math.exp(-2 * (math.pi * 3.0 / max(spacing)) ** 2) + 1e-9
        assert domain.integral(u) == pytest.approx(mass, rel=tolerance)
        for axis in range(3):
            x = torch.from_numpy(domain.points[:, axis].copy())
            mean = domain.integral(u * x) / mass
            assert mean == pytest.approx(centre[axis], abs=30 * tolerance)
            assert domain.integral(u * (x - mean) ** 2) / mass == pytest.approx(9.0, rel=100 * tolerance)


def test_the_seed_on_a_turned_grid() -> None:
    """The voxel axes, not those of space, are the box's."""
    c, s = math.cos(0.5), math.sin(0.5)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.diag([1.0, 2.0, 3.0])
    affine[:3, 3] = -affine[:3, :3] @ np.array([17.5, 8.5, 5.5])
    mask = np.ones((36, 18, 12), dtype=bool)
    domain = voxels(mask, affine, {"white": mask * 1.0, "grey": mask * 0.0}, SELF)
    u = TumourModel(domain, seed=Seed(0.5, 2.5)).seed_state(torch.zeros(3, dtype=torch.float64))
    assert domain.integral(u) == pytest.approx(0.5 * (2 * math.pi * 6.25) ** 1.5, rel=1e-3)


def test_a_seed_too_narrow_for_the_grid_is_refused() -> None:
    with pytest.raises(
        GliodeError, match=r"seed.width: 0.8 mm is too narrow for a spacing of 3 mm; use more than 0.87"
    ):
        TumourModel(head(), seed=Seed(0.5, 0.8)).seed_state(torch.zeros(3, dtype=torch.float64))
    for bad in ({"amplitude": 0.0}, {"amplitude": 1.1}, {"width": -1.0}):
        with pytest.raises(GliodeError, match=r"seed\.(amplitude|width): "):
            Seed(**bad)


def test_diffusivity_is_monotone_between_the_tissues_and_exact_in_them() -> None:
    domain = head()
    D = TumourModel(domain).diffusivity(torch.tensor(0.4).double(), torch.tensor(0.08).double())
    white = domain.cell_data["white"]
    torch.testing.assert_close(D[white == 1], torch.full_like(D[white == 1], 0.4))
    torch.testing.assert_close(D[white == 0], torch.full_like(D[white == 0], 0.08))
    order = torch.argsort(white)
    assert (D[order].diff() >= -1e-15).all()
    # Between the bounds of all mixtures: harmonic and arithmetic means.
    mixed = (white > 0) & (white < 1)
    share = white[mixed]
    assert (D[mixed] < share * 0.4 + (1 - share) * 0.08).all()
    assert (D[mixed] > 1 / (share / 0.4 + (1 - share) / 0.08)).all()


def test_a_domain_of_an_anatomy() -> None:
    white, grey, fluid = (np.zeros((6, 5, 4)) for _ in range(3))
    white[1:4, 1:4], grey[4, 1:4], fluid[5] = 0.8, 0.6, 1.0
    grey[1:4, 1:4] = 0.1
    affine = np.diag([2.0, 1.0, 1.5, 1.0])
    domain = domain_of(Anatomy(white, grey, fluid, affine, None, "test"))
    assert domain.n_global == 5 * 4 * 5
    total = domain.cell_data["white"] + domain.cell_data["grey"]
    torch.testing.assert_close(total, torch.ones_like(total))
    assert set(domain.cell_data["white"].numpy().round(12)) == {0.0, round(0.8 / 0.9, 12)}


# ---- Growth -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", [exponential, logistic, gompertz])
def test_without_diffusion_every_vertex_grows_by_itself(law: Callable[[], Any]) -> None:
    model = TumourModel(head(), law(), step=10.0)
    parameters = point(D_white=1e-300, D_grey=1e-300)
    seed = model.seed_state(torch.stack([parameters[a] for a in "xyz"])).numpy()

    def rate(_: float, u: Any) -> Any:
        return 0.03 * model.law.rate(torch.from_numpy(u)).numpy()

    exact = solve_ivp(rate, (0, 60.0), seed, method="DOP853", rtol=1e-10, atol=1e-14).y[:, -1]
    np.testing.assert_allclose(model.states(parameters)[0], exact, rtol=2e-4, atol=1e-9)


def test_without_growth_the_mass_of_the_seed_is_kept() -> None:
    model = TumourModel(head())
    first, second = model.states(point(rho=0.0), visits=(0.0, 30.0))
    seed = model.domain.integral(model.seed_state(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)))
    for u in (first, second):
        assert model.domain.integral(u) == pytest.approx(seed, rel=1e-10)


def test_with_exponential_growth_the_mass_is_known() -> None:
    """int u grows as exp(rho t) whatever D is, also through splitting: a check of dates and durations."""
    model = TumourModel(head(), exponential(), step=7.0)
    states = model.states(point(age=50.0), visits=(0.0, 13.0, 60.0))
    seed = model.domain.integral(model.seed_state(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)))
    for u, days in zip(states, (50.0, 63.0, 110.0), strict=True):
        assert model.domain.integral(u) == pytest.approx(seed * math.exp(0.03 * days), rel=1e-10)


@pytest.mark.parametrize("scheme", ["rkl2", "sdirk2", "crank-nicolson", "implicit-euler"])
def test_schemes_agree_as_the_step_shrinks_and_keep_the_bounds(scheme: Scheme) -> None:
    domain = head()
    reference = TumourModel(domain, step=0.25).states(point())[0]
    u = TumourModel(domain, step=2.0, scheme=scheme, rtol=1e-12).states(point())[0]
    error = float((domain.mass * (u - reference) ** 2).sum() / (domain.mass * reference**2).sum()) ** 0.5
    assert error < (2e-2 if scheme == "implicit-euler" else 1e-3)
    assert float(u.min()) >= 0.0 and float(u.max()) <= 1.0


def test_checkpointing_and_the_number_of_steps() -> None:
    grads = []
    for checkpoint in (None, 3):
        model, at = TumourModel(head(), step=5.0, checkpoint=checkpoint), leaves(point())
        u = model.states(at, visits=(0.0, 20.0))[1]
        grads.append(torch.autograd.grad((u**2).sum(), list(at.values())))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-14)
    model = TumourModel(head(), step=5.0)
    assert [model.steps_for(days) for days in (5.0, 5.1, 0.2, 60.0, -60.0)] == [1, 2, 1, 12, 12]


def test_a_mesh_that_is_no_voxel_grid() -> None:
    """Tetrahedra take nodal seeds and the full quadrature, and end near the voxels' result."""
    mesh = dolfinx.mesh.create_box(SELF, [[-12.0] * 3, [12.0] * 3], [12] * 3)
    tetrahedra = from_mesh(mesh)
    cell = {
        "white": torch.ones(tetrahedra.n_cells).double(),
        "grey": torch.zeros(tetrahedra.n_cells).double(),
    }
    u = TumourModel(Domain(mesh, tetrahedra.V, cell)).states(point())[0]
    ones = np.ones((12, 12, 12))
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = -11.0
    bricks = voxels(ones > 0, affine, {"white": ones, "grey": 0 * ones}, SELF)
    expected = bricks.integral(TumourModel(bricks).states(point())[0])
    assert tetrahedra.integral(u) == pytest.approx(expected, rel=0.03)


# ---- Treatments -------------------------------------------------------------------------------------------


def test_radiotherapy_multiplies_by_the_linear_quadratic_survival() -> None:
    u = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    fraction = Radiotherapy(day=3.0, dose=1.8, alpha=0.03, beta=0.004)
    torch.testing.assert_close(fraction(u), u * math.exp(-(0.03 * 1.8 + 0.004 * 1.8**2)))
    with pytest.raises(GliodeError, match="must not be negative"):
        Radiotherapy(day=0.0, dose=-2.0)


def test_a_course_skips_weekends() -> None:
    days = [fraction.day for fraction in course(start=10.0, fractions=12)]
    assert days == [10, 11, 12, 13, 14, 17, 18, 19, 20, 21, 24, 25]


def test_treatments_act_at_their_dates() -> None:
    """Exponential growth commutes with everything, so the final mass tells which treatments were given."""
    domain = head()
    plain = domain.integral(TumourModel(domain, exponential()).states(point(), visits=(0.0, 30.0))[1])
    therapy = [
        *course(-20.0, 3),
        Radiotherapy(30.0),
        Radiotherapy(31.0),
        Radiotherapy(-80.0),
        Radiotherapy(0.0),
    ]
    model = TumourModel(domain, exponential(), therapy=therapy)
    first, second = (domain.integral(u) for u in model.states(point(), visits=(0.0, 30.0)))
    survival = math.exp(-(0.035 * 2 + 0.0035 * 4))
    # Given: three of the course, day 0 (seen by the first scan) and day 30; not days 31 and -80.
    assert second / plain == pytest.approx(survival**5, rel=1e-10)
    assert first * math.exp(0.03 * 30) == pytest.approx(plain * survival**4, rel=1e-10)


def test_resection_removes_what_it_should() -> None:
    domain = head()
    kept = torch.from_numpy((domain.points[:, 0] > 0.0) * 1.0)
    model = TumourModel(domain, therapy=[Resection(0.0, kept)])
    u = model.states(point())[0]
    assert float(u[kept == 0].abs().max()) == 0.0
    torch.testing.assert_close(u[kept == 1], TumourModel(domain).states(point())[0][kept == 1])
    with pytest.raises(GliodeError, match="one per dof of u"):
        Resection(0.0, kept[:-1])(u)
    with pytest.raises(GliodeError, match=r"values in \[0, 1\]"):
        Resection(0.0, 2 * kept)(u)


# ---- Derivatives ------------------------------------------------------------------------------------------


def observed(model: TumourModel, values: Mapping[str, Tensor]) -> Tensor:
    first, second = model.states(values, visits=(0.0, 20.0), age_steps=8)
    weights = torch.from_numpy(np.sin(model.domain.points[: model.domain.n_owned, 0]) + 1.5)
    return (weights * first**2).sum() + torch.cos(3 * second).sum()


THERAPY = [Radiotherapy(-13.0), Radiotherapy(8.0)]


@pytest.mark.parametrize("scheme", ["rkl2", "sdirk2"])
@pytest.mark.parametrize("name", PARAMETERS)
def test_gradient_and_tangent_against_differences(name: str, scheme: Scheme) -> None:
    model = TumourModel(head(), step=8.0, scheme=scheme, rtol=1e-13, therapy=THERAPY)
    at = leaves(point())
    gradients = dict(
        zip(PARAMETERS, torch.autograd.grad(observed(model, at), list(at.values())), strict=True)
    )
    h = 1e-4 * max(1.0, VALUES[name])

    def moved(step: float) -> float:
        return float(observed(model, point(**{name: VALUES[name] + step})))

    # Fourth order, so that the differences are good to eight digits.
    difference = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)
    assert float(gradients[name]) == pytest.approx(difference, rel=2e-7, abs=1e-8)
    with forward_ad.dual_level():
        dual = point()
        dual[name] = forward_ad.make_dual(dual[name], torch.ones((), dtype=torch.float64))
        tangent = forward_ad.unpack_dual(observed(model, dual)).tangent
    assert float(tangent) == pytest.approx(float(gradients[name]), rel=1e-9)


@pytest.mark.parametrize("checkpoint", [None, 3])
def test_hessian_of_all_parameters(checkpoint: int | None) -> None:
    """Reverse over reverse and forward over reverse against differences of the gradient."""
    model = TumourModel(head(), step=8.0, therapy=THERAPY, checkpoint=checkpoint)
    along = {k: 0.1 * v for k, v in VALUES.items()}

    def gradient(step: float) -> list[Tensor]:
        at = leaves(point(**{k: v + step * along[k] for k, v in VALUES.items()}))
        return list(torch.autograd.grad(observed(model, at), list(at.values())))

    h = 1e-4
    expected = [float(a - b) / (2 * h) for a, b in zip(gradient(h), gradient(-h), strict=True)]
    at = leaves(point())
    grads = torch.autograd.grad(observed(model, at), list(at.values()), create_graph=True)
    slope = torch.stack([g * d for g, d in zip(grads, along.values(), strict=True)]).sum()
    found = [float(g) for g in torch.autograd.grad(slope, list(at.values()))]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    with forward_ad.dual_level():
        at = leaves(point())
        dual = {k: forward_ad.make_dual(v, torch.tensor(along[k]).double()) for k, v in at.items()}
        grads = torch.autograd.grad(observed(model, dual), list(at.values()))
        found = [float(forward_ad.unpack_dual(g).tangent) for g in grads]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.mpi
def test_ranks_agree_with_one_process() -> None:
    results = []
    for comm in (SELF, WORLD):
        model = TumourModel(head(comm), step=8.0, therapy=THERAPY)
        at = leaves(point())
        u = model.states(at, visits=(0.0, 20.0))[1]
        value = reduce((model.domain.mass * u**2).sum(), comm)
        grads = torch.autograd.grad(value, list(at.values()))
        volume = cell_means(model.domain, u.detach())
        results.append([volume, float(value.detach()), [float(g) for g in grads]])
    for serial, parallel in zip(*results, strict=True):
        np.testing.assert_allclose(parallel, serial, rtol=1e-9, atol=1e-12)


# ---- What makes no sense ----------------------------------------------------------------------------------


def test_what_makes_no_sense_is_refused() -> None:
    domain = head()
    model = TumourModel(domain)
    with pytest.raises(GliodeError, match="cell data 'white' and 'grey'"):
        TumourModel(Domain(domain.mesh, domain.V, {}, domain.grid))
    with pytest.raises(GliodeError, match=r"step: 0.0 days must be positive"):
        TumourModel(domain, step=0.0)
    with pytest.raises(GliodeError, match=r"age: -3.0 days must be positive"):
        model.states(point(age=-3.0))
    with pytest.raises(GliodeError, match=r"parameters: \['rho'\] are missing"):
        model.states({k: v for k, v in point().items() if k != "rho"})
    for visits in ((10.0,), (0.0, 0.0), (0.0, 30.0, 20.0)):
        with pytest.raises(GliodeError, match="must start at day 0"):
            model.states(point(), visits=visits)
    with pytest.raises(GliodeError, match="D is not finite"):
        model.states(point(D_white=-0.3, D_grey=-0.1))
