"""Ten tumours of MNI152 followed back from 120 days: centre, stopping rule, Landweber beside it, two ranks.

The tumour: D_white, D_white / D_grey and rho log-normal as in tumour/patients.py, the source 0.5
exp(-r^2/(2 (5 mm)^2)) at a random place in white matter, grown for 120 days (logistic) on voxels of 4/3 mm
with steps of 2 days. The scan: the density on voxels of 4 mm with noise of 5 % of its largest value. The
search, on voxels of 4 mm with steps of 5 days and a defect taken on 2 mm, is that of tumour/source_search.py
with its defaults: L2 gradient, from m = 0, stopped at ||r|| <= 1.05 delta. All of it was settled on the seeds
101 to 108.

Errors are relative, in L2. The best along the path is that of the same run gone on for 40 iterations, as long
again as the longest of the tuning seeds took. Landweber has the same problem, space and start, and each of
its step rules 8 times the solves of the conjugate gradients.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from inverse.optimizers import conjugate_gradients, landweber
from inverse.stopping import Discrepancy, MaxIterations, State
from scripts.benchmarks import Check
from scripts.benchmarks._ranks import called
from tumour.anatomy import Anatomy, mni152
from tumour.imaging import Modality, add_noise, noise_sd
from tumour.model import Seed, TumourModel, domain_of
from tumour.patients import Scan, camera
from tumour.source import Known, SourceProblem, corner_values, positive
from tumour.source_foci import distances, foci_of, relative_error
from tumour.source_search import Locator, Source

AGE, SEED, NOISE, REACH = 120.0, Seed(0.5, 5.0), 0.05, 50.0
SEEDS = range(1, 11)
LONGEST, BUDGET = 40, 8.0
RULES = ("power", "line_search")
"""Landweber's: a constant step from the norm of J, and Armijo's from twice the last one."""


@dataclass(frozen=True)
class Brains:
    """MNI152 for the truth, for the defect and for the search."""

    truth: Anatomy
    finer: Anatomy
    coarse: Anatomy

    @staticmethod
    def read() -> Brains:
        return Brains(mni152(4 / 3), mni152(2.0), mni152(4.0))


def run(full: bool) -> list[Check]:
    """All checks; with `full` a row for each case."""
    torch.set_num_threads(1)
    brains, start = Brains.read(), time.perf_counter()
    rows = [case(brains, seed) for seed in SEEDS]
    seconds = time.perf_counter() - start
    checks: list[Check] = []
    for seed, row in zip(SEEDS, rows, strict=True) if full else ():
        checks += [Check(f"seed {seed}: {what}", value) for what, value in row.items()]

    def worst(name: str) -> float:
        return max(row[name] for row in rows)

    def number(name: str, bar: float) -> int:
        return sum(row[name] <= bar for row in rows)

    ratio = sorted(row["ratio"] for row in rows)
    return [
        *checks,
        Check.at_least("centre within 3 mm, of 10", number("centre", 3.0), 9),
        Check("centre: largest distance", worst("centre"), "mm"),
        Check.at_least(
            "error at the discrepancy within 15 % of the path's best, of 10", number("ratio", 1.15), 10
        ),
        Check("that ratio: median and worst", f"{(ratio[4] + ratio[5]) / 2:.3f} and {ratio[-1]:.3f}"),
        Check(
            "error at the discrepancy: least and most",
            f"{min(r['error'] for r in rows):.2f} and {worst('error'):.2f}",
        ),
        Check(
            "iterations: least and most",
            f"{min(r['iterations'] for r in rows):.0f} and {worst('iterations'):.0f}",
        ),
        Check.at_least(
            "Landweber above the discrepancy after 8 times the solves, of 10",
            sum(row["rival"] > 1.0 for row in rows),
            10,
        ),
        Check("the same with its constant step, of 10", sum(row["constant"] > 1.0 for row in rows)),
        Check(
            "constant step: ||r|| / (tau delta), least and most",
            f"{min(r['constant'] for r in rows):.2f} and {worst('constant'):.2f}",
        ),
        Check(
            "Landweber's solves over ours to the discrepancy, least and most",
            f"{min(r['times'] for r in rows):.1f} and {worst('times'):.1f}",
        ),
        Check.at_most("two ranks against one, source in L2", ranks(), 1e-6),
        Check("ten cases", seconds, "s"),
    ]


def draw(brain: Anatomy, seed: int) -> tuple[Known, np.ndarray]:
    """Parameters and a place in white matter."""
    generator = np.random.default_rng([seed, 20261121])
    D = math.exp(generator.normal(math.log(0.35), 0.5))
    rho = math.exp(generator.normal(math.log(0.02), 0.35))
    ratio = math.exp(generator.normal(math.log(6.0), 0.3))
    inside = np.argwhere(brain.brain & (brain.white > 0.6))
    voxel = inside[generator.integers(len(inside))] + generator.uniform(-0.5, 0.5, 3)
    return Known(D, D / ratio, rho, AGE), voxel @ brain.affine[:3, :3].T + brain.affine[:3, 3]


def scanned(brains: Brains, known: Known, centre: np.ndarray, seed: int) -> Scan:
    """The noisy scan; the truth is grown within 54 mm of its source."""
    model = TumourModel(domain_of(brains.truth, near(brains.truth, centre, REACH + 4)), None, SEED, 2.0)
    numbers = [
        torch.tensor(x, dtype=torch.float64) for x in (known.D_white, known.D_grey, known.rho, known.age)
    ]
    mask = near(brains.coarse, centre, REACH) & brains.coarse.brain
    with torch.no_grad():
        D = model.diffusivity(numbers[0], numbers[1])
        u = model.evolve(model.seed_state(torch.from_numpy(centre)), D, numbers[2], numbers[3])
        modality = Modality("density", NOISE)
        clean = camera(model, brains.coarse, mask, 3)(u[0], [modality])[0].numpy()
    values = np.zeros(mask.shape)
    values[mask] = add_noise(clean, modality, np.random.default_rng(seed))
    return Scan(0.0, modality, values, mask, noise_sd(clean, modality))


def near(brain: Anatomy, centre: np.ndarray, reach: float) -> np.ndarray:
    """Voxels whose centres are within `reach` mm of a point."""
    index = np.indices(brain.shape).reshape(3, -1).T
    points = index @ brain.affine[:3, :3].T + brain.affine[:3, 3]
    return (np.linalg.norm(points - centre, axis=1) <= reach).reshape(brain.shape)


def located(brains: Brains, seed: int) -> tuple[Locator, Source, np.ndarray]:
    """One case: the search, what it found, and the true centre."""
    known, centre = draw(brains.coarse, seed)
    scan = scanned(brains, known, centre, seed)
    locator = Locator(SourceProblem(known, brains.coarse, [scan], None, SEED, finer=brains.finer))
    return locator, locator.run(), centre


def case(brains: Brains, seed: int) -> dict[str, float]:
    """What is measured in one case."""
    locator, found, centre = located(brains, seed)
    domain, problem = locator.problem.domain, locator.field_problem(found.defect)
    truth = locator.problem.growing.model.seed_state(torch.from_numpy(centre))
    errors: list[float] = []

    def watch(state: State) -> None:
        errors.append(relative_error(domain, positive(state.m), truth))

    conjugate_gradients.minimise(problem, locator.start, stopping=MaxIterations(LONGEST), callback=watch)
    error = relative_error(domain, found.u, truth)
    last = found.history[-1]
    solves = sum(last[name] for name in ("forward", "adjoint", "tangent"))
    level = locator.settings.tau * found.delta
    constant, searched = (rival(locator, found.defect, rule, BUDGET * solves) for rule in RULES)
    return {
        "centre": distances(found.foci[:1], centre[None])[0],
        "error": error,
        "best": min(errors),
        "ratio": error / min(*errors, error),
        "iterations": last["iteration"],
        "solves": solves,
        "residual": found.residual_norm / level,
        "constant": constant.residual / level,
        "rival": min(constant.residual, searched.residual) / level,
        "times": min(one.solves for one in (constant, searched) if one.residual <= level or one is searched)
        / solves,
        "foci": float(len(foci_of(domain, found.u))),
    }


class Rival(NamedTuple):
    """How far Landweber came: ||r|| and the solves it took."""

    residual: float
    solves: float


def rival(locator: Locator, defect: Tensor, rule: str, budget: float) -> Rival:
    """Landweber with a step rule, to the discrepancy or to the end of a number of solves."""

    def spent(state: State) -> dict[str, float] | None:
        solves = float(sum(state.counts.values()))
        return {"solves": solves} if solves >= budget else None

    rules = (Discrepancy(locator.settings.tau, locator.problem.delta), spent, MaxIterations(10**6))
    found = landweber.minimise(locator.field_problem(defect), locator.start, step=rule, stopping=rules)
    return Rival(float(found.residual_norm or math.nan), float(sum(found.counts.values())))


# ---- Ranks ------------------------------------------------------------------------------------------------


def worker(path: str) -> None:
    """Leave the first case's source at the grid's corners in a file, and print its counts."""
    torch.set_num_threads(1)
    locator, found, _ = located(Brains.read(), SEEDS[0])
    values = corner_values(locator.problem.domain, found.u)
    if MPI.COMM_WORLD.rank == 0:
        np.save(path, values)
        print("\n" + json.dumps(found.counts), flush=True)


def ranks() -> float:
    """||u_2 - u_1|| / ||u_1||, the sources of two ranks and of one, each in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        one, two = (launched(count, Path(folder) / f"{count}.npy") for count in (1, 2))
    return float(np.linalg.norm(two - one) / np.linalg.norm(one))


def launched(count: int, path: Path) -> Any:
    """What `worker` leaves, run on `count` ranks."""
    code = f"from scripts.benchmarks.source import worker; worker({str(path)!r})"
    called(code, count)
    return np.load(path)
