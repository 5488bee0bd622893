r"""Iteratively regularised Gauss-Newton, and Levenberg-Marquardt for fields: matrix-free.

    m_(k+1) = m_k + argmin_d  ||r(m_k) + r'(m_k) d||^2 + alpha_k ||m_k + d - m*||^2,   alpha_k = alpha_0 q^k,

with m* the start (the first: Bakushinskii 1992; Blaschke, Neubauer, Scherzer 1997) or m_k
itself (Levenberg-Marquardt: Hanke 1997), norms those of the data and of the space. The step solves

    (J^T J + alpha_k G) d = -J^T r - alpha_k G (m_k - m*)

by conjugate gradients preconditioned by the Riesz map G^-1, under which the operator is alpha_k I plus a
compact one. Stopped by the discrepancy principle both are regularization methods; the residual need not fall
at every step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from inverse.optimizers.inner import steihaug
from inverse.optimizers.iteration import (
    Callback,
    Iterate,
    Recorder,
    Result,
    Start,
    Stopping,
)
from inverse.optimizers.landweber import norm_of_hessian
from inverse.problem import LeastSquares
from solvers.errors import GliodeError

INNER_TOLERANCE = 0.01


def minimise(
    problem: LeastSquares,
    m0: Start,
    stopping: Stopping,
    towards: str = "start",
    alpha: float | None = None,
    q: float = 0.5,
    inner_iterations: int = 200,
    callback: Callback | None = None,
) -> Result:
    """Bring the residual to the noise level from m0 (or on from the state_dict of an earlier run).

    stopping: needed, as it is the regularization: Discrepancy(tau, delta). towards: "start" (iteratively
    regularised Gauss-Newton) or "iterate" (Levenberg-Marquardt). alpha: alpha_0 (None: the largest eigenvalue
    of J^T J in the space at m0); q in (0, 1). `result.state.memory` holds "alpha", the next one, and
    "inner_iterations". Raises GliodeError for problems with a regularizer (theirs would be a second one) or
    bounds.
    """
    if not isinstance(problem, LeastSquares):
        raise GliodeError("irgn: needs a LeastSquares problem")
    if problem.regularizer is not None:
        raise GliodeError(
            "irgn: the iteration regularises by itself; leave the regularizer out, or take newton_cg"
        )
    if problem.bounds is not None:
        raise GliodeError("irgn: bounds are not handled; use landweber, tao or log-parameters")
    if towards not in ("start", "iterate"):
        raise GliodeError(f"irgn: towards {towards!r} is not 'start' or 'iterate'")
    if alpha is not None and not alpha > 0:
        raise GliodeError(f"irgn: alpha must be positive, got {alpha}")
    if not 0 < q < 1:
        raise GliodeError(f"irgn: q must lie between 0 and 1, got {q}; 0.5 is usual")
    space = problem.space
    run = Recorder("irgn", problem, m0, stopping, callback)
    with run:
        here = run.first()
        if run.memory:
            alpha, start, inner = (
                float(run.memory["alpha"]),
                run.memory["start"],
                int(run.memory["inner_iterations"]),
            )
        else:
            alpha = max(norm_of_hessian(problem, here), 1e-300) if alpha is None else alpha
            start, inner = here.m, 0
        while not run.record(here, {"alpha": alpha, "start": start, "inner_iterations": float(inner)}):
            gradient = here.gradient
            if towards == "start":
                gradient = gradient + alpha * space.gram(here.m - start)
            tolerance = INNER_TOLERANCE * space.dual_norm(gradient)
            found = steihaug(space, _damped(problem, here.m, alpha), gradient, tolerance, inner_iterations)
            if found.ended == "limit":
                warnings.warn(
                    f"irgn: at alpha = {alpha:.1e} the inner solve did not converge in {inner_iterations} "
                    "iterations; allow more, or stop earlier (a larger tau)",
                    stacklevel=2,
                )
            inner += found.iterations
            alpha *= q
            here = Iterate.of(problem.evaluate(here.m + found.d))
    return run.result()


def _damped(problem: LeastSquares, m: Tensor, alpha: float) -> Callable[[Tensor], Tensor]:
    """d -> J^T J d + alpha G d at m."""
    at = problem.evaluate(m)

    def action(d: Tensor) -> Tensor:
        return torch.add(at.gauss_newton_action(d), problem.space.gram(d), alpha=alpha)

    return action
