"""A tumour grown step by step, so that a run can stop and go on: the numbers of `TumourModel.states`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from solvers.errors import GliodeError
from solvers.evolution import PointwiseStep, Strang
from solvers.fem.mesh import Domain, FloatArray
from solvers.fem.sampling import cell_means
from tumour.anatomy import Anatomy
from tumour.imaging import LEVELS
from tumour.model import TumourModel
from tumour.nifti import Grid, average_onto
from tumour.therapy import Treatment


@dataclass(frozen=True)
class Stretch:
    """Equal steps from one day to another, and the treatments at its end."""

    start: float
    end: float
    steps: int
    treatments: tuple[Treatment, ...]


@dataclass(frozen=True)
class Snapshot:
    """Where a run stands: `step` steps of stretch number `stretch` are done, to u; found: day -> state."""

    stretch: int
    step: int
    u: Tensor
    found: Mapping[float, Tensor] = field(default_factory=dict)


def plan(model: TumourModel, age: float, days: Sequence[float]) -> list[Stretch]:
    """The stretches between the seed at day -age, the days wanted and the treatments.

    Raises GliodeError for a day or treatment before the seed.
    """
    if not days or min(days) <= -age:
        raise GliodeError(f"days: {list(days)} must come after the seed, day {-age:g}")
    early = [t.day for t in model.therapy if t.day <= -age]
    if early:
        raise GliodeError(f"therapy: day {early[0]:g} is before the seed, day {-age:g}")
    last = max(days)
    edges = sorted({-age, *days, *(t.day for t in model.therapy if t.day <= last)})
    return [
        Stretch(a, b, model.steps_for(b - a), tuple(t for t in model.therapy if t.day == b))
        for a, b in pairwise(edges)
    ]


def grow(
    model: TumourModel,
    parameters: Mapping[str, float],
    days: Sequence[float],
    start: Snapshot | None = None,
    tick: Callable[[Snapshot], None] | None = None,
    coefficients: tuple[Tensor, Tensor] | None = None,
) -> dict[float, Tensor]:
    """The densities (owned dofs,) at days after the first visit, by the model's steps.

    parameters: numbers named as in `tumour.model.PARAMETERS`. start: a snapshot of an earlier run of the same
    plan. tick: called after each step; it may raise to stop the run. coefficients: D per cell and rho (a
    number or one for each owned dof), in place of those of the parameters.
    """
    m = {name: torch.tensor(value, dtype=torch.float64) for name, value in parameters.items()}
    stretches = plan(model, parameters["age"], days)
    step = Strang(PointwiseStep(model.law.flow), model.diffusion)
    with torch.no_grad():
        D, rho = coefficients or (model.diffusivity(m["D_white"], m["D_grey"]), m["rho"])
        w = model.operator.conductances(D)
        at = start or Snapshot(0, 0, model.seed_state(torch.stack([m["x"], m["y"], m["z"]])))
        u, found = at.u, dict(at.found)
        for number in range(at.stretch, len(stretches)):
            stretch = stretches[number]
            dt = torch.tensor(stretch.end - stretch.start, dtype=torch.float64) / stretch.steps
            for done in range(at.step if number == at.stretch else 0, stretch.steps):
                u = step(u, dt, w, rho, first=done == 0, last=done == stretch.steps - 1)
                if tick is not None:
                    tick(Snapshot(number, done + 1, u, found))
            for treatment in stretch.treatments:
                u = treatment(u)
            if stretch.end in days:
                found = {**found, stretch.end: u}
    return found


def volumes(domain: Domain, day: float, u: Tensor) -> dict[str, float]:
    """What one reads off a density: its largest value, the cells, the volumes within both imaging levels."""
    largest = domain.comm.allreduce(float(u.max()) if len(u) else 0.0, op=MPI.MAX)
    found = {"day": day, "largest": largest, "cm3 of cells": domain.integral(u) / 1000}
    for level in sorted(LEVELS.values()):
        found[f"cm3 above {level:g}"] = domain.integral((u > level).double()) / 1000
    return found


def on_grid(domain: Domain, u: Tensor, brain: Anatomy) -> FloatArray:
    """The mean of a state over each voxel of the anatomy's grid, 0 outside the mesh; on every rank."""
    volume = cell_means(domain, u)
    assert domain.grid is not None
    if domain.grid.shape == brain.shape and np.array_equal(domain.grid.affine, brain.affine):
        return volume
    return average_onto(volume, domain.grid.affine, Grid(brain.shape, brain.affine))
