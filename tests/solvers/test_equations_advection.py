"""Advection, diffusion and reaction against closed forms, differences and the torch form."""

from __future__ import annotations

import math
from typing import Any

import dolfinx
import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import Tensor

from solvers.errors import GliodeError
from solvers.evolution import Evolution
from solvers.fem.equations.advection import METHODS, SCHEMES, Transport
from solvers.fem.export import gathered, scattered
from solvers.fem.mesh import Domain, from_mesh, interval
from solvers.node.science.linear import Linear
from solvers.ode.integrate import integrate


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def square(n: int, comm: MPI.Comm = MPI.COMM_SELF) -> Domain:
    quadrilateral, none = dolfinx.mesh.CellType.quadrilateral, dolfinx.mesh.GhostMode.none
    corners = [[-1.5, -1.5], [1.5, 1.5]]
    return from_mesh(dolfinx.mesh.create_rectangle(comm, corners, [n, n], quadrilateral, ghost_mode=none))


def right(x: Any) -> tuple[float]:
    return (1.0,)


def turn(x: Any) -> tuple[Any, Any]:
    return -x[1], x[0]


def heated(cells: int, method: str) -> Transport:
    """b u' = D u'' + 1 on (0, 1), 0 at the ends."""
    return Transport(
        interval(1.0, cells),
        [right],
        method,
        boundary=lambda x: 0 * x[:, 0],
        source=lambda x: 1 + 0 * x[:, 0],
    )


def layer(x: Any, b: float, D: float) -> Any:
    return (x - (np.exp(b * (x - 1) / D) - np.exp(-b / D)) / (1 - np.exp(-b / D))) / b


def pulse(x: Any, centre: Any, t: float, D: float, r: float, variance: float = 0.0625) -> Tensor:
    later = variance + 2 * D * t
    u = np.exp(-((x - np.asarray(centre)) ** 2).sum(1) / (2 * later) - r * t)
    return torch.from_numpy((variance / later) ** (x.shape[1] / 2) * u)


@pytest.mark.parametrize("D", [1e-6, 0.01, 0.3, 100.0])
def test_supg_is_exact_at_the_nodes_of_a_boundary_layer(D: float) -> None:
    """At Peclet numbers from 0.0006 to 60000."""
    transport = heated(8, "supg")
    u, exact = transport.stationary()(vector(0.8), D), layer(transport.points[:, 0], 0.8, D)
    assert np.abs(u.numpy() - exact).max() < 1e-9 * exact.max()


@pytest.mark.parametrize("method", ["dg", "galerkin"])
def test_the_other_methods_converge_by_order_two(method: str) -> None:
    errors = []
    for n in (20, 40):
        transport = heated(n, method)
        u = transport.stationary()(vector(1.0), 0.1)
        away = u.numpy() - layer(transport.points[:, 0], 1.0, 0.1)
        errors.append(math.sqrt(np.mean(away**2)))
    assert math.log2(errors[0] / errors[1]) > 1.7 and errors[1] < 3e-3


def test_galerkin_is_refused_where_it_oscillates() -> None:
    transport = heated(10, "galerkin")
    assert transport.peclet(vector(2.0), 0.05) == pytest.approx(2.0 * 0.1 / (2 * 0.05), rel=1e-12)
    assert transport.stationary()(vector(1.0), 0.06).min() >= 0
    with pytest.raises(GliodeError, match=r"Peclet number .* is 5; above 1"):
        transport.stationary()(vector(1.0), 0.01)
    with pytest.raises(GliodeError, match="take method 'supg' or 'dg'"):
        transport.step()(torch.zeros(11, dtype=torch.float64), 0.1, vector(1.0), 0.01)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_pulse_is_carried_spread_and_decays_by_order_two(scheme: str) -> None:
    errors = []
    for n in (50, 100):
        transport = Transport(interval(5.0, n), [right], "dg", scheme=scheme)
        x, step = transport.points[:, :1], transport.step()
        u = Evolution(step)(pulse(x, 1.5, 0, 0.01, 0.2), 2.0, n // 2, vector(1.0), 0.01, 0.2)  # type: ignore[arg-type]
        true = pulse(x, 3.5, 2.0, 0.01, 0.2)
        errors.append(float((u - true).norm() / true.norm()))
    assert math.log2(errors[0] / errors[1]) > 1.8 and errors[1] < 0.015


@pytest.mark.parametrize(("method", "within"), [("dg", 0.02), ("supg", 0.045)])
def test_a_pulse_turns(method: str, within: float) -> None:
    transport = Transport(square(20), [turn], method)
    x, step = transport.points[:, :2], transport.step()
    u = pulse(x, (0.5, 0), 0, 0.01, 0.1)
    for _ in range(16):
        u = step(u, math.pi / 32, vector(1.0), 0.01, 0.1)
    true = pulse(x, (0, 0.5), math.pi / 2, 0.01, 0.1)
    assert float((u - true).norm() / true.norm()) < within


def test_nothing_is_lost_but_by_decay() -> None:
    """The integral, of a pulse that stays inside, by Crank-Nicolson's factor for u' = -r u."""
    transport = Transport(interval(8.0, 60), [right], "dg")
    mass = gathered(transport.space, torch.ones(transport.size, dtype=torch.float64))
    weights = -Linear(transport.semidiscrete())(0.0, mass, s0=0.0, D=0.0, r=1.0)  # type: ignore[arg-type]
    assert torch.allclose(weights, torch.ones_like(weights))  # M^-1 M 1
    step, u = transport.step(), pulse(transport.points[:, :1], 3.0, 0, 0.0, 0.0)
    total = [float(u.view(-1, 2).mean(1).sum())]  # equal cells: two ends each
    for _ in range(10):
        u = step(u, 0.1, vector(1.0), 0.0, 0.7)
        total.append(float(u.view(-1, 2).mean(1).sum()))
    assert total[-1] / total[0] == pytest.approx(((1 - 0.035) / (1 + 0.035)) ** 10, rel=1e-6)


@pytest.mark.parametrize("boundary", [None, lambda x: np.sin(x[:, 0])])
def test_the_exported_form_takes_the_same_steps(boundary: Any) -> None:
    """The implicit midpoint rule of a linear problem is Crank-Nicolson's."""
    transport = Transport(interval(3.0, 15), [right], "dg", boundary, lambda x: 0.3 * x[:, 0])
    u = pulse(transport.points[:, :1], 1.0, 0, 0.0, 0.0)
    values = (vector(0.7), vector(0.05)[0], vector(0.3)[0])
    done = Evolution(transport.step())(u, 1.0, 20, *values)
    field, times = Linear(transport.semidiscrete()), torch.linspace(0, 1, 21, dtype=torch.float64)

    def slope(t: Tensor, x: Tensor, s: Tensor, D: Tensor, r: Tensor) -> Tensor:
        return field(t, x, s0=s[0], D=D, r=r)

    x = integrate(slope, gathered(transport.space, u), times, "midpoint", parameters=values)
    assert float((scattered(transport.space, x) - done).abs().max()) < 1e-10


def test_the_exported_form_of_two_flows() -> None:
    transport = Transport(square(6), [lambda x: (1.0, 0.0), lambda x: (0.0, 1.0)], "dg")
    u = pulse(transport.points[:, :2], (0, 0), 0, 0.0, 0.0)
    step, field = transport.step(), Linear(transport.semidiscrete())
    x = gathered(transport.space, u)
    slope = scattered(transport.space, field(0.0, x, s0=0.6, s1=0.9, D=0.02, r=0.1))  # type: ignore[arg-type]
    h = 1e-5
    implicit = (step(u, h, vector(0.6, 0.9), 0.02, 0.1) - u) / h
    assert float((implicit - slope).abs().max()) < 1e-3 * float(slope.abs().max())
    again = (step(u, h / 2, vector(0.6, 0.9), 0.02, 0.1) - u) / (h / 2)
    assert float((2 * again - implicit - slope).abs().max()) < 1e-6 * float(slope.abs().max())


@pytest.mark.parametrize("method", METHODS)
def test_gradients_agree_with_differences(method: str) -> None:
    transport = Transport(interval(4.0, 20), [right], method)
    u0, step = pulse(transport.points[:, :1], 1.5, 0, 0.0, 0.0), transport.step()
    weights = torch.from_numpy(np.cos(2 * transport.points[:, 0]))

    def functional(m: Tensor) -> Tensor:
        return (weights * Evolution(step)(m[3] * u0, 0.6, 3, m[:1], m[1], m[2])).sum()

    m = vector(1.1, 0.13, 0.4, 0.9).requires_grad_()
    (gradient,) = torch.autograd.grad(functional(m), m)
    with torch.no_grad():
        for k in range(4):
            h = 1e-5 * torch.eye(4, dtype=torch.float64)[k]
            difference = float(functional(m + h) - functional(m - h)) / 2e-5
            assert difference == pytest.approx(float(gradient[k]), rel=1e-6), k


@pytest.mark.mpi
def test_ranks_take_the_steps_of_one_process() -> None:
    moments = []
    for comm in (MPI.COMM_WORLD, MPI.COMM_SELF):
        domain = square(8, comm)
        transport = Transport(domain, [turn])
        u = pulse(transport.points[:, :2], (0.5, 0), 0, 0.0, 0.0)
        for _ in range(3):
            u = transport.step()(u, 0.1, vector(1.0), 0.01, 0.1)
        moments.append([domain.integral(u), domain.integral(u**2), transport.peclet(vector(1.0), 0.01)])
    assert moments[0] == pytest.approx(moments[1], rel=1e-10)


@pytest.mark.mpi
def test_dg_on_several_ranks_is_refused() -> None:
    if MPI.COMM_WORLD.size == 1:
        assert Transport(square(2), [turn], "dg").size == 16
        return
    with pytest.raises(GliodeError, match="'dg' runs on one process"):
        Transport(square(8, MPI.COMM_WORLD), [turn], "dg")


def test_wrong_input_is_refused() -> None:
    step, u = heated(4, "supg").step(), torch.zeros(5, dtype=torch.float64)
    for values, said in (
        ((vector(1.0), -0.1, 0.0), "D: -0.1 must be positive"),
        ((vector(1.0), 0.0, 0.0), "needs 'dg'"),
        ((vector(1.0), 0.1, -0.2), "r: -0.2 is a rate of decay"),
        ((vector(1.0, 2.0), 0.1, 0.0), "give 1 finite speeds"),
        ((vector(math.nan), 0.1, 0.0), "give 1 finite speeds"),
    ):
        with pytest.raises(GliodeError, match=said):
            step(u, 0.1, *values)
    with pytest.raises(GliodeError, match="method: 'fd'"):
        Transport(interval(1.0, 4), [right], "fd")
    with pytest.raises(GliodeError, match="scheme: 'euler'"):
        Transport(interval(1.0, 4), [right], scheme="euler")
    with pytest.raises(GliodeError, match="flows: give one"):
        Transport(interval(1.0, 4), [])
    with pytest.raises(GliodeError, match="two of them cross the same facets"):
        Transport(square(3), [turn, lambda x: (1.0, 0.0)], "dg").semidiscrete()
    with pytest.raises(GliodeError, match="export method 'dg'"):
        heated(4, "supg").semidiscrete()
