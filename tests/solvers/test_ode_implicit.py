"""Implicit Runge-Kutta steps: the equations they solve, all derivatives, stiffness, symplecticity."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from solvers.errors import GliodeError
from solvers.ode.implicit import _gmres
from solvers.ode.integrate import integrate
from solvers.ode.tableau import Tableau
from solvers.ode.tableaux import TABLEAUX, tableau

IMPLICIT = [name for name, t in TABLEAUX.items() if not t.explicit]


def f(t: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(x @ w.T) * (1 + t) - x**3


def inputs(states: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """x0, learned times with a step of zero, w."""
    x0 = torch.randn(states, 2, dtype=torch.float64, requires_grad=True)
    times = torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64, requires_grad=True)
    return x0, times, torch.randn(2, 2, dtype=torch.float64, requires_grad=True)


def test_all_but_the_explicit_ones_are_here() -> None:
    assert IMPLICIT == ["midpoint", "gauss2", "radau5", "lobatto_iiia", "lobatto_iiib", "lobatto"]


@pytest.mark.parametrize("name", IMPLICIT)
def test_a_step_is_that_of_dense_newton_iteration(name: str) -> None:
    """The stage equations of one state, q and p with coefficients of their own, with the full Jacobian."""
    scheme = tableau(name)
    x0, _, w = (v.detach() for v in inputs())
    x, h, s, d = x0[0], 0.7, scheme.stages, 2
    half = np.arange(d) < d // 2
    A_p, b_p = (scheme.A, scheme.b) if scheme.A_p is None else (scheme.A_p, scheme.b_p)
    # A and b for each component: (s, s, d), (s, d).
    A = torch.from_numpy(np.where(half, scheme.A[..., None], np.array(A_p)[..., None]))
    b = torch.from_numpy(np.where(half, scheme.b[..., None], np.array(b_p)[..., None]))

    def residual(K: Tensor) -> Tensor:
        X = x + h * torch.einsum("ijd,jd->id", A, K.view(s, d))
        nodes = (torch.tensor(0.3 + c * h, dtype=torch.float64) for c in scheme.c)
        return K - torch.cat([f(t, X[i], w) for i, t in enumerate(nodes)])

    K = torch.zeros(s * d, dtype=torch.float64)
    for _ in range(20):
        K = K - torch.linalg.solve(torch.autograd.functional.jacobian(residual, K), residual(K))
    with torch.no_grad():
        found = integrate(f, x, torch.tensor([0.3, 0.3 + h], dtype=torch.float64), name, parameters=(w,))
    torch.testing.assert_close(found, x + h * (b * K.view(s, d)).sum(0), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("name", ["midpoint", "lobatto"])
@pytest.mark.parametrize("gradient", ["adjoint", "autograd", "checkpointed"])
def test_first_and_second_derivatives_in_both_modes(name: str, gradient: str) -> None:
    def run(x0: Tensor, times: Tensor, w: Tensor) -> Tensor:
        return integrate(f, x0, times, name, gradient=gradient, parameters=(w,))

    assert gradcheck(run, inputs(), check_forward_ad=True, fast_mode=True)
    if name == "midpoint" or gradient == "autograd":
        assert gradgradcheck(run, inputs(), check_fwd_over_rev=True, fast_mode=True)


def test_the_tangent_can_be_differentiated_too() -> None:
    """d/dw of <y, J d> by reverse over forward, and by forward over reverse with and without its graph."""
    x0, times, w = inputs(2)
    d, y = torch.randn_like(x0), torch.randn_like(x0)
    results = []
    with forward_ad.dual_level():
        x = integrate(f, forward_ad.make_dual(x0, d), times, "gauss2", parameters=(w,))
        moved = forward_ad.unpack_dual(x).tangent
        assert moved is not None
        (found,) = torch.autograd.grad((y * moved).sum(), w, retain_graph=True)
        results.append(forward_ad.unpack_dual(found).primal)
    for create_graph in (False, True):
        with forward_ad.dual_level():
            x = integrate(f, forward_ad.make_dual(x0, d), times, "gauss2", parameters=(w,))
            (found,) = torch.autograd.grad(x, w, y, create_graph=create_graph)
            results.append(forward_ad.unpack_dual(found).tangent)
            torch.testing.assert_close(results[-1], results[0], rtol=1e-11, atol=1e-12)
    assert float(results[0].abs().max()) > 0.01


def hamiltonian(q: Tensor, p: Tensor) -> Tensor:
    """Not separable: two coupled degrees of freedom."""
    return (0.5 * (1 + q**2) * p**2).sum() + (q[0] * p[1]) ** 2 / 3 + torch.cos(q).sum() + q.prod() / 5


def flow(t: Tensor, x: Tensor) -> Tensor:
    def one(x: Tensor) -> Tensor:
        g = torch.func.grad(lambda z: hamiltonian(z[:2], z[2:]))(x)
        return torch.cat([g[2:], -g[:2]])

    return torch.stack([one(row) for row in x])


@pytest.mark.parametrize("name", ["midpoint", "gauss2", "lobatto"])
def test_symplectic_for_any_hamiltonian(name: str) -> None:
    """M^T J M = J for the Jacobian M of the discrete map."""
    x0 = torch.tensor([[0.4, -0.3, 0.5, 0.8]], dtype=torch.float64)
    times = torch.linspace(0, 1, 4, dtype=torch.float64)
    J = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64).kron(torch.eye(2, dtype=torch.float64))

    def defect(scheme: str) -> float:
        M = torch.autograd.functional.jacobian(lambda x: integrate(flow, x, times, scheme)[0], x0)[:, 0]
        return float((M.T @ J @ M - J).abs().max())

    assert defect(name) < 1e-12
    assert defect("stoermer_verlet") > 1e-4  # which is for separable ones


@pytest.mark.parametrize("name", ["lobatto_iiia", "lobatto_iiib"])
def test_one_half_of_the_lobatto_pair_alone_is_not(name: str) -> None:
    x0 = torch.tensor([[0.4, -0.3, 0.5, 0.8]], dtype=torch.float64)
    times = torch.linspace(0, 1, 2, dtype=torch.float64)
    M = torch.autograd.functional.jacobian(lambda x: integrate(flow, x, times, name)[0], x0)[:, 0]
    J = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64).kron(torch.eye(2, dtype=torch.float64))
    assert float((M.T @ J @ M - J).abs().max()) > 1e-5


def laplacian(n: int, dtype: torch.dtype) -> Tensor:
    off = torch.ones(n - 1, dtype=dtype)
    return (torch.diag(off, 1) + torch.diag(off, -1) - 2 * torch.eye(n, dtype=dtype)) * (n + 1) ** 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["midpoint", "gauss2", "radau5"])
def test_a_stiff_linear_problem_against_the_stability_function(name: str, dtype: torch.dtype) -> None:
    """Heat equation, h |lambda| up to 700: x(T) = R(h L)^N x0 and the gradient R(h L)^N of sum x(T)."""
    n, steps, scheme = 20, 5, tableau(name)
    L = laplacian(n, torch.float64)
    values, vectors = np.linalg.eigh(L.numpy())
    one, eye = np.ones(scheme.stages), np.eye(scheme.stages)
    R = [1 + z * scheme.b @ np.linalg.solve(eye - z * scheme.A, one) for z in values * 2.0 / steps]
    power = torch.from_numpy(vectors * np.array(R) ** steps @ vectors.T)
    x0 = torch.rand(3, n, dtype=dtype, requires_grad=True)
    matrix, times = L.to(dtype), torch.linspace(0, 2, steps + 1, dtype=dtype)
    for gradient in ("adjoint", "autograd"):
        x = integrate(lambda t, x: x @ matrix, x0, times, name, gradient=gradient)
        (found,) = torch.autograd.grad(x.sum(), x0)
        bar = 1e-11 if dtype == torch.float64 else 1e-4
        assert float((x.detach().double() - x0.detach().double() @ power).abs().max()) < bar
        assert float((found.double() - power.sum(0)).abs().max()) < bar


def test_a_stiff_reaction_is_found_from_far_away() -> None:
    """x' = -1000 (x^3 - cos t): one explicit step leaves for infinity; Newton from K = 0 does not."""

    def stiff(t: Tensor, x: Tensor) -> Tensor:
        return -1000 * (x**3 - torch.cos(t))

    times = torch.linspace(0, 1, 41, dtype=torch.float64)
    with torch.no_grad():
        x = integrate(stiff, torch.tensor([1.0], dtype=torch.float64), times, "gauss2")
    # Away from the initial layer x follows cos(t)^(1/3), to 1/1000.
    assert abs(float(x) - math.cos(1.0) ** (1 / 3)) < 1e-3


def test_no_solution_is_an_error_with_the_way_out() -> None:
    """Implicit Euler for x' = x^2, x(0) = 1: K = (1 + h K)^2 has no real solution for h > 1/4."""
    euler = Tableau("implicit_euler", [[1]], [1])
    x0 = torch.ones(1, dtype=torch.float64, requires_grad=True)
    for gradient in ("adjoint", "autograd"):
        with pytest.raises(GliodeError, match="more, shorter steps"):
            integrate(lambda t, x: x**2, x0, torch.tensor([0.0, 1.0]).double(), euler, gradient=gradient)
    h = 0.2
    x = integrate(lambda t, x: x**2, x0, torch.tensor([0.0, h], dtype=torch.float64), euler)
    assert float(x) == pytest.approx((1 - math.sqrt(1 - 4 * h)) / (2 * h), rel=1e-14)
    with pytest.raises(GliodeError, match="more, shorter steps"), torch.no_grad():
        integrate(lambda t, x: x / 0, x0, torch.tensor([0.0, h], dtype=torch.float64), euler)


def test_fields_that_do_not_depend_on_the_state_or_on_anything() -> None:
    times = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    x0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
    for how in ("adjoint", "autograd"):
        x = integrate(lambda t, x: t * torch.ones(2).double(), x0, times, "gauss2", gradient=how)
        torch.testing.assert_close(x, x0 + 4.5, rtol=1e-15, atol=0)
        by_x0, by_times = torch.autograd.grad(x.sum(), [x0, times])
        torch.testing.assert_close(by_x0, torch.ones_like(x0))
        torch.testing.assert_close(by_times, torch.tensor([0.0, 0.0, 6.0], dtype=torch.float64))
        x = integrate(lambda t, x: torch.ones(2).double(), x0, times, "midpoint", gradient=how)
        torch.testing.assert_close(
            torch.autograd.grad(x.sum(), times)[0], torch.tensor([-2.0, 0, 2]).double()
        )


def test_an_equilibrium_stays() -> None:
    """All corrections are rounding there, and the iteration must see that."""
    x0 = torch.full((4,), math.pi, dtype=torch.float64)
    x = integrate(lambda t, x: 3 * torch.sin(x), x0, torch.linspace(0, 0.5, 6).double(), "gauss2")
    torch.testing.assert_close(x, x0, rtol=1e-14, atol=0)


def test_hidden_tensors_are_refused_on_the_tape_too() -> None:
    """An implicit function sees the gradient of its arguments only."""
    w = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    x0, times, _ = inputs()

    def hidden(t: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x @ w)

    for gradient in ("adjoint", "autograd", "checkpointed"):
        with pytest.raises(GliodeError, match="pass them as parameters"):
            integrate(hidden, x0, times, "midpoint", gradient=gradient).sum().backward()
    with torch.no_grad():
        integrate(hidden, x0, times, "midpoint")


def test_a_module_with_derivatives_that_are_written_by_hand_once() -> None:
    """relu and layer norm: torch's own kernels, differentiable twice."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 4)).double()

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            out: Tensor = self.net(x)
            return out

    x0, times = torch.randn(3, 4, dtype=torch.float64), torch.linspace(0, 1, 4, dtype=torch.float64)
    found = [
        torch.autograd.grad(
            integrate(Field(), x0, times, "gauss2", gradient=g).square().sum(), list(net.parameters())
        )
        for g in ("adjoint", "autograd")
    ]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_gmres_reduces_the_residual_and_knows_breakdown() -> None:
    A = torch.eye(30, dtype=torch.float64) + torch.randn(30, 30, dtype=torch.float64) / 8
    b = torch.randn(5, 6, dtype=torch.float64)
    x = _gmres(lambda v: (A @ v.flatten()).view(5, 6), b)
    left = float((b.flatten() - A @ x.flatten()).norm())
    assert 1e-9 * float(b.norm()) < left <= 1.001e-4 * float(b.norm())
    torch.testing.assert_close(_gmres(lambda v: 3 * v, b), b / 3)  # an invariant space of one dimension
    assert not _gmres(lambda v: v, torch.zeros(3)).any()
    assert bool(_gmres(lambda v: v * math.nan, b).isnan().all())
    x = _gmres(lambda v: (A @ v.flatten()).view(5, 6), b, iterations=3)  # as near as they get
    assert left < float((b.flatten() - A @ x.flatten()).norm()) < float(b.norm())
