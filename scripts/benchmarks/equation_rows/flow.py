"""Incompressible Navier-Stokes: closed forms, and the DFG cylinder."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import dolfinx
import numpy as np
import torch
import ufl
from mpi4py import MPI
from torch import Tensor

from scripts.benchmarks.equation_rows import Row
from solvers.evolution import Evolution
from solvers.fem.equations.cylinder import HEIGHT, at_inflow, cylinder_channel, not_outflow, on_cylinder
from solvers.fem.equations.navier_stokes import Force, SemiImplicit, midpoint_step, steady
from solvers.fem.equations.taylor_hood import Probe, TaylorHood

NU = 1e-3
INTERVALS = {  # Schäfer & Turek 1996
    "2D-1": {"drag": (5.57, 5.59), "lift": (0.0104, 0.0110), "pressure": (0.1172, 0.1176)},
    "2D-2": {
        "drag": (3.22, 3.24),
        "lift": (0.99, 1.01),
        "Strouhal": (0.295, 0.305),
        "pressure": (2.46, 2.50),
    },
}


def rows(full: bool) -> list[Row]:
    """The rows of this module."""
    torch.set_num_threads(1)
    return [
        taylor_green_space(),
        taylor_green_time("midpoint", 12),
        taylor_green_time("semi-implicit", 40),
        kovasznay(),
        cylinder_steady(),
        *([cylinder_shedding()] if full else []),
    ]


# ---- closed forms ---------------------------------------------------------------------------------------


def square(n: int) -> TaylorHood:
    """[0, pi]^2 with walls that slip: the periodic Taylor-Green vortices, one of them."""
    corners = [np.zeros(2), np.full(2, np.pi)]
    mesh = dolfinx.mesh.create_rectangle(MPI.COMM_SELF, corners, [n, n])
    walls = [(lambda x, i=i: np.isclose(x[i] % np.pi, 0.0) | np.isclose(x[i], np.pi), [i]) for i in range(2)]
    return TaylorHood(mesh, walls, pinned=lambda x: np.isclose(x[0] + x[1], 0.0))


def taylor_green(n: int, nu: float, duration: float, steps: int, scheme: str) -> float:
    """The relative error of the velocity at the end."""
    space = square(n)
    u = space.state(
        lambda x: np.stack([np.sin(x[0]) * np.cos(x[1]), -np.cos(x[0]) * np.sin(x[1])]),
        lambda x: (np.cos(2 * x[0]) + np.cos(2 * x[1]) - 2) / 4,
    )
    dt, still = duration / steps, space.zeros()
    with torch.no_grad():
        if scheme == "midpoint":
            u = Evolution(midpoint_step(space))(u, duration, steps, torch.tensor(nu).double(), still)
        else:
            step = SemiImplicit(space)
            pair = step.start(u, dt, nu, still)
            for _ in range(steps - 1):
                pair = step(pair, dt, nu, still)
            u = pair[0]
    x = ufl.SpatialCoordinate(space.mesh)
    exact = ufl.as_vector([ufl.sin(x[0]) * ufl.cos(x[1]), -ufl.cos(x[0]) * ufl.sin(x[1])])
    return space.distance(u, math.exp(-2 * nu * duration) * exact)


def taylor_green_space() -> Row:
    coarse, fine = (taylor_green(n, 0.01, 0.5, 10, "midpoint") for n in (6, 12))
    return Row(
        "Taylor-Green vortex, mesh",
        "closed form",
        fine,
        1e-2,
        float(np.log2(coarse / fine)),
        3.0,
        note="nu = 0.01, P2-P1, 12 x 12 x 2 triangles, midpoint rule",
    )


def taylor_green_time(scheme: str, steps: int) -> Row:
    coarse, fine = (taylor_green(16, 2.0, 0.5, n, scheme) for n in (steps // 2, steps))
    order = float(np.log2(coarse / fine))
    note = f"nu = 2, {steps} steps until exp(-2) of the velocity is left"
    return Row(f"Taylor-Green vortex, {scheme}", "closed form", fine, 1e-2, order, 2.0, note=note)


def kovasznay() -> Row:
    coarse, fine = (kovasznay_error(n) for n in (6, 12))
    order = float(np.log2(coarse / fine))
    note = "Re = 40, 12 x 12 x 2 triangles on [-0.5, 1] x [-0.5, 0.5]"
    return Row("Kovasznay flow", "closed form", fine, 1e-2, order, 3.0, note=note)


def kovasznay_error(n: int, reynolds: float = 40.0) -> float:
    """The relative error of the velocity."""
    rate = reynolds / 2 - math.hypot(reynolds / 2, 2 * math.pi)

    def velocity(x: Any, lib: Any) -> list[Any]:
        wave, decay = 2 * math.pi * x[1], lib.exp(rate * x[0])
        return [1 - decay * lib.cos(wave), rate / (2 * math.pi) * decay * lib.sin(wave)]

    mesh = dolfinx.mesh.create_rectangle(MPI.COMM_SELF, [np.full(2, -0.5), np.array([1.0, 0.5])], [n, n])
    space = TaylorHood(mesh, [(everywhere, (0, 1))], pinned=lambda x: np.isclose(x[0] + x[1], -1.0))
    boundary = space.boundary(lambda x: np.stack(velocity(x, np)), everywhere)
    with torch.no_grad():
        u = steady(space)(1 / reynolds, boundary)
    return space.distance(u, ufl.as_vector(velocity(ufl.SpatialCoordinate(mesh), ufl)))


def everywhere(x: Any) -> Any:
    """All of the boundary."""
    return np.ones(x.shape[1], dtype=bool)


# ---- the cylinder ---------------------------------------------------------------------------------------


def parabola(x: Any) -> Any:
    """The inflow with a maximum of 1."""
    return np.stack([4 * x[1] * (HEIGHT - x[1]) / HEIGHT**2, np.zeros_like(x[0])])


@dataclass
class Cylinder:
    """The channel, meshed with n cells along a quarter of the cylinder, and what the benchmark measures."""

    n: int
    space: TaylorHood = field(init=False)

    def __post_init__(self) -> None:
        self.space = TaylorHood(cylinder_channel(self.n), [(not_outflow, (0, 1))])
        self.inflow = self.space.boundary(parabola, at_inflow)
        self._force = Force(self.space, on_cylinder)
        self._ends = Probe(self.space, np.array([[0.15, 0.2], [0.25, 0.2]]))

    def coefficients(self, u: Tensor, mean: float, acceleration: Tensor | None = None) -> tuple[float, ...]:
        """Drag and lift, 2 F / (mean^2 D), and the pressure difference; mean: the mean inflow."""
        drag, lift = 2 * self._force(u, NU, acceleration) / (mean**2 * 0.1)
        before, behind = self._ends.pressure(u)
        return float(drag), float(lift), float(before - behind)


def inside(case: str, found: dict[str, float]) -> tuple[float, str]:
    """How far the worst figure is from the middle of its interval, in half widths, and all of them."""
    far = [abs(2 * found[k] - low - high) / (high - low) for k, (low, high) in INTERVALS[case].items()]
    return max(far), ", ".join(f"{name} {value:.5g}" for name, value in found.items())


def cylinder_steady() -> Row:
    channel = Cylinder(32)
    with torch.no_grad():
        u = steady(channel.space)(NU, 0.3 * channel.inflow)
    found = dict(zip(("drag", "lift", "pressure"), channel.coefficients(u, 0.2), strict=True))
    worst, figures = inside("2D-1", found)
    return Row("DFG cylinder 2D-1", "published intervals, of which 1 is the edge", worst, 1.0, note=figures)


def shedding(
    channel: Cylinder, dt: float, duration: float
) -> Iterator[tuple[float, Tensor, tuple[float, ...]]]:
    """DFG 2D-2: after each step time, state, and (drag, lift, pressure difference).

    From the stationary flow, which is unstable, with a push across the wake that starts the shedding.
    """
    space, inflow = channel.space, 1.5 * channel.inflow
    solve, step = steady(space), SemiImplicit(space)
    u = solve(10 * NU, inflow)
    for nu in (3 * NU, NU):
        u = solve(nu, inflow, start=u)
    push = space.state(
        lambda x: np.stack([0 * x[0], np.exp(-((x[0] - 0.35) ** 2 + (x[1] - 0.2) ** 2) / 0.03**2)]),
        lambda x: 0 * x[0],
    )
    pair, time = step.start(u + push, dt, NU, inflow), dt
    while time < duration:
        older, pair, time = pair[1], step(pair, dt, NU, inflow), time + dt
        acceleration = (3 * pair[0] - 4 * pair[1] + older) / (2 * dt)
        yield time, pair[0], channel.coefficients(pair[0], 1.0, acceleration)


def cylinder_shedding(n: int = 16, dt: float = 1 / 2200, duration: float = 6.0) -> Row:
    with torch.no_grad():
        series = np.array([(t, *measured) for t, _, measured in shedding(Cylinder(n), dt, duration)])
    worst, figures = inside("2D-2", shedding_figures(series))
    note = f"{figures}; n = {n}, dt = {dt:.3g} s, the last 1 s of {duration:g} s"
    return Row("DFG cylinder 2D-2", "published intervals, of which 1 is the edge", worst, 1.0, note=note)


def shedding_figures(series: Any, last: float = 1.0) -> dict[str, float]:
    """Of (time, drag, lift, pressure difference) rows: the figures of the last periods."""
    time, drag, lift, pressure = series[series[:, 0] > series[-1, 0] - last].T
    tops = np.flatnonzero((lift[1:-1] > lift[:-2]) & (lift[1:-1] >= lift[2:])) + 1
    bend, slope = lift[tops + 1] - 2 * lift[tops] + lift[tops - 1], (lift[tops + 1] - lift[tops - 1]) / 2
    peaks = time[tops] - slope / bend * (time[1] - time[0])
    period = float(np.diff(peaks).mean())
    # The benchmark takes the pressure half a period after the lift is largest.
    halfway = np.interp(peaks[:-1] + period / 2, time, pressure)
    return {
        "drag": float(drag.max()),
        "lift": float(lift.max()),
        "Strouhal": 0.1 / period,
        "pressure": float(halfway.mean()),
    }
