r"""Nonlinear conjugate gradients in a Space (a Sobolev gradient where the space is a Sobolev space).

    d_0 = -g_0,    m_(k+1) = m_k + eta_k d_k,    d_(k+1) = -g_(k+1) + beta d_k,    g = riesz(J'(m)),

with y = g_(k+1) - g_k and every product that of the space

    FR     (g+, g+) / (g, g)                    PR+    max(0, (g+, y) / (g, g))
    FR-PR  PR kept between -FR and FR           HS     (g+, y) / (d, y)           DY    (g+, g+) / (d, y)

(Nocedal and Wright 2006, section 5.2; the hybrid is Gilbert and Nocedal 1992; DY is Dai and Yuan 1999). A
direction that does not descend, or along which no step does, is replaced by -g.
"""

from __future__ import annotations

from collections.abc import Callable

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
from inverse.optimizers.line_search import Step, sensitivity, wolfe
from inverse.problem import InverseProblem
from solvers.errors import GliodeError

# beta of (g, g), (g+, g+), (g+, g), (d, y)
_BETA: dict[str, Callable[[float, float, float, float], float]] = {
    "FR": lambda old, new, mixed, dy: new / old,
    "PR+": lambda old, new, mixed, dy: max(0.0, (new - mixed) / old),
    "FR-PR": lambda old, new, mixed, dy: max(-new / old, min(new / old, (new - mixed) / old)),
    "HS": lambda old, new, mixed, dy: (new - mixed) / dy,
    "DY": lambda old, new, mixed, dy: new / dy,
}


def minimise(
    problem: InverseProblem,
    m0: Start,
    variant: str = "PR+",
    step: str = "sensitivity",
    stopping: Stopping = DEFAULT_STOPPING,
    callback: Callback | None = None,
) -> Result:
    """Minimise J from m0 (or on from the state_dict of an earlier run).

    variant: "FR", "PR+", "FR-PR", "HS" or "DY"; step: "sensitivity" (see `line_search.sensitivity`) or
    "wolfe" (strong Wolfe, c2 = 0.1, needs first derivatives only). Bounds are refused: each change of the
    active set would end the conjugacy; use landweber, quasi_newton or gauss_newton, or parameters in which
    the bound is at infinity (logarithms).
    """
    if variant not in _BETA:
        raise GliodeError(f"conjugate_gradients: variant {variant!r} is not one of {', '.join(_BETA)}")
    if step not in ("sensitivity", "wolfe"):
        raise GliodeError(f"conjugate_gradients: step {step!r} is not 'sensitivity' or 'wolfe'")
    if problem.bounds is not None:
        raise GliodeError(
            "conjugate_gradients: bounds are not handled; use landweber, quasi_newton or gauss_newton, "
            "or log-parameters in place of positivity"
        )
    space = problem.space
    run = Recorder("conjugate_gradients", problem, m0, stopping, callback)

    def search(here: Iterate, d: Tensor, slope: float, guess: float) -> Step | None:
        if step == "sensitivity":
            return sensitivity(problem, here, d, slope)
        return wolfe(problem, here, d, slope, guess, 0.1)

    with run:
        here = run.first()
        if run.memory:
            d, guess = run.memory["direction"], float(run.memory["guess"])
        else:
            d, guess = -here.riesz, 1 / max(here.gradient_norm, 1e-300)
        while not run.record(here, {"direction": d, "guess": guess}):
            slope = space.pair(here.gradient, d)
            found = search(here, d, slope, guess) if slope < 0 else None
            if found is None:
                d, slope = -here.riesz, -(here.gradient_norm**2)
                found = search(here, d, slope, 1 / here.gradient_norm)
            if found is None:
                run.stop("LineSearch", {"gradient_norm": here.gradient_norm})
                break
            there, eta = found
            mixed, dy = space.pair(there.gradient, here.riesz), space.pair(there.gradient, d) - slope
            old, new = here.gradient_norm**2, there.gradient_norm**2
            d = -there.riesz + (_BETA[variant](old, new, mixed, dy) if dy > 0 else 0.0) * d
            guess = (
                eta * slope / min(space.pair(there.gradient, d), -1e-300)
            )  # the same first-order change of J
            here = there
    return run.result()
