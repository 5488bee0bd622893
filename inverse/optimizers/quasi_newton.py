r"""Limited-memory BFGS in the metric of a Space.

Without bounds: the two-loop recursion with primal steps s = m+ - m, dual differences y = J'(m+) - J'(m),
pairings <y, s>, and the Riesz map as the initial inverse Hessian,

    H_0 = gamma riesz,    gamma = <y, s> / <y, riesz y>,

so that iteration counts do not depend on the mesh (Nocedal and Wright 2006, algorithm 7.4, over a Hilbert
space). With bounds: SciPy's L-BFGS-B in the variables z = m / s of a diagonal metric sum a b / s^2, in which
it is Euclidean.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import Bounds, OptimizeResult
from scipy.optimize import minimize as scipy_minimize
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
from inverse.optimizers.line_search import wolfe
from inverse.problem import InverseProblem
from solvers.errors import GliodeError
from solvers.spaces import Space

Array = NDArray[np.float64]


def minimise(
    problem: InverseProblem,
    m0: Start,
    memory: int = 10,
    stopping: Stopping = DEFAULT_STOPPING,
    callback: Callback | None = None,
) -> Result:
    """Minimise J from m0 (or on from the state_dict of an earlier run).

    memory: pairs (s, y) kept. Bounds need a diagonal metric of replicated parameters (Euclidean, or a Product
    of such); with bounds a resumed run starts from the saved point with an empty memory.
    """
    if problem.bounds is not None:
        return _bounded(problem, m0, memory, stopping, callback)
    space = problem.space
    run = Recorder("quasi_newton", problem, m0, stopping, callback)
    with run:
        here = run.first()
        steps = list(run.memory["steps"]) if "steps" in run.memory else []
        duals = list(run.memory["duals"]) if "duals" in run.memory else []
        while not run.record(
            here, {"steps": torch.stack(steps), "duals": torch.stack(duals)} if steps else {}
        ):
            d = -_two_loops(space, here.gradient, steps, duals)
            slope = space.pair(here.gradient, d)
            found = (
                wolfe(problem, here, d, slope, 1.0 if steps else 1 / here.gradient_norm, 0.9)
                if slope < 0
                else None
            )
            if found is None and steps:  # forget what was learned and go downhill
                steps, duals = [], []
                found = wolfe(
                    problem, here, -here.riesz, -(here.gradient_norm**2), 1 / here.gradient_norm, 0.9
                )
            if found is None:
                run.stop("LineSearch", {"gradient_norm": here.gradient_norm})
                break
            there, _ = found
            s, y = there.m - here.m, there.gradient - here.gradient
            if space.pair(y, s) > 1e-12 * space.norm(s) * space.dual_norm(y):
                steps, duals = [*steps, s][-memory:], [*duals, y][-memory:]
            here = there
    return run.result()


def _two_loops(space: Space, gradient: Tensor, steps: list[Tensor], duals: list[Tensor]) -> Tensor:
    """The primal H gradient: H the limited-memory inverse Hessian, a map from duals to primals."""
    q = gradient
    weights = []
    for s, y in zip(reversed(steps), reversed(duals), strict=True):
        a = space.pair(q, s) / space.pair(y, s)
        weights.append(a)
        q = q - a * y
    p = space.riesz(q)
    if steps:
        p = p * (space.pair(duals[-1], steps[-1]) / space.pair(duals[-1], space.riesz(duals[-1])))
    for s, y, a in zip(steps, duals, reversed(weights), strict=True):
        p = p + (a - space.pair(y, p) / space.pair(y, s)) * s
    return p


def _bounded(
    problem: InverseProblem, m0: Start, memory: int, stopping: Stopping, callback: Callback | None
) -> Result:
    scale = problem.space.scaling()
    if scale is None or problem.bounds is None or problem.space.comm is not None:
        raise GliodeError(
            "quasi_newton: bounds need a diagonal metric of replicated parameters (Euclidean); "
            "leave the bounds out, or use parameters in which they are at infinity (logarithms)"
        )
    lower, upper = ((side.reshape(-1) / scale).numpy() for side in problem.bounds)
    run = Recorder("quasi_newton", problem, m0, stopping, callback)
    with run:
        last = run.first()  # the last point evaluated, at z = at
        at = (last.m.reshape(-1) / scale).numpy()
        shape = last.m.shape

        def objective(z: Array) -> tuple[float, Array]:
            nonlocal at, last
            if not np.array_equal(z, at):
                at = z.copy()
                last = Iterate.of(
                    problem.evaluate(problem.project((torch.from_numpy(at) * scale).view(shape)))
                )
                last.require_finite()
            return last.value, (last.gradient.reshape(-1) * scale).numpy()

        def accepted(intermediate_result: OptimizeResult) -> None:
            objective(intermediate_result.x)
            if run.record(last):
                raise StopIteration

        if not run.record(last):
            own = {"maxcor": memory, "maxiter": 10**9, "maxfun": 10**9, "ftol": 0.0, "gtol": 0.0}
            box = Bounds(lower, upper)
            scipy_minimize(
                objective, at, jac=True, method="L-BFGS-B", bounds=box, callback=accepted, options=own
            )
            if not run.stopped:
                run.stop("LineSearch", {"gradient_norm": last.gradient_norm})
    return run.result()
