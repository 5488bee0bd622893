"""Incompressible Navier-Stokes: viscosity and inflow from samples of the velocity behind a cylinder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from scripts.benchmarks._measures import relative
from scripts.benchmarks.equation_rows import Row
from scripts.benchmarks.equation_rows._fits import estimates
from scripts.benchmarks.equation_rows.flow import parabola
from solvers.fem.equations.cylinder import HEIGHT, at_inflow, cylinder_channel, not_outflow
from solvers.fem.equations.navier_stokes import midpoint_step, steady
from solvers.fem.equations.taylor_hood import Probe, TaylorHood
from solvers.node.science.activated import Stepped, Unknown
from solvers.node.weights import Parameters
from solvers.spaces import Euclidean


def rows(full: bool) -> list[Row]:
    """The rows of this module."""
    torch.set_num_threads(1)
    return [identification(), identification_in_time()]


RAKES = [0.02, 0.05, 0.08, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]  # x of the samples, 24 across the channel at each
SAMPLES = np.stack(np.meshgrid(RAKES, np.linspace(0.015, 0.395, 24)), -1).reshape(-1, 2)


def modes(space: TaylorHood) -> list[Tensor]:
    """The parabola, and it times P1(s) and P2(s): U times (1, skew, flatness) of them is an inflow.

    s in [-1, 1] across the channel; Legendre's polynomials.
    """
    shapes: list[Callable[[Any], Any]] = [lambda s: 1 + 0 * s, lambda s: s, lambda s: (3 * s**2 - 1) / 2]

    def profile(shape: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda x: parabola(x) * shape(2 * x[1] / HEIGHT - 1)

    return [space.boundary(profile(shape), at_inflow) for shape in shapes]


class Channel:
    """(ln nu, ln U, skew, flatness) -> velocity at the samples, with the inflow of `modes`."""

    def __init__(self, n: int) -> None:
        space = TaylorHood(cylinder_channel(n), [(not_outflow, (0, 1))])
        self._modes, self._solve, self._probe = modes(space), steady(space), Probe(space, SAMPLES)
        self._start: Tensor | None = None

    def __call__(self, m: Tensor) -> Tensor:
        first, *others = self._modes
        inflow = m[1].exp() * (first + sum(a * mode for a, mode in zip(m[2:], others, strict=True)))
        u = self._solve(m[0].exp(), inflow, start=self._start)
        self._start = u.detach().clone()  # where Newton starts for the next parameters
        return self._probe.velocity(u)


def identification() -> Row:
    truth = torch.tensor([np.log(1e-3), np.log(0.3), 0.3, 0.4], dtype=torch.float64)
    guess = torch.tensor([np.log(2e-3), np.log(0.2), 0.0, 0.0], dtype=torch.float64)
    with torch.no_grad():
        clean, model = Channel(16)(truth), Channel(8)
        error = relative(model(truth), clean)
    found = estimates(Euclidean(4), model, clean, guess)
    values = {
        "viscosity": (1e-3, [m[0].exp().item() for m in found]),
        "amplitude": (0.3, [m[1].exp().item() for m in found]),
        "skew": (0.3, [m[2].item() for m in found]),
        "flatness": (0.4, [m[3].item() for m in found]),
    }
    note = (
        f"stationary, Re 20; both components at {len(SAMPLES)} points on {len(RAKES)} rakes; inflow ="
        " amplitude times parabola times (1 + skew P1 + flatness P2); data from a mesh of 4 times the cells;"
        " error: of the velocities there"
    )
    case = "channel with cylinder: viscosity, inflow"
    return Row(case, "finer mesh", error, 1e-2, parameters=values, note=note)


KNOTS = [0.0, 0.35, 0.25, 0.4, 0.3]  # the inflow's amplitude each half second, linear between


def pulsating(n: int) -> tuple[Stepped, Callable[[Tensor], Tensor]]:
    """The channel from rest as a network of 10 midpoint steps, and states -> velocities at 24 points.

    Its weights are the viscosity and the inflow's amplitude, a function of depth (time).
    """
    space = TaylorHood(cylinder_channel(n), [(not_outflow, (0, 1))])
    inflow, step = space.boundary(parabola, at_inflow), midpoint_step(space)
    points = np.stack(np.meshgrid([0.1, 0.3, 0.4, 0.6], np.linspace(0.05, 0.36, 6)), -1)
    probe, rest, duration = Probe(space, points), space.zeros(), 2.0

    def advance(u: Tensor, dt: float, viscosity: Tensor, amplitude: Tensor) -> Tensor:
        return step(u, dt, viscosity, amplitude * inflow)

    unknowns = {
        "viscosity": Unknown(2e-3, positive=True),
        "amplitude": Unknown(0.2, depth="linear", knots=len(KNOTS), duration=duration),
    }
    net = Stepped(advance, unknowns, duration, 10)
    return net, lambda m: torch.stack([probe.velocity(u) for u in run(net, m, rest)[1:]])


def run(net: Stepped, m: Tensor, rest: Tensor) -> Tensor:
    """All states of the network with the weights m."""
    states: Tensor = functional_call(net, dict(Parameters(net).unpack(m)), (rest, True))
    return states


def identification_in_time() -> Row:
    truth = torch.tensor([np.log(1e-3), *KNOTS], dtype=torch.float64)
    net, model = pulsating(8)
    with torch.no_grad():
        clean = pulsating(12)[1](truth)
        error = relative(model(truth), clean)
    parameters = Parameters(net, length=0.2)
    found = estimates(parameters.space, model, clean, parameters.pack())
    values = {"viscosity": (1e-3, [m[0].exp().item() for m in found])}
    for k, amplitude in enumerate(KNOTS[1:], start=1):
        values[f"inflow at {k / 2:g} s"] = (amplitude, [m[1 + k].item() for m in found])
    note = (
        "a network of 10 midpoint steps from rest; both components at 24 points after each; data from a mesh"
        " of 2.2 times the cells and the same steps; error: of the velocities there"
    )
    return Row(
        "channel in time: viscosity, inflow(t)", "finer mesh", error, 1e-2, parameters=values, note=note
    )
