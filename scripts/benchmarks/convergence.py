"""Orders of convergence in space and time: manufactured solutions, heat kernels and the exact Fisher wave.

Errors are relative L2 norms of uh - u by quadrature, not of nodal values, where P1 can be too good. An
order is the slope between the two finest runs. Bars: order 2 in h, and in time for the second-order schemes,
within 0.1; the wave's speed within 0.1 %.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import dolfinx
import numpy as np
import torch
import ufl
from dolfinx.fem import Constant, Function, functionspace
from dolfinx.mesh import CellType
from mpi4py import MPI
from torch import Tensor

from scripts.benchmarks import Check
from solvers.evolution import PointwiseStep, Strang
from solvers.fem.compat import geometry_dofmap
from solvers.fem.diffusion import DiffusionStep
from solvers.fem.implicit import Sdirk2Step, theta_step
from solvers.fem.mesh import Domain, box, interval
from solvers.fem.operators import DiffusionOperator

COMM = MPI.COMM_SELF
DX = ufl.dx(metadata={"quadrature_degree": 4})
TOLERANCE = 0.1


def run(full: bool) -> list[Check]:
    """All checks; `full` adds a finer mesh and a finer step to each sequence."""
    return [
        *manufactured_in_space(full),
        *manufactured_in_time(full),
        *variable_diffusion(full),
        *heat_kernel(full),
        *fisher_wave(full),
    ]


def orders(errors: Sequence[float]) -> list[float]:
    """log2 of the ratios of errors at successive halvings."""
    return [float(np.log2(a / b)) for a, b in itertools.pairwise(errors)]


def self_order(results: Sequence[Tensor]) -> float:
    """The order in the step from results of halved steps on one mesh."""
    return orders([float(torch.linalg.norm(a - b)) for a, b in itertools.pairwise(results)])[-1]


def order_checks(what: str, errors: Sequence[float], expected: int) -> list[Check]:
    """The last order against its bar, and the errors for information."""
    return [
        Check.near(f"{what}: order", orders(errors)[-1], expected, TOLERANCE),
        Check(f"{what}: errors", " ".join(f"{e:.1e}" for e in errors), "relative L2"),
    ]


def relative_error(uh: Function, exact: Any) -> float:
    """||uh - u|| / ||u|| in L2 for a UFL expression u."""
    form = dolfinx.fem.form
    difference, size = (dolfinx.fem.assemble_scalar(form(w**2 * DX)) for w in (uh - exact, exact + 0 * uh))
    return float(np.sqrt(difference / size))


def function(V: Any, u: Tensor) -> Function:
    """A Function of the values."""
    uh = Function(V)
    uh.x.array[:] = u.numpy()
    return uh


# ---- ImplicitStep -----------------------------------------------------------------------------------------

SCHEMES: dict[str, tuple[Callable[..., Any], int]] = {
    "implicit Euler": (partial(theta_step, theta=1.0), 1),
    "trapezoidal": (theta_step, 2),
    "SDIRK2": (Sdirk2Step, 2),
}


def manufactured_in_space(full: bool) -> list[Check]:
    """u_t = div(D grad u) + 2 u (1 - u) + f in the square or cube, u = 1/2 + 0.3 exp(-t) prod cos(pi x_i)."""
    cases = {
        "triangles": (CellType.triangle, [8, 16, 32]),
        "quadrilaterals": (CellType.quadrilateral, [8, 16, 32]),
        "tetrahedra": (CellType.tetrahedron, [6, 12, 24]),
        "hexahedra": (CellType.hexahedron, [6, 12, 24]),
    }
    checks = []
    for name, (cell, sizes) in cases.items():
        errors = [_manufactured_error(cell, n) for n in ([*sizes, 2 * sizes[-1]] if full else sizes)]
        checks += order_checks(f"manufactured in h, {name}, SDIRK2", errors, 2)
    return checks


def _manufactured_error(cell: CellType, n: int) -> float:
    flat = cell in (CellType.triangle, CellType.quadrilateral)
    mesh = (
        dolfinx.mesh.create_unit_square(COMM, n, n, cell)
        if flat
        else dolfinx.mesh.create_unit_cube(COMM, n, n, n, cell)
    )
    V = functionspace(mesh, ("Lagrange", 1))
    x, t = ufl.SpatialCoordinate(mesh), Constant(mesh, 0.0)
    D, rho = 0.1 * (1 + 0.5 * x[0] + x[1] ** 2), 2.0

    def shape(cos: Callable[[Any], Any], x: Any) -> Any:
        product = cos(np.pi * x[0]) * cos(np.pi * x[1])
        return product if flat else product * cos(np.pi * x[2])

    u = 0.5 + 0.3 * ufl.exp(-t) * shape(ufl.cos, x)
    source = -0.3 * ufl.exp(-t) * shape(ufl.cos, x) - ufl.div(D * ufl.grad(u)) - rho * u * (1 - u)

    def spatial(w: Any, v: Any) -> ufl.Form:
        return ((rho * w * (1 - w) + source) * v - D * ufl.inner(ufl.grad(w), ufl.grad(v))) * DX

    # The Jacobian is symmetric, and with these steps close to the mass matrix.
    step = Sdirk2Step(spatial, V, [t], time=t, options={"ksp_type": "cg", "pc_type": "jacobi"})
    start = Function(V)
    start.interpolate(lambda x: 0.5 + 0.3 * shape(np.cos, x))
    duration, steps = 0.2, 16
    values = torch.from_numpy(start.x.array.copy())
    for k in range(steps):
        values = step(values, duration / steps, k * duration / steps)
    t.value = duration
    return relative_error(function(V, values), u)


def manufactured_in_time(full: bool) -> list[Check]:
    """The same with u = (1 + x + y/2) (2 + sin 4t) / 8: exact in space, so that the error is the scheme's."""
    mesh = dolfinx.mesh.create_unit_square(COMM, 4, 4)
    V = functionspace(mesh, ("Lagrange", 1))
    x, t = ufl.SpatialCoordinate(mesh), Constant(mesh, 0.0)
    D, rho = 0.1 * (1 + 0.5 * x[0] + x[1] ** 2), 2.0
    shape = 1 + x[0] + x[1] / 2
    u, velocity = shape * (2 + ufl.sin(4 * t)) / 8, shape * 4 * ufl.cos(4 * t) / 8

    def operator(w: Any, v: Any) -> ufl.Form:
        return (rho * w * (1 - w) * v - D * ufl.inner(ufl.grad(w), ufl.grad(v))) * DX

    def spatial(w: Any, v: Any) -> ufl.Form:
        # The source in weak form, so that the boundary flux of u is part of it.
        return operator(w, v) - operator(u, v) + velocity * v * DX

    checks = []
    start = Function(V)
    start.interpolate(lambda x: (1 + x[0] + x[1] / 2) / 4)
    for name, (make, expected) in SCHEMES.items():
        step, errors = make(spatial, V, [t], time=t), []
        for steps in (20, 40, 80, 160, 320) if full or expected == 1 else (20, 40, 80):
            values = torch.from_numpy(start.x.array.copy())
            for k in range(steps):
                values = step(values, 1.0 / steps, k / steps)
            t.value = 1.0
            errors.append(relative_error(function(V, values), u))
        checks += order_checks(f"manufactured in dt, {name}", errors, expected)
    return checks


# ---- DiffusionStep ----------------------------------------------------------------------------------------


def _diffuse(
    domain: Domain, D: Tensor, u: Tensor, duration: float, steps: int, scheme: Any, tensor: bool = False
) -> Tensor:
    operator = DiffusionOperator(domain, tensor)
    step, w = DiffusionStep(operator, scheme), operator.conductances(D)
    for _ in range(steps):
        u = step(u, duration / steps, w)
    return u


def _centres(domain: Domain) -> np.ndarray[Any, Any]:
    return np.asarray(domain.mesh.geometry.x[geometry_dofmap(domain.mesh)].mean(axis=1))


def variable_diffusion(full: bool) -> list[Check]:
    """u = phi(x) exp(-t), phi = cos kx + a cos 2kx, solves u_t = (D u')' with u' = 0 at 0 and pi/k for

        D(x) = -int phi / phi' = (1 + a cos kx) / (1 + 4 a cos kx) / k^2.

    In three dimensions: phi(x) phi(y) phi(z) exp(-3t), with the tensor D = diag(D(x), D(y), D(z)).
    """
    k, a, duration = 0.1, 0.15, 0.5

    def phi(cos: Callable[[Any], Any], x: Any) -> Any:
        return cos(k * x) + a * cos(2 * k * x)

    def diffusivity(x: Any) -> Any:
        return (1 + a * np.cos(k * x)) / (1 + 4 * a * np.cos(k * x)) / k**2

    def error(domain: Domain, steps: int) -> float:
        x, dim = ufl.SpatialCoordinate(domain.mesh), domain.mesh.geometry.dim
        D, start = diffusivity(_centres(domain)), domain.interpolate(lambda x: phi(np.cos, x[:, 0]))
        exact, tensor = phi(ufl.cos, x[0]) * float(np.exp(-duration)), False
        if dim == 3:
            start = domain.interpolate(lambda x: np.prod(phi(np.cos, x), axis=1))
            exact = (
                phi(ufl.cos, x[0]) * phi(ufl.cos, x[1]) * phi(ufl.cos, x[2]) * float(np.exp(-3 * duration))
            )
            D, tensor = np.einsum("cd,de->cde", D, np.eye(3)), True
        else:
            D = D[:, 0]
        u = _diffuse(domain, torch.from_numpy(D.copy()), start, duration, steps, "sdirk2", tensor)
        return relative_error(domain.function(u), exact)

    length = np.pi / k
    lines = [error(interval(length, n, COMM), 160) for n in (10, 20, 40, *((80,) if full else ()))]
    checks = order_checks("variable D(x) in h, interval, DiffusionStep", lines, 2)
    sizes = ((4, 8, 2), (8, 16, 4), (16, 32, 8), *(((32, 64, 16),) if full else ()))
    bricks = [error(box((length, length, length), n, COMM), 32) for n in sizes]
    checks += order_checks("tensor D(x) in h, bricks 1 : 1/2 : 2, DiffusionStep", bricks, 2)
    return checks


def heat_kernel(full: bool) -> list[Check]:
    """A Gaussian spreading from variance 9 to 18 mm^2 a direction, in an octant, on voxels 1 : 1 : 2."""
    D, lengths, first, last = 0.5, (20.0, 20.0, 20.0), 9.0, 18.0
    duration = (last - first) / (2 * D)

    def kernel(exp: Callable[[Any], Any], square: Any, variance: float) -> Any:
        return (first / variance) ** 1.5 * exp(-square / (2 * variance))

    def solve(domain: Domain, steps: int, scheme: Any) -> Tensor:
        start = domain.interpolate(lambda x: kernel(np.exp, (x**2).sum(1), first))
        return _diffuse(
            domain, torch.full((domain.n_cells,), D, dtype=torch.float64), start, duration, steps, scheme
        )

    errors = []
    for n in (8, 16, 32, *((64,) if full else ())):
        domain = box(lengths, (n, n, n // 2), COMM)
        x = ufl.SpatialCoordinate(domain.mesh)
        uh = domain.function(solve(domain, 64, "sdirk2"))
        errors.append(relative_error(uh, kernel(ufl.exp, ufl.inner(x, x), last)))
    checks = order_checks("heat kernel in h, bricks 1 : 1 : 2, DiffusionStep", errors, 2)
    domain = box(lengths, (16, 16, 8), COMM)
    for scheme, expected in {"sdirk2": 2, "crank-nicolson": 2, "implicit-euler": 1}.items():
        order = self_order([solve(domain, steps, scheme) for steps in (8, 16, 32, 64)])
        checks.append(
            Check.near(f"heat kernel in dt, DiffusionStep {scheme}: order", order, expected, TOLERANCE)
        )
    return checks


# ---- The Fisher wave --------------------------------------------------------------------------------------


def fisher_wave(full: bool) -> list[Check]:
    """u = (1 + exp(z/sqrt 6))^-2, z = (x - ct) sqrt(rho/D), c = 5 sqrt(D rho/6) (Ablowitz & Zeppetella 1979).

    D = 0.13 mm^2/day, rho = 0.025/day on 200 mm: the front (2.3 mm wide) runs from 70 mm for 400 days. What
    is wrong ahead of it grows by exp(rho t) = 22000 in that time, so the linear solves go to 1e-13.
    """
    D, rho, length, origin, duration = 0.13, 0.025, 200.0, 70.0, 400.0
    speed = 5 * np.sqrt(D * rho / 6)

    def wave(exp: Callable[[Any], Any], x: Any, t: float) -> Any:
        return (1 + exp((x - origin - speed * t) * np.sqrt(rho / D / 6))) ** -2

    def spatial(u: Any, v: Any) -> ufl.Form:
        return (rho * u * (1 - u) * v - D * u.dx(0) * v.dx(0)) * ufl.dx

    def logistic(u: Tensor, dt: Tensor) -> Tensor:
        growth = torch.exp(rho * dt)
        return u * growth / (1 + u * (growth - 1))

    def implicit(make: Callable[..., Any]) -> Callable[[Domain], Callable[[Tensor, float], Tensor]]:
        return lambda domain: make(spatial, domain.V)

    def strang(domain: Domain) -> Callable[[Tensor, float], Tensor]:
        operator = DiffusionOperator(domain, rtol=1e-13)
        w = operator.conductances(torch.full((domain.n_cells,), D, dtype=torch.float64))
        split = Strang(PointwiseStep(logistic), DiffusionStep(operator))
        return lambda u, dt: split(u, dt, w)

    steppers = {
        "trapezoidal": implicit(theta_step),
        "SDIRK2": implicit(Sdirk2Step),
        "Strang": strang,
    }

    def in_time(make: Callable[[Domain], Callable[[Tensor, float], Tensor]]) -> float:
        domain = interval(length, 400, COMM)
        step, results = make(domain), []
        for steps in (50, 100, 200, 400):
            u = domain.interpolate(lambda x: wave(np.exp, x[:, 0], 0.0))
            for _ in range(steps):
                u = step(u, duration / steps)
            results.append(u)
        return self_order(results)

    checks = []
    for name, make in steppers.items():
        errors, speeds = [], []
        for cells in (200, 400, 800, *((1600,) if full else ())):
            domain = interval(length, cells, COMM)
            step, steps = make(domain), cells // 4
            x = domain.points[:, 0]
            u = start = domain.interpolate(lambda x: wave(np.exp, x[:, 0], 0.0))
            for _ in range(steps):
                u = step(u, duration / steps)
            exact = wave(ufl.exp, ufl.SpatialCoordinate(domain.mesh)[0], duration)
            errors.append(relative_error(domain.function(u), exact))
            speeds.append((_front(x, u) - _front(x, start)) / duration)
        checks += order_checks(f"Fisher wave in h = dt/8, {name}", errors, 2)
        checks.append(Check.near(f"Fisher wave in dt, {name}: order", in_time(make), 2, TOLERANCE))
        deviation = 100 * abs(speeds[-1] / speed - 1)
        checks.append(Check.at_most(f"Fisher wave, {name}: speed off {speed:.4f} mm/d", deviation, 0.1, "%"))
    return checks


def _front(x: np.ndarray[Any, Any], u: Tensor) -> float:
    """Where u falls through 1/2, by interpolation of logit(sqrt u), which is linear for the exact wave."""
    order = np.argsort(x)
    x, root = x[order], np.sqrt(u.numpy()[order])
    at = int(np.flatnonzero(root > np.sqrt(0.5))[-1])
    level = np.log(root / (1 - root))[at : at + 2]
    target = np.log(np.sqrt(0.5) / (1 - np.sqrt(0.5)))
    return float(x[at] + (x[at + 1] - x[at]) * (target - level[0]) / (level[1] - level[0]))
