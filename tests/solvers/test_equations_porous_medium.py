"""The porous medium equation against Barenblatt's solution, dense Newton steps and the torch form."""

from __future__ import annotations

import math

import dolfinx
import numpy as np
import pytest
import torch
from mpi4py import MPI
from scipy.integrate import quad
from torch import Tensor

from solvers.errors import GliodeError
from solvers.evolution import Evolution
from solvers.fem.equations.porous_medium import Barenblatt, PorousMedium
from solvers.fem.export import export, gathered, scattered
from solvers.fem.implicit import Sdirk2Step
from solvers.fem.mesh import Domain, box, from_mesh, interval
from solvers.node.models import Node
from solvers.node.science.activated import ScienceActivated, Unknown
from solvers.node.science.transport import PorousMedium as PorousMediumField
from solvers.node.science.transport import power
from solvers.ode.integrate import integrate
from solvers.ode.tableau import Tableau

START, END = 0.5, 1.5


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def triangles(n: int, comm: MPI.Comm = MPI.COMM_SELF) -> Domain:
    none = dolfinx.mesh.GhostMode.none
    return from_mesh(dolfinx.mesh.create_rectangle(comm, [[0.0, 0.0], [2.4, 2.4]], [n, n], ghost_mode=none))


def run(domain: Domain, exact: Barenblatt, steps: int, scheme: str = "sdirk2") -> tuple[Tensor, Tensor]:
    """The computed and the exact state at END."""
    start = domain.interpolate(lambda x: exact.density(x, START))
    u = Evolution(PorousMedium(domain, scheme))(start, END - START, steps, number(exact.D), number(exact.m))
    return u, domain.interpolate(lambda x: exact.density(x, END))


@pytest.mark.parametrize(("m", "dim"), [(1.5, 1), (2.0, 2), (4.0, 3)])
def test_the_source_solution_has_its_mass_and_solves_the_equation(m: float, dim: int) -> None:
    """By quadrature, and by differences of the radial form u_t = D r^(1-d) (r^(d-1) (u^m)_r)_r."""
    exact, area = Barenblatt(m, 1.7, dim, 0.6), {1: 2.0, 2: 2 * math.pi, 3: 4 * math.pi}[dim]

    def u(r: float, t: float) -> float:
        return float(exact.density(np.array([[r]]), t)[0])

    mass = quad(lambda r: area * r ** (dim - 1) * u(r, 1.3), 0, exact.front(1.3))[0]
    assert mass == pytest.approx(1.7, rel=1e-6)
    assert u(exact.front(1.3) * 1.001, 1.3) == 0 < u(exact.front(1.3) * 0.999, 1.3)
    r, h = 0.4 * exact.front(1.3), 1e-3

    def flux(r: float) -> float:
        return r ** (dim - 1) * (u(r + h / 2, 1.3) ** m - u(r - h / 2, 1.3) ** m) / h

    spread = 0.6 * (flux(r + h / 2) - flux(r - h / 2)) / h / r ** (dim - 1)
    assert (u(r, 1.3 + h) - u(r, 1.3 - h)) / (2 * h) == pytest.approx(spread, rel=1e-3)


@pytest.mark.parametrize(("scheme", "order"), [("implicit-euler", 1), ("sdirk2", 2)])
def test_the_order_against_the_source_solution(scheme: str, order: int) -> None:
    """In L1 over three doublings: where the front stands between vertices makes single ones jump."""
    exact, errors = Barenblatt(2.0, 2.0, 1, 0.8), []
    for n in (20, 160):
        domain = interval(4.0, n)
        u, true = run(domain, exact, n // 2, scheme)
        errors.append(domain.integral((u - true).abs()) / domain.integral(true))
        start = domain.interpolate(lambda x: exact.density(x, START))
        assert domain.integral(u) == pytest.approx(domain.integral(start), rel=1e-12)
    assert math.log2(errors[0] / errors[1]) / 3 > order - 0.2
    assert errors[1] < {1: 4e-3, 2: 2e-4}[order]


def test_the_front_in_two_dimensions() -> None:
    """Where u falls below a thousandth of its maximum along the axis: within a cell; and u >= 0."""
    exact, n = Barenblatt(3.0, 1.0, 2), 24
    domain = triangles(n)
    u, _ = run(domain, exact, 20, "implicit-euler")
    along = (np.abs(domain.points[:, 1]) < 1e-12) & (u.numpy() > 1e-3 * float(u.max()))
    assert abs(domain.points[along, 0].max() - exact.front(END)) < 2.4 / n
    assert float(u.min()) >= -1e-12


def test_a_step_of_bricks_keeps_bounds_at_any_length() -> None:
    """Implicit Euler with an M-matrix is monotone: of an indicator at steps far beyond any explicit one."""
    domain = box((3.0, 2.0, 4.0), (5, 3, 3))
    step, D, m = PorousMedium(domain, "implicit-euler"), 0.7, 2.5
    u0 = domain.interpolate(lambda x: (x[:, 0] < 1.1) & (x[:, 2] < 2.1))
    for dt in (1e-3, 0.1, 10.0):
        u = step(u0, dt, D, m)
        assert float(u.min()) > -1e-9 and float(u.max()) < 1 + 1e-9
        assert domain.integral(u) == pytest.approx(domain.integral(u0), rel=1e-9)


def test_the_torch_form_from_exported_operators_takes_the_same_steps() -> None:
    """SDIRK2 of `integrate`, with its own Newton method, on the semi-discrete field."""
    domain, exact, g = interval(4.0, 20), Barenblatt(2.0, 2.0), Sdirk2Step.gamma
    field = PorousMediumField(export(domain, "interval"))
    u0 = domain.interpolate(lambda x: exact.density(x, START))
    u = Evolution(PorousMedium(domain))(u0, 0.5, 5, number(0.7), number(2.2))
    sdirk = Tableau("sdirk2", [[g, 0], [1 - g, g]], [1 - g, g])
    times = torch.linspace(0, 0.5, 6, dtype=torch.float64)
    x = integrate(lambda t, x: field(t, x, 0.7, 2.2), gathered(domain.V, u0), times, sdirk)
    assert float((scattered(domain.V, x) - u).abs().max()) < 1e-8


def test_gradients_of_both_forms_agree_with_differences() -> None:
    """By the state, D and m, through several steps, with u = 0 in half of the domain."""
    domain, exact = interval(4.0, 20), Barenblatt(2.0, 1.0)
    step, field = PorousMedium(domain), PorousMediumField(export(domain, "interval"))
    u0 = domain.interpolate(lambda x: exact.density(x, START))
    weights = torch.from_numpy(np.cos(domain.points[:, 0]))
    times = torch.linspace(0, 0.4, 41, dtype=torch.float64)

    def by_dolfinx(m: Tensor) -> Tensor:
        return (weights * Evolution(step)(m[2] * u0, 0.4, 4, m[0], m[1])).sum()

    def by_torch(m: Tensor) -> Tensor:
        start = m[2] * gathered(domain.V, u0)
        end = integrate(field, start, times, "chebyshev5", parameters=(m[0], m[1]))
        return (gathered(domain.V, weights) * end).sum()

    m = torch.tensor([0.8, 2.3, 1.1], dtype=torch.float64, requires_grad=True)
    for functional in (by_dolfinx, by_torch):
        (gradient,) = torch.autograd.grad(functional(m), m)
        with torch.no_grad():
            for k in range(3):
                h = 1e-5 * torch.eye(3, dtype=torch.float64)[k]
                difference = (functional(m + h) - functional(m - h)) / 2e-5
                assert float(difference) == pytest.approx(float(gradient[k]), rel=1e-6), (functional, k)


def test_a_science_activated_network_refuses_steps_that_would_explode() -> None:
    """The fastest rate is D m u^(m-1) times that of the heat equation."""
    domain = interval(4.0, 20)
    field, u0 = PorousMediumField(export(domain, "interval")), torch.ones(21, dtype=torch.float64)
    unknowns = {"D": Unknown(0.5, positive=True), "m": Unknown(3.0)}
    fastest = 0.5 * 3.0 * 4 / 0.2**2
    with pytest.raises(GliodeError, match="fastest rate"):
        Node(ScienceActivated(field, unknowns), 1.0, int(fastest / 2.79 * 0.9), "kutta4")(u0)
    end = Node(ScienceActivated(field, unknowns), 1.0, int(fastest / 2.79 * 1.1), "kutta4")(u0)
    assert torch.allclose(end, u0)


def test_the_power_has_no_infinite_derivative_at_zero() -> None:
    u = torch.tensor([0.0, 0.5, -0.5], dtype=torch.float64, requires_grad=True)
    m = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    by_u, by_m = torch.autograd.grad(power(u, m).sum(), (u, m))
    assert torch.allclose(by_u[1:], 1.2 * torch.full((2,), 0.5**0.2, dtype=torch.float64))
    assert abs(float(by_u[0])) < 1e-15 and float(by_m) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.mpi
def test_ranks_take_the_steps_of_one_process() -> None:
    exact = Barenblatt(2.0, 2.0, 2)
    here, alone = triangles(8, MPI.COMM_WORLD), triangles(8)
    u, v = (run(domain, exact, 3)[0] for domain in (here, alone))
    moments = [[d.integral(w), d.integral(w**2)] for d, w in ((here, u), (alone, v))]
    assert moments[0] == pytest.approx(moments[1], rel=1e-10)


def test_wrong_input_is_refused() -> None:
    step, u = PorousMedium(interval(1.0, 4), "implicit-euler"), torch.ones(5, dtype=torch.float64)
    for values, said in (
        ((0.1, -1.0, 2.0), "D: -1"),
        ((0.1, 1.0, 0.5), "m: 0.5"),
        ((0.1, 1.0, -2.0), "m: -2"),
    ):
        with pytest.raises(GliodeError, match=said):
            step(u, *values)
    with pytest.raises(GliodeError, match="density is not negative"):
        step(-u, 0.1, 1.0, 2.0)
    with pytest.raises(GliodeError, match="scheme: 'euler'"):
        PorousMedium(interval(1.0, 4), "euler")
    with pytest.raises(GliodeError, match="front for m > 1"):
        Barenblatt(1.0, 1.0)
    with pytest.raises(GliodeError, match="mass and D must be positive"):
        Barenblatt(2.0, -1.0)
    with pytest.raises(GliodeError, match="time must be positive"):
        Barenblatt(2.0, 1.0).density(np.zeros((1, 1)), 0.0)
    field = PorousMediumField(export(interval(1.0, 4), "interval"))
    with pytest.raises(GliodeError, match="at least 1"):
        field(0.0, u, 1.0, 0.9)
