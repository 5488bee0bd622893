"""Growth in a ball against the radial solution and a tuned voxel solver: error, time, the choice of defaults.

Fisher's equation in a ball of radius 28 mm, D = 0.13 mm^2/day, rho = 0.025/day, zero flux, 200 days, from a
Gaussian cut at u = 0.1 (shared/NUMBERS.md). The reference is radial: finite volumes on 2800 shells, BDF at
1e-9.

The rival is what a careful NumPy user writes: classical Runge-Kutta on voxels cropped to the ball, 7-point
differences, float64, at the stability limit, in place on contiguous memory, in slabs that stay in the cache
(twice as fast as whole arrays). Both start from means of the seed over each voxel or control volume, so both
are measured by such means of the exact solution. Their stencils are the same, half a voxel apart, and so are
their errors in space to a few per cent. One thread each; times are the best of runs that take turns.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from scipy.integrate import solve_ivp
from scipy.interpolate import CubicSpline
from scipy.sparse import diags
from torch import Tensor

from scripts.benchmarks import Check
from solvers.evolution import Evolution, PointwiseStep, Strang
from solvers.fem.diffusion import DiffusionStep, Scheme
from solvers.fem.mesh import ball
from solvers.fem.operators import DiffusionOperator
from tumour.growth import logistic
from tumour.model import default_step

RADIUS, D, RHO, DAYS = 28.0, 0.13, 0.025, 200.0
INTEGRAL = 9633.8
SEED_RADIUS = math.sqrt(-20.0 * math.log(0.1 * (4 * math.pi * 5) ** 1.5 / 250.0))
TOLERANCE = 1e-8
SCHEMES: tuple[Scheme, ...] = ("rkl2", "sdirk2", "crank-nicolson", "implicit-euler")
Array = np.ndarray[Any, np.dtype[np.float64]]


def run(full: bool) -> list[Check]:
    """Table, bars of accuracy, bars of speed."""
    torch.set_num_threads(1)
    exact = reference()
    checks = [Check.near("reference: integral", exact.integral, INTEGRAL, 2.0, "mm^3")]
    for h in (2.0, 1.0, 0.5):
        checks += spacing(h, exact, full)
    return [*checks, Check("load average", os.getloadavg()[0], "processes")]


# ---- The reference ----------------------------------------------------------------------------------------


def seed(squared: Array) -> Array:
    """u0 at squared distances from the centre."""
    g = 250.0 / (4 * math.pi * 5) ** 1.5 * np.exp(-squared / 20.0)
    return np.where(squared < SEED_RADIUS**2, np.minimum(1.0, g), 0.0)


@dataclass(frozen=True)
class Reference:
    """The density at day 200 by distance from the centre, and its integral over the ball."""

    profile: Callable[[Array], Array]
    integral: float

    def __call__(self, points: Array) -> Array:
        """At points (n, 3); outside the ball, where a voxel's corner can lie, the value on its surface."""
        return self.profile(np.minimum(np.sqrt((points**2).sum(1)), RADIUS))

    def means(self, points: Array, h: float, n: int = 4) -> Array:
        """Over boxes of edge h about points."""
        return box_means(points, h, n, self)


def box_means(points: Array, h: float, n: int, f: Callable[[Array], Array]) -> Array:
    """Means of f over boxes of edge h about points, by the midpoint rule with n^3 points."""
    one = ((np.arange(n) + 0.5) / n - 0.5) * h
    total = np.zeros(len(points))
    for offset in np.stack(np.meshgrid(one, one, one), -1).reshape(-1, 3):
        total += f(points + offset)
    return total / n**3


def seed_means(points: Array, h: float) -> Array:
    """The seed averaged over boxes, finely where its jump cuts them."""
    u, r = np.zeros(len(points)), np.sqrt((points**2).sum(1))
    reach = math.sqrt(3) / 2 * h
    for near, n in ((r < SEED_RADIUS - reach, 4), (np.abs(r - SEED_RADIUS) <= reach, 24)):
        u[near] = box_means(points[near], h, n, lambda x: seed((x**2).sum(1)))
    return u


def reference(shells: int = 2800) -> Reference:
    """Finite volumes in r."""
    r = np.linspace(0.0, RADIUS, shells + 1)
    volumes = 4 / 3 * math.pi * np.diff(r**3)
    conductance = 4 * math.pi * r[1:-1] ** 2 * D / (RADIUS / shells)
    total = np.append(conductance, 0.0) + np.append(0.0, conductance)
    L = (diags(1 / volumes) @ diags([-total, conductance, conductance], [0, 1, -1])).tocsc()
    x, weight = np.polynomial.legendre.leggauss(8)
    at = r[:-1, None] + (x + 1) / 2 * np.diff(r)[:, None]
    start = (seed(at**2) * at**2 * weight).sum(1) / (at**2 * weight).sum(1)
    result = solve_ivp(
        lambda _, u: L @ u + RHO * u * (1 - u), (0, DAYS), start,
        method="BDF", rtol=1e-9, atol=1e-11, jac=lambda _, u: (L + diags(RHO * (1 - 2 * u))).tocsc(),
    )  # fmt: skip
    u, centres = result.y[:, -1], (r[1:] + r[:-1]) / 2
    # Even about the centre.
    spline = CubicSpline(np.append(-centres[2::-1], centres), np.append(u[2::-1], u))
    return Reference(spline, float(volumes @ u))


# ---- The rival --------------------------------------------------------------------------------------------


class Voxels:
    """Runge-Kutta 4 on voxels: k = c (sum of neighbours) + u (rho - c (their number) - rho u), 0 outside.

    Arrays are flat, so that all neighbours are shifted contiguous slices; one layer of zeros goes round the
    ball.
    """

    def __init__(self, h: float) -> None:
        n = math.ceil(RADIUS / h) + 1
        one = (np.arange(2 * n) - n + 0.5) * h
        centres = np.stack(np.meshgrid(one, one, one, indexing="ij"), -1).reshape(-1, 3)
        mask = (centres**2).sum(1) <= RADIUS**2
        self.h, self.points, self.inside = h, centres[mask], mask
        self.start = np.zeros(len(mask))
        self.start[mask] = seed_means(self.points, h)
        inside, c = mask * 1.0, D / h**2
        self.strides = (4 * n * n, 2 * n, 1)
        neighbours = sum(np.roll(inside, s) + np.roll(inside, -s) for s in self.strides)
        self.coupling, self.linear = c * inside, (RHO - c * neighbours) * inside
        self.steps = math.ceil(DAYS * 12 * c / 2.785)
        self.block = max(1, 27_000 // self.strides[0]) * self.strides[0]

    def grow(self) -> Array:
        """The densities at the last day, flat."""
        dt, u = DAYS / self.steps, self.start.copy()
        self._total, self._k, self._t = np.empty_like(u), np.empty(self.block), np.empty(self.block)
        one, other = np.zeros_like(u), np.zeros_like(u)
        for _ in range(self.steps):
            self._stage(u, u, one, dt / 2, dt / 6, first=True)
            self._stage(u, one, other, dt / 2, dt / 3)
            self._stage(u, other, one, dt, dt / 3)
            self._stage(u, one, None, 0.0, dt / 6)
        return u

    def _stage(self, u: Array, y: Array, new: Array | None, a: float, b: float, first: bool = False) -> None:
        """k = f(y); new = u + a k; total += b k, at the last stage u += total."""
        x, line, _ = self.strides
        for i in range(x, len(u) - x, self.block):
            j = min(i + self.block, len(u) - x)
            k, t, here = self._k[: j - i], self._t[: j - i], slice(i, j)
            np.add(y[i - x : j - x], y[i + x : j + x], out=k)
            for s in (line, 1):
                k += y[i - s : j - s]
                k += y[i + s : j + s]
            k *= self.coupling[here]
            np.multiply(y[here], -RHO, out=t)
            t += self.linear[here]
            t *= y[here]
            k += t
            if new is not None:
                np.multiply(k, a, out=t)
                np.add(t, u[here], out=new[here])
            if first:
                np.multiply(k, b, out=self._total[here])
            else:
                k *= b
                self._total[here] += k
            if new is None:
                u[here] += self._total[here]

    def errors(self, u: Array, exact: Reference) -> tuple[float, float]:
        """Of the integral, %, and relative L2."""
        means, volume = exact.means(self.points, self.h), self.h**3
        error = np.linalg.norm(u[self.inside] - means) / np.linalg.norm(means)
        return 100 * (float(u.sum()) * volume / INTEGRAL - 1), float(error)


# ---- Ours -------------------------------------------------------------------------------------------------


class Ours:
    """The ball of the same voxels as finite elements."""

    def __init__(self, h: float, exact: Reference) -> None:
        self.domain = ball(RADIUS, h, MPI.COMM_SELF)
        self.operator = DiffusionOperator(self.domain, rtol=TOLERANCE)
        self.w = self.operator.conductances(torch.full((self.domain.n_cells,), D, dtype=torch.float64))
        self.start = torch.from_numpy(seed_means(self.domain.points, h))
        self.exact = self.domain.project(exact)
        self._rho = torch.tensor(RHO, dtype=torch.float64)

    def grow(self, steps: int, scheme: Scheme = "rkl2") -> Tensor:
        """The densities at the last day."""
        law = logistic()
        reaction = PointwiseStep(law.flow, recompute=not law.closed_form)
        self.diffusion = DiffusionStep(self.operator, scheme)
        return Evolution(Strang(reaction, self.diffusion))(self.start, DAYS, steps, self.w, self._rho)

    def errors(self, u: Tensor) -> tuple[float, float]:
        """Of the integral, %, and relative L2."""
        norm = [float(torch.sqrt((self.domain.mass * v**2).sum())) for v in (u - self.exact, self.exact)]
        return 100 * (self.domain.integral(u) / INTEGRAL - 1), norm[0] / norm[1]


def timed(f: Callable[[], Any]) -> tuple[Any, float]:
    """The result and the seconds it took."""
    start = time.perf_counter()
    result = f()
    return result, time.perf_counter() - start


def spacing(h: float, exact: Reference, full: bool) -> list[Check]:
    """The rows of the table at one spacing, then the default against its bars."""
    ours, rival, checks = Ours(h, exact), Voxels(h), []
    u = ours.grow(1)
    every = (10, 14, 20, 28, 40, 56, 80, 100) if full else (10, 20, 40, 100)
    for scheme in SCHEMES:
        # The implicit schemes take minutes at 0.5 mm: two rows of them suffice to see it.
        sizes = every if scheme == "rkl2" or h > 0.5 or full else ((20, 40) if scheme == "sdirk2" else (20,))
        for steps in sizes:
            ours.operator.count.iterations = 0
            u, seconds = timed(partial(ours.grow, steps, scheme))
            integral, error = ours.errors(u)
            products = ours.operator.count.iterations
            text = f"integral {integral:+.3f} %, L2 {error:.2e}, {products} products, {seconds:.2f} s"
            text += f", {ours.diffusion.fallbacks} fallbacks" if ours.diffusion.fallbacks else ""
            checks.append(Check(f"h = {h} mm, {scheme}, {steps} steps", text))
    days = default_step((h, h, h))
    steps = math.ceil(DAYS / days)
    best = [math.inf, math.inf]
    for _ in range(2 if h < 1 else 6):
        u, seconds = timed(partial(ours.grow, steps))
        v, theirs = timed(rival.grow)
        best = [min(best[0], seconds), min(best[1], theirs)]
    (integral, error), (their_integral, their_error) = ours.errors(u), rival.errors(v, exact)
    text = (
        f"integral {their_integral:+.3f} %, L2 {their_error:.2e}, {4 * rival.steps} products, {best[1]:.2f} s"
    )
    checks.append(Check(f"h = {h} mm, rival, {rival.steps} steps", text))
    halved = ours.errors(ours.grow(2 * steps))[0]
    name = f"h = {h} mm, default ({days:g} days, {best[0]:.2f} s)"
    moved = abs(integral - halved)
    if h == 2:  # too coarse for the bars, which are for 1 and 0.5 mm
        return [
            *checks,
            Check(f"{name}: integral", integral, "%"),
            Check(f"{name}: halving moves it", moved, "%"),
        ]
    return [
        *checks,
        Check.at_most(f"{name}: error of the integral", abs(integral), 0.25, "%"),
        Check.at_most(f"{name}: halving the step moves the integral", moved, 0.25, "%"),
        Check.at_most(f"{name}: L2 error over the rival's", error / their_error, 1.0),
        Check.at_least(f"{name}: times faster than the rival", best[1] / best[0], 3 if h == 1 else 5),
        Check.within(f"{name}: smallest density", float(u.min()), 0.0, 1.0),
        Check.within(f"{name}: largest density", float(u.max()), 0.0, 1.0),
    ]
