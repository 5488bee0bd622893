r"""Landweber's iteration in a Space: m_(k+1) = P(m_k - omega g_k), g = riesz(J'(m)).

P is the projection onto the bounds. For J = 1/2 ||r||^2 this is the classical iteration; stopped by the
discrepancy principle it is a regularization method (Hanke, Neubauer, Scherzer 1995). Nesterov's acceleration,

    m_(k+1) = P(z_k - omega riesz(J'(z_k))),    z_(k+1) = P(m_(k+1) + k/(k+3) (m_(k+1) - m_k)),    z_0 = m_0,

takes the square root of its iterations to the same discrepancy (Neubauer 2017; for nonlinear ill-posed
problems Hubmer and Ramlau 2017). The iterates recorded are the z_k, whose residuals are known; where J(z)
would rise, z is m and the momentum begins anew, so that the record falls (O'Donoghue and Candes 2015).
"""

from __future__ import annotations

from inverse.optimizers.iteration import (
    DEFAULT_STOPPING,
    Callback,
    Iterate,
    Recorder,
    Result,
    Start,
    Stopping,
)
from inverse.optimizers.line_search import ARMIJO, rounding
from inverse.problem import InverseProblem, ResidualEvaluation
from solvers.errors import GliodeError


def minimise(
    problem: InverseProblem,
    m0: Start,
    step: float | str = "power",
    acceleration: str | None = None,
    stopping: Stopping = DEFAULT_STOPPING,
    callback: Callback | None = None,
) -> Result:
    """Minimise J from m0 (or on from the state_dict of an earlier run).

    step: omega itself, or "power": 1 / ||J'' ||, the norm of the Hessian (least squares: of J^T J + R'') in
    the space at m0 by power iteration; or "line_search": Armijo, beginning each time at twice the last omega.
    A given or "power" omega is halved for good where J would rise. acceleration: None or "nesterov" (not with
    "line_search"). Bounds need a diagonal metric (Euclidean),
    in which projecting is exact.
    """
    if isinstance(step, str) and step not in ("power", "line_search"):
        raise GliodeError(f"landweber: step {step!r} is not a number, 'power' or 'line_search'")
    if not isinstance(step, str) and not step > 0:
        raise GliodeError(f"landweber: the step must be positive, got {step}")
    if acceleration not in (None, "nesterov"):
        raise GliodeError(f"landweber: acceleration {acceleration!r} is not None or 'nesterov'")
    if acceleration is not None and step == "line_search":
        raise GliodeError("landweber: Nesterov's acceleration needs a fixed step; take step='power'")
    if problem.bounds is not None and problem.space.scaling() is None:
        raise GliodeError(
            "landweber: bounds need a Euclidean space (entrywise projection is not one in this metric)"
        )
    space = problem.space
    run = Recorder("landweber", problem, m0, stopping, callback)
    with run:
        here = run.first()
        if "omega" in run.memory:
            omega = float(run.memory["omega"])
        else:
            omega = step if not isinstance(step, str) else 1 / max(norm_of_hessian(problem, here), 1e-300)
        last = run.memory.get("last", here.m)  # m_k, for the momentum
        momentum = int(run.memory.get("momentum", 0))  # k since it began
        while not run.record(here, {"omega": omega, "last": last, "momentum": float(momentum)}):
            if momentum > 0:
                m = problem.project(here.m - omega * here.riesz)
                ahead = problem.project(m + momentum / (momentum + 3) * (m - last))
                trial = problem.evaluate(ahead)
                if trial.value <= here.value + rounding(here):
                    here, last, momentum = Iterate.of(trial), m, momentum + 1
                    continue
                momentum = 0
            if step == "line_search":
                omega *= 2
            for _ in range(60):
                trial = problem.evaluate(problem.project(here.m - omega * here.riesz))
                moved = space.pair(here.gradient, trial.m - here.m)
                if trial.value <= here.value + ARMIJO * moved + rounding(here):
                    here = Iterate.of(trial)
                    break
                omega /= 2
            else:
                run.stop("LineSearch", {"gradient_norm": here.gradient_norm, "omega": omega})
                break
            last, momentum = here.m, int(acceleration is not None)
            del trial
    return run.result()


def norm_of_hessian(problem: InverseProblem, here: Iterate, tolerance: float = 0.01, most: int = 50) -> float:
    """The largest |eigenvalue| of riesz J'' (least squares: riesz (J^T J + R'')) at a point, from below, by
    power iteration.
    """
    at = problem.evaluate(here.m)
    d, last = here.riesz, 0.0
    for _ in range(most):
        size = problem.space.norm(d)
        if not size > 0:
            break
        d = d / size
        dual = at.gauss_newton_action(d) if isinstance(at, ResidualEvaluation) else at.hessian_action(d)
        found = abs(problem.space.pair(dual, d))
        if abs(found - last) <= tolerance * found:
            return found
        d, last = problem.space.riesz(dual), found
    return last
