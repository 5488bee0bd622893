"""Stationary problems against closed forms, Hooke's law, finite differences and, in parallel, one process."""

from __future__ import annotations

from functools import partial
from typing import Any

import dolfinx
import numpy as np
import pytest
import torch
import ufl
from dolfinx.fem import Constant, Function, functionspace
from mpi4py import MPI
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from scripts.benchmarks.equation_rows import stationary as cases
from solvers.errors import GliodeError
from solvers.fem.equations.stationary import Stationary, dofs_on, elasticity, poisson, stress, zero
from solvers.fem.implicit import NotConverged
from solvers.spaces import reduce, replicate


def test_conduction_converges_to_its_closed_form_with_order_2() -> None:
    errors = []
    for n in (4, 8):
        solve, points = cases.conduction(n)
        errors.append(cases.relative(solve(0.7, 5.0), cases.conduction_exact(0.7, 5.0, points)))
    assert errors[1] < 4e-3 and np.log2(errors[0] / errors[1]) > 1.8


def test_a_tube_converges_to_lames_solution_with_order_2() -> None:
    errors = []
    for n in (2, 4):
        solve, points = cases.tube_model(n)
        errors.append(cases.relative(solve(2.0, 0.3), cases.tube_exact(2.0, 0.3, points)))
    assert errors[1] < 2e-2 and np.log2(errors[0] / errors[1]) > 1.8


def test_a_uniform_strain_has_hookes_stress() -> None:
    """A bar pulled by t with free sides: strain t/E along it and -nu t/E across; exact in Q1."""
    mesh = dolfinx.mesh.create_unit_cube(MPI.COMM_SELF, 2, 2, 2, dolfinx.mesh.CellType.hexahedron)
    V = functionspace(mesh, ("Lagrange", 1, (3,)))
    u, v, (E, nu) = Function(V), ufl.TestFunction(V), (Constant(mesh, 0.0) for _ in range(2))
    pulled = ufl.conditional(ufl.gt(ufl.SpatialCoordinate(mesh)[0], 1 - 1e-9), 0.3, 0.0)
    bcs = [zero(V.sub(i), partial(near_zero, axis=i)) for i in range(3)]
    solve = Stationary(elasticity(u, v, E, nu) - pulled * v[0] * ufl.ds, u, [E, nu], bcs=bcs)
    found = solve(2.0, 0.25).view(-1, 3).numpy()
    np.testing.assert_allclose(found, V.tabulate_dof_coordinates() * [0.15, -0.0375, -0.0375], atol=1e-12)
    u.x.array[:] = found.reshape(-1)
    E.value, nu.value = 2.0, 0.25
    sigma = [
        [dolfinx.fem.assemble_scalar(dolfinx.fem.form(stress(u, E, nu)[i, j] * ufl.dx)) for j in range(3)]
        for i in range(3)
    ]
    np.testing.assert_allclose(sigma, np.diag([0.3, 0.0, 0.0]), atol=1e-12)


def nonlinear(comm: MPI.Comm, n: int) -> tuple[Stationary, Any, list[Tensor]]:
    """-div((1 + u^2) k grad u) = f with f a field, boundary values as parameters; and values for it."""
    mesh = dolfinx.mesh.create_unit_square(comm, n, n)
    V = functionspace(mesh, ("Lagrange", 1))
    u, v, k, f, edge = Function(V), ufl.TestFunction(V), Constant(mesh, 0.0), Function(V), Function(V)
    solve = Stationary(
        poisson(u, v, k * (1 + u**2), f), u, [k, f, edge], boundary=edge, bcs=[zero(V, everywhere)]
    )
    owned = V.dofmap.index_map.size_local
    x = torch.from_numpy(V.tabulate_dof_coordinates()[:owned].copy())
    source, values = 3 * torch.sin(2 * x[:, 0] + 1), torch.zeros(owned, dtype=torch.float64)
    dofs = dofs_on(V, everywhere)
    on = torch.from_numpy(dofs[dofs < owned].astype(np.int64))
    values[on] = (x[:, 0] ** 2 - 0.5 * x[:, 1])[on]
    return solve, V, [torch.tensor(0.4, dtype=torch.float64), source, values]


def near_zero(x: Any, axis: int) -> Any:
    return np.isclose(x[axis], 0.0)


def everywhere(x: Any) -> Any:
    return np.ones(x.shape[1], dtype=bool)


def test_derivatives_by_coefficients_sources_and_boundary_values() -> None:
    solve, _, point = nonlinear(MPI.COMM_SELF, 2)
    leaves = [p.requires_grad_() for p in point]
    assert gradcheck(solve, leaves, eps=1e-5, atol=1e-7, rtol=1e-6, check_forward_ad=True)
    assert gradgradcheck(solve, leaves, eps=1e-5, atol=1e-6, rtol=1e-5)


def test_boundary_values_are_met() -> None:
    solve, V, (k, f, edge) = nonlinear(MPI.COMM_SELF, 4)
    on = dofs_on(V, everywhere)
    u = solve(k, f, edge)
    assert len(on) == 16 and float(edge[on].abs().max()) > 0.4
    torch.testing.assert_close(u[on], edge[on])


def test_a_start_changes_nothing_but_where_newton_begins() -> None:
    solve, _, (k, f, edge) = nonlinear(MPI.COMM_SELF, 4)
    u = solve(k, f, edge)
    torch.testing.assert_close(solve(k, f, edge, start=solve(1.3 * k, f, edge)), u, rtol=1e-9, atol=1e-9)


def test_what_makes_no_sense_is_refused() -> None:
    mesh = dolfinx.mesh.create_unit_interval(MPI.COMM_SELF, 4)
    V = functionspace(mesh, ("Lagrange", 1))
    u, v, k, edge = Function(V), ufl.TestFunction(V), Constant(mesh, 0.0), Function(V)
    with pytest.raises(GliodeError, match="no facet of the boundary"):
        zero(V, lambda x: x[0] > 2.0)
    F = poisson(u, v, 1.0, k * ufl.exp(u))
    with pytest.raises(GliodeError, match="list `boundary` among the parameters"):
        Stationary(F, u, [k], boundary=edge)
    bcs = [zero(V, everywhere)]
    solve = Stationary(F, u, [k], bcs=bcs)
    with pytest.raises(GliodeError, match="expected float64"):
        solve(torch.ones(2, dtype=torch.float64))
    solve(3.0)  # Bratu's problem has solutions up to 3.51 (here, on four cells, a little less)
    with pytest.raises(NotConverged, match="continue from easier parameters"):
        solve(5.0)
    solve(3.0)


@pytest.mark.mpi
def test_ranks_agree_with_one_process() -> None:
    """Solution and gradients by a coefficient, a source field and boundary values."""
    results = []
    for comm in (MPI.COMM_SELF, MPI.COMM_WORLD):
        solve, V, (k, f, edge) = nonlinear(comm, 6)
        points = V.tabulate_dof_coordinates()[: len(f)]
        weights = torch.from_numpy(1.0 + points[:, 0] - 0.5 * points[:, 1] ** 2)
        leaves = [k.requires_grad_(), f.requires_grad_(), edge.requires_grad_()]
        u = solve(replicate(k, comm), f, edge)
        grads = torch.autograd.grad(reduce((weights * u**3).sum(), comm), leaves)
        places = np.concatenate(comm.allgather(points.round(9)))
        order = np.lexsort(places.T)
        fields = [np.concatenate(comm.allgather(t.detach().numpy()))[order] for t in (u, *grads[1:])]
        results.append([grads[0].numpy(), *fields])
    for serial, parallel in zip(*results, strict=True):
        np.testing.assert_allclose(parallel, serial, rtol=1e-9, atol=1e-9 * np.abs(serial).max())
