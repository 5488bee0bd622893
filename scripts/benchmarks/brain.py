"""MNI152 for 200 days at 2 mm (and 1 mm with --full): seconds, memory, two ranks, an explicit voxel solver beside it.

Parameters: D 0.65 mm^2/day in white and 0.13 in grey matter, rho 0.012/day, the high-grade glioma of Swanson, Alvord &
Murray (Cell Prolif. 33, 2000, 317); the speed is also given for a fifth of D, since explicit solvers gain most from
slow diffusion. Seed: 0.5 exp(-r^2/(2 (3 mm)^2)) in white matter.

The rival is what a careful NumPy user writes: explicit Euler on voxels cropped to the brain, float64, arithmetic means
of D on faces, zero flux through the surface, at its stability limit (the largest eigenvalue, by power iteration), in
place on contiguous memory in slabs that stay in the cache. The error of each in time is against its own limit of small
steps, in relative L2; they differ in space by half a voxel only. One thread each; best of runs that take turns.
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from scripts.benchmarks import Check
from tumour.anatomy import Anatomy, mni152
from tumour.model import Seed, TumourModel, default_step, domain_of

DAYS, RHO = 200.0, 0.012
WHITE, GREY = 0.65, 0.13
CENTRE = (-28.0, -14.0, 26.0)
ROOT = Path(__file__).resolve().parents[2]
Array = np.ndarray[Any, np.dtype[np.float64]]


def run(full: bool) -> list[Check]:
    """All checks."""
    torch.set_num_threads(1)
    checks = [*spacing(2.0), *ranks(2.0)]
    if full:
        checks += [*spacing(1.0), *gradient(1.0)]
    return [*checks, Check("load average", os.getloadavg()[0], "processes")]


def timed(f: Callable[[], Any]) -> tuple[Any, float]:
    """The result and the seconds it took."""
    start = time.perf_counter()
    result = f()
    return result, time.perf_counter() - start


# ---- Ours -------------------------------------------------------------------------------------------------


def parameters(factor: float = 1.0) -> dict[str, Tensor]:
    """Those of the docstring, D times a factor."""
    values = dict(D_white=WHITE * factor, D_grey=GREY * factor, rho=RHO, age=DAYS)
    values |= dict(zip("xyz", CENTRE, strict=True))
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def grow(model: TumourModel, factor: float = 1.0, steps: int | None = None) -> Tensor:
    """The densities at day 200."""
    with torch.no_grad():
        return model.states(parameters(factor), age_steps=steps)[0]


def distance(mass: Any, u: Any, v: Any) -> float:
    """||u - v|| / ||v|| in L2."""
    return float(((mass * (u - v) ** 2).sum() / (mass * v**2).sum()) ** 0.5)


def spacing(h: float) -> list[Check]:
    """Set-up, loop, memory, and the rival, at one spacing."""
    anatomy, reading = timed(lambda: mni152(h))
    domain, meshing = timed(lambda: domain_of(anatomy))
    model, setting = timed(lambda: TumourModel(domain))
    steps = model.steps_for(DAYS)
    name = f"{h:g} mm"
    checks = [
        Check(f"{name}: vertices", domain.n_global),
        Check(f"{name}: reading the anatomy", reading, "s"),
        Check(f"{name}: mesh", meshing, "s"),
        Check(f"{name}: operators", setting, "s"),
    ]
    best: dict[float, list[float]] = {}
    for factor in (1.0, 0.2):
        rival = Voxels(anatomy, model.seed, factor)
        best[factor] = [math.inf, math.inf]
        for _ in range(2 if h == 1 else 4):
            u, ours = timed(lambda f=factor: grow(model, f))
            v, theirs = timed(rival.grow)
            best[factor] = [min(a, b) for a, b in zip(best[factor], (ours, theirs), strict=True)]
        if factor < 1:
            break
        model.operator.count.iterations = 0
        error = distance(domain.mass, grow(model), grow(model, steps=8 * steps))
        products = 9 * model.operator.count.iterations / 9
        # Euler's error falls as its step: twice the change on halving it.
        finer = rival.grow(2)
        their_error = 2 * distance(1.0, v, finer) * float(np.linalg.norm(finer) / np.linalg.norm(2 * finer - v))
    raise NotImplementedError(products, error, their_error, checks, u)
