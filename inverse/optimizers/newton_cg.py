r"""Inexact Newton-CG for fields: H d = -J'(m) by conjugate gradients preconditioned by the Riesz map.

In a space whose Gram matrix is the prior's precision this is prior-preconditioned CG, whose iterations do not
grow with the mesh. The inner iteration ends at ||residual|| <= min(1/2, sqrt(||g|| / ||g_0||)) ||g||
(Eisenstat and Walker 1996) or at a direction of negative curvature (Steihaug 1983). Then either Armijo
backtracking from the full step, or a trust region ||d|| <= radius in the space's norm: with rho the actual
over the predicted fall of J (Nocedal & Wright 2006, algorithm 4.1),

    rho < 1/4: radius = ||d|| / 4,    rho > 3/4 at the edge: radius = 2 radius,    m + d is taken where rho >
    1e-4.

The first radius is the length of the first unrestricted step.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial

from torch import Tensor

from inverse.optimizers.inner import Inner, steihaug
from inverse.optimizers.iteration import (
    DEFAULT_STOPPING,
    Callback,
    Iterate,
    Recorder,
    Result,
    Start,
    Stopping,
)
from inverse.optimizers.line_search import backtracking, rounding
from inverse.problem import Evaluation, InverseProblem, ResidualEvaluation
from solvers.errors import GliodeError

TAKEN, POOR, GOOD = 1e-4, 0.25, 0.75
REJECTIONS = 25


def minimise(
    problem: InverseProblem,
    m0: Start,
    hessian: str = "gauss_newton",
    globalisation: str = "armijo",
    gauss_newton_first: int = 0,
    inner_iterations: int = 200,
    stopping: Stopping = DEFAULT_STOPPING,
    callback: Callback | None = None,
) -> Result:
    """Minimise J from m0 (or on from the state_dict of an earlier run).

    hessian: "gauss_newton", J^T J + R'' of a LeastSquares problem, or "full", the exact J'', which far from a
    minimum may be indefinite: `gauss_newton_first` iterations then use the other one. globalisation: "armijo"
    or "trust_region". `result.state.memory` holds "inner_iterations" and "inner_limits": how many inner
    solves ended at their limit of `inner_iterations` unconverged (their d still descends). Bounds are
    refused.
    """
    if hessian not in ("gauss_newton", "full"):
        raise GliodeError(f"newton_cg: hessian {hessian!r} is not 'gauss_newton' or 'full'")
    if globalisation not in ("armijo", "trust_region"):
        raise GliodeError(f"newton_cg: globalisation {globalisation!r} is not 'armijo' or 'trust_region'")
    if inner_iterations < 1 or gauss_newton_first < 0:
        raise GliodeError("newton_cg: inner_iterations must be at least 1, gauss_newton_first at least 0")
    if problem.bounds is not None:
        raise GliodeError(
            "newton_cg: bounds are not handled; use tao, landweber, quasi_newton or gauss_newton"
        )
    run = Recorder("newton_cg", problem, m0, stopping, callback)
    with run:
        here = run.first()
        inner, limits = (int(run.memory.get(key, 0)) for key in ("inner_iterations", "inner_limits"))
        radius = float(run.memory.get("radius", math.inf))
        while not run.record(
            here, {"inner_iterations": float(inner), "inner_limits": float(limits), "radius": radius}
        ):
            approximate = hessian == "gauss_newton" or run.state.iteration < gauss_newton_first
            action = _action(problem.evaluate(here.m), approximate)
            ratio = here.gradient_norm / run.state.first_gradient_norm
            tolerance = min(0.5, math.sqrt(ratio)) * here.gradient_norm

            solve = partial(steihaug, problem.space, action, here.gradient, tolerance, inner_iterations)
            if globalisation == "armijo":
                found = solve()
                slope = problem.space.pair(here.gradient, found.d)
                del action, solve  # the graph, before the next one is built
                step = backtracking(problem, here, found.d, slope, 1.0)
                there = None if step is None else step[0]
                used, at_limit = found.iterations, found.ended == "limit"
            else:
                there, radius, used, at_limit = _trusted(problem, here, solve, radius)
                del action, solve
            if at_limit and not limits:
                warnings.warn(
                    f"newton_cg: an inner solve did not converge in {inner_iterations} iterations; its last "
                    "direction is taken all the same. Allow more, or precondition (the space of a prior, H1)",
                    stacklevel=2,
                )
            inner, limits = inner + used, limits + at_limit
            if there is None:
                numbers = {"gradient_norm": here.gradient_norm, "inner_limits": float(limits)}
                run.stop("LineSearch" if globalisation == "armijo" else "NoDescent", numbers)
                break
            here = there
    return run.result()


def _action(at: Evaluation, approximate: bool) -> Callable[[Tensor], Tensor]:
    if not approximate:
        return at.hessian_action
    if not isinstance(at, ResidualEvaluation):
        raise GliodeError("newton_cg: hessian='gauss_newton' needs LeastSquares; else take 'full'")
    return at.gauss_newton_action


def _trusted(
    problem: InverseProblem, here: Iterate, solve: Callable[..., Inner], radius: float
) -> tuple[Iterate | None, float, int, bool]:
    """The next iterate (None: no step lowers J) and radius, the Hessian actions, whether a solve gave up."""
    used, limit = 0, False
    for _ in range(REJECTIONS):
        found = solve(radius=radius)
        used, limit = used + found.iterations, limit or found.ended == "limit"
        length = problem.space.norm(found.d)
        trial = problem.evaluate(here.m + found.d)
        noise = rounding(here)
        rho = (here.value - trial.value + noise) / (found.decrease + noise)
        if not math.isfinite(rho):
            rho = -math.inf
        if math.isinf(radius):
            radius = length
        if rho < POOR:
            radius = length / 4
        elif rho > GOOD and length >= 0.99 * radius:
            radius *= 2
        if rho > TAKEN:
            return Iterate.of(trial), radius, used, limit
    return None, radius, used, limit
