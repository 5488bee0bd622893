r"""Inexact Newton-CG for fields: H d = -J'(m) solved by conjugate gradients preconditioned by the space's
Riesz map.

In a space whose Gram matrix is the prior's precision this is prior-preconditioned CG, whose iterations do not
grow with the mesh. The inner iteration ends at ||residual|| <= min(1/2, sqrt(||g|| / ||g_0||)) ||g||
(Eisenstat and Walker 1996) or at a direction of negative curvature (Steihaug 1983); Armijo backtracking from
the full step follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from inverse.optimizers.iteration import (
    DEFAULT_STOPPING,
    Callback,
    Iterate,
    Recorder,
    Result,
    Start,
    Stopping,
)
from inverse.optimizers.line_search import backtracking
from inverse.problem import InverseProblem, ResidualEvaluation
from solvers.errors import GliodeError
from solvers.spaces import Space


def minimise(
    problem: InverseProblem,
    m0: Start,
    hessian: str = "gauss_newton",
    inner_iterations: int = 200,
    stopping: Stopping = DEFAULT_STOPPING,
    callback: Callback | None = None,
) -> Result:
    """Minimise J from m0 (or on from the state_dict of an earlier run).

    hessian: "gauss_newton", J^T J + R'' of a LeastSquares problem, or "full", the exact J''. The number of
    inner iterations is in `result.state.memory["inner_iterations"]`. Bounds are refused.
    """
    if hessian not in ("gauss_newton", "full"):
        raise GliodeError(f"newton_cg: hessian {hessian!r} is not 'gauss_newton' or 'full'")
    if problem.bounds is not None:
        raise GliodeError("newton_cg: bounds are not handled; use landweber, quasi_newton or gauss_newton")
    space = problem.space
    run = Recorder("newton_cg", problem, m0, stopping, callback)
    with run:
        here = run.first()
        inner = int(run.memory.get("inner_iterations", 0))
        while not run.record(here, {"inner_iterations": float(inner)}):
            at = problem.evaluate(here.m)
            action = at.hessian_action
            if hessian == "gauss_newton":
                if not isinstance(at, ResidualEvaluation):
                    raise GliodeError(
                        "newton_cg: hessian='gauss_newton' needs LeastSquares; else take 'full'"
                    )
                action = at.gauss_newton_action
            first = run.state.first_gradient_norm
            tolerance = min(0.5, math.sqrt(here.gradient_norm / first)) * here.gradient_norm
            d, used = _solve(space, action, here, tolerance, inner_iterations)
            inner += used
            del at, action  # the graph, before the next one is built
            found = backtracking(problem, here, d, space.pair(here.gradient, d), 1.0)
            if found is None:
                run.stop("LineSearch", {"gradient_norm": here.gradient_norm})
                break
            here, _ = found
    return run.result()


def _solve(
    space: Space, action: Callable[[Tensor], Tensor], here: Iterate, tolerance: float, most: int
) -> tuple[Tensor, int]:
    """A descent direction d with H d near -J'(m), and the Hessian actions it took."""
    d = torch.zeros_like(here.m)
    residual, z = -here.gradient, -here.riesz
    p, square = z, here.gradient_norm**2
    for k in range(most):
        image = action(p)
        curvature = space.pair(image, p)
        if curvature <= 0:
            return (p if k == 0 else d), k + 1
        a = square / curvature
        d, residual = d + a * p, residual - a * image
        z = space.riesz(residual)
        before, square = square, max(space.pair(residual, z), 0.0)
        if math.sqrt(square) <= tolerance:
            return d, k + 1
        p = z + (square / before) * p
    return d, most
