"""Synthetic patients on MNI152: parameters from two noisy visits, errors, coverage of the intervals, cost.

The truth grows on a mesh of 2 mm at half the time step; scans and identification are at 4 mm. Patients
alternate between densities (PET-like, noise of 5 % of the maximum at every voxel) and outlines at u = 0.16
and 0.6 (smoothed thresholds, noise 0.05), visits 60 days apart. The plain call takes the first 10 patients,
`--full` 20. The discretisation-error model of `tumour.identification` was set on other patients (numbers 100
to 115).
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from typing import Any

import numpy as np

from scripts.benchmarks import Check

SPACING, FINER = 4.0, 2.0
VISITS = (0.0, 60.0)


def patient(number: int) -> dict[str, Any]:
    """Draw, grow, scan and identify one patient: errors and coverage by parameter."""
    import torch

    from tumour.anatomy import mni152
    from tumour.identification import LOGARITHMIC, Identifier
    from tumour.imaging import Kind, Modality
    from tumour.model import PARAMETERS, TumourModel, domain_of
    from tumour.patients import draw, observe

    torch.set_num_threads(1)
    anatomy = mni152(SPACING)
    truth = draw(anatomy, number)
    kinds: tuple[Kind, ...] = ("density",) if number % 2 == 0 else ("oedema", "enhancing")
    finer = TumourModel(domain_of(mni152(FINER)), step=2.5)
    with torch.no_grad():
        scans = observe(finer, truth, anatomy, VISITS, [Modality(kind) for kind in kinds], noise_seed=number)
    start = time.perf_counter()
    found = Identifier(anatomy, scans).run()
    row: dict[str, Any] = {
        "number": number, "kind": kinds[0], "seconds": time.perf_counter() - start,
        "equivalents": found.forward_equivalents, "reduced": 2 * found.misfit / found.data,
        "width": math.sqrt(truth["D_white"] / truth["rho"]), "covered": {}, "error": {},
    }  # fmt: skip
    for name in PARAMETERS:
        estimate = found.estimates[name]
        low, high = estimate.interval
        row["covered"][name] = low <= truth[name] <= high
        difference = estimate.value - truth[name]
        row["error"][name] = difference / truth[name] if name in LOGARITHMIC else difference
    row["error"]["seed"] = math.sqrt(sum(row["error"][axis] ** 2 for axis in "xyz"))
    return row


def run(full: bool) -> list[Check]:
    """The table and its bars."""
    from rich.progress import track

    from tumour.model import PARAMETERS

    os.environ["OMP_NUM_THREADS"] = "1"
    numbers = range(20 if full else 10)
    with multiprocessing.get_context("spawn").Pool(min(2, os.cpu_count() or 1)) as pool:
        rows = list(track(pool.imap(patient, numbers), "patients", total=len(numbers)))
    checks = []
    for row in rows:
        errors = ", ".join(
            f"{name} {100 * row['error'][name]:+.1f} %" for name in ("D_white", "D_grey", "rho", "age")
        )
        missed = [name for name in PARAMETERS if not row["covered"][name]]
        checks.append(
            Check(
                f"patient {row['number']} ({row['kind']}, sqrt(D/rho) {row['width']:.1f} mm)",
                f"{errors}, seed {row['error']['seed']:.2f} mm; {row['equivalents']:.0f} forward runs, "
                f"{row['seconds']:.0f} s; outside: {', '.join(missed) or 'none'}",
            )
        )

    def median(name: str) -> float:
        return float(np.median([abs(row["error"][name]) for row in rows]))

    for name in ("D_white", "D_grey", "rho"):
        checks.append(Check.at_most(f"median error of {name}", 100 * median(name), 10, "%"))
    checks.append(Check("median error of age", 100 * median("age"), "%"))
    checks.append(Check.at_most("median distance of the seed", median("seed"), 3, "mm"))
    for name in PARAMETERS:
        share = 100 * float(np.mean([row["covered"][name] for row in rows]))
        checks.append(Check.within(f"90 % intervals that hold {name}", share, 75, 100, "%"))
    cost = float(np.median([row["equivalents"] for row in rows]))
    checks.append(Check.at_most("forward equivalents a patient, median", cost, 60))
    return checks
