"""D(x) of tumours in the 3-D brain by a trained prior, TV and H1: errors on held-out cases.

The cohort of `tumour.priors_fields`: a cube of 84 mm of MNI152 around the seed, one or two inclusions of
three to five times the D, or of a fifth to two fifths, six densities with 5 % noise; the truth is grown on
voxels of 3 mm with half the time step. Alpha of each competitor is the one of its grid with the least mean
error on the same eight validation cases at 6 mm; it is then kept, at 4 mm too. The weights are those that
come with Gliode, trained at 6 mm on the training split (`scripts/train.py
data/cases/regularizers/field.yaml`). Errors are of log D in the lumped L2 norm where the density has come to
0.05, relative to finding nothing. In-distribution: 16 ellipsoids of the test split (`--full`: 40); out of
distribution: 8 tubes, crescents and boxes (`--full`: 20). Intervals: 95 %, bootstrap over the cases, paired.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from typing import Any

import numpy as np

from scripts.benchmarks import Check

GRIDS: dict[str, tuple[float, ...]] = {
    "h1": (0.7, 1.5, 3.0),
    "tv": (0.04, 0.08, 0.16),
    "learned": (0.7, 1.4, 2.8),
}
COARSE, FINE = 6.0, 4.0
VALIDATION = 8
Grids = dict[str, tuple[float, ...]]
Job = tuple[str, str, int, Grids, tuple[float, ...]]


def trial(job: Job) -> dict[str, Any]:
    """The errors of one case: {"h1 alpha spacing": error}, and the seconds they took."""
    import torch

    from tumour.fields_search import FieldSearch, FieldSettings
    from tumour.priors_fields import field_case

    torch.set_num_threads(1)
    split, family, number, grids, spacings = job
    case = field_case(split, number, family)  # type: ignore[arg-type]
    row: dict[str, Any] = {"seconds": 0.0}
    for spacing in spacings:
        problem = case.problem(spacing)
        start = torch.zeros_like(problem.truth)
        for name, alphas in grids.items():
            settings = FieldSettings(name, max_iterations=20)  # type: ignore[arg-type]
            search = FieldSearch(problem.forward, settings)
            for alpha in alphas:
                begin = time.process_time()
                m = search.solve(alpha, start).m
                row[key(name, alpha, spacing)] = float(problem.error(m))
                row[f"seconds {name} {spacing:g}"] = time.process_time() - begin
    return row


def key(name: str, alpha: float, spacing: float) -> str:
    """Of an error in a row."""
    return f"{name} {alpha:g} {spacing:g}"


def gain(learned: np.ndarray, *others: np.ndarray) -> tuple[float, float, float]:
    """How far the median of `learned` is below the best other's, in %, and the interval of that."""
    from scipy.stats import bootstrap

    def statistic(*errors: np.ndarray, axis: int = -1) -> Any:
        medians = [np.median(part, axis=axis) for part in errors]
        return 100 * (1 - medians[0] / np.minimum.reduce(medians[1:]))

    samples = (learned, *others)
    interval = bootstrap(
        samples, statistic, paired=True, vectorized=True, n_resamples=2000, method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    return float(statistic(*samples)), float(interval.low), float(interval.high)


def run(full: bool) -> list[Check]:
    """The table and its bars."""
    from rich.progress import track

    os.environ["OMP_NUM_THREADS"] = "1"
    tuning: list[Job] = [("validation", "smooth", k, GRIDS, (COARSE,)) for k in range(VALIDATION)]
    with multiprocessing.get_context("spawn").Pool(min(2, os.cpu_count() or 1)) as pool:
        rows = list(track(pool.imap(trial, tuning), "validation", total=len(tuning)))
        best = {}
        for name, grid in GRIDS.items():
            means = [float(np.mean([row[key(name, alpha, COARSE)] for row in rows])) for alpha in grid]
            best[name] = grid[int(np.argmin(means))]
        chosen: Grids = {name: (alpha,) for name, alpha in best.items()}
        counts = {"smooth": 40 if full else 16, "odd": 20 if full else 8}
        tests: list[Job] = [
            ("test", family, k, chosen, (COARSE, FINE) if family == "smooth" else (COARSE,))
            for family, count in counts.items()
            for k in range(count)
        ]
        found = list(track(pool.imap(trial, tests), "test", total=len(tests)))
    checks = []
    groups = {"smooth": found[: counts["smooth"]], "odd": found[counts["smooth"] :]}
    errors = {
        (family, spacing): {
            name: np.array([row[key(name, best[name], spacing)] for row in groups[family]]) for name in GRIDS
        }
        for family, spacing in (("smooth", COARSE), ("odd", COARSE), ("smooth", FINE))
    }
    words = {"smooth": "in-distribution", "odd": "out of distribution"}
    for (family, spacing), of in errors.items():
        for name, values in of.items():
            seconds = np.median([row[f"seconds {name} {spacing:g}"] for row in groups[family]])
            low, high = np.quantile(values, [0.25, 0.75])
            value = f"{np.median(values):.3f} ({low:.3f} to {high:.3f}), {seconds:.1f} s"
            what = f"{words[family]}, {spacing:g} mm: {name} (alpha {best[name]:g}), median error (quartiles)"
            checks.append(Check(what, value))
    bars = {("smooth", COARSE): 20.0, ("odd", COARSE): 0.0, ("smooth", FINE): None}
    for (family, spacing), bar in bars.items():
        share, low, high = gain(*(errors[family, spacing][name] for name in ("learned", "h1", "tv")))
        what = f"{words[family]}, {spacing:g} mm: learned below the better of H1 and TV"
        checks.append(Check(what, share, "%") if bar is None else Check.at_least(what, share, bar, "%"))
        checks.append(Check(f"{what}, 95 % interval", f"{low:.0f} to {high:.0f}", "%"))
    ours = [float(np.median(errors["smooth", spacing]["learned"])) for spacing in (FINE, COARSE)]
    what = f"trained at {COARSE:g} mm, used at {FINE:g} mm: median error above that at {COARSE:g} mm"
    checks.append(Check.at_most(what, 100 * (ours[0] / ours[1] - 1), 5, "%"))
    return checks
