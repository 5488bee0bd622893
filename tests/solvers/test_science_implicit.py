"""Batched implicit solves and steps against dense algebra, and against the finite-element steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from dolfinx.mesh import create_unit_cube
from mpi4py import MPI
from scipy.sparse import diags
from torch import Tensor

from solvers.errors import GliodeError
from solvers.evolution import Evolution, PointwiseStep, Strang
from solvers.fem.diffusion import DiffusionStep
from solvers.fem.export import dof_numbers, export, gathered
from solvers.fem.mesh import ball, from_mesh
from solvers.fem.operators import DiffusionOperator
from solvers.node.science.batched import BatchedFlow
from solvers.node.science.implicit import ImplicitDiffusion, Resolvent, conjugate_gradients
from solvers.node.science.sparse import PairOperator, Stiffness
from solvers.operators import Conductances, Sparse
from solvers.resolvent import Scheme
from solvers.semidiscrete import SemiDiscrete
from tumour.growth import logistic

F64 = torch.float64


def chain(n: int = 8) -> Conductances:
    first = torch.arange(n - 1)
    edge = torch.arange(n - 1, dtype=torch.int32)[:, None]
    return Conductances(first, first + 1, edge, torch.ones(1, 1, dtype=F64), n, True)


def tridiagonal(w: Tensor) -> Tensor:
    """K(w) of the chain."""
    zero = w.new_zeros(1)
    main = torch.cat([w, zero]) + torch.cat([zero, w])
    return torch.diag(main) - torch.diag(w, 1) - torch.diag(w, -1)


def consistent(n: int = 8) -> Sparse:
    return Sparse.of(diags([1 / 6, 2 / 3, 1 / 6], [-1, 0, 1], shape=(n, n)))


def resolvent(mass: Tensor | Sparse, n: int = 8, rtol: float = 1e-13) -> Resolvent:
    return Resolvent(mass, Stiffness(chain(n)), rtol)


MASSES: dict[str, Callable[[int], Tensor | Sparse]] = {
    "lumped": lambda n: torch.linspace(0.5, 1.5, n, dtype=F64),
    "consistent": consistent,
}


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("many", [False, True])
def test_the_solve_is_the_dense_one(mass: str, many: bool) -> None:
    M = MASSES[mass](8)
    whole = M.dense() if isinstance(M, Sparse) else torch.diag(M)
    b, tau = torch.rand(3, 8, dtype=F64), torch.tensor([[0.1], [3.0], [40.0]], dtype=F64)
    w = torch.rand(3, 7, dtype=F64) if many else torch.rand(7, dtype=F64)
    S = resolvent(M)
    rows = [torch.linalg.solve(whole + tau[i] * tridiagonal(w[i] if many else w), b[i]) for i in range(3)]
    torch.testing.assert_close(S(b, w, tau), torch.stack(rows), rtol=1e-11, atol=1e-12)
    assert 0 < S.iterations <= 9 and S.solves == 1  # as many as there are dofs, but for rounding
    torch.testing.assert_close(S(b[1], w[1] if many else w, 3.0), rows[1], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("many", [False, True])
def test_all_derivatives_of_a_solve(mass: str, many: bool) -> None:
    S = resolvent(MASSES[mass](4), 4, rtol=1e-15)
    b = torch.rand(2, 4, dtype=F64, requires_grad=True)
    w = (torch.rand(2, 3, dtype=F64) if many else torch.rand(3, dtype=F64)).requires_grad_()
    tau = (torch.rand(2, 1, dtype=F64) if many else torch.tensor(0.7, dtype=F64)).requires_grad_()
    assert torch.autograd.gradcheck(S, (b, w, tau), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(S, (b, w, tau), check_fwd_over_rev=True)


class Shifts:
    """The chain's K(w) without a matrix: differences of neighbours, and theirs."""

    def __call__(self, w: Tensor, u: Tensor) -> Tensor:
        flux = w * u.diff(dim=-1)
        zero = torch.zeros_like(flux[..., :1])
        return -torch.cat([zero, flux, zero], -1).diff(dim=-1)

    def diagonal(self, w: Tensor) -> Tensor:
        zero = torch.zeros_like(w[..., :1])
        return torch.cat([w, zero], -1) + torch.cat([zero, w], -1)

    def at(self, w: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda u: self(w, u)


def test_any_product_will_do() -> None:
    mass = torch.linspace(0.5, 1.5, 4, dtype=F64)
    S, ours = Resolvent(mass, Shifts(), 1e-15), resolvent(mass, 4)
    b = torch.rand(2, 4, dtype=F64, requires_grad=True)
    w = torch.rand(2, 3, dtype=F64, requires_grad=True)
    torch.testing.assert_close(S(b, w, 2.0), ours(b, w, 2.0))
    assert torch.autograd.gradcheck(lambda b, w: S(b, w, 2.0), (b, w), check_forward_ad=True)


def test_the_mass_alone_is_inverted() -> None:
    M = consistent()
    b = torch.rand(2, 8, dtype=F64, requires_grad=True)
    S = Resolvent(M)
    torch.testing.assert_close(S(b), torch.linalg.solve(M.dense(), b.T).T, rtol=1e-9, atol=1e-10)
    assert torch.autograd.gradcheck(S, (b,), check_forward_ad=True)
    assert torch.equal(Resolvent(torch.full((8,), 2.0, dtype=F64))(b), b / 2)


def test_each_state_stops_by_itself() -> None:
    """An easy state beside a hard one is the same to the last bit as alone, and goes on no longer."""
    eigenvalues = torch.linspace(1.0, 1e4, 50, dtype=F64)

    def apply(u: Tensor) -> Tensor:
        return eigenvalues * u

    easy, hard = torch.zeros(50, dtype=F64), torch.ones(50, dtype=F64)
    easy[:2] = 1.0
    one, start = torch.ones(50, dtype=F64), torch.zeros(2, 50, dtype=F64)
    both, long = conjugate_gradients(apply, torch.stack([easy, hard]), one, start)
    alone, short = conjugate_gradients(apply, easy, one, start[0])
    assert short == 2 and long > 20
    assert torch.equal(both[0], alone)
    torch.testing.assert_close(both[1], hard / eigenvalues)


def test_single_precision_is_solved_to_its_own() -> None:
    n = 40
    first = torch.arange(n - 1)
    edge, table = first.int()[:, None], torch.ones(1, 1)
    K = Stiffness(Conductances(first, first + 1, edge, table, n, True))
    S = Resolvent(torch.ones(n), K, rtol=1e-6)
    b, w = torch.rand(n), torch.rand(n - 1)
    exact = torch.linalg.solve(torch.eye(n) + 5 * tridiagonal(w), b)
    torch.testing.assert_close(S(b, w, 5.0), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1e-30, 1e-16, 1.0, 1e25])
def test_single_precision_is_solved_in_the_scale_of_each_state(size: float) -> None:
    """Squares of the residuals are out of the range of single precision."""
    n = 20
    first = torch.arange(n - 1)
    pairs = Conductances(first, first + 1, first.int()[:, None], torch.ones(1, 1), n, True)
    S = Resolvent(torch.ones(n), Stiffness(pairs))
    b, w = torch.rand(3, n) * torch.tensor([[1.0], [size], [0.0]]), torch.rand(n - 1) + 0.5
    exact = torch.linalg.solve((torch.eye(n) + 5 * tridiagonal(w)).double(), b.double().T).T
    found = S(b, w, 5.0).double()
    assert not found[2].any()
    for i in (0, 1):
        assert float((found[i] - exact[i]).norm()) < 1e-5 * float(exact[i].norm())


def test_one_state_has_as_many_solutions_as_steps() -> None:
    b = torch.rand(4, dtype=F64, requires_grad=True)
    w = torch.rand(3, dtype=F64, requires_grad=True)
    tau = torch.tensor([[0.1], [3.0], [40.0]], dtype=F64, requires_grad=True)
    for mass in (MASSES["lumped"](4), consistent(4)):
        S = resolvent(mass, 4, rtol=1e-15)
        torch.testing.assert_close(S(b, w, tau), torch.stack([S(b, w, t) for t in tau[:, 0]]))
        assert torch.autograd.gradcheck(S, (b, w, tau), check_forward_ad=True)


def test_a_solve_that_fails_says_so() -> None:
    S = resolvent(torch.ones(8, dtype=F64))
    b, w = torch.rand(2, 8, dtype=F64), torch.ones(7, dtype=F64)
    with pytest.raises(GliodeError, match="D is negative somewhere"):
        S(b, -w, 3.0)
    with pytest.raises(GliodeError, match="states did not converge"):
        S(b, -w, 0.3)
    with pytest.raises(GliodeError, match="not finite"):
        S(b, w * torch.nan, 3.0)
    with pytest.raises(GliodeError, match="1 of 2 states did not converge"):
        S(torch.stack([b[0], b[1] * torch.nan]), w, 3.0)
    with pytest.raises(GliodeError, match="runs backwards"):
        S(b, w, -1.0)
    matrix = torch.eye(8, dtype=F64) + 30.0 * tridiagonal(w)
    with pytest.raises(GliodeError, match="2 of 2 states did not converge in 2 iterations"):
        conjugate_gradients(lambda u: u @ matrix, b, 1 / matrix.diagonal(), b, most=2)


def test_what_does_not_fit_is_told() -> None:
    S = resolvent(torch.ones(8, dtype=F64))
    b, w = torch.rand(8, dtype=F64), torch.ones(7, dtype=F64)
    with pytest.raises(GliodeError, match=r"state: torch.float32 on cpu, the operators torch.float64"):
        S(b.float(), w, 1.0)
    with pytest.raises(GliodeError, match=r"conductances: torch.float32"):
        S(b, w.float(), 1.0)
    with pytest.raises(GliodeError, match=r"tau: shape \(8,\), expected a number or \(batch, 1\)"):
        S(b, w, torch.ones(8, dtype=F64))
    with pytest.raises(GliodeError, match=r"tau: \(3, 1\) for states \(2, 8\)"):
        S(b.expand(2, 8), w, torch.ones(3, 1, dtype=F64))
    with pytest.raises(GliodeError, match="no stiffness"):
        Resolvent(torch.ones(8, dtype=F64))(b, w, 1.0)
    with pytest.raises(GliodeError, match="no conductances"):
        Resolvent.of(SemiDiscrete(torch.ones(8, dtype=F64)))
    with pytest.raises(GliodeError, match="scheme: 'euler' is not one of"):
        ImplicitDiffusion(S, "euler")  # type: ignore[arg-type]


# ---- Steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "order"), [("sdirk2", 2), ("crank-nicolson", 2), ("implicit-euler", 1)])
def test_the_order_of_a_step(scheme: Scheme, order: int) -> None:
    """Against the matrix exponential, for two diffusivities and two lengths at once."""
    step = ImplicitDiffusion(resolvent(torch.ones(8, dtype=F64)), scheme, margin=torch.inf)
    w, u = torch.rand(2, 7, dtype=F64) + 0.5, torch.rand(2, 8, dtype=F64)
    dt = torch.tensor([[1.0], [0.5]], dtype=F64)
    exact = torch.stack(
        [torch.linalg.matrix_exp(-t * tridiagonal(v)) @ x for t, v, x in zip(dt, w, u, strict=True)]
    )
    errors = []
    for steps in (16, 32):
        v = u
        for _ in range(steps):
            v = step(v, dt / steps, w)
        errors.append((v - exact).norm(dim=1))
    assert float((torch.log2(errors[0] / errors[1]) - order).abs().max()) < 0.1


def test_only_the_states_that_leave_their_bounds_are_taken_again() -> None:
    S = resolvent(torch.ones(8, dtype=F64))
    step, w = ImplicitDiffusion(S, "crank-nicolson"), torch.ones(7, dtype=F64)
    smooth = torch.linspace(0, 1, 8, dtype=F64).mul(torch.pi).cos()
    spike = torch.zeros(8, dtype=F64)
    spike[3] = 1.0
    out = step(torch.stack([smooth, spike]), 20.0, w)
    assert step.fallbacks == 1
    free = ImplicitDiffusion(S, "crank-nicolson", margin=torch.inf)
    torch.testing.assert_close(out[0], free(smooth, 20.0, w))
    assert float(free(spike, 20.0, w).min()) < -0.1 and float(out[1].min()) >= 0
    half = torch.eye(8, dtype=F64) + 10.0 * tridiagonal(w)
    torch.testing.assert_close(out[1], torch.linalg.solve(half, torch.linalg.solve(half, spike)))


@pytest.mark.parametrize("mesh", ["bricks", "tetrahedra"])
@pytest.mark.parametrize("scheme", ["rkl2", *get_args(Scheme)])
def test_steps_are_those_of_the_finite_elements(scheme: Any, mesh: str) -> None:
    """A tumour, with its gradients: DOLFINx and PETSc beside torch alone."""
    domain = ball(4.0, 1.0) if mesh == "bricks" else from_mesh(create_unit_cube(MPI.COMM_SELF, 3, 3, 3))
    operator = DiffusionOperator(domain, rtol=1e-13)
    problem = export(domain, mesh)
    pairs, mass, flat = problem.conductances, problem.mass, scheme == "rkl2"
    assert pairs is not None and isinstance(mass, Tensor)
    products = PairOperator(pairs, mass)
    theirs = DiffusionStep(operator, scheme, margin=torch.inf)
    ours: Any = (
        BatchedFlow(products) if flat else ImplicitDiffusion(Resolvent.of(problem, 1e-13), scheme, torch.inf)
    )
    start = domain.interpolate(lambda x: 0.5 * np.exp(-(x**2).sum(1) / 4))
    D, rho, days = torch.linspace(0.05, 0.4, domain.n_cells, dtype=F64), torch.tensor(0.1, dtype=F64), 20.0
    place = torch.from_numpy(dof_numbers(domain.V))
    cells = torch.tensor(domain.cell_numbers)
    results = []
    for alone in (False, True):
        d, r = D.clone().requires_grad_(), rho.clone().requires_grad_()
        evolution = Evolution(Strang(PointwiseStep(logistic().flow), ours if alone else theirs))
        u0 = gathered(domain.V, start) if alone else start
        u0 = u0[:, None] if alone and flat else u0
        w = pairs(torch.zeros_like(d).index_copy(0, cells, d)) if alone else operator.conductances(d)
        u = evolution(u0, days, 5, w[:, None] if alone and flat else w, r).squeeze(-1)
        u = u if alone else torch.zeros_like(u).index_copy(0, place, u)
        results.append([u, *torch.autograd.grad((u * torch.arange(len(u))).sum(), (d, r))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-11 * float(one.abs().max()))


def test_a_batch_of_tumours_is_each_of_them() -> None:
    """Different diffusivities, growth rates, ages and seeds at once."""
    diffusion = ImplicitDiffusion(resolvent(torch.ones(8, dtype=F64)))
    evolution = Evolution(Strang(PointwiseStep(lambda u, dt, rho: u * torch.exp(rho * dt)), diffusion))
    w, u = torch.rand(3, 7, dtype=F64), torch.rand(3, 8, dtype=F64)
    rho, age = torch.rand(3, 1, dtype=F64), 1.0 + torch.rand(3, 1, dtype=F64)
    leaves = [x.requires_grad_() for x in (u, w, rho, age)]
    all_at_once = evolution(u, age, 4, w, rho)
    grads = torch.autograd.grad(all_at_once.square().sum(), leaves)
    for i in range(3):
        own = [x[i].detach().requires_grad_() for x in leaves]
        one = evolution(own[0], own[3], 4, own[1], own[2])
        torch.testing.assert_close(all_at_once[i], one, rtol=1e-10, atol=1e-12)
        for theirs, ours in zip(grads, torch.autograd.grad(one.square().sum(), own), strict=True):
            torch.testing.assert_close(theirs[i], ours, rtol=1e-8, atol=1e-10)
