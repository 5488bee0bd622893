"""Variational problems: geodesics, brachistochrone, catenary, minimal surface, obstacle; a potential found.

`CURVES` and `surface`, `obstacle` are also what `benchmark.py variational` measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import dolfinx
import numpy as np
import torch
import ufl
from mpi4py import MPI
from scipy.optimize import brentq
from torch import Tensor

from inverse.optimizers import conjugate_gradients, tao
from inverse.optimizers.iteration import Result
from inverse.problem import InverseProblem
from inverse.stopping import GradientTolerance, MaxIterations
from scripts.benchmarks._measures import noisy
from scripts.benchmarks.equation_rows import Row
from scripts.benchmarks.equation_rows._fits import SEEDS
from scripts.variational_studies import TRUTH, collocated, potentials, screening
from solvers.fem.equations.variational import Descent, Energy, sector
from solvers.fem.mesh import from_mesh
from solvers.node.science.variational import Path, membrane

GRAVITY = 9.81
TIGHT = (GradientTolerance(1e-9), MaxIterations(300))


# ---- curves -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """A curve with a closed form: path(knots); start: its first weights; shown(path, m): points at the knots,
    in a plane or in space; exact: the same of the closed form, at the knots' share of the parameter; cost.
    """

    name: str
    path: Callable[[int], Path]
    exact: Callable[[Tensor], Tensor]
    cost: float
    start: Callable[[Path], Tensor] = Path.straight
    shown: Callable[[Path, Tensor], Tensor] | None = None

    def solve(self, knots: int) -> tuple[Path, Result]:
        """By conjugate gradients in L2 of the weights."""
        path = self.path(knots)
        problem = InverseProblem(path.space(), path.cost)
        return path, conjugate_gradients.minimise(problem, self.start(path), stopping=TIGHT)

    def points(self, path: Path, m: Tensor) -> Tensor:
        """The curve found, at the knots."""
        return path.at(m, path.knots)[0] if self.shown is None else self.shown(path, m)

    def errors(self, knots: int) -> tuple[float, float]:
        """Largest distance to the closed form over the curve's size, and relative error of the cost."""
        path, result = self.solve(knots)
        exact = self.exact(path.knots / path.duration)
        size = float((exact.amax(0) - exact.amin(0)).norm())
        away = float((self.points(path, result.m) - exact).norm(dim=-1).max())
        return away / size, abs(result.value / self.cost - 1)


def on_sphere(points: Tensor) -> Tensor:
    """(colatitude, longitude) (..., 2) -> the unit sphere in space."""
    theta, phi = points.unbind(-1)
    return torch.stack([theta.sin() * phi.cos(), theta.sin() * phi.sin(), theta.cos()], -1)


def great_circle() -> Curve:
    """Energy theta'^2 + sin(theta)^2 phi'^2; the square of the angle between the ends."""
    ends = torch.tensor([[1.2, 0.0], [0.7, 2.0]], dtype=torch.float64)
    a, b = on_sphere(ends)
    angle = math.acos(float(a @ b))

    def energy(t: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return w[..., 0].square() + (x[..., 0].sin() * w[..., 1]).square()

    def exact(s: Tensor) -> Tensor:
        s = s[:, None]
        return (((1 - s) * angle).sin() * a + (s * angle).sin() * b) / math.sin(angle)

    return Curve(
        "great circle",
        lambda knots: Path(energy, ends[0], ends[1], knots=knots),
        exact,
        angle**2,
        shown=lambda path, m: on_sphere(path.at(m, path.knots)[0]),
    )


def hyperbolic_line() -> Curve:
    """Energy (x'^2 + y'^2) / y^2 of the half-plane; the circle (tanh s, 1 / cosh s), s its length."""

    def exact(s: Tensor) -> Tensor:
        length = -1.0 + 2.5 * s
        return torch.stack([length.tanh(), 1 / length.cosh()], -1)

    ends = exact(torch.tensor([0.0, 1.0], dtype=torch.float64))

    def energy(t: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return w.square().sum(-1) / x[..., 1].square()

    return Curve("hyperbolic line", lambda knots: Path(energy, ends[0], ends[1], knots=knots), exact, 2.5**2)


def catenary(c: float, b: float, width: float, shift: float, held: bool) -> Curve:
    """y = c cosh((t - b) / c) + shift on [0, width]: least of int y sqrt(1 + y'^2), the area of a surface of
    revolution over 2 pi; held: that of a chain of this length, its height's integral.
    """

    def exact(s: Tensor) -> Tensor:
        t = width * s
        return torch.stack([t, c * ((t - b) / c).cosh() + shift], -1)

    ends = exact(torch.tensor([0.0, 1.0], dtype=torch.float64))[:, 1:]
    length = c * (math.sinh((width - b) / c) + math.sinh(b / c))
    sinh2 = math.sinh(2 * (width - b) / c) + math.sinh(2 * b / c)
    cost = c * width / 2 + c**2 / 4 * sinh2 + shift * length

    def arc(t: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return (1 + w[..., 0].square()).sqrt()

    def weight(t: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return x[..., 0] * arc(t, x, w)

    def path(knots: int) -> Path:
        return Path(
            weight, ends[0], ends[1], knots=knots, duration=width, hold=(arc, length) if held else None
        )

    def hanging(path: Path) -> Tensor:
        return torch.linspace(-1, 1, len(path.knots), dtype=torch.float64)[:, None]

    def shown(path: Path, m: Tensor) -> Tensor:
        return torch.stack([path.knots, path.at(m, path.knots)[0][:, 0]], -1)

    name = "chain of given length" if held else "catenary of revolution"
    return Curve(name, path, exact, cost, hanging if held else Path.straight, shown)


def brachistochrone(width: float, depth: float | None) -> Curve:
    """From rest at (0, 0) to (width, depth), depth downward (None: free), in the least time.

    In y = q^2 and the share t of the time spent, the square of the time is int (x'^2 / q^2 + 4 q'^2) dt / 2g.
    x does not enter, so x' = width q^2 / int q^2 and what is left is (4 int q'^2 + width^2 / int q^2) / 2g:
    smooth in q, which starts along a line, where y = x^(2/3) does not. The cycloid is q = sqrt(2 r) sin(a t
    / 2), a the angle it has rolled.
    """

    def excess(a: float) -> float:
        return (a - math.sin(a)) / (1 - math.cos(a)) - width / (depth or 1.0)

    a = math.pi if depth is None else brentq(excess, 1e-3, 2 * math.pi - 1e-3, xtol=1e-14)
    radius = width / (a - math.sin(a))

    def exact(s: Tensor) -> Tensor:
        return radius * torch.stack([a * s - (a * s).sin(), 1 - (a * s).cos()], -1)

    def parts(t: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return torch.cat([w.square(), x.square()], -1)

    def outcome(end: Tensor, integrals: Tensor) -> Tensor:
        return (4 * integrals[0] + width**2 / integrals[1]) / (2 * GRAVITY)

    def shown(path: Path, m: Tensor) -> Tensor:
        q = path.at(m, path.knots)[0][:, 0]
        each = (path.quadrature * path.sampled(m)[0][:, 0].square()).view(len(q) - 1, -1).sum(1)
        covered = torch.cat([each.new_zeros(1), each.cumsum(0)])
        return torch.stack([width * covered / covered[-1], q.square()], -1)

    end = None if depth is None else [math.sqrt(depth)]
    return Curve(
        "brachistochrone" + (" to a wall" if depth is None else ""),
        lambda knots: Path(parts, [0.0], end, knots=knots, outcome=outcome),
        exact,
        a**2 * radius / GRAVITY,
        lambda path: torch.ones(len(path.knots), 1, dtype=torch.float64),
        shown,
    )


CURVES = (
    great_circle(),
    hyperbolic_line(),
    catenary(0.8, 0.9, 1.5, 0.0, False),
    catenary(0.7, 0.9, 2.0, -2.0, True),
    brachistochrone(2.0, 1.0),
    brachistochrone(2.0, None),
)


# ---- surfaces ---------------------------------------------------------------------------------------------


def surface(cells: int) -> tuple[float, int]:
    """A catenoid u = c arcosh(r / c), 1 <= r <= 2, by Newton's method from the membrane's shape: its largest
    error over its height, and the dofs.
    """
    c, domain = 0.8, sector(1.0, 2.0, cells)
    r = torch.from_numpy(np.linalg.norm(domain.points[: domain.n_owned], axis=1))
    exact = c * torch.acosh(r / c)
    held = (r < 1 + 1e-9) | (r > 2 - 1e-9)

    def stretched(u: dolfinx.fem.Function) -> ufl.Form:
        return 0.5 * ufl.inner(ufl.grad(u), ufl.grad(u)) * ufl.dx

    def area(u: dolfinx.fem.Function) -> ufl.Form:
        return ufl.sqrt(1 + ufl.inner(ufl.grad(u), ufl.grad(u))) * ufl.dx

    u = torch.zeros_like(exact)
    for energy in (stretched, area):
        u = Descent(domain, energy, held, exact)(u, math.inf)
    return float((u - exact).abs().max() / (exact.max() - exact.min())), len(u)


def obstacle(cells: int) -> tuple[float, float]:
    """A membrane over the unit half ball, u = 0 at r = 2, on a quarter of [-2, 2]^2: errors in L2, and of
    the radius a of the contact, 1 - a^2 = a^2 log(2 / a) (Bueler 2021, chapter 12).
    """
    mesh = dolfinx.mesh.create_rectangle(
        MPI.COMM_WORLD,
        [[0.0, 0.0], [2.0, 2.0]],
        [cells, cells],
        ghost_mode=dolfinx.mesh.GhostMode.none,
        diagonal=dolfinx.mesh.DiagonalType.crossed,
    )
    domain = from_mesh(mesh)
    points = torch.from_numpy(domain.points[: domain.n_owned])
    r = points.norm(dim=1)
    a = brentq(lambda a: 1 - a**2 - a**2 * math.log(2 / a), 0.1, 0.99)
    slope = a**2 / math.sqrt(1 - a**2)
    near = r.clamp(max=0.9)  # the ball, and its tangent further out, where nothing touches
    ball = (1 - near.square()).sqrt() - 0.9 / math.sqrt(1 - 0.81) * (r - near)
    exact = torch.where(r <= a, ball, slope * (2 / r.clamp(min=a)).log())
    energy = Energy(domain, membrane, (points > 2 - 1e-9).any(1), exact)
    low = ball[energy.free]
    problem = InverseProblem(energy.space, energy, bounds=(low, None))
    found = tao.minimise(problem, low.clamp(min=0), "bntr", "full", stopping=MaxIterations(100))
    u = energy.state(found.m)
    contact = float(domain.mass[u <= ball + 1e-9].sum())
    away = float((domain.mass @ (u - exact).square() / (domain.mass @ exact.square())).sqrt())
    return away, math.sqrt(4 * contact / math.pi) - a


def order(errors: Sequence[float], sizes: Sequence[float]) -> float:
    """Of the last two of a sequence of meshes or knots."""
    return math.log(errors[-2] / errors[-1]) / math.log(sizes[-1] / sizes[-2])


def rows(full: bool) -> list[Row]:
    """Curves at 33 knots, surfaces on triangles of 1/32 of the radius (full: 65 and 1/64)."""
    knots = [9, 17, 33, 65] if full else [9, 17, 33]
    cells = [16, 32, 64] if full else [16, 32]
    found = []
    for curve in CURVES:
        errors = [curve.errors(k) for k in knots]
        away, costs = zip(*errors, strict=True)
        found.append(
            Row(
                f"variational: {curve.name}",
                "closed form",
                max(away[-1], costs[-1]),
                1e-4,
                order(away, [k - 1 for k in knots]),
                4.0,
                note="the larger error of curve (at the knots, over its size) and cost",
            )
        )
    bent = [surface(n)[0] for n in cells]
    found.append(Row("variational: minimal surface", "catenoid", bent[-1], 1e-3, order(bent, cells), 2.0))
    stretched = [obstacle(n)[0] for n in cells]
    found.append(
        Row(
            "variational: obstacle",
            "radial closed form",
            stretched[-1],
            5e-3,
            note=f"in L2; order {order(stretched, cells):.2f}, uneven: the contact ends between vertices",
        )
    )
    clean = collocated()
    error = float((potentials(33) - clean).abs().max() / clean.abs().max())
    estimates = [screening(*noisy(clean, seed)) for seed in SEEDS]
    k, c = zip(*estimates, strict=True)
    found.append(
        Row(
            "variational: charged fluid",
            "SciPy's collocation",
            error,
            1e-3,
            parameters={"k": (TRUTH[0], k), "c": (TRUTH[1], c)},
            note="potential by least energy at 33 knots, parameters by shooting from the collocation's data",
        )
    )
    return found
