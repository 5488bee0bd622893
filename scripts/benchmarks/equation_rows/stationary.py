"""Stationary problems as steps of one: Poisson, and an elastic tube under pressure (Lamé)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dolfinx
import numpy as np
import torch
import ufl
from dolfinx.fem import Constant, Function, functionspace
from mpi4py import MPI
from torch import Tensor

from scripts.benchmarks._measures import relative
from scripts.benchmarks.equation_rows import Row
from scripts.benchmarks.equation_rows._fits import fits
from solvers.fem.equations.stationary import Stationary, elasticity, poisson, zero

Array = np.ndarray[Any, np.dtype[np.float64]]


def rows(full: bool) -> list[Row]:
    """The rows of this module."""
    torch.set_num_threads(1)
    return [heat_conduction(), tube()]


def on_meshes(
    model: Callable[[int], tuple[Stationary, Array]],
    closed_form: Callable[[float, float, Array], Tensor],
    meshes: tuple[int, int],
    truth: dict[str, float],
) -> tuple[list[float], Stationary, Tensor]:
    """The relative errors on two meshes; the solver on the second, and the closed form at its dofs."""
    errors = []
    for n in meshes:
        solve, points = model(n)
        first, second = truth.values()
        exact = closed_form(first, second, points)
        with torch.no_grad():
            errors.append(relative(solve(first, second), exact))
    return errors, solve, exact


# ---- Poisson --------------------------------------------------------------------------------------------

FLUX = 1.0  # inwards at x = 1


def conduction(n: int) -> tuple[Stationary, Array]:
    """(k, a) -> u on the unit square, -div(k grad u) = a sin(pi x/2) cos(pi y), and the places of its dofs.

    u = 0 at x = 0, k du/dx = FLUX at x = 1, no flux through the other sides.
    """
    mesh = dolfinx.mesh.create_unit_square(MPI.COMM_SELF, n, n)
    V = functionspace(mesh, ("Lagrange", 1))
    u, v, (k, a) = Function(V), ufl.TestFunction(V), (Constant(mesh, 0.0) for _ in range(2))
    x = ufl.SpatialCoordinate(mesh)
    flux = ufl.conditional(ufl.gt(x[0], 1 - 1e-9), FLUX, 0.0)
    F = poisson(u, v, k, a * ufl.sin(np.pi * x[0] / 2) * ufl.cos(np.pi * x[1])) - flux * v * ufl.ds
    solve = Stationary(F, u, [k, a], bcs=[zero(V, lambda x: np.isclose(x[0], 0.0))])
    return solve, V.tabulate_dof_coordinates()[:, :2]


def conduction_exact(k: float, a: float, points: Array) -> Tensor:
    """FLUX x / k + a sin(pi x/2) cos(pi y) / (k 5 pi^2 / 4)."""
    x, y = points.T
    return torch.from_numpy(
        FLUX * x / k + a * np.sin(np.pi * x / 2) * np.cos(np.pi * y) / (1.25 * np.pi**2 * k)
    )


def heat_conduction() -> Row:
    truth = {"conductivity": 0.7, "source": 5.0}
    errors, solve, exact = on_meshes(conduction, conduction_exact, (8, 16), truth)
    start = dict.fromkeys(truth, 1.0)
    return Row(
        "Poisson",
        "closed form",
        errors[1],
        1e-2,
        float(np.log2(errors[0] / errors[1])),
        2.0,
        fits(lambda m: solve(*m), exact, truth, start),
        "P1, 16 x 16 x 2 triangles; the flux through one side is known, else only source / conductivity could"
        " be found; data: the closed form",
    )


# ---- elasticity -----------------------------------------------------------------------------------------

INNER, OUTER, PRESSURE = 1.0, 2.0, 0.1


def tube_model(n: int) -> tuple[Stationary, Array]:
    """(E, nu) -> displacement of a quarter of a tube under pressure from inside, and the places of its nodes.

    n x 2 n x 2 hexahedra; no displacement along the axis.
    """
    corners = [np.array([INNER, 0.0, 0.0]), np.array([OUTER, np.pi / 2, 1.0])]
    mesh = dolfinx.mesh.create_box(MPI.COMM_SELF, corners, [n, 2 * n, 2], dolfinx.mesh.CellType.hexahedron)
    r, angle = mesh.geometry.x[:, 0].copy(), mesh.geometry.x[:, 1].copy()
    mesh.geometry.x[:, 0], mesh.geometry.x[:, 1] = r * np.cos(angle), r * np.sin(angle)
    V = functionspace(mesh, ("Lagrange", 1, (3,)))
    u, v, (young, ratio) = Function(V), ufl.TestFunction(V), (Constant(mesh, 0.0) for _ in range(2))
    mesh.topology.create_connectivity(2, 3)
    facets = dolfinx.mesh.locate_entities_boundary(mesh, 2, lambda x: np.isclose(np.hypot(x[0], x[1]), INNER))
    inside = dolfinx.mesh.meshtags(mesh, 2, np.sort(facets), np.ones(len(facets), np.int32))
    ds = ufl.ds(domain=mesh, subdomain_data=inside)(1)
    F = elasticity(u, v, young, ratio) + PRESSURE * ufl.inner(ufl.FacetNormal(mesh), v) * ds
    symmetric: list[Callable[[Any], Any]] = [
        lambda x: np.isclose(x[0], 0.0),
        lambda x: np.isclose(x[1], 0.0),
        lambda x: np.isclose(x[2] * (1 - x[2]), 0.0),
    ]
    bcs = [zero(V.sub(i), where) for i, where in enumerate(symmetric)]
    return Stationary(F, u, [young, ratio], bcs=bcs), V.tabulate_dof_coordinates()


def tube_exact(young: float, ratio: float, points: Array) -> Tensor:
    """Lamé's u_r = (1 + nu) / E p a^2 / (b^2 - a^2) ((1 - 2 nu) r + b^2 / r), plane strain, flattened."""
    r = np.hypot(points[:, 0], points[:, 1])[:, None]
    scale = (1 + ratio) / young * PRESSURE * INNER**2 / (OUTER**2 - INNER**2)
    radial = scale * ((1 - 2 * ratio) * r + OUTER**2 / r)
    return torch.from_numpy((radial * points / r * [1, 1, 0]).reshape(-1))


def tube() -> Row:
    truth = {"Young's modulus": 2.0, "Poisson's ratio": 0.3}
    errors, solve, exact = on_meshes(tube_model, tube_exact, (4, 8), truth)
    start = {"Young's modulus": 1.0, "Poisson's ratio": 0.2}
    return Row(
        "elastic tube in 3-D",
        "Lamé's closed form",
        errors[1],
        1e-2,
        float(np.log2(errors[0] / errors[1])),
        2.0,
        fits(lambda m: solve(*m), exact, truth, start),
        "Q1, 8 x 16 x 2 hexahedra on a quarter; data: the closed form at all nodes",
    )
