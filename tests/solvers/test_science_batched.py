"""The batched Legendre step on both operators: against single finite-element steps and dense polynomials."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dolfinx
import numpy as np
import pytest
import torch
from mpi4py import MPI
from numpy.polynomial import Legendre
from torch import Tensor
from torch.autograd import forward_ad

from solvers.errors import GliodeError
from solvers.fem.legendre import LegendreFlow
from solvers.fem.mesh import Domain, from_mesh, voxels
from solvers.fem.operators import DiffusionOperator
from solvers.node.science import lanes
from solvers.node.science.batched import BatchedFlow
from solvers.node.science.lanes import Lanes, logistic, width
from solvers.node.science.voxels import VoxelOperator
from solvers.operators import mixture, monomials
from solvers.semidiscrete import Grid

Kind = str
KINDS = ("lanes", "voxels")


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def bricks() -> Domain:
    """Voxels of 1 x 1 x 3 mm with a notch."""
    mask = np.ones((5, 4, 3), dtype=bool)
    mask[3:, 3:] = False
    return voxels(mask, np.diag([1.0, 1.0, 3.0, 1.0]), comm=MPI.COMM_SELF)


def tetrahedra() -> Domain:
    corners = [[0.0, 0.0, 0.0], [5.0, 4.0, 4.0]]
    none = dolfinx.mesh.GhostMode.none
    return from_mesh(dolfinx.mesh.create_box(MPI.COMM_SELF, corners, [3, 3, 2], ghost_mode=none))


class Case:
    """A batch on a mesh, each tumour with its own D and step, so that the numbers of stages differ."""

    def __init__(self, kind: Kind, batch: int = 11, make: Callable[[], Domain] = bricks) -> None:
        self.domain = make()
        self.operator = DiffusionOperator(self.domain)
        white = random(self.domain.n_cells)
        self.fields = mixture(torch.stack([white, 1 - white]))
        self.dtype = torch.float64
        if kind == "lanes":
            self.batched: Any = Lanes(self.operator.conductances, self.fields, self.domain.mass)
        else:
            g = self.domain.grid
            assert g is not None
            parts = (torch.from_numpy(np.array(x)) for x in (g.affine, g.cell_voxel, g.dof_corner))
            self.batched = VoxelOperator(Grid(g.shape, *parts), self.fields)
        self.flow = BatchedFlow(self.batched)
        self.D = torch.stack([0.02 * 40.0 ** random(batch), 0.01 * 10.0 ** random(batch, seed=3)], 1)
        self.dt = 1.0 + 9.0 * random(batch, seed=4)
        self.u = random(batch, self.domain.n_owned, seed=5)

    def __call__(self, u: Tensor, dt: Tensor, D: Tensor) -> Tensor:
        """States (batch, n) there and back."""
        op = self.batched
        out = self.flow(op.box(u), op.numbers(dt), *op.weights(monomials(D)))
        found: Tensor = op.states(out)[: len(u)]
        return found

    def single(self, u: Tensor, dt: Tensor, D: Tensor) -> Tensor:
        """The same, one after the other, by the finite-element step."""
        flow = LegendreFlow(self.operator)
        w = self.operator.conductances(monomials(D) @ self.fields)
        return torch.stack([flow(*x) for x in zip(u, w, dt, strict=True)])

    def leaves(self) -> list[Tensor]:
        return [x.clone().requires_grad_() for x in (self.u, self.dt, self.D)]


@pytest.mark.parametrize("kind", KINDS)
def test_steps_and_gradients_are_those_of_single_finite_element_steps(kind: Kind) -> None:
    case = Case(kind)
    w = case.operator.conductances(monomials(case.D) @ case.fields)
    stages = [LegendreFlow(case.operator).polynomial(x, float(t)).s for x, t in zip(w, case.dt, strict=True)]
    # Chunks of lanes hold tumours that are an even, and some that are an odd number of stages late.
    assert {(max(stages) - s) % 2 for s in stages} == {0, 1} and max(stages) - min(stages) > 3
    ours, theirs = case.leaves(), case.leaves()
    found, expected = case(*ours), case.single(*theirs)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)
    cotangent = random(*found.shape, seed=6) - 0.5
    for a, b in zip(
        torch.autograd.grad(found, ours, cotangent),
        torch.autograd.grad(expected, theirs, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_any_mesh_has_lanes_where_some_weights_are_negative() -> None:
    """Against the dense polynomial in the matrix that PETSc assembles."""
    case, s = Case("lanes", 3, tetrahedra), 15
    assert bool((case.operator.conductances(torch.ones(case.domain.n_cells).double()) < 0).any())
    case.flow.stages = s
    found = case(case.u, case.dt, case.D)
    mass = case.domain.mass.numpy()
    for u, dt, D, ours in zip(case.u, case.dt, case.D, found, strict=True):
        w = case.operator.conductances(monomials(D) @ case.fields)
        K = case.operator.matrix(w, 1.0).convert("dense").getDenseArray() - np.diag(mass)
        rates, modes = np.linalg.eig(K / mass[:, None])
        b, theta = (s * s + s - 2) / (2 * s * (s + 1)), 4 * float(dt) / (s * s + s - 2)
        growth = 1 - b + b * Legendre.basis(s)(1 - theta * rates)
        exact = (modes @ (growth * np.linalg.solve(modes, u.numpy()))).real
        np.testing.assert_allclose(ours.numpy(), exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_by_differences_in_both_modes_and_twice(kind: Kind) -> None:
    case = Case(kind, 2)
    basis = random(case.domain.n_owned, 4, seed=7)

    def few(c: Tensor, dt: Tensor, D: Tensor) -> Tensor:
        return case(case.u + c[:, None] * torch.sin(case.u), dt, D) @ basis

    at = [x.clone().requires_grad_() for x in (random(2, seed=8), case.dt, case.D)]
    assert torch.autograd.gradcheck(few, at, check_forward_ad=True, atol=1e-7)
    assert torch.autograd.gradgradcheck(few, at, check_fwd_over_rev=True, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode_is_the_transpose_of_reverse_mode(kind: Kind) -> None:
    case = Case(kind)
    directions = [random(*x.shape, seed=9) - 0.5 for x in (case.u, case.dt, case.D)]
    directions[2] *= 0.01
    cotangent = random(*case.u.shape, seed=6) - 0.5
    with torch.no_grad(), forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(x, d) for x, d in zip((case.u, case.dt, case.D), directions, strict=True)
        ]
        forward = float((forward_ad.unpack_dual(case(*duals)).tangent * cotangent).sum())
    leaves = case.leaves()
    grads = torch.autograd.grad(case(*leaves), leaves, cotangent)
    reverse = sum(float((g * d).sum()) for g, d in zip(grads, directions, strict=True))
    assert forward == pytest.approx(reverse, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_taped_form_is_the_same_step(kind: Kind) -> None:
    case = Case(kind)
    op = case.batched
    arguments = op.box(case.u), op.numbers(case.dt), *op.weights(monomials(case.D))
    torch.testing.assert_close(case.flow.on_tape(*arguments), case.flow(*arguments), rtol=1e-12, atol=1e-13)


def test_threads_change_nothing() -> None:
    case = Case("lanes", 2 * width(torch.float64) + 1)
    leaves = case.leaves()
    alone = torch.autograd.grad(case(*leaves).square().sum(), leaves)
    try:
        torch.set_num_threads(2)
        together = torch.autograd.grad(case(*leaves).square().sum(), leaves)
    finally:
        torch.set_num_threads(1)
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_beyond_the_interval_of_its_stages_names_the_longest_stable_one(kind: Kind) -> None:
    case = Case(kind, 3)
    rate = float(case.flow.bound([x.detach() for x in case.batched.weights(monomials(case.D))]).max())
    fixed = BatchedFlow(case.batched, stages=5)
    limit = (25 + 5 - 2) / 2 / rate
    weights = case.batched.weights(monomials(case.D))
    state = case.batched.box(case.u)
    kept = fixed(state, 0.99 * limit, *weights)
    assert float(kept.detach().abs().max()) <= 1.5
    with pytest.raises(GliodeError, match=rf"5 are stable up to {limit:.3g} days"):
        fixed(state, 1.05 * limit, *weights)
    with pytest.raises(GliodeError, match="runs backwards"):
        fixed(state, -1.0, *weights)
    with pytest.raises(GliodeError, match=r"needs .* stages on this mesh"):
        case.flow(state, 1e9, *weights)
    with pytest.raises(GliodeError, match="stages: 1"):
        BatchedFlow(case.batched, stages=1)
    with pytest.raises(GliodeError, match="negative"):
        case.flow(state, 1.0, *[-x for x in weights])


def test_single_precision_lanes_agree_within_their_rounding() -> None:
    case = Case("lanes")
    single = Lanes(case.operator.conductances, case.fields, case.domain.mass, torch.float32)
    assert single.width == 2 * case.batched.width
    leaves = [x.detach().float().requires_grad_() for x in (case.u, case.dt, case.D)]
    u, dt, D = leaves
    out = BatchedFlow(single)(single.box(u), single.numbers(dt), *single.weights(monomials(D)))
    found, expected = single.states(out)[: len(u)], case(case.u, case.dt, case.D)
    assert float((found - expected).abs().max()) < 1e-5
    reference = case.leaves()
    for a, b in zip(
        torch.autograd.grad(found.square().sum(), leaves),
        torch.autograd.grad(case(*reference).square().sum(), reference),
        strict=True,
    ):
        assert float((a - b).norm()) < 1e-4 * float(b.norm())


def test_the_compiled_logistic_flow_solves_its_equation() -> None:
    chunks = 2, 7, width(torch.float64)
    u, rho, dt = random(*chunks), random(2, 1, chunks[2], seed=2), torch.tensor(3.0).double()
    odds = u / (1 - u) * torch.exp(rho * dt)
    torch.testing.assert_close(logistic(u, dt, rho), odds / (1 + odds), rtol=1e-13, atol=0)
    at = [x.clone().requires_grad_() for x in (u, rho)]

    def flow(u: Tensor, rho: Tensor) -> Tensor:
        return logistic(u, dt, rho)

    assert torch.autograd.gradcheck(flow, at, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda u, rho: flow(u, rho)[:, :2], at)


@pytest.mark.parametrize("shape", [(1,), (1, 1, 1), (2, 1, 1), (1, 1, -1), (2, 1, -1)])
def test_the_compiled_logistic_flow_has_rates_of_any_shape_that_broadcasts(shape: tuple[int, ...]) -> None:
    lanes = width(torch.float64)
    u, dt = random(2, 5, lanes), torch.tensor(2.0).double()
    rho = random(*(lanes if k < 0 else k for k in shape), seed=2).requires_grad_()
    odds = u / (1 - u) * torch.exp(rho * dt)
    found, expected = logistic(u, dt, rho), odds / (1 + odds)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    (ours,), (theirs,) = (torch.autograd.grad(x.square().sum(), rho) for x in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_what_the_compiled_logistic_flow_refuses() -> None:
    lanes = width(torch.float64)
    u, dt, rho = random(2, 5, lanes), torch.tensor(2.0).double(), random(2, 1, lanes)
    with pytest.raises(GliodeError, match=r"rho dt: shape \(3, 1, 1\) does not broadcast"):
        logistic(u, dt, random(3, 1, 1))
    with pytest.raises(GliodeError, match=r"rho dt: shape \(2, 5, .*does not broadcast"):
        logistic(u, dt, u)
    with pytest.raises(GliodeError, match=r"rho dt: torch.float32"):
        logistic(u, dt.float(), rho.float())
    with pytest.raises(GliodeError, match=r"state: torch.float64 on cpu of shape"):
        logistic(u[..., 1:], dt, rho)
    with pytest.raises(GliodeError, match=r"dtype: torch.float16"):
        logistic(u.half(), dt.half(), rho.half())


def test_lanes_hand_no_memory_to_c_that_does_not_fit() -> None:
    case = Case("lanes", 2 * width(torch.float64))
    op, flow = case.batched, case.flow
    u, theta = op.box(case.u), op.weights(monomials(case.D))[0]
    for state, weights, message in (
        (u.float(), theta, "state: torch.float32 on cpu, its weights torch.float64"),
        (u.float(), theta.float(), "weights: torch.float32"),
        (u, theta.float(), "weights: torch.float32"),
        (u[:, :10], theta, r"state: .*shape \(10, "),
        (u[..., 1:], theta, "state: shape"),
        (case.u, theta, "state: shape"),
        (u, theta[:, 1:], r"weights: .*shape \(2, "),
        (u[:1], theta, "state: shape"),
        (u, theta[:1], "state: shape"),
    ):
        with pytest.raises(GliodeError, match=message):
            flow(state, 0.5, weights)
    table = torch.zeros(5, 1, op.width).double()
    for a, coefficients, message in (
        (u[0].T.contiguous().T, table, "state: .*contiguous"),
        (u[0], table[:4], "coefficients: "),
        (u[0], table.float(), "coefficients: torch.float32"),
    ):
        with pytest.raises(GliodeError, match=message):
            op.advance([theta[0]], a, None, coefficients)
    # Views that lie apart in memory are put together before.
    apart, rates = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (u, theta))
    assert torch.equal(flow(apart, 0.5, rates), flow(u, 0.5, theta))


@pytest.mark.parametrize("kind", [*KINDS, "single"])
def test_the_derivative_by_a_step_of_no_length_is_the_rate(kind: Kind) -> None:
    """du/ddt = -L u at dt = 0, in both modes, beside tumours whose step is longer."""
    case = Case("lanes" if kind == "single" else kind, 3)
    step = case.single if kind == "single" else case
    w = case.operator.conductances(monomials(case.D) @ case.fields)
    masses = case.domain.mass
    rates = torch.stack([case.operator.stiffness(x, u) / masses for x, u in zip(w, case.u, strict=True)])
    case.dt[0] = case.dt[2] = 0.0
    leaves = case.leaves()
    cotangent = random(*case.u.shape, seed=6) - 0.5
    found = torch.autograd.grad(step(*leaves), leaves, cotangent)
    assert all(bool(torch.isfinite(x).all()) for x in found)
    for i in (0, 2):
        torch.testing.assert_close(found[0][i], cotangent[i], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(found[1][i], -(cotangent[i] @ rates[i]), rtol=1e-10, atol=1e-13)
        assert not found[2][i].any()
    directions = [random(*x.shape, seed=9) - 0.5 for x in leaves]
    with torch.no_grad(), forward_ad.dual_level():
        duals = [forward_ad.make_dual(x.detach(), d) for x, d in zip(leaves, directions, strict=True)]
        tangent = forward_ad.unpack_dual(step(*duals)).tangent
        assert tangent is not None
    for i in (0, 2):
        exact = directions[0][i] - directions[1][i] * rates[i]
        torch.testing.assert_close(tangent[i], exact, rtol=1e-10, atol=1e-12)
    reverse = sum(float((g * d).sum()) for g, d in zip(found, directions, strict=True))
    assert float((tangent * cotangent).sum()) == pytest.approx(reverse, rel=1e-11)


def test_what_lanes_refuse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = Case("lanes", 1)
    with pytest.raises(GliodeError, match="mass: shape"):
        Lanes(case.operator.conductances, case.fields, case.domain.mass[1:])
    with pytest.raises(GliodeError, match="Lanes run on the CPU"):
        Lanes(case.operator.conductances, case.fields, case.domain.mass.to("meta"))
    with pytest.raises(GliodeError, match=r"dtype: torch.float16"):
        Lanes(case.operator.conductances, case.fields, case.domain.mass, torch.float16)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    lanes._compiled.cache_clear()
    try:
        with pytest.raises(GliodeError, match="no-such-compiler"):
            Lanes(case.operator.conductances, case.fields, case.domain.mass)
    finally:
        lanes._compiled.cache_clear()
