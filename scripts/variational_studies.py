r"""Ill-posed and control problems with the network's weights as unknowns: for the benchmark and its picture.

force        x'' = w(t) from noisy positions: w is their second derivative
law          x'' = -f(x) from where many paths end: f a function of space
steer        u_t = D u_xx, D u_x(1) = w(t) or a source in a part of (0, 1): a target at T
as_weight    u' = w(t) with the cost int ||w - f(u)||^2: the equation solved by its right-hand side
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_bvp
from torch import Tensor

from inverse.optimizers import conjugate_gradients, gauss_newton, newton_cg
from inverse.optimizers.iteration import Result
from inverse.problem import InverseProblem, LeastSquares
from inverse.regularizers.tikhonov import Tikhonov
from inverse.stopping import Discrepancy, GradientTolerance, MaxIterations, Rule, State
from scripts.benchmarks._measures import noisy
from solvers.node.models import Node
from solvers.node.science.activated import ScienceActivated, Unknown
from solvers.node.science.variational import Path
from solvers.node.weights import Parameters
from solvers.ode.integrate import integrate
from solvers.spaces import DepthSobolev, Euclidean

F64 = torch.float64
Array = NDArray[np.float64]


# ---- ill-posed --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """An unknown function (n,) at `grid`, its truth, and how it was found.

    errors: of the iterates, relative, in L2; error: of the last; oracle: of the best, which only the truth
    tells.
    """

    grid: Tensor
    truth: Tensor
    found: Tensor
    result: Result
    errors: tuple[float, ...]

    @property
    def error(self) -> float:
        return self.errors[-1]

    @property
    def oracle(self) -> float:
        return min(self.errors)


def minimised(problem: LeastSquares, start: Tensor, stopped: bool, grid: Tensor, truth: Tensor) -> Found:
    """By conjugate gradients; stopped: by the discrepancy principle, or where nothing moves any more."""
    errors: list[float] = []

    def note(state: State) -> None:
        errors.append(float((state.m - truth).norm() / truth.norm()))

    stop = rules(stopped, problem.data_size)
    result = conjugate_gradients.minimise(problem, start, stopping=stop, callback=note)
    return Found(grid, truth, result.m, result, tuple(errors))


def rules(stopped: bool, size: int) -> tuple[Rule, ...]:
    """By the discrepancy principle, or until nothing moves any more."""
    if stopped:
        return Discrepancy(1.1, math.sqrt(size)), MaxIterations(200)
    return GradientTolerance(1e-8), MaxIterations(60)


def force(seed: int, length: float, stopped: bool, steps: int = 50) -> Found:
    """x'' = w on [0, 1] from rest, x seen at 50 times; in L2, or H1 with a length."""
    w = Unknown(0.0, "linear", steps + 1)
    field = ScienceActivated(lambda t, y, w: torch.stack([y[..., 1], w.expand_as(y[..., 0])], -1), {"w": w})
    network = Node(field, 1.0, steps)
    parameters = Parameters(network, length)
    rest = torch.zeros(2, dtype=F64)

    def seen(m: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(network, dict(parameters.unpack(m)), (rest, True))
        return out[1:, 0]

    times = network.times()
    a, b = 2 * math.pi, 5.0  # w = sin(a t) + cos(b t), integrated twice
    clean = times / a - (a * times).sin() / a**2 + (1 - (b * times).cos()) / b**2
    data, sd = noisy(clean[1:], seed)
    problem = LeastSquares(parameters.space, seen, data, sd)
    return minimised(problem, parameters.pack(), stopped, times, (a * times).sin() + (b * times).cos())


def law(seed: int, length: float, stopped: bool, shots: int = 40, steps: int = 40) -> Found:
    """x'' = -f(x) from rest at 40 places, x and x' seen at t = 2 alone; f linear between 41 places.

    The data come from 4 times as many steps, with the true f.
    """
    grid = torch.linspace(-1.5, 1.5, 41, dtype=F64)
    space = DepthSobolev(grid, (), length)
    start = torch.stack([torch.linspace(-1.45, 1.45, shots, dtype=F64), torch.zeros(shots, dtype=F64)], -1)

    def truth(x: Tensor) -> Tensor:
        return 3 * x - 4 * x * (-((x / 0.5) ** 2)).exp()

    def between(x: Tensor, f: Tensor) -> Tensor:
        place = (x - grid[0]) / (grid[1] - grid[0])
        left = place.detach().floor().clamp(0, len(grid) - 2).long()
        share = place - left
        return (1 - share) * f[left] + share * f[left + 1]

    def moving(acceleration: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
        return torch.stack([y[..., 1], -acceleration(y[..., 0])], -1)

    field = ScienceActivated(
        lambda t, y, f: moving(lambda x: between(x, f), y), {"f": Unknown(3 * grid, space=space)}
    )
    network = Node(field, 2.0, steps)
    parameters = Parameters(network)

    def ends(m: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(network, dict(parameters.unpack(m)), (start,))
        return out

    fine = torch.linspace(0, 2, 4 * steps + 1, dtype=F64)
    data, sd = noisy(integrate(lambda t, y: moving(truth, y), start, fine), seed)
    problem = LeastSquares(parameters.space, ends, data, sd)
    return minimised(problem, parameters.pack(), stopped, grid, truth(grid))


# ---- a potential between walls ----------------------------------------------------------------------------


TRUTH = (10.0, 0.4)  # k, c
ENDS = torch.tensor([[1.5, 0.5], [1.0, 1.2], [-1.0, 1.5]], dtype=F64)
SEEN = torch.linspace(0, 1, 81, dtype=F64)


def potentials(knots: int) -> Tensor:
    """Least of int w^2 / 2 + k (cosh(x - c) - 1) dt between three pairs of ends, (81, 3): potentials of a
    charged fluid between two walls (Poisson and Boltzmann).
    """
    k, c = TRUTH

    def energy(t: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return (0.5 * w.square() + k * ((x - c).cosh() - 1)).sum(-1)

    path = Path(energy, ENDS[:, 0], ENDS[:, 1], knots=knots)
    problem = InverseProblem(path.space(), path.cost)
    stop = (GradientTolerance(1e-9), MaxIterations(200))
    return path.at(conjugate_gradients.minimise(problem, path.straight(), stopping=stop).m, SEEN)[0]


def collocated() -> Tensor:
    """The same by SciPy's collocation: x'' = k sinh(x - c)."""
    k, c = TRUTH
    found = []
    for first, last in ENDS.tolist():

        def field(t: Array, y: Array) -> Array:
            return np.vstack([y[1], k * np.sinh(y[0] - c)])

        def ends(a: Array, b: Array, first: float = first, last: float = last) -> Array:
            return np.array([a[0] - first, b[0] - last])

        guess = np.vstack([np.linspace(first, last, 81), np.full(81, last - first)])
        found.append(solve_bvp(field, ends, SEEN.numpy(), guess, tol=1e-9).sol(SEEN.numpy())[0])
    return torch.from_numpy(np.stack(found, 1))


def screening(data: Tensor, sd: float) -> list[float]:
    """k and c from noisy potentials, by shooting: x'' = k sinh(x - c) with unknown slopes at the start."""

    def shoot(m: Tensor) -> Tensor:
        def field(t: Tensor, state: Tensor, k: Tensor, c: Tensor) -> Tensor:
            x, slope = state.unbind(-1)
            return torch.stack([slope, k * (x - c).sinh()], -1)

        first = torch.stack([ENDS[:, 0], m[2:]], -1)
        return integrate(field, first, SEEN, parameters=(m[0].exp(), m[1]), trajectory=True)[..., 0]

    guess = torch.cat([torch.zeros(2, dtype=F64), (data[8] - ENDS[:, 0]) / SEEN[8]])
    m = gauss_newton.minimise(LeastSquares(Euclidean(5), shoot, data, sd), guess).m
    return [float(m[0].exp()), float(m[1])]


# ---- control ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """u_t = D u_xx on (0, 1) in n linear elements, lumped, no flux but what is controlled: u' = A u + B w(t).

    where: "boundary", a flux through x = 1; "inside", a source in 0.3 < x < 0.5.
    """

    where: str
    cells: int = 20
    D: float = 0.2
    T: float = 0.5
    weight: float = 1e-3  # of the control's cost

    def system(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A, B (n,), the mass and the target at the vertices."""
        n, h = self.cells + 1, 1 / self.cells
        x = torch.linspace(0, 1, n, dtype=F64)
        mass = torch.full((n,), h, dtype=F64)
        mass[[0, -1]] = h / 2
        K = torch.diag(torch.full((n,), 2 / h, dtype=F64))
        K -= torch.diag(torch.full((n - 1,), 1 / h, dtype=F64), 1)
        K -= torch.diag(torch.full((n - 1,), 1 / h, dtype=F64), -1)
        K[0, 0] = K[-1, -1] = 1 / h
        source = torch.zeros(n, dtype=F64)
        if self.where == "boundary":
            source[-1] = 1.0
        else:
            source = mass * ((x > 0.3) & (x < 0.5))
        return -self.D * K / mass[:, None], source / mass, mass, 0.5 * (1 - (math.pi * x).cos())

    def dense(self, times: Tensor) -> tuple[Tensor, Tensor, float]:
        """Optimal w at the times, u(T), and J, from linear algebra alone.

        J = 1/2 ||u(T) - y||_M^2 + weight / 2 int w^2 from u(0) = 0. With W = int e^(As) B B^T e^(A^T s) ds,
        u(T) = W p and w(t) = B^T e^(A^T (T - t)) p, where weight p = M (y - W p).
        """
        A, B, mass, y = (v.numpy() for v in self.system())
        root = np.sqrt(mass)
        rates, modes = np.linalg.eigh(-root[:, None] * A / root)
        sums = np.maximum(rates[:, None] + rates, 1e-9)  # no flux: one rate is 0
        b = modes.T @ (root * B)
        gramian = modes @ (np.outer(b, b) * -np.expm1(-sums * self.T) / sums) @ modes.T / np.outer(root, root)
        p = np.linalg.solve(self.weight * np.eye(len(B)) + mass[:, None] * gramian, mass * y)
        decay = np.exp(-np.outer(self.T - times.numpy(), rates))
        w = decay * b @ modes.T @ (p / root)
        end = gramian @ p
        cost = 0.5 * mass @ (end - y) ** 2 + 0.5 * self.weight * p @ gramian @ p
        return torch.from_numpy(w), torch.from_numpy(end), float(cost)

    def train(self, knots: int = 41, steps: int = 80) -> tuple[Tensor, Tensor, float]:
        """The same by the network u' = A u + B w(t), w its weights: (knots,), u(T), J."""
        A, B, mass, y = self.system()
        w = Unknown(0.0, "linear", knots, self.T)
        network = Node(ScienceActivated(lambda t, u, w: u @ A.mT + w * B, {"w": w}), self.T, steps)
        parameters = Parameters(network)

        def end(m: Tensor) -> Tensor:
            out: Tensor = torch.func.functional_call(
                network, dict(parameters.unpack(m)), (torch.zeros_like(y),)
            )
            return mass.sqrt() * out

        problem = LeastSquares(
            parameters.space, end, mass.sqrt() * y, 1.0, Tikhonov(parameters.space, self.weight)
        )
        found = newton_cg.minimise(
            problem, parameters.pack(), stopping=(GradientTolerance(1e-8), MaxIterations(20))
        )
        with torch.no_grad():
            return found.m, end(found.m) / mass.sqrt(), found.value


def as_weight(knots: int, cells: int = 12) -> tuple[float, int]:
    """u_t = D u_xx + 5 u (1 - u) as u' = w, int ||w - f(u)||_M^2 least: relative error of u(1) against the
    integrator, and inner iterations. From w = f(u(0)): the cost is not convex, from w = 0 it takes longer.
    """
    A, _, mass, _ = Bar("inside", cells, 0.02).system()
    x = torch.linspace(0, 1, cells + 1, dtype=F64)
    first = 0.2 + 0.1 * (math.pi * x).cos()

    def f(u: Tensor) -> Tensor:
        return u @ A.mT + 5 * u * (1 - u)

    path = Path(lambda t, u, w: (mass * (w - f(u)).square()).sum(-1), first, knots=knots)

    def residual(m: Tensor) -> Tensor:
        u, w = path.sampled(m)
        return (path.quadrature[:, None] * mass).sqrt() * (w - f(u))

    zero = torch.zeros(len(path.times), cells + 1, dtype=F64)
    problem = LeastSquares(path.space(), residual, zero, 1.0)
    start = f(first).expand(knots, -1).clone()
    found = newton_cg.minimise(problem, start, stopping=(GradientTolerance(1e-9), MaxIterations(30)))
    end = path.at(found.m, path.knots[-1:])[0][0]
    exact = integrate(lambda t, u: f(u), first, torch.linspace(0, 1, 201, dtype=F64))
    return float((end - exact).norm() / exact.norm()), int(found.state.memory["inner_iterations"])
