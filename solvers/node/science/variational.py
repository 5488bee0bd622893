r"""Variational problems as the network x' = w(t), with an energy for its cost.

    minimise  c(x(T), int_0^T L(t, x, w) dt)    over    x' = w(t),  x(0) = start,  x(T) = end,

w depth-varying weights, L a Lagrangian of one or more components, c the cost of what they add up to (a
problem of Bolza). The derivative by w in L2 is that by x in H1: the network's weights precondition the curve.

The physics x' = w is linear in the weights, so the network is run once, on the unit weights, and its states
for any weights are a matrix product after that (`Path`). `carried` gives the same cost to a network that has
to be run, as one more component of its state:

    x' = w,    z' = L(t, x, w),    z(0) = 0,    cost c(x(T), z(T)).

`Elements` is the same in space: energies of piecewise-linear functions on simplices, int W(x, u, grad u) dx.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

from solvers.errors import GliodeError
from solvers.node.science.activated import ScienceActivated, Unknown
from solvers.ode.integrate import integrate
from solvers.spaces import DepthSobolev, GramSpace

Lagrangian = Callable[[Tensor, Tensor, Tensor], Tensor]
"""L(t, x, w): times (...), states and slopes (..., d) -> (...) or (..., k), on the tape."""

POINTS = 4  # of the Gauss rule between two knots
ITERATIONS = 50  # of Newton's method for the factor that meets a constraint


def carried(lagrangian: Lagrangian, dim: int) -> Callable[..., Tensor]:
    """The physics (x, z) -> (w, L(t, x, w)) for `ScienceActivated`, its unknown named w; x is (..., dim)."""

    def field(t: Tensor, state: Tensor, w: Tensor) -> Tensor:
        x = state[..., :dim]
        slopes = w.expand_as(x)
        running = lagrangian(t.expand(x.shape[:-1]), x, slopes)
        return torch.cat([slopes, running if running.ndim == x.ndim else running[..., None]], -1)

    return field


class Path:
    """The cost of a path as a function of its weights m (knots, d), the values of w at the knots.

    lagrangian: L(t, x, w) of all quadrature points at once. start: (d,). end: (d,), met by every m, NaN in a
    component that is free (None: all are). Where it is given, m counts up to a constant: w = m + (end - start
    - int m) / T, the projection in L2 as in H1. Between `knots` equal distances of [0, duration] w is linear.
    outcome: c(x(T), integrals) -> 0-d (None: the integrals' sum). hold: (C, value): int C(t, x, w) dt = value
    is met by every m too, through a factor on the path's deviation from its chord, with which C must grow (a
    length).

    Raises GliodeError for numbers and shapes that make no sense, and where no factor meets `hold`.
    """

    def __init__(
        self,
        lagrangian: Lagrangian,
        start: Sequence[float] | Tensor,
        end: Sequence[float] | Tensor | None = None,
        knots: int = 33,
        duration: float = 1.0,
        outcome: Callable[[Tensor, Tensor], Tensor] | None = None,
        hold: tuple[Lagrangian, float] | None = None,
    ) -> None:
        self.start = torch.as_tensor(start, dtype=torch.float64).detach()
        if self.start.ndim != 1 or not bool(torch.isfinite(self.start).all()):
            raise GliodeError(f"path: the start must be d finite numbers, got {self.start.tolist()}")
        target = torch.full_like(self.start, math.nan) if end is None else end
        self.end = torch.as_tensor(target, dtype=torch.float64).detach()
        if self.end.shape != self.start.shape:
            raise GliodeError(f"path: the end has {self.end.numel()} components, the start {len(self.start)}")
        if hold is not None and not bool(torch.isfinite(self.end).all()):
            raise GliodeError("path: a constraint is held on a path between two given points; give its end")
        self.lagrangian, self.outcome, self.hold, self.duration = lagrangian, outcome, hold, duration
        self._given = torch.isfinite(self.end)
        self._unit = Unknown(
            torch.zeros(knots, dtype=torch.float64), "linear", knots, duration, trained=False
        )
        self._unit.weights.values.copy_(torch.eye(knots, dtype=torch.float64))
        self.knots = self._unit.weights.knots
        nodes, shares = np.polynomial.legendre.leggauss(POINTS)
        h = duration / (knots - 1)
        self.times = (self.knots[:-1, None] + h * torch.from_numpy((nodes + 1) / 2)).reshape(-1)
        self.quadrature = torch.from_numpy(shares * h / 2).repeat(knots - 1)
        self._states, self._slopes = self._run(self.times)
        self._last = self._run(self.knots[-1:])[0][0]

    def _run(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """x and w of the unit weights at times (n,), (n, knots): the network, exact for linear weights."""
        grid, place = torch.unique(torch.cat([self.knots, times]), return_inverse=True)
        field = ScienceActivated(lambda t, x, w: w, {"w": self._unit})
        states = integrate(field, torch.zeros(len(self.knots), dtype=torch.float64), grid, trajectory=True)
        sampled = self._unit.sample(times[:, None])
        return states[place[len(self.knots) :]], sampled.table[[row[0] for row in sampled.index]]

    def space(self, length: float = 0.0) -> DepthSobolev:
        """The weights' space, L2 over the depth, or H1 with a length scale."""
        return DepthSobolev(self.knots, tuple(self.start.shape), length)

    def straight(self) -> Tensor:
        """The weights of the chord (of a component with a free end: of staying at the start)."""
        return self._chord().expand(len(self.knots), -1).clone()

    def _chord(self) -> Tensor:
        chord = (self.end - self.start) / self.duration
        return torch.where(self._given, chord, torch.zeros_like(chord))

    def _bent(self, m: Tensor) -> Tensor:
        """m without its mean where the end is given: the weights of the deviation from the chord."""
        mean = self._last @ m / self.duration
        return m - torch.where(self._given, mean, torch.zeros_like(mean))

    def _at(self, states: Tensor, slopes: Tensor, times: Tensor, bent: Tensor) -> tuple[Tensor, Tensor]:
        chord = self._chord()
        return self.start + times[:, None] * chord + states @ bent, chord + slopes @ bent

    def sampled(self, m: Tensor) -> tuple[Tensor, Tensor]:
        """x and w at the quadrature points `times`, (n, d) each; `quadrature` (n,) are their shares of T."""
        return self._at(self._states, self._slopes, self.times, self._scaled(m))

    def at(self, m: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """x and w at any times (n,) in [0, T], (n, d) each."""
        return self._at(*self._run(times), times, self._scaled(m))

    def _integrals(self, functional: Lagrangian, x: Tensor, w: Tensor) -> Tensor:
        values = functional(self.times, x, w)
        if values.ndim not in (1, 2) or len(values) != len(x):
            raise GliodeError(
                f"path: the Lagrangian gave shape {tuple(values.shape)} for {len(x)} points; reduce over the "
                "last dimension of x and w only"
            )
        return self.quadrature @ (values if values.ndim == 2 else values[:, None])

    def cost(self, m: Tensor) -> Tensor:
        """c(x(T), int L dt), 0-d, to be minimised over `space`."""
        bent = self._scaled(m)
        x, w = self._at(self._states, self._slopes, self.times, bent)
        integrals = self._integrals(self.lagrangian, x, w)
        if self.outcome is None:
            return integrals.sum()
        return self.outcome(self.start + self.duration * self._chord() + self._last @ bent, integrals)

    def _scaled(self, m: Tensor) -> Tensor:
        """The deviation's weights, times the factor that meets the constraint.

        Newton's method off the tape finds the factor; two steps with the slope fixed, on the tape, give it
        its first and second derivatives.
        """
        bent = self._bent(m)
        if self.hold is None:
            return bent
        functional, value = self.hold

        def excess(factor: Tensor, bent: Tensor) -> Tensor:
            x, w = self._at(self._states, self._slopes, self.times, factor * bent)
            return self._integrals(functional, x, w).sum() - value

        factor, slope = _increasing(lambda a: excess(a, bent.detach()))
        for _ in range(2):
            factor = factor - excess(factor, bent) / slope
        return factor * bent


def _increasing(f: Callable[[Tensor], Tensor]) -> tuple[Tensor, float]:
    """The positive root of f, f(0) < 0, and the slope there. Raises GliodeError where there is none."""
    one = torch.ones((), dtype=torch.float64)
    if not float(f(0 * one)) < 0:
        raise GliodeError("path: the value to hold is not above that of the chord (no length is shorter)")
    low, high, a = 0.0, math.inf, 1.0
    for _ in range(ITERATIONS):
        leaf = torch.full_like(one, a, requires_grad=True)
        with torch.enable_grad():
            value = f(leaf)
            (slope,) = torch.autograd.grad(value, leaf)
        if not float(slope) > 0:
            raise GliodeError(
                "path: no factor meets the constraint, which must grow with the path's deviation from its "
                "chord; start from weights that are not constant"
            )
        low, high = (a, high) if float(value.detach()) < 0 else (low, a)
        step = float(value.detach() / slope)
        a = a - step
        if not low < a < high:
            a = (low + high) / 2 if math.isfinite(high) else 2 * low
        if abs(step) <= 1e-12 * a:
            return torch.full_like(one, a), float(slope)
    raise GliodeError("path: no factor meets the constraint to rounding; is it smooth in the path?")


class Elements:
    """Energies of continuous piecewise-linear functions u (vertices,) on intervals or triangles.

    points: (vertices, d) coordinates; cells: (cells, d + 1) vertices of each. volumes: (cells,); mass:
    (vertices,), lumped. Raises GliodeError for cells without a volume.
    """

    def __init__(self, points: Tensor, cells: Tensor) -> None:
        self.points, self.cells = points.detach().double(), cells.long()
        corners = self.points[self.cells]
        edges = corners[:, 1:] - corners[:, :1]
        dim = self.points.shape[1]
        if edges.shape[1:] != (dim, dim):
            raise GliodeError(f"elements: {self.cells.shape[1]} vertices a cell in {dim} dimensions")
        self.volumes = torch.linalg.det(edges).abs() / math.factorial(dim)
        if not bool((self.volumes > 1e-14 * self.volumes.max()).all()):
            raise GliodeError("elements: a cell has no volume; mend the mesh")
        hats = torch.linalg.inv(edges)  # (cells, d, vertices 1 to d)
        self._slopes = torch.cat([-hats.sum(2, keepdim=True), hats], 2)
        share = (self.volumes / (dim + 1))[:, None].expand(self.cells.shape).reshape(-1)
        self.mass = torch.zeros(len(points), dtype=torch.float64).index_add(0, self.cells.reshape(-1), share)

    def gradient(self, u: Tensor) -> Tensor:
        """grad u, (cells, d)."""
        return torch.einsum("cdv,cv->cd", self._slopes, u[self.cells])

    def energy(self, u: Tensor, density: Callable[[Tensor], Tensor], load: Tensor | None = None) -> Tensor:
        """int W(grad u) - f u dx, 0-d: density W: (cells, d) -> (cells,); load: f at the vertices, lumped."""
        stored = self.volumes @ density(self.gradient(u))
        return stored if load is None else stored - (self.mass * load) @ u

    def dirichlet(self, free: Tensor) -> GramSpace:
        """H1_0: the vertices numbered in `free`, u = 0 at the others, (a, b) = int grad a . grad b."""
        local = torch.einsum("c,cdv,cdw->cvw", self.volumes, self._slopes, self._slopes)
        rows = self.cells[:, :, None].expand(local.shape).reshape(-1).numpy()
        columns = self.cells[:, None, :].expand(local.shape).reshape(-1).numpy()
        whole = scipy.sparse.csr_matrix((local.reshape(-1).numpy(), (rows, columns)))
        stiffness = whole[free.numpy()][:, free.numpy()].tocsc()
        factor = scipy.sparse.linalg.splu(stiffness)
        return GramSpace(
            len(free),
            lambda a: torch.from_numpy(stiffness @ a.numpy()),
            lambda d: torch.from_numpy(factor.solve(d.numpy())),
        )


def area(slopes: Tensor) -> Tensor:
    """sqrt(1 + |grad u|^2), whose energy is the area of the graph of u."""
    return (1 + slopes.square().sum(-1)).sqrt()


def membrane(slopes: Tensor) -> Tensor:
    """1/2 |grad u|^2."""
    return 0.5 * slopes.square().sum(-1)
