"""MNI152 for 200 days at 2 mm (and 1 mm with --full): time, memory, two ranks, an explicit solver beside it.

Parameters: D 0.65 mm^2/day in white and 0.13 in grey matter, rho 0.012/day, the high-grade glioma of Swanson,
Alvord & Murray (Cell Prolif. 33, 2000, 317); the speed is also given for a fifth of D, since slow diffusion
favours explicit solvers. Seed: 0.5 exp(-r^2/(2 (3 mm)^2)) in white matter.

The rival is what a careful NumPy user writes: explicit Euler on voxels cropped to the brain, float64,
arithmetic means of D on the faces, zero flux through the surface, at its stability limit, on contiguous
memory in slabs that stay in the cache. The errors in time are against each solver's own limit of small steps,
in relative L2; in space the two differ by half a voxel only. One thread each; best of runs that take turns.
"""

from __future__ import annotations

import json
import math
import os
import resource
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from scripts.benchmarks import Check
from scripts.benchmarks._ranks import called
from tumour.anatomy import mni152
from tumour.model import Seed, TumourModel, domain_of

DAYS, RHO, WHITE, GREY = 200.0, 0.012, 0.65, 0.13
CENTRE = (-28.0, -14.0, 26.0)
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


# ---- The rival --------------------------------------------------------------------------------------------


class Voxels:
    """u += dt (div(D grad u) + rho u (1 - u)) on voxels; flat arrays, zeros round the brain's box."""

    def __init__(self, model: TumourModel, factor: float) -> None:
        grid = model.domain.grid
        assert grid is not None
        h = float(grid.spacing[0])
        low = grid.cell_voxel.min(axis=0) - 1
        shape = np.ptp(grid.cell_voxel, axis=0) + 3
        self.strides = (int(shape[1] * shape[2]), int(shape[2]), 1)
        inside = (grid.cell_voxel - low) @ self.strides
        values = parameters(factor)
        D = np.zeros(int(np.prod(shape)))
        D[inside] = model.diffusivity(values["D_white"], values["D_grey"]).numpy()
        # Conductances of the faces between a voxel and the next one along each axis, 1/day.
        self.faces = [np.zeros_like(D) for _ in self.strides]
        for face, s in zip(self.faces, self.strides, strict=True):
            face[:-s] = np.where((D[:-s] > 0) & (D[s:] > 0), (D[:-s] + D[s:]) / (2 * h**2), 0.0)
        total = sum(face + np.roll(face, s) for face, s in zip(self.faces, self.strides, strict=True))
        self.total = np.asarray(total)
        self.limit = 2.0 / float(2 * self.total.max())
        self.steps = math.ceil(DAYS / self.limit)
        self.block = max(1, 27_000 // self.strides[0]) * self.strides[0]
        self.start = np.zeros_like(D)
        points = grid.cell_voxel @ grid.affine[:3, :3].T + grid.affine[:3, 3]
        self.start[inside] = _gaussian(points - CENTRE, h, model.seed)

    def grow(self, refine: int = 1) -> Array:
        """The densities at the last day, with steps `refine` times shorter than the limit."""
        steps = self.steps * refine
        dt, x = DAYS / steps, self.strides[0]
        u, new = self.start.copy(), np.zeros_like(self.start)
        # u_new = u (1 + dt rho - dt total - dt rho u) + sum of dt face u_neighbour
        diagonal = (1.0 + dt * RHO) - dt * self.total
        faces = [dt * face for face in self.faces]
        scratch = np.empty(self.block)
        for _ in range(steps):
            for i in range(x, len(u) - x, self.block):
                j = min(i + self.block, len(u) - x)
                k, t, here = new[i:j], scratch[: j - i], u[i:j]
                np.multiply(here, -dt * RHO, out=k)
                k += diagonal[i:j]
                k *= here
                for face, s in zip(faces, self.strides, strict=True):
                    np.multiply(face[i:j], u[i + s : j + s], out=t)
                    k += t
                    np.multiply(face[i - s : j - s], u[i - s : j - s], out=t)
                    k += t
            u, new = new, u
        return u


def _gaussian(x: Array, h: float, seed: Seed) -> Array:
    """Means of the seed over voxels, by 4^3 points each."""
    one, total = ((np.arange(4) + 0.5) / 4 - 0.5) * h, np.full(len(x), seed.amplitude)
    for axis in range(3):
        total *= np.exp(-((x[:, axis, None] + one) ** 2) / (2 * seed.width**2)).mean(axis=1)
    return total


# ---- One process ------------------------------------------------------------------------------------------


def parameters(factor: float = 1.0) -> dict[str, Tensor]:
    """Those of the docstring, D times a factor."""
    values = {"D_white": WHITE * factor, "D_grey": GREY * factor, "rho": RHO, "age": DAYS}
    values |= dict(zip("xyz", CENTRE, strict=True))
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def grow(model: TumourModel, factor: float = 1.0, refine: int = 1) -> Tensor:
    """The densities at day 200, with steps `refine` times shorter than the default."""
    with torch.no_grad():
        return model.states(parameters(factor), age_steps=refine * model.steps_for(DAYS))[0]


def distance(u: Any, v: Any, mass: Any = 1.0) -> float:
    """||u - v|| / ||v|| in L2."""
    return float(((mass * (u - v) ** 2).sum() / (mass * v**2).sum()) ** 0.5)


def spacing(h: float) -> list[Check]:
    """Set-up, loop, errors and the rival."""
    anatomy, reading = timed(lambda: mni152(h))
    domain, meshing = timed(lambda: domain_of(anatomy))
    model, assembling = timed(lambda: TumourModel(domain))
    steps, name = model.steps_for(DAYS), f"{h:g} mm"
    speed, products, rival_steps = {}, 0.0, 0
    errors, integrals = [0.0, 0.0], [0.0, 0.0]
    for factor in (1.0, 0.2):
        rival = Voxels(model, factor)
        best = [math.inf, math.inf]
        for _ in range(2 if h == 1 else 4):
            model.operator.count.iterations = 0
            u, ours = timed(partial(grow, model, factor))
            count = model.operator.count.iterations
            v, theirs = timed(rival.grow)
            best = [min(best[0], ours), min(best[1], theirs)]
        speed[factor] = best
        if factor == 1.0:
            products, rival_steps = count / steps, rival.steps
            errors[0] = distance(u, grow(model, refine=8), domain.mass)
            # Euler's error is proportional to the step, so the limit is 2 v(dt/2) - v(dt).
            errors[1] = distance(v, 2 * rival.grow(2) - v)
            integrals = [domain.integral(u), float(v.sum()) * h**3]
    setting = meshing + assembling
    ours, theirs = speed[1.0]
    checks = [
        Check(f"{name}: vertices, {domain.n_cells} voxels", domain.n_global),
        Check(f"{name}: reading the anatomy", reading, "s"),
        Check(f"{name}: set-up (mesh {meshing:.2f} s, operators {assembling:.2f} s)", setting, "s"),
        Check(f"{name}: loop, {steps} steps of {model.step:g} days", ours, "s"),
        Check(f"{name}: products with the stiffness a step", products),
        Check(f"{name}: rival's loop, {rival_steps} steps", theirs, "s"),
        Check(f"{name}: tumour, ours and the rival's", f"{integrals[0]:.0f} and {integrals[1]:.0f}", "mm^3"),
        Check(f"{name}: smallest and largest density", f"{float(u.min()):.1e} and {float(u.max()):.3f}"),
    ]
    ratio, slow = theirs / ours, speed[0.2][1] / speed[0.2][0]
    if h > 1:
        error = Check(f"{name}: error in time, ours and the rival's", f"{errors[0]:.2e} and {errors[1]:.2e}")
        return [*checks, error, Check(f"{name}: times faster than the rival", ratio)]
    return [
        *checks,
        Check.at_most(f"{name}: error in time (rival {errors[1]:.2e})", errors[0], errors[1]),
        Check.at_least(f"{name}: times faster than the rival", ratio, 3.0),
        Check(f"{name}: the same for a fifth of D ({speed[0.2][0]:.2f} s)", slow),
        Check.at_most(f"{name}: set-up over loop", setting / ours, 1.0),
    ]


# ---- Processes of their own -------------------------------------------------------------------------------


def worker(h: float, with_gradient: bool) -> None:
    """Print the seconds and the memory of a run in this process, or on these ranks, as JSON."""
    torch.set_num_threads(1)
    comm, anatomy = MPI.COMM_WORLD, mni152(h)
    model = TumourModel(domain_of(anatomy), checkpoint=5 if with_gradient else None)
    grow(model, refine=1)  # the first run compiles, and fills what is kept
    seconds = []
    for _ in range(1 if with_gradient else 3):
        comm.Barrier()
        start = time.perf_counter()
        if with_gradient:
            at = {name: value.requires_grad_() for name, value in parameters().items()}
            u = model.states(at)[0]
            torch.autograd.grad(0.5 * (model.domain.mass * u**2).sum(), list(at.values()))
        else:
            grow(model)
        comm.Barrier()
        seconds.append(time.perf_counter() - start)
    memory = comm.allreduce(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 2**20
    if comm.rank == 0:
        print("\n" + json.dumps({"seconds": min(seconds), "gib": memory}), flush=True)


def launched(h: float, count: int, with_gradient: bool = False) -> dict[str, float]:
    """What `worker` prints on `count` ranks."""
    code = f"from scripts.benchmarks.brain import worker; worker({h}, {with_gradient})"
    lines = [line for line in called(code, count).splitlines() if line.startswith("{")]
    found: dict[str, float] = json.loads(lines[-1])
    return found


def ranks(h: float) -> list[Check]:
    """One rank against two, taking turns, and the memory of one."""
    best = [math.inf, math.inf]
    for _ in range(2):
        one, two = launched(h, 1), launched(h, 2)
        best = [min(best[0], one["seconds"]), min(best[1], two["seconds"])]
    return [
        Check(f"{h:g} mm: peak memory of a forward run", one["gib"], "GiB"),
        Check.at_least(
            f"{h:g} mm: 2 ranks ({best[1]:.2f} s) over 1 ({best[0]:.2f} s)", best[0] / best[1], 1.4, "times"
        ),
    ]


def gradient(h: float) -> list[Check]:
    """Memory and time with a gradient by all parameters, in blocks of five steps."""
    forward, both = launched(h, 1), launched(h, 1, with_gradient=True)
    return [
        Check(f"{h:g} mm: peak memory of a forward run", forward["gib"], "GiB"),
        Check(f"{h:g} mm: value and gradient, checkpointed", both["seconds"], "s"),
        Check.at_most(f"{h:g} mm: peak memory with gradient", both["gib"] * 2**30 / 1e9, 12.0, "GB"),
    ]
