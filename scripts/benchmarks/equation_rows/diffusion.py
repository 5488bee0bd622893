"""Diffusion: the porous medium equation against Barenblatt's solution, and heat backwards in time."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import dolfinx
import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from inverse.choice import SpectralTikhonov, discrepancy
from inverse.optimizers import conjugate_gradients
from inverse.problem import LeastSquares
from inverse.stopping import Discrepancy, MaxIterations
from scripts.benchmarks._measures import noisy
from scripts.benchmarks.equation_rows import Row
from scripts.benchmarks.equation_rows._fits import SEEDS, fits
from solvers.evolution import Evolution
from solvers.fem.diffusion import DiffusionStep
from solvers.fem.equations.heat import Cosines
from solvers.fem.equations.porous_medium import Barenblatt, PorousMedium
from solvers.fem.mesh import Domain, from_mesh, interval
from solvers.fem.operators import DiffusionOperator
from solvers.fem.spaces import sobolev

START, END = 0.5, 2.0  # times of the porous medium


def square(n: int, side: float = 2.4) -> Domain:
    """[0, side]^2 in 2 n^2 triangles: a quarter of the plane, by symmetry."""
    corners = [[0.0, 0.0], [side, side]]
    return from_mesh(dolfinx.mesh.create_rectangle(MPI.COMM_SELF, corners, [n, n]))


def march(domain: Domain, exact: Barenblatt, steps: int) -> tuple[float, float]:
    """Relative errors in L2 at the end and in L1, the mean over the second half of the steps.

    Where the front stands between two vertices makes the error of one time jump; hence the mean.
    """
    step, dt = PorousMedium(domain), (END - START) / steps
    u = domain.interpolate(lambda x: exact.density(x, START))
    means, last = [], math.nan
    for k in range(steps):
        u = step(u, dt, exact.D, exact.m)
        if k >= steps // 2:
            true = domain.interpolate(lambda x, t=START + (k + 1) * dt: exact.density(x, t))
            means.append(domain.integral((u - true).abs()) / domain.integral(true))
            last = math.sqrt(domain.integral((u - true) ** 2) / domain.integral(true**2))
    return last, float(np.mean(means))


def porous(
    case: str,
    domains: list[Domain],
    steps: list[int],
    exact: Barenblatt,
    fitted: tuple[Domain, int],
    names: tuple[str, ...],
) -> Row:
    """Errors and order over meshes each twice as fine; parameters from noisy exact data on a coarser one."""
    errors = [march(domain, exact, n) for domain, n in zip(domains, steps, strict=True)]
    order = math.log2(errors[0][1] / errors[-1][1]) / (len(errors) - 1)
    domain, count = fitted
    step = PorousMedium(domain)
    start = domain.interpolate(lambda x: exact.density(x, START))
    times = np.linspace(START, END, 4)
    seen = torch.arange(domain.n_owned)[:: max(1, domain.n_owned // 100)]
    true = {"D": exact.D, "m": exact.m, "initial mass": 1.0}
    known = {name: torch.tensor(value, dtype=torch.float64) for name, value in true.items()}
    guess = {"D": 1.5 * exact.D, "m": exact.m - 0.5, "initial mass": 0.8}

    def forward(values: Tensor) -> Tensor:
        given = known | dict(zip(names, values.unbind(), strict=True))
        u, found = given["initial mass"] * start, []
        for before, after in pairwise(times):
            u = Evolution(step)(u, after - before, count, given["D"], given["m"])
            found.append(u[seen])
        return torch.stack(found)

    points = domain.points[seen.numpy()]
    clean = torch.stack([torch.from_numpy(exact.density(points, t)) for t in times[1:]])
    found = fits(forward, clean, {name: true[name] for name in names}, guess)
    note = f"data: the closed form at {len(points)} points and 3 times; order: of the error in L1"
    return Row(case, "Barenblatt's solution, L2", errors[-1][0], 0.01, order, 2.0, found, note)


LENGTH, DIFFUSIVITY, DURATION = 10.0, 0.2, 7.0
AMPLITUDES = torch.tensor([1.0, 0.5, -0.4, 0.4, 0.0, 0.0, 0.3, 0.0, 0.2], dtype=torch.float64)
SMOOTH = 0.3  # mm, length of the Sobolev space of the initial state


def heat(cells: int, steps: int) -> tuple[Domain, Cosines, Callable[[Tensor], Tensor]]:
    """The map from the initial state to the final one on an interval."""
    domain, exact = interval(LENGTH, cells), Cosines(LENGTH, DIFFUSIVITY)
    operator = DiffusionOperator(domain, rtol=1e-12)
    w = operator.conductances(torch.full((domain.n_cells,), DIFFUSIVITY, dtype=torch.float64))
    evolution = Evolution(DiffusionStep(operator, "sdirk2"))
    return domain, exact, lambda u: evolution(u, DURATION, steps, w)


def heat_error(cells: int, steps: int) -> float:
    """Relative L2 error of the final state."""
    domain, exact, forward = heat(cells, steps)
    x = torch.from_numpy(domain.points[:, 0])
    true = exact.state(x, AMPLITUDES, DURATION)
    away = forward(exact.state(x, AMPLITUDES, 0.0)) - true
    return math.sqrt(domain.integral(away**2) / domain.integral(true**2))


def backward_heat() -> Row:
    """The initial state from the final one: its modes that the noise leaves determined."""
    errors = [heat_error(50, 10), heat_error(100, 20)]
    domain, exact, forward = heat(100, 20)
    x = torch.from_numpy(domain.points[:, 0])
    space, count = sobolev(domain, SMOOTH), len(AMPLITUDES)
    clean = exact.state(x, AMPLITUDES, DURATION)
    sd = noisy(clean, 0)[1]
    limits = exact.errors(count, DURATION, sd, len(x))
    kept = int((limits < sd).sum())  # they grow; of the noise alone, not of the true amplitudes
    spectral = SpectralTikhonov(forward, space)
    found: dict[str, tuple[float, list[float]]] = {f"a_{k}": (float(AMPLITUDES[k]), []) for k in range(kept)}
    apart = 0.0
    for seed in SEEDS:
        data, sd = noisy(clean, seed)
        problem = LeastSquares(space, forward, data, sd)
        delta = problem.data_size**0.5
        rules = (Discrepancy(1.1, delta), MaxIterations(50))
        iterated = conjugate_gradients.minimise(problem, space.zeros(), stopping=rules).m
        damped = discrepancy(spectral.problem(data, sd).solve, space.zeros(), delta, alpha=1e-2).solution
        apart = max(apart, space.norm(iterated - damped) / space.norm(damped))
        for k, value in enumerate(exact.amplitudes(x, iterated, domain.mass, kept).tolist()):
            found[f"a_{k}"][1].append(value)
    lost = [f"a_{k} ({float(limits[k]):.2g})" for k in range(kept, count)]
    note = (
        "unknown: the whole initial state, by Sobolev conjugate gradients stopped by the discrepancy; "
        f"spectral Tikhonov at the discrepancy's alpha is within {100 * apart:.0f} %; data: the closed form; "
        "counted: the modes that the noise leaves a smaller sd than a datum has, whatever the method; not "
        f"(their sd): {', '.join(lost)} and all above"
    )
    order = math.log2(errors[0] / errors[1])
    return Row("heat, 1-D; backwards", "cosines, L2", errors[-1], 0.01, order, 2.0, found, note)


def rows(full: bool) -> list[Row]:
    """Porous medium in one and two dimensions, heat backwards."""
    lines = [interval(4.0, n) for n in (40, 80, 160)]
    squares = [square(n) for n in ((16, 32, 64) if full else (16, 32))]
    return [
        porous(
            "porous medium 1-D, m = 2",
            lines,
            [20, 40, 80],
            Barenblatt(2.0, 2.0, 1, 0.8),
            (lines[1], 10),
            ("D", "m", "initial mass"),
        ),
        porous(
            "porous medium 2-D, m = 2",
            squares,
            [12, 24, 48][: len(squares)],
            Barenblatt(2.0, 2.0, 2, 0.8),
            (square(20), 4),
            ("m", "initial mass"),
        ),
        backward_heat(),
    ]
