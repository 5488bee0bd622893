r"""Plug-and-play: a denoiser D in the place of the prox of proximal gradient descent.

    m_(k+1) = (1 - rho) m_k + rho T m_k,    T m = P D(m - tau riesz(J'(m))),    P onto the bounds

(Venkatakrishnan, Bouman and Wohlberg 2013.) D needs no objective. Where J is convex with an L-Lipschitz
gradient, tau < 2 / L, and D is alpha-averaged, T is averaged too, with the constant

    1 / (1 + 1 / sum_i alpha_i / (1 - alpha_i)),    alpha_i = tau L / 2, that of D, and 1/2 of bounds,

so that the iteration converges to a fixed point whenever there is one (with bounds on both sides there is),
and the residual ||m_k - T m_k|| never rises (docs/theory/plug_and_play.md). A D that is 1-Lipschitz and no
more has alpha = 1: then so has T, and rho < 1 is needed (Krasnoselskii 1955).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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
from inverse.optimizers.proximal import norm_of_smooth
from inverse.problem import InverseProblem
from solvers.errors import GliodeError


def averaged(constants: Sequence[float]) -> float:
    """The constant of a composition of averaged maps (Combettes and Yamada 2015); 1 where one has 1."""
    if any(alpha >= 1 for alpha in constants):
        return 1.0
    total = sum(alpha / (1 - alpha) for alpha in constants)
    return total / (1 + total)


def minimise(
    problem: InverseProblem,
    m0: Start,
    denoiser: Callable[[Tensor], Tensor],
    shape: tuple[int, ...] | None = None,
    tau: float | str = "power",
    relaxation: float | None = None,
    stopping: Stopping = DEFAULT_STOPPING,
    callback: Callback | None = None,
) -> Result:
    """The fixed point of T from m0 (or on from the state_dict of an earlier run), for a convex J.

    denoiser: from fields (1, *shape) to such, in the arithmetic of m; shape: of the field that a point is,
    None: its own. D must be averaged in the norm of the problem's space, with the constant that is its
    attribute `averaged`; without one it is taken for 1-Lipschitz and no more. tau: below 2 / L, L the norm
    of J'' at m0 by power iteration; "power": 1 / L. relaxation: rho, between 0 and 1 / alpha of T (below it
    where that is 1); None: 1 where T is averaged, else 1/2.

    Values are those of J alone, which need not fall. gradient_norm is the residual ||m - T m|| / tau.
    Raises GliodeError for another tau or rho, a D that returns another shape, and bounds in a space without
    a diagonal metric.
    """
    if isinstance(tau, str) and tau != "power":
        raise GliodeError(f"plug_and_play: tau {tau!r} is not a number or 'power'")
    space = problem.space
    if problem.bounds is not None and space.scaling() is None:
        raise GliodeError("plug_and_play: bounds need a space with a diagonal metric")
    form = space.shape if shape is None else tuple(shape)
    if math.prod(form) != space.size:
        raise GliodeError(f"plug_and_play: fields of shape {form} for {space.size} unknowns")
    run = Recorder("plug_and_play", problem, m0, stopping, callback)
    with run, torch.no_grad():
        if run.memory:
            step, rho = (float(run.memory[name]) for name in ("tau", "relaxation"))
        else:
            step, rho = _constants(problem, run.start, denoiser, tau, relaxation)

        m = run.start
        while True:
            here = problem.evaluate(m)
            moved = m - step * space.riesz(here.gradient())
            cleaned = denoiser(moved.reshape(1, *form))
            if cleaned.shape != (1, *form) or cleaned.dtype != m.dtype:
                raise GliodeError(
                    f"plug_and_play: the denoiser makes {cleaned.dtype} of shape {tuple(cleaned.shape)} of "
                    f"{m.dtype} {(1, *form)}; it must return the same"
                )
            residual = (m - problem.project(cleaned.reshape(m.shape))) / step
            norm = math.sqrt(space.inner(residual, residual))  # NaN stays NaN
            at = Iterate(m, here.value, here.misfit, space.gram(residual), residual, norm)
            if run.record(at, {"tau": step, "relaxation": rho}):
                break
            m = m - rho * step * residual
    return run.result()


def _constants(
    problem: InverseProblem,
    m: Tensor,
    denoiser: Callable[[Tensor], Tensor],
    tau: float | str,
    relaxation: float | None,
) -> tuple[float, float]:
    """tau and rho, checked."""
    with torch.enable_grad():
        L = norm_of_smooth(problem, m)
    step = 1 / L if isinstance(tau, str) else float(tau)
    if not 0 < step < 2 / L:
        raise GliodeError(
            f"plug_and_play: tau {step:.4g} does not lie between 0 and 2 / ||J''|| = {2 / L:.4g}; nothing "
            "converges beyond; take tau='power'"
        )
    constants = [step * L / 2, float(getattr(denoiser, "averaged", 1.0))]
    alpha = averaged(constants if problem.bounds is None else [*constants, 0.5])
    rho = (1.0 if alpha < 1 else 0.5) if relaxation is None else float(relaxation)
    if not 0 < rho < 1 / alpha:
        raise GliodeError(
            f"plug_and_play: the relaxation {rho:g} does not lie between 0 and {1 / alpha:.4g}, one over the "
            "constant of averagedness of the iteration"
        )
    return step, rho
