"""Diffusion steps: what every scheme keeps, their exactness on one mode, and their derivatives."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, get_args

import dolfinx
import numpy as np
import pytest
import torch
from mpi4py import MPI
from numpy.polynomial import Legendre
from scipy.linalg import eigh
from torch import Tensor
from torch.autograd import forward_ad

from solvers.errors import GliodeError
from solvers.fem.diffusion import DiffusionStep, Scheme
from solvers.fem.export import export
from solvers.fem.mesh import Domain, from_mesh, interval, voxels
from solvers.fem.operators import DiffusionOperator
from solvers.spaces import reduce, replicate

SELF, WORLD = MPI.COMM_SELF, MPI.COMM_WORLD
SCHEMES = get_args(Scheme)


def bricks(comm: MPI.Comm = SELF) -> Domain:
    """Voxels of 1 x 1 x 3 mm with a notch."""
    mask = np.ones((7, 6, 4), dtype=bool)
    mask[4:, 4:] = False
    return voxels(mask, np.diag([1.0, 1.0, 3.0, 1.0]), comm=comm)


def tetrahedra(comm: MPI.Comm = SELF) -> Domain:
    none = dolfinx.mesh.GhostMode.none
    return from_mesh(dolfinx.mesh.create_box(comm, [[0, 0, 0], [5, 4, 4]], [4, 3, 3], ghost_mode=none))


def voxel(comm: MPI.Comm = SELF) -> Domain:
    """A single one: with more ranks there are some that own nothing."""
    return voxels(np.ones((1, 1, 1), dtype=bool), np.diag([1.0, 2.0, 3.0, 1.0]), comm=comm)


def positions(domain: Domain) -> Any:
    return domain.mesh.geometry.x[domain.mesh.geometry.dofmap[: domain.n_cells]].mean(axis=1)


def diffusivity(domain: Domain) -> Tensor:
    """A factor of 20 between cells, by position, so that it does not depend on the partition."""
    x = positions(domain)
    return torch.from_numpy(np.where(np.sin(3 * x[:, 0] + x[:, 1] ** 2 - x[:, 2]) > 0, 0.65, 0.03))


def make(
    domain: Domain, scheme: Scheme, rtol: float = 1e-13, margin: float = 1e-7
) -> tuple[DiffusionStep, Tensor]:
    operator = DiffusionOperator(domain, rtol=rtol)
    return DiffusionStep(operator, scheme, margin), operator.conductances(diffusivity(domain))


def smooth(domain: Domain) -> Tensor:
    x = domain.points[: domain.n_owned]
    return torch.from_numpy(np.exp(-((x - [2.0, 2.0, 3.0]) ** 2).sum(1) / 6.0))


# ---- What every scheme keeps ------------------------------------------------------------------------------


@pytest.mark.parametrize("domain", [bricks, tetrahedra])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_mass_is_kept(scheme: Scheme, domain: Callable[[], Domain]) -> None:
    mesh = domain()
    step, w = make(mesh, scheme)
    u = smooth(mesh)
    before = mesh.integral(u)
    for dt in (0.3, 5.0, 40.0):
        u = step(u, dt, w)
        assert mesh.integral(u) == pytest.approx(before, rel=1e-10)


@pytest.mark.parametrize("dt", [0.5, 20.0, 2000.0])
@pytest.mark.parametrize("seed", ["voxel", "half", "corner"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_bounds_are_kept_by_steep_seeds_and_long_steps(scheme: Scheme, seed: str, dt: float) -> None:
    domain = bricks()
    step, w = make(domain, scheme, margin=1e-12)
    x = domain.points
    seeds = {
        "voxel": (np.abs(x - [2.5, 2.5, 4.5]).max(1) < 0.6) * 1.0,
        "half": (x[:, 0] < 2.0) * 1.0,
        "corner": 1.0 - (x.max(1) < 0.0),
    }
    u = torch.from_numpy(seeds[seed])
    assert u.min() == 0.0 and u.max() == 1.0
    for _ in range(3):
        u = step(u, dt, w)
        assert float(u.min()) >= -1e-11 and float(u.max()) <= 1.0 + 1e-11


def test_without_the_fallback_the_second_order_schemes_leave_the_bounds() -> None:
    """So the test above tests something; and the Legendre polynomial needs it least."""
    lowest = {}
    domain = bricks()
    u = torch.from_numpy((np.abs(domain.points - [2.5, 2.5, 4.5]).max(1) < 0.6) * 1.0)
    for scheme in SCHEMES:
        step, w = make(domain, scheme, margin=np.inf)
        lowest[scheme] = min(float(step(u, dt, w).min()) for dt in (0.5, 2.0, 20.0, 200.0))
        assert step.fallbacks == 0
    assert lowest["implicit-euler"] >= -1e-12
    assert lowest["sdirk2"] < -1e-2 and lowest["crank-nicolson"] < -1e-1
    assert -6e-2 < lowest["rkl2"] < 0.0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_constant_stays(scheme: Scheme) -> None:
    domain = tetrahedra()
    step, w = make(domain, scheme)
    u = torch.full((domain.n_owned,), 0.4, dtype=torch.float64)
    torch.testing.assert_close(step(u, 30.0, w), u, rtol=0, atol=1e-12)


# ---- One mode at a time -----------------------------------------------------------------------------------


def modes(domain: Domain, step: DiffusionStep, w: Tensor) -> tuple[Any, Any]:
    """Eigenvalues and vectors of K u = lambda M u, the stiffness built from its action on unit vectors."""
    unit = torch.eye(domain.n_owned, dtype=torch.float64)
    K = np.stack([step.operator.stiffness(w, e).numpy() for e in unit])
    values, vectors = eigh(K, np.diag(domain.mass))
    return values, vectors


def factor(scheme: Scheme, z: Any, largest: float) -> Any:
    """What the scheme multiplies a mode exp(-z) by; largest: the bound of z the stages are chosen by."""
    gamma = 1 - 1 / np.sqrt(2)
    if scheme == "sdirk2":
        return (1 - (1 - 2 * gamma) * z) / (1 + gamma * z) ** 2
    if scheme == "crank-nicolson":
        return (1 - z / 2) / (1 + z / 2)
    if scheme == "implicit-euler":
        return 1 / (1 + z)
    s = 2
    while (s * s + s - 2) / 2 * (0.95 if s % 2 == 0 else 1.0) < largest * (1 - 1e-12):
        s += 1
    b = (s * s + s - 2) / (2 * s * (s + 1))
    return 1 - b + b * Legendre.basis(s)(1 - 4 * z / (s * s + s - 2))


@pytest.mark.parametrize("dt", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_mode_is_multiplied_by_the_scheme_s_factor(scheme: Scheme, dt: float) -> None:
    domain = bricks()
    step, w = make(domain, scheme, margin=np.inf)
    values, vectors = modes(domain, step, w)
    ends = torch.cat([step.operator.conductances.first, step.operator.conductances.second])
    bound = 2 * float(
        (torch.zeros(domain.n_owned).double().index_add(0, ends, w.repeat(2)) / domain.mass).max()
    )
    assert values[-1] <= bound
    u = torch.rand(domain.n_owned, dtype=torch.float64)
    coefficients = vectors.T @ (domain.mass * u).numpy()
    expected = vectors @ (factor(scheme, dt * values, dt * bound) * coefficients)
    np.testing.assert_allclose(step(u, dt, w), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("scheme", "order"), [("rkl2", 2), ("sdirk2", 2), ("crank-nicolson", 2), ("implicit-euler", 1)]
)
def test_order_against_the_exponential(scheme: Scheme, order: int) -> None:
    domain = bricks()
    step, w = make(domain, scheme, margin=np.inf)
    values, vectors = modes(domain, step, w)
    start, errors = smooth(domain), []
    exact = vectors @ (np.exp(-4.0 * values) * (vectors.T @ (domain.mass * start).numpy()))
    for steps in (32, 64, 128):
        u = start
        for _ in range(steps):
            u = step(u, 4.0 / steps, w)
        errors.append(float(np.abs(u.numpy() - exact).max()))
    slopes = [np.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert slopes[-1] == pytest.approx(order, abs=0.1)


def test_stages_grow_with_the_root_of_the_step() -> None:
    domain = bricks()
    step, w = make(domain, "rkl2", margin=np.inf)
    used = []
    for dt in (100.0, 400.0, 1600.0):
        step.operator.count.iterations = 0
        step(smooth(domain), dt, w)
        used.append(step.operator.count.iterations)
    assert used == sorted(used) and used[2] / used[0] == pytest.approx(4.0, rel=0.15)


# ---- Derivatives ------------------------------------------------------------------------------------------


def loss(u: Tensor) -> Tensor:
    return (u**3).sum() + torch.cos(u).sum()


def two_steps(step: DiffusionStep, u: Tensor, w: Tensor, dt: Tensor) -> Tensor:
    return step(step(u, dt / 2, w), dt, w)


@pytest.fixture(params=[(s, d) for s in SCHEMES for d in ("bricks", "tetrahedra")], ids=lambda p: " ".join(p))
def problem(request: pytest.FixtureRequest) -> tuple[Callable[..., Tensor], list[Tensor], list[Tensor]]:
    """A map of (u, w, dt), a point and a direction; the field is smooth, so that no step falls back."""
    scheme, name = request.param
    domain = {"bricks": bricks, "tetrahedra": tetrahedra}[name]()
    step, w = make(domain, scheme, rtol=1e-14, margin=np.inf)
    point = [smooth(domain), w, torch.tensor(3.1, dtype=torch.float64)]
    generator = torch.Generator().manual_seed(5)
    along = [torch.rand(x.shape, generator=generator, dtype=torch.float64) * x for x in point]
    return lambda u, w, dt: two_steps(step, u, w, dt), point, along


def leaves(point: list[Tensor]) -> list[Tensor]:
    return [x.clone().requires_grad_() for x in point]


def test_tangent_and_adjoint_agree(problem: Any) -> None:
    run, point, along = problem
    with forward_ad.dual_level():
        out = run(*(forward_ad.make_dual(x, d) for x, d in zip(point, along, strict=True)))
        tangent = forward_ad.unpack_dual(out).tangent
    g = torch.cos(torch.arange(len(point[0]), dtype=torch.float64))
    at = leaves(point)
    grads = torch.autograd.grad(run(*at), at, g)
    assert float(tangent @ g) == pytest.approx(
        sum(float((a * b).sum()) for a, b in zip(along, grads, strict=True)), rel=1e-10
    )


@pytest.mark.parametrize("index", range(3), ids=["state", "conductances", "dt"])
def test_taylor_remainders_and_each_tangent(problem: Any, index: int) -> None:
    run, point, along = problem
    at = leaves(point)
    gradient = torch.autograd.grad(loss(run(*at)), at)[index]

    def moved(h: float) -> list[Tensor]:
        return [x + h * along[index] if k == index else x for k, x in enumerate(point)]

    base, slope = loss(run(*point)), (gradient * along[index]).sum()
    sizes = (1e-2, 5e-3, 2.5e-3)  # small enough to keep the number of stages
    remainders = [abs(float(loss(run(*moved(h))) - base - h * slope)) for h in sizes]
    slopes = [np.log2(a / b) for a, b in itertools.pairwise(remainders)]
    np.testing.assert_allclose(slopes[-1], 2.0, atol=0.05)
    with forward_ad.dual_level():
        at = [forward_ad.make_dual(x, along[k]) if k == index else x for k, x in enumerate(point)]
        tangent = forward_ad.unpack_dual(loss(run(*at))).tangent
    assert float(tangent) == pytest.approx(float(slope), rel=1e-10)


def test_second_derivatives_in_all_orders_of_modes(problem: Any) -> None:
    run, point, along = problem

    def gradient(h: float) -> list[Tensor]:
        at = leaves([x + h * d for x, d in zip(point, along, strict=True)])
        return list(torch.autograd.grad(loss(run(*at)), at))

    h = 1e-4
    expected = [(a - b) / (2 * h) for a, b in zip(gradient(h), gradient(-h), strict=True)]
    at = leaves(point)
    grads = torch.autograd.grad(loss(run(*at)), at, create_graph=True)
    slope = sum((g * d).sum() for g, d in zip(grads, along, strict=True))
    reverse_over_reverse = torch.autograd.grad(slope, at)
    with forward_ad.dual_level():
        at = leaves(point)
        value = loss(run(*(forward_ad.make_dual(x, d) for x, d in zip(at, along, strict=True))))
        grads = torch.autograd.grad(value, at, create_graph=True)
        forward_over_reverse = [forward_ad.unpack_dual(g).tangent for g in grads]
        reverse_over_forward = torch.autograd.grad(forward_ad.unpack_dual(value).tangent, at)
    for found in (reverse_over_reverse, forward_over_reverse, reverse_over_forward):
        for one, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(one, reference, rtol=1e-5, atol=1e-6 * float(reference.abs().max()))


def test_the_gradient_of_the_fallback_is_that_of_the_branch_taken() -> None:
    domain = bricks()
    step, w = make(domain, "rkl2", rtol=1e-14, margin=1e-12)
    u = torch.from_numpy((np.abs(domain.points - [2.5, 2.5, 4.5]).max(1) < 0.6) * 1.0)
    at = w.clone().requires_grad_()
    out = step(u, 20.0, at)
    assert step.fallbacks == 1
    (gradient,) = torch.autograd.grad(loss(out), at)
    euler, _ = make(domain, "implicit-euler", rtol=1e-14)
    expected = loss(euler(euler(u, 10.0, at), 10.0, at))
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, at)[0], rtol=1e-9, atol=1e-12)


# ---- What cannot be solved --------------------------------------------------------------------------------


def test_what_makes_no_sense_is_refused() -> None:
    domain = bricks()
    operator = DiffusionOperator(domain)
    step, u = DiffusionStep(operator), smooth(domain)
    D = diffusivity(domain)
    with pytest.raises(GliodeError, match="scheme: 'euler' is not one of rkl2, sdirk2"):
        DiffusionStep(operator, "euler")  # type: ignore[arg-type]
    with pytest.raises(GliodeError, match="D is negative"):
        step(u, 1.0, operator.conductances(-D))
    with pytest.raises(GliodeError, match=r"a step of -1\.0 days runs backwards"):
        step(u, -1.0, operator.conductances(D))
    with pytest.raises(GliodeError, match=r"needs \d+ stages on this mesh .* choose the scheme sdirk2"):
        step(u, 1e9, operator.conductances(D))
    bad = operator.conductances(D)
    bad[3] = torch.nan
    for scheme in SCHEMES:
        with pytest.raises(GliodeError, match="not finite"):
            DiffusionStep(operator, scheme)(u, 1.0, bad)


def test_a_change_of_w_in_place_is_seen() -> None:
    """Matrices and bounds are kept between steps; what is kept must not outlive the values."""
    domain = interval(4.0, 8, SELF)
    for scheme in SCHEMES:
        step = DiffusionStep(DiffusionOperator(domain, rtol=1e-13), scheme, margin=np.inf)
        w = step.operator.conductances(torch.full((8,), 0.1, dtype=torch.float64))
        u = domain.interpolate(lambda x: np.cos(np.pi * x[:, 0] / 4))
        step(u, 1.0, w)
        w.mul_(30.0)
        other = DiffusionStep(DiffusionOperator(domain, rtol=1e-13), scheme, margin=np.inf)
        torch.testing.assert_close(step(u, 1.0, w), other(u, 1.0, w.clone()), rtol=1e-10, atol=1e-12)


# ---- Ranks ------------------------------------------------------------------------------------------------


def gathered(comm: MPI.Comm, points: Any, values: Tensor) -> Any:
    """The values of all ranks in the order of their points."""
    every = np.concatenate(comm.allgather(points[: len(values)].round(9) + 0.0))
    return np.concatenate(comm.allgather(values.detach().numpy()))[np.lexsort(every.T)]


@pytest.mark.mpi
@pytest.mark.parametrize("make_domain", [bricks, tetrahedra, voxel])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_ranks_agree_with_one_process(scheme: Scheme, make_domain: Callable[[MPI.Comm], Domain]) -> None:
    """States, gradients, tangents and second derivatives on all ranks against the same on this rank alone."""
    results = []
    for comm in (SELF, WORLD):
        domain = make_domain(comm)
        operator = DiffusionOperator(domain, rtol=1e-13)
        step = DiffusionStep(operator, scheme, margin=np.inf)
        u, D = smooth(domain).requires_grad_(), diffusivity(domain).requires_grad_()
        dt = torch.tensor(3.1, dtype=torch.float64, requires_grad=True)
        out = two_steps(step, u, operator.conductances(D), replicate(dt, comm))
        value = reduce((domain.mass * out**2).sum(), comm)
        grads = torch.autograd.grad(value, (u, D, dt), create_graph=True)
        x = torch.from_numpy(domain.points[: domain.n_owned])
        slope = reduce((x[:, 0] * grads[0]).sum() + grads[1].sum(), comm) + grads[2]
        second = torch.autograd.grad(slope, (u, D, dt))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(D.detach(), torch.ones_like(D))
            later = forward_ad.make_dual(dt.detach(), torch.tensor(0.5, dtype=torch.float64))
            along = two_steps(step, u.detach(), operator.conductances(dual), replicate(later, comm))
            tangent = forward_ad.unpack_dual(along).tangent
        fields = [gathered(comm, domain.points, t) for t in (out, grads[0], second[0], tangent)]
        cells = [gathered(comm, positions(domain), t) for t in (grads[1], second[1])]
        results.append([*fields, *cells, grads[2].detach().numpy(), second[2].numpy()])
    for serial, parallel in zip(*results, strict=True):
        np.testing.assert_allclose(parallel, serial, rtol=1e-9, atol=1e-9 * np.abs(serial).max())
    assert domain.integral(out.detach()) == pytest.approx(domain.integral(smooth(domain)), rel=1e-10)


@pytest.mark.mpi
@pytest.mark.parametrize("make_domain", [bricks, voxel])
@pytest.mark.parametrize("scheme", ["rkl2", "sdirk2"])
def test_a_change_on_one_rank_is_one_on_all(
    scheme: Scheme, make_domain: Callable[[MPI.Comm], Domain]
) -> None:
    """D changes in the cells of one rank alone, one operator: no rank keeps its matrix, or its bound."""
    results = []
    for comm in (SELF, WORLD):
        domain = make_domain(comm)
        operator = DiffusionOperator(domain, rtol=1e-13)
        step, D, found = DiffusionStep(operator, scheme), diffusivity(domain), []
        first = torch.from_numpy((domain.cell_numbers == 0).astype(np.float64))
        for factor in (0.0, 3.0, 0.0):
            found.append(step(smooth(domain), 0.4, operator.conductances(D + factor * first)))
        assert not WORLD.allreduce(torch.equal(found[0], found[1]), op=MPI.LAND)
        results.append([gathered(comm, domain.points, u) for u in found])
    for serial, parallel in zip(*results, strict=True):
        np.testing.assert_allclose(parallel, serial, rtol=1e-9, atol=1e-10)


@pytest.mark.mpi
@pytest.mark.parametrize("tensor", [False, True])
def test_a_mesh_smaller_than_the_ranks_is_exported(tensor: bool) -> None:
    ours, theirs = (export(voxel(comm), "one", tensor) for comm in (WORLD, SELF))
    assert ours.conductances is not None and theirs.conductances is not None
    assert isinstance(ours.mass, Tensor) and isinstance(theirs.mass, Tensor)
    torch.testing.assert_close(ours.mass, theirs.mass)
    torch.testing.assert_close(ours.conductances.table, theirs.conductances.table)
    assert torch.equal(ours.conductances.first, theirs.conductances.first)


@pytest.mark.mpi
def test_a_number_that_is_none_on_one_rank_stops_all() -> None:
    operator = DiffusionOperator(bricks(WORLD))
    D = diffusivity(operator.domain)
    if WORLD.rank == 0:
        D[0] = np.nan
    with pytest.raises(GliodeError, match="not finite"):
        operator.matrix(operator.conductances(D), 0.5)
