"""Navier-Stokes against closed forms, published figures, finite differences and, in parallel, one process."""

from __future__ import annotations

from typing import Any

import dolfinx
import numpy as np
import pytest
import torch
import ufl
from mpi4py import MPI
from torch import Tensor
from torch.autograd import forward_ad

from scripts.benchmarks.equation_rows import flow
from scripts.benchmarks.equation_rows.flow_identification import modes
from solvers.errors import GliodeError
from solvers.fem.equations.cylinder import RADIUS, at_inflow, cylinder_channel, not_outflow, on_cylinder
from solvers.fem.equations.navier_stokes import Force, SemiImplicit, midpoint_step, steady
from solvers.fem.equations.taylor_hood import Probe, TaylorHood
from solvers.fem.implicit import NotConverged
from solvers.spaces import reduce, replicate

RE_20 = {"drag": 5.57953523384, "lift": 0.010618948146, "pressure": 0.11752016697}  # Nabh 1998


@pytest.mark.parametrize("scheme, steps", [("midpoint", 12), ("semi-implicit", 40)])
def test_taylor_green_vortices_decay_with_order_2_in_time(scheme: str, steps: int) -> None:
    row = flow.taylor_green_time(scheme, steps)
    assert row.error < 6e-3 and row.order is not None and 1.85 < row.order < 2.2


def test_kovasznay_flow_converges_with_order_3() -> None:
    coarse, fine = (flow.kovasznay_error(n) for n in (5, 10))
    assert fine < 2e-3 and np.log2(coarse / fine) > 2.8


def test_the_cylinder_in_a_channel_at_re_20() -> None:
    """Within 0.01 %, 0.5 % and 0.3 % of the converged values: the pressure is piecewise linear."""
    channel = flow.Cylinder(12)
    found = channel.coefficients(steady(channel.space)(flow.NU, 0.3 * channel.inflow), 0.2)
    for value, exact, bar in zip(found, RE_20.values(), (1e-4, 5e-3, 3e-3), strict=True):
        assert abs(value - exact) < bar * exact


def test_the_mesh_is_the_channel() -> None:
    """Its area and the cylinder's circumference, as well as quadratic edges can; no cell is turned over."""
    mesh = cylinder_channel(6)
    facets = dolfinx.mesh.locate_entities_boundary(mesh, 1, on_cylinder)
    marks = dolfinx.mesh.meshtags(mesh, 1, np.sort(facets), np.ones(len(facets), np.int32))
    one = dolfinx.fem.Constant(mesh, 1.0)
    around = ufl.ds(domain=mesh, subdomain_data=marks)(1)
    area, edge, signed = (
        dolfinx.fem.assemble_scalar(dolfinx.fem.form(f))
        for f in (one * ufl.dx, one * around, ufl.sign(ufl.JacobianDeterminant(mesh)) * ufl.dx)
    )
    assert area == pytest.approx(2.2 * 0.41 - np.pi * RADIUS**2, abs=1e-6)
    assert edge == pytest.approx(2 * np.pi * RADIUS, rel=1e-5)
    assert abs(signed) == pytest.approx(area, rel=1e-12)
    with pytest.raises(GliodeError, match="n must be even"):
        cylinder_channel(7)


def small(comm: MPI.Comm) -> tuple[TaylorHood, list[Tensor]]:
    """The channel on a coarse mesh and its inflow modes."""
    space = TaylorHood(cylinder_channel(4, comm), [(not_outflow, (0, 1))])
    return space, modes(space)


def test_derivatives_of_a_midpoint_step_and_of_a_semi_implicit_one() -> None:
    """By start, step, viscosity and inflow: adjoint and tangent against central differences."""
    space, (parabola, skew, _) = small(MPI.COMM_SELF)
    start = steady(space)(0.01, parabola)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(space.n_owned, generator=generator, dtype=torch.float64)
    # A divergence-free change of the start, else its pressure dominates.
    change = steady(space)(0.02, parabola + 0.3 * skew) - start
    implicit, explicit = midpoint_step(space), SemiImplicit(space, courant=10.0)

    def later(scheme: str, m: Tensor) -> Tensor:
        u, inflow = start + m[0] * change, parabola + m[3] * skew
        if scheme == "midpoint":
            return (weights * implicit(implicit(u, m[1], m[2], inflow), m[1], m[2], inflow)).sum()
        pair = explicit(explicit.start(u, m[1], m[2], inflow), m[1], m[2], inflow)
        return (weights * pair[0]).sum()

    for scheme in ("midpoint", "semi-implicit"):
        m = torch.tensor([0.4, 0.01, 0.02, 0.2], dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(later(scheme, m), m)
        for k, h in enumerate((1e-4, 1e-6, 1e-6, 1e-4)):
            e = torch.zeros(4, dtype=torch.float64)
            e[k] = 1.0
            with torch.no_grad():
                difference = float(later(scheme, m + h * e) - later(scheme, m - h * e)) / (2 * h)
                with forward_ad.dual_level():
                    tangent = forward_ad.unpack_dual(
                        later(scheme, forward_ad.make_dual(m.detach(), e))
                    ).tangent
            assert float(gradient[k]) == pytest.approx(difference, rel=2e-5)
            assert float(tangent) == pytest.approx(float(gradient[k]), rel=1e-7)


def test_a_stationary_flow_stays() -> None:
    """Also where Newton starts from the solution."""
    space, (parabola, _, _) = small(MPI.COMM_SELF)
    u = steady(space)(0.01, parabola)
    for later in (
        midpoint_step(space)(u, 0.05, 0.01, parabola),
        SemiImplicit(space).start(u, 0.002, 0.01, parabola)[0],
    ):
        torch.testing.assert_close(later, u, rtol=0.0, atol=1e-8)


def test_without_walls_that_move_kinetic_energy_falls_by_what_friction_takes() -> None:
    """By the midpoint rule |u1|^2 - |u0|^2 = -2 dt nu |grad (u0 + u1)/2|^2, up to what div u leaves."""
    space = flow.square(6)
    u0 = space.state(
        lambda x: np.stack([np.sin(x[0]) * np.cos(x[1]), -np.cos(x[0]) * np.sin(x[1])]), lambda x: 0 * x[0]
    )
    u0 = midpoint_step(space)(u0, 1e-3, 0.05, space.zeros())  # free of divergence in the discrete sense
    u1 = midpoint_step(space)(u0, 0.2, 0.05, space.zeros())
    now, before, mean = (ufl.split(space.function(u))[0] for u in (u1, u0, (u0 + u1) / 2))
    energy, lost = (
        dolfinx.fem.assemble_scalar(dolfinx.fem.form(f * ufl.dx))
        for f in (
            ufl.inner(now, now) - ufl.inner(before, before),
            -2 * 0.2 * 0.05 * ufl.inner(ufl.grad(mean), ufl.grad(mean)),
        )
    )
    assert lost < -0.1 and energy == pytest.approx(lost, rel=5e-3)


def walls(x: Any) -> Any:
    return np.isclose(x[1] * (1 - x[1]), 0.0)


def test_force_on_a_wall_of_a_straight_channel() -> None:
    """Poiseuille flow pulls its wall by nu du/dy a length: quadratic, so exact."""
    mesh = dolfinx.mesh.create_rectangle(MPI.COMM_SELF, [np.zeros(2), np.array([3.0, 1.0])], [6, 4])
    space = TaylorHood(mesh, [(walls, (0, 1)), (at_inflow, (0, 1))])
    profile = space.boundary(lambda x: np.stack([x[1] * (1 - x[1]), 0 * x[0]]), at_inflow)
    u = steady(space)(0.1, profile)
    force = Force(space, lambda x: np.isclose(x[1], 0.0))(u, 0.1)
    # u = y (1 - y), p = 2 nu (3 - x): on the wall the shear is nu, the pressure's integral 9 nu. The wall's
    # corner dof also takes part of the pressure 6 nu at the inflow: its basis function has integral h/6.
    probe = Probe(space, np.array([[1.1, 0.3], [2.0, 0.9]]))
    np.testing.assert_allclose(probe.velocity(u), [[0.21, 0.0], [0.09, 0.0]], atol=1e-9)
    np.testing.assert_allclose(probe.pressure(u), [0.38, 0.2], atol=1e-9)
    np.testing.assert_allclose(force, [0.3 - 0.6 * 0.25 / 6, -0.9], rtol=1e-9)
    with pytest.raises(GliodeError, match="outside the mesh"):
        Probe(space, np.array([[1.1, 1.3]]))


def test_flow_between_plates_in_3_d() -> None:
    """Sides that slip, tetrahedra: the plane parabola and its pressure, exactly."""
    cells, corners = [3, 2, 2], [np.zeros(3), np.array([1.5, 1.0, 1.0])]
    space = TaylorHood(
        dolfinx.mesh.create_box(MPI.COMM_SELF, corners, cells),
        [(at_inflow, (0, 1, 2)), (lambda x: walls(x[1:]), (0, 1, 2)), (walls, (1,))],
    )
    profile = space.boundary(lambda x: np.stack([x[2] * (1 - x[2]), 0 * x[0], 0 * x[0]]), at_inflow)
    probe = Probe(space, np.array([[1.1, 0.3, 0.3], [0.4, 0.6, 0.1]]))
    u = steady(space)(0.1, profile)
    np.testing.assert_allclose(probe.velocity(u), [[0.21, 0.0, 0.0], [0.09, 0.0, 0.0]], atol=1e-9)
    np.testing.assert_allclose(probe.pressure(u), [0.08, 0.22], atol=1e-9)


def test_the_way_out_of_each_error() -> None:
    space, (parabola, _, _) = small(MPI.COMM_SELF)
    solve = steady(space)
    with pytest.raises(NotConverged, match="continue from easier parameters"):
        solve(1e-4, 1.5 * parabola)
    u = None
    for nu in (1e-2, 3e-3, 1e-3, 5e-4):
        u = solve(nu, 1.5 * parabola, start=u)
    assert u is not None
    step = SemiImplicit(space)
    with pytest.raises(GliodeError, match=r"cross .* cells, more than 0.2; take dt <= ([\d.]+)") as error:
        step.start(u, 0.02, 5e-4, 1.5 * parabola)
    longest = float(str(error.value).split("<=")[1].split(",")[0])
    step.start(u, 0.99 * longest, 5e-4, 1.5 * parabola)
    box = [(flow.everywhere, (0, 1))]
    with pytest.raises(GliodeError, match="name a vertex where it is zero"):
        TaylorHood(space.mesh, box)
    with pytest.raises(GliodeError, match="leave out `pinned`"):
        TaylorHood(space.mesh, [(not_outflow, (0, 1))], pinned=at_inflow)
    with pytest.raises(GliodeError, match=r"marks \d+ vertices of the boundary, expected one"):
        TaylorHood(space.mesh, box, pinned=at_inflow)


@pytest.mark.mpi
def test_ranks_agree_with_one_process() -> None:
    """Steady flow, one step of each scheme, probes, force, and the gradient by viscosity and amplitude."""
    results = []
    for comm in (MPI.COMM_SELF, MPI.COMM_WORLD):
        space, (parabola, skew, _) = small(comm)
        probe = Probe(space, np.array([[0.3, 0.1], [0.31, 0.3], [1.0, 0.2], [0.1, 0.33]]))
        m = torch.tensor([0.01, 0.3], dtype=torch.float64, requires_grad=True)
        nu, a = replicate(m, comm)
        inflow = parabola + a * skew
        u = steady(space)(nu, inflow)
        later = midpoint_step(space)(u, 0.05, 2 * nu, inflow)
        pair = SemiImplicit(space).start(u, 0.002, 2 * nu, inflow)
        states = (u, later, pair[0])
        observed = [probe.velocity(x).square().sum() + probe.pressure(x).sum() for x in states]
        value = reduce(torch.stack(observed).sum(), comm)
        (gradient,) = torch.autograd.grad(value, m)
        force = Force(space, on_cylinder)(later, 0.02, (later - u) / 0.05)
        results.append(np.concatenate([[float(value)], gradient.numpy(), force]))
    np.testing.assert_allclose(results[1], results[0], rtol=1e-7)
