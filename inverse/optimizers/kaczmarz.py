r"""Landweber-Kaczmarz with loping: a system of equations F_i(m) = y_i, one after the other, in a Space.

    m <- P(m - omega_i riesz(r_i'(m)^T r_i(m))),    left out where ||r_i(m)|| <= tau delta_i,

for i = 1, ..., N again and again. A sweep in which every equation is left out ends the iteration; that, not
the total residual, is its discrepancy principle (Haltmeier, Leitao, Scherzer 2007; De Cezaro, Haltmeier,
Leitao, Scherzer 2008). An equation left out costs its forward solve only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from inverse.optimizers.iteration import (
    SOLVES,
    Callback,
    Iterate,
    Recorder,
    Result,
    Start,
    Stopping,
)
from inverse.optimizers.landweber import norm_of_hessian
from inverse.problem import InverseProblem, LeastSquares
from inverse.stopping import MaxIterations, Value
from solvers.errors import GliodeError


def minimise(
    problems: Sequence[LeastSquares],
    m0: Start,
    tau: float,
    deltas: Sequence[float] | None = None,
    step: float | str = "power",
    stopping: Stopping = MaxIterations(1000),
    callback: Callback | None = None,
) -> Result:
    """Solve the equations from m0 (or on from the state_dict of an earlier run).

    problems: one an equation, all in one space, with the same bounds and no regularizer; tau > 1; deltas:
    noise levels in the norm of each residual (None: the square roots of the numbers of data); step: omega, or
    "power": 1/||J_i^T J_i|| at m0. An iteration of the record is a sweep: its value and residuals are those
    met on the way, its gradient the sum of those used. stopped_by is "Loping" where every equation was left
    out.
    """
    system = _System(problems)
    if deltas is None:
        deltas = [math.sqrt(problem.data_size) for problem in problems]
    if not (math.isfinite(tau) and tau > 1):
        raise GliodeError(f"kaczmarz: tau must be above 1, got {tau}; with several equations 2 is usual")
    if len(deltas) != len(problems) or not all(math.isfinite(delta) and delta > 0 for delta in deltas):
        raise GliodeError(f"kaczmarz: needs {len(problems)} noise levels above 0, got {list(deltas)}")
    if step != "power" and (isinstance(step, str) or not step > 0):
        raise GliodeError(f"kaczmarz: step {step!r} is not a positive number or 'power'")
    run = Recorder("kaczmarz", system, m0, stopping, callback)
    with run:
        if run.memory:
            omegas = run.memory["omegas"].tolist()
        elif isinstance(step, str):
            omegas = [1 / max(_norm(problem, run), 1e-300) for problem in problems]
        else:
            omegas = [step] * len(problems)
        memory: dict[str, Value] = {"omegas": torch.tensor(omegas, dtype=torch.float64)}
        m = run.start
        while True:
            there, sweep, active = _sweep(problems, m, omegas, [tau * delta for delta in deltas])
            system.count()
            stopped = run.record(sweep, memory)
            if active == 0:
                run.stop("Loping", {"tau": tau, "equations": float(len(problems))})
            if stopped or active == 0:
                break
            m = there
    return run.result()


def _norm(problem: LeastSquares, run: Recorder) -> float:
    return norm_of_hessian(problem, Iterate.of(problem.evaluate(run.start)))


class _System(InverseProblem):
    """The equations as one problem: the sum of their misfits and of their counts."""

    def __init__(self, problems: Sequence[LeastSquares]) -> None:
        if not problems or not all(isinstance(problem, LeastSquares) for problem in problems):
            raise GliodeError("kaczmarz: needs LeastSquares problems, at least one")
        first = problems[0]
        for problem in problems:
            if problem.regularizer is not None:
                raise GliodeError("kaczmarz: the stopping regularises; leave the regularizers out")
            if problem.space is not first.space:
                raise GliodeError("kaczmarz: all problems must share one space (the same object)")
            if not _same(problem.bounds, first.bounds):
                raise GliodeError("kaczmarz: all problems must have the same bounds")
        if first.bounds is not None and first.space.scaling() is None:
            raise GliodeError("kaczmarz: bounds need a diagonal metric, in which the projection is entrywise")
        super().__init__(first.space, lambda m: torch.stack([p.misfit(m) for p in problems]).sum())
        self.bounds, self._problems = first.bounds, problems
        self.count()

    def count(self) -> None:
        """Take over the solves made so far."""
        self.counts = {name: sum(p.counts[name] for p in self._problems) for name in SOLVES}


def _same(a: tuple[Tensor, Tensor] | None, b: tuple[Tensor, Tensor] | None) -> bool:
    if a is None or b is None:
        return a is b
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def _sweep(
    problems: Sequence[LeastSquares], m: Tensor, omegas: Sequence[float], limits: Sequence[float]
) -> tuple[Tensor, Iterate, int]:
    """The point after all equations, what was met on the way, and how many were not left out."""
    start, value, gradient, active = m, 0.0, torch.zeros_like(m), 0
    for problem, omega, limit in zip(problems, omegas, limits, strict=True):
        at = problem.evaluate(m)
        value += at.misfit
        if not math.sqrt(2 * at.misfit) <= limit:  # NaN is not left out, and recorded
            free = problem.free(m, at.gradient())
            gradient, active = gradient + free, active + 1
            m = problem.project(m - omega * problem.space.riesz(free))
    riesz = problems[0].space.riesz(gradient)
    norm = math.sqrt(max(problems[0].space.pair(gradient, riesz), 0.0))
    return m, Iterate(start, value, value, gradient, riesz, norm), active
