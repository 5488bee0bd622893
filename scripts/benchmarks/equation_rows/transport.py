"""Advection, diffusion and reaction: a boundary layer, an advected and a rotating pulse."""

from __future__ import annotations

import math
from collections.abc import Callable

import dolfinx
import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from torch import Tensor

from scripts.benchmarks._measures import relative
from scripts.benchmarks.equation_rows import Row
from scripts.benchmarks.equation_rows._fits import fits
from solvers.evolution import Evolution
from solvers.fem.equations.advection import Transport
from solvers.fem.mesh import from_mesh, interval

Array = NDArray[np.float64]
Exact = Callable[[Array, float], Tensor]  # points, time -> u


def layer(x: Array, b: float, D: float) -> Array:
    """b u' = D u'' + 1, u(0) = u(1) = 0, without exponentials that overflow."""
    found: Array = (x - (np.exp(b * (x - 1) / D) - np.exp(-b / D)) / (1 - np.exp(-b / D))) / b
    return found


def boundary_layer() -> Row:
    """SUPG at a cell Peclet number of 2.5, in one dimension exact at the nodes; b and D from noisy values."""
    truth = {"b": 1.0, "D": 0.02}

    def made(cells: int) -> tuple[Callable[..., Tensor], Array]:
        transport = Transport(
            interval(1.0, cells),
            [lambda x: (1.0,)],
            boundary=lambda x: 0 * x[:, 0],
            source=lambda x: 1 + 0 * x[:, 0],
        )
        return transport.stationary(), transport.points[:, 0]

    solve, x = made(10)
    u, exact = solve(torch.tensor([truth["b"]], dtype=torch.float64), truth["D"]).numpy(), layer(x, **truth)
    error = float(np.abs(u - exact).max() / exact.max())
    solve, x = made(100)
    clean = torch.from_numpy(layer(x, **truth))
    found = fits(lambda m: solve(m[:1], m[1]), clean, truth, {"b": 0.7, "D": 0.03})
    note = (
        "error at the nodes of 10 cells of Peclet number 2.5; data: the closed form at the nodes of 100 cells"
    )
    case, reference = "advection-diffusion, boundary layer, SUPG", "closed form, largest"
    return Row(case, reference, error, 1e-10, parameters=found, note=note)


def pulse(x: Array, centre: Array, variance: float, t: float, D: float, r: float) -> Tensor:
    """A Gaussian of height 1 and this variance, carried to `centre` in the time t, at points (n, d)."""
    later = variance + 2 * D * t
    square = ((x - centre) ** 2).sum(1)
    height = (variance / later) ** (x.shape[1] / 2) * math.exp(-r * t)
    return torch.from_numpy(height * np.exp(-square / (2 * later)))


def march(
    transport: Transport, exact: Exact, times: tuple[float, ...], steps: int, m: Tensor
) -> list[Tensor]:
    """States at the times, `steps` apart, for m = (speed, D, r)."""
    evolution, u, found, now = Evolution(transport.step()), exact(transport.points, 0.0), [], 0.0
    for time in times:
        u, now = evolution(u, time - now, steps, m[:1], m[1], m[2]), time
        found.append(u)
    return found


def carried(
    case: str,
    exact: Exact,
    truth: dict[str, float],
    start: dict[str, float],
    transports: list[Transport],
    steps: list[int],
    times: tuple[float, ...],
) -> Row:
    """Errors at the last time and their order; the parameters from noisy exact states, on the second."""
    m = torch.tensor(list(truth.values()), dtype=torch.float64)
    errors = []
    for transport, count in zip(transports, steps, strict=True):
        true = exact(transport.points, times[-1])
        errors.append(relative(march(transport, exact, times, count, m)[-1], true))
    order = math.log2(errors[-2] / errors[-1])
    coarse = transports[-2]
    clean = torch.stack([exact(coarse.points, t) for t in times])
    found = fits(lambda m: torch.stack(march(coarse, exact, times, steps[-2], m)), clean, truth, start)
    snapshots = f"{len(times)} time{'s' * (len(times) > 1)}"
    note = f"data: the closed form at the dofs of the second finest mesh and {snapshots}"
    return Row(case, "closed form, L2", errors[-1], 0.01, order, 2.0, found, note)


def advected() -> Row:
    """In one dimension."""
    truth = {"b": 1.0, "D": 0.01, "r": 0.2}

    def exact(x: Array, t: float) -> Tensor:
        return pulse(x[:, :1], np.array([1.5 + truth["b"] * t]), 0.25**2, t, truth["D"], truth["r"])

    transports = [Transport(interval(5.0, n), [lambda x: (1.0,)], "dg") for n in (100, 200)]
    start = {"b": 0.9, "D": 0.02, "r": 0.3}
    case = "advection-diffusion-decay, pulse, 1-D, DG"
    return carried(case, exact, truth, start, transports, [25, 50], (1.0, 2.0))


def rotating(full: bool) -> Row:
    """In two dimensions, a quarter of a turn."""
    truth = {"omega": 1.0, "D": 0.01, "r": 0.1}

    def exact(x: Array, t: float) -> Tensor:
        angle = truth["omega"] * t
        centre = 0.5 * np.array([math.cos(angle), math.sin(angle)])
        return pulse(x[:, :2], centre, 0.25**2, t, truth["D"], truth["r"])

    transports = []
    for n in (36, 72, 144) if full else (36, 72):
        kind, corners = dolfinx.mesh.CellType.quadrilateral, [[-1.8, -1.8], [1.8, 1.8]]
        domain = from_mesh(dolfinx.mesh.create_rectangle(MPI.COMM_SELF, corners, [n, n], kind))
        transports.append(Transport(domain, [lambda x: (-x[1], x[0])], "dg"))
    start, steps = {"omega": 0.9, "D": 0.015, "r": 0.15}, [24, 48, 96][: len(transports)]
    case = "advection-diffusion-decay, rotating pulse, 2-D, DG"
    return carried(case, exact, truth, start, transports, steps, (math.pi / 2,))


def rows(full: bool) -> list[Row]:
    """The layer and the pulses."""
    return [boundary_layer(), advected(), rotating(full)]
