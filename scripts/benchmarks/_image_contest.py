"""Regularizers against each other on an image problem: tuned alike on validation pictures, judged on others.

Two kinds of pictures, each with its own tuning and table: photographs, on others of which learned ones were
trained, and drawn sections of a body, constant in parts, as TV has it and no photograph is.

The methods are TV, H1 and all weights in data/regularizers for images in [0, 1]; those whose
name ends with a problem's were trained for that problem. Each is a job of its own: `row` tunes it on
`validation_truths` (9 trials, 16 where there are two parameters) and restores `test_truths`.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from inverse.datasets.images import TEST, VALIDATION
from inverse.image_problems import SIZE, ImageProblem, image_problem, restored, test_truths, validation_truths
from inverse.optimizers import conjugate_gradients, plug_and_play, primal_dual
from inverse.optimizers.iteration import Result
from inverse.problem import LeastSquares
from inverse.regularizers.learned import files
from inverse.regularizers.learned.energy import Energy, Learned
from inverse.regularizers.sobolev import Seminorm
from inverse.regularizers.total_variation import ImageGradient, TotalVariation
from inverse.stopping import GradientTolerance, MaxIterations, State, StepTolerance
from scripts.benchmarks import Check
from scripts.benchmarks._image_limits import NOISE, limit, limit_checks
from scripts.benchmarks._images import Parameters, Row, Tuned, gain, psnr, table, tuned
from solvers.errors import GliodeError

VALIDATION_NOISE, TEST_NOISE = 71, 81  # seeds
BUDGET = {0: 1, 1: 9, 2: 16}  # trials by the number of parameters
ITERATIONS = 200
EARLY = 0.3  # dB that the best iterate must be above the last for a method to be said to need early stopping
LABELS = {
    "ICNN": "ICNN-AR",
    "AdversarialNetwork": "AR",
    "NETT": "NETT",
    "TDV": "TDV",
    "FieldsOfExperts": "FoE",
}
PHOTOGRAPHS = "photographs"
KINDS = {
    PHOTOGRAPHS: (slice(0, len(VALIDATION)), slice(0, len(TEST))),
    "sections": (slice(len(VALIDATION), None), slice(len(TEST), None)),
}
"""Kind -> where it stands in validation_truths and in test_truths."""
PROVABLE = ("CRR", "WCRR")
EXPECTED = ("TV", "H1", "CRR", "WCRR", "ICNN-AR", "AR", "NETT", "TDV", "unrolled", "PnP")
PROBLEMS = ("sparse_tomography", "tomography", "deconvolution", "motion")
Watch = Callable[[State], object]


class Solve(Protocol):
    """Data of one image -> image, flat, with what the optimizer says; `watch` sees each iterate."""

    def __call__(self, problem: ImageProblem, y: Tensor, parameters: Parameters, watch: Watch) -> Result: ...


@dataclass(frozen=True)
class Method:
    """name: in the table; start: where the search of its parameters begins; convex: the file, of a CRR."""

    name: str
    solve: Solve
    start: Mapping[str, float]
    convex: Path | None = None


# ---- classical --------------------------------------------------------------------------------------------


def _tv(problem: ImageProblem, y: Tensor, parameters: Parameters, watch: Watch) -> Result:
    """Exact, by 300 steps of the primal-dual method: within 0.05 dB of 2000."""
    inverse = problem.least_squares(y)
    variation = TotalVariation(ImageGradient(problem.A.shape), parameters["weight"])
    start = problem.naive(y).reshape(-1)
    rules = (StepTolerance(1e-5), MaxIterations(300))
    return primal_dual.minimise(inverse, start, variation, balance=0.3, stopping=rules, callback=watch)


def _h1(problem: ImageProblem, y: Tensor, parameters: Parameters, watch: Watch) -> Result:
    D = ImageGradient(problem.A.shape)
    inverse = problem.least_squares(y, Seminorm(lambda a: D.adjoint(D(a)), parameters["weight"]))
    start = problem.naive(y).reshape(-1)
    rules = (GradientTolerance(1e-4), MaxIterations(ITERATIONS))
    return conjugate_gradients.minimise(inverse, start, stopping=rules, callback=watch)


CLASSICAL = (
    Method("TV", _tv, {"weight": 10.0}),
    Method("H1", _h1, {"weight": 100.0}),
)

# ---- learned ----------------------------------------------------------------------------------------------


def variational(energy: Energy) -> Solve:
    """Misfit + weight / scale^2 R(scale x), by limited-memory BFGS from the naive inversion."""

    def solve(problem: ImageProblem, y: Tensor, parameters: Parameters, watch: Watch) -> Result:
        space = problem.least_squares(y).space
        penalty = Learned(energy, space, problem.A.shape, parameters["weight"], parameters["scale"])
        return restored(problem, y, penalty, iterations=ITERATIONS, callback=watch)

    return solve


def plugged(denoiser: nn.Module) -> Solve:
    """Plug-and-play with the denoiser at a level."""

    def solve(problem: ImageProblem, y: Tensor, parameters: Parameters, watch: Watch) -> Result:
        at: Callable[[Tensor], Tensor] = denoiser.at(parameters["level"])  # type: ignore[operator]
        start = problem.naive(y).reshape(-1)
        rules = (StepTolerance(2e-4), MaxIterations(ITERATIONS // 2))
        return plug_and_play.minimise(
            problem.least_squares(y), start, at, problem.A.shape, stopping=rules, callback=watch
        )

    return solve


def unrolled(network: nn.Module) -> Solve:
    """A network from data to images: evaluated once, and recorded as an iteration of the optimizers is."""

    def solve(problem: ImageProblem, y: Tensor, parameters: Parameters, watch: Watch) -> Result:
        network.on(problem)  # type: ignore[operator]
        dtype = next(network.parameters()).dtype
        with torch.no_grad():
            x = network(y[None].to(dtype))[0].double()
        inverse: LeastSquares = problem.least_squares(y)
        return conjugate_gradients.minimise(inverse, x.reshape(-1), stopping=MaxIterations(0))

    return solve


def learned(problem: str) -> list[Method]:
    """A method for each file of data/regularizers for such images that is not for another problem."""
    methods = []
    for path in sorted(files.FOLDER.glob("*.safetensors")):
        other = next((name for name in PROBLEMS if path.stem.endswith(f"_{name}")), problem)
        if other != problem:
            continue
        module, card = files.load(path)
        if card.units != "1" or card.spacing is not None:
            continue
        method = of_module(path, module, card)
        if method is not None:
            methods.append(method)
    return methods


def of_module(path: Path, module: nn.Module, card: files.Card) -> Method | None:
    """What the weights are for; None: for no image problem."""
    kind, stem = type(module).__name__, path.stem
    if kind == "NonExpansiveDenoiser":
        return Method(f"PnP ({stem})", plugged(module), {"level": 0.003})
    if kind in ("LearnedDescent", "ContinuousUnrolling"):
        return Method(f"unrolled ({stem})", unrolled(module), {})
    if not isinstance(module, Energy) or kind not in (*LABELS, "Ridge"):
        return None
    try:
        module.require_fit((SIZE, SIZE))
    except GliodeError:  # volumes
        return None
    label = LABELS.get(kind, "CRR" if module.guarantee().convex else "WCRR")
    start = {"weight": card.weight, "scale": card.scale}
    return Method(f"{label} ({stem})", variational(module), start, path if label == "CRR" else None)


def methods(problem: str) -> dict[str, Method]:
    """All, by name."""
    return {method.name: method for method in (*CLASSICAL, *learned(problem))}


# ---- the contest ------------------------------------------------------------------------------------------


Found = dict[str, tuple[Row, Tensor]]
"""Kind of pictures -> row, and its images (n, size, size)."""


def row(job: tuple[str, str]) -> Found:
    """One method (problem, name) on each kind of pictures: tuned on those to tune on, judged on others."""
    torch.set_num_threads(1)
    what, name = job
    problem, method = image_problem(what), methods(what)[name]
    own, others = validation_truths(), test_truths()
    data, unseen = problem.measured(own, VALIDATION_NOISE), problem.measured(others, TEST_NOISE)
    out = {}
    for kind, (first, second) in KINDS.items():
        best = _tuned(problem, method, data[first], own[first])
        out[kind] = _judged(problem, method, best, unseen[second], others[second])
    return out


def _tuned(problem: ImageProblem, method: Method, data: Tensor, truths: Tensor) -> Tuned:
    def score(parameters: Parameters) -> float:
        total = 0.0
        for y, truth in zip(data, truths, strict=True):
            try:
                found = method.solve(problem, y, parameters, lambda state: None)
            except GliodeError:
                return -math.inf
            total += psnr(found.m.reshape(truth.shape), truth)
        return total / len(truths)

    return tuned(score, method.start, BUDGET[len(method.start)])


def _judged(
    problem: ImageProblem, method: Method, best: Tuned, data: Tensor, truths: Tensor
) -> tuple[Row, Tensor]:
    out = Row(method.name, parameters=best.parameters, tried=best.tried)
    images, highest, unfinished, worse = [], [], 0, 0
    for y, truth in zip(data, truths, strict=True):
        trace: list[float] = []

        def watch(state: State, truth: Tensor = truth, trace: list[float] = trace) -> None:
            trace.append(psnr(state.m.reshape(truth.shape), truth))

        begin = time.perf_counter()
        found = method.solve(problem, y, best.parameters, watch)
        seconds = time.perf_counter() - begin
        image = found.m.reshape(truth.shape)
        out.add(image, truth, seconds, found.iterations)
        images.append(image)
        highest.append(max(trace, default=out.psnr[-1]))
        unfinished += found.stopped_by == "MaxIterations" and found.iterations >= ITERATIONS // 2
        worse += out.psnr[-1] < psnr(problem.naive(y), truth)
    early = sum(a - b for a, b in zip(highest, out.psnr, strict=True)) / len(highest)
    if early > EARLY:
        out.notes.append(f"its best iterates are {early:.2f} dB above the last: needs early stopping")
    if unfinished and method.name != "TV":
        out.notes.append(f"not converged on {unfinished}")
    if worse:
        out.notes.append(f"below the naive inversion on {worse}")
    return out, torch.stack(images)


def contest(pool: Pool, what: str, names: Sequence[str] | None = None) -> dict[str, Found]:
    """Name -> what was found, a job for each method."""
    from rich.progress import track

    names = list(methods(what)) if names is None else names
    jobs = pool.imap(row, [(what, name) for name in names])
    return dict(zip(names, track(jobs, what, total=len(names)), strict=True))


def pool() -> Pool:
    """Two processes, a thread each."""
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = "1"
    return multiprocessing.get_context("spawn").Pool(min(2, os.cpu_count() or 1))


def judged(problems: Sequence[str], noise: float, full: bool) -> list[Check]:
    """The checks of a benchmark: contests of all methods, and limits for the first problem.

    noise: of the problems, per cent.
    """
    checks: list[Check] = []
    with pool() as workers:
        for what in problems:
            found = contest(workers, what)
            for kind in KINDS:
                checks += table(f"{what}, {kind}", [of[kind][0] for of in found.values()])
            checks += bars(what, {name: of[PHOTOGRAPHS][0] for name, of in found.items()})
            if what == problems[0]:
                first = found
        what = problems[0]
        for name, method in methods(what).items():
            if method.convex is not None:
                levels = tuple(value / noise for value in NOISE)
                pictures = (0, 1, 2, 8, 9) if full else (2, 8)  # with a photograph and a section at least
                parameters = first[name][PHOTOGRAPHS][0].parameters
                jobs = [(what, str(method.convex), parameters, number, levels) for number in pictures]
                checks += limit_checks(what, name, noise, levels, workers.map(limit, jobs, 1))
    return checks


def bars(what: str, rows: Mapping[str, Row]) -> list[Check]:
    """The better provable one over TV, and which methods there are."""
    present = {name.partition(" (")[0] for name in rows}
    missing = [name for name in EXPECTED if name not in present]
    checks = [
        Check(f"{what}: methods without weights", ", ".join(missing) or "none", "", "none", holds=not missing)
    ]
    over = {
        name: gain(of.psnr, rows["TV"].psnr)
        for name, of in rows.items()
        if name.partition(" (")[0] in PROVABLE
    }
    if over:
        name = max(over, key=lambda name: over[name].mean)
        checks.append(
            Check.at_least(
                f"{what}, {PHOTOGRAPHS}: gain of {name} over TV, lower end of 95 %", over[name].low, 0.0, "dB"
            )
        )
    return checks
