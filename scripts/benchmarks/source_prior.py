"""Sources of 3-D brain tumours by trained and by classical regularizers: held-out cases, other shapes, 4 mm.

The cases are those of tumour/priors.py: TEST of the family it was trained on (`smooth`), and of another
(`odd`); u(0) of 120 days ago in MNI152 from one density with 5 % noise, all else known. The search is that
of tumour/source_prior.py: the same problem, start, optimizer and defect for all, R(u) h1, tv, sparsity or
the trained one with alpha as ALPHAS; beside it the early stopped conjugate gradients of
tumour/source_search.py. Errors are relative, in L2, against the truth's means on the search's mesh; the
truth is grown on 4/3 mm.

The alphas are those of the least median error of the validation cases on 6 mm, from GRIDS; with --full they
are searched anew, and must come out the same. On 4 mm they stay. Intervals are of 95 %, by the bootstrap
over cases.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import get_args

import numpy as np
import torch

from scripts.benchmarks import Check
from tumour import priors
from tumour.source import positive, prolonged
from tumour.source_foci import relative_error
from tumour.source_prior import Name, minimised, of_source, penalty_of, problem_with
from tumour.source_search import Locator

ALPHAS: dict[str, float] = {"h1": 3.0, "tv": 0.16, "sparsity": 0.1, "learned": 1.0}
GRIDS: dict[str, tuple[float, ...]] = {
    "h1": (1.5, 3.0, 6.0),
    "tv": (0.08, 0.16, 0.32),
    "sparsity": (0.03, 0.1, 0.3),
    "learned": (0.7, 1.0, 1.4),
}
SMOOTH, ODD, VALIDATION, FINER = range(16), range(8), range(8), range(8)
COARSE, FINE = 6.0, 4.0
CLASSICAL = ("tv", "sparsity")
RESAMPLES = 4000


def run(full: bool) -> list[Check]:
    """All checks; with `full` also the alphas again, and a row for each case."""
    begin = time.perf_counter()
    names = (*get_args(Name), "stopping")
    jobs: list[tuple[str, int, str, float, tuple[str, ...]]] = []
    jobs += [("smooth", k, "test", COARSE, names) for k in SMOOTH]
    jobs += [("odd", k, "test", COARSE, names) for k in ODD]
    jobs += [("smooth", k, "test", FINE, ("learned", "tv", "stopping")) for k in FINER]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        rows = list(pool.map(case, jobs))
        searched = list(pool.map(swept, VALIDATION)) if full else []
    cut, end = len(SMOOTH), len(SMOOTH) + len(ODD)
    smooth, odd, fine = rows[:cut], rows[cut:end], rows[end:]
    checks: list[Check] = []
    for job, row in zip(jobs, rows, strict=True) if full else ():
        errors = ", ".join(f"{name} {value:.3f}" for name, value in row.items())
        checks.append(Check(f"{job[0]} {job[1]} on {job[3]:g} mm", errors))
    checks += [Check(f"in distribution, {name}", _median(smooth, name)) for name in names]
    best = min(CLASSICAL, key=lambda name: float(np.median(_of(smooth, name))))
    gain, low, high = _gain(smooth, best)
    checks += [
        Check("the best of TV and sparsity", best),
        Check.at_least("in distribution: median error below that", 100 * gain, 20.0, "%"),
        Check("its interval", f"{100 * low:.0f} to {100 * high:.0f}", "%"),
        *(Check(f"the same, below {name}", f"{100 * _gain(smooth, name)[0]:.0f}", "%") for name in names[:2]),
    ]
    checks += [Check(f"other shapes, {name}", _median(odd, name)) for name in names]
    rival = min(CLASSICAL, key=lambda name: float(np.median(_of(odd, name))))
    gain, low, high = _gain(odd, rival)
    checks += [
        Check.at_least(f"other shapes: median error below that of {rival}", 100 * gain, 0.0, "%"),
        Check("its interval", f"{100 * low:.0f} to {100 * high:.0f}", "%"),
    ]
    same = [smooth[k] for k in FINER]
    loss = {
        of: float(np.median(_of(fine, of)) / np.median(_of(same, of))) - 1
        for of in ("learned", "learned, mm")
    }
    checks += [
        *(Check(f"4 mm, {name}", _median(fine, name)) for name in ("learned", "tv", "stopping")),
        Check.at_most("4 mm against 6 mm, the weights of 6 mm: loss", 100 * loss["learned"], 5.0, "%"),
        Check("the same, against the truth on 4/3 mm", 100 * loss["learned, mm"], "%"),
        Check("seconds", time.perf_counter() - begin, "s"),
    ]
    for name in GRIDS if full else ():
        medians = {alpha: float(np.median([one[name, alpha] for one in searched])) for alpha in GRIDS[name]}
        found = min(medians, key=lambda alpha: medians[alpha])
        text = ", ".join(f"{alpha:g}: {error:.3f}" for alpha, error in medians.items())
        what = f"validation, {name}, by alpha"
        checks.append(Check(what, text, "", f"least at {ALPHAS[name]:g}", found == ALPHAS[name]))
    return checks


def case(job: tuple[str, int, str, float, tuple[str, ...]]) -> dict[str, float]:
    """The errors of one case on one mesh; `learned, mm`: against the truth on its own mesh."""
    family, number, split, spacing, names = job
    torch.set_num_threads(1)
    source = priors.source_case(split, number, family)  # type: ignore[arg-type]
    grown = priors.grown(source)
    problem = grown.problem(spacing)
    domain, truth = problem.domain, priors.boxed(problem.domain, source.shape)
    errors: dict[str, float] = {}
    memory: dict[str, np.ndarray] = {}
    locator = Locator(problem, save=memory.update)
    _, defect = locator.corrected()
    for name in names:
        if name == "stopping":
            found = Locator(problem, resume=memory).run().u
        else:
            penalty = penalty_of(name, domain)  # type: ignore[arg-type]
            lower = problem_with(problem, defect, of_source(penalty, ALPHAS[name]))
            found = positive(minimised(lower, locator.start).m)
        errors[name] = relative_error(domain, found, truth)
        if name == "learned":
            fine = grown.model.domain
            errors["learned, mm"] = relative_error(fine, prolonged(domain, found, fine), grown.source)
    return errors


def swept(number: int) -> dict[tuple[str, float], float]:
    """The errors of one validation case for all alphas."""
    torch.set_num_threads(1)
    source = priors.source_case("validation", number)
    problem = priors.grown(source).problem(COARSE)
    truth = priors.boxed(problem.domain, source.shape)
    locator = Locator(problem)
    _, defect = locator.corrected()
    errors = {}
    for name in get_args(Name):
        penalty = penalty_of(name, problem.domain)
        for alpha in GRIDS[name]:
            found = minimised(problem_with(problem, defect, of_source(penalty, alpha)), locator.start)
            errors[name, alpha] = relative_error(problem.domain, positive(found.m), truth)
    return errors


def _of(rows: Sequence[dict[str, float]], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows])


def _draws(count: int) -> np.ndarray:
    """(resamples, count) cases."""
    return np.random.default_rng(0).integers(count, size=(RESAMPLES, count))


def _median(rows: Sequence[dict[str, float]], name: str) -> str:
    errors = _of(rows, name)
    low, high = np.quantile(np.median(errors[_draws(len(rows))], axis=1), (0.025, 0.975))
    return f"{np.median(errors):.3f} ({low:.3f} to {high:.3f})"


def _gain(rows: Sequence[dict[str, float]], rival: str) -> tuple[float, float, float]:
    """1 - median(learned) / median(rival), and its interval, cases drawn in pairs."""
    ours, theirs = _of(rows, "learned"), _of(rows, rival)
    draws = _draws(len(rows))
    ratios = 1 - np.median(ours[draws], axis=1) / np.median(theirs[draws], axis=1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(1 - np.median(ours) / np.median(theirs)), float(low), float(high)
