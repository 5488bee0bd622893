r"""Primal-dual splitting for J(m) + TV(m) + R(m): total variation by its gradient operator D, not its prox.

With dual slopes p, |p_q| <= weight, metric M, weights W and b the bound of D M^-1 D^T W:

    m_(k+1) = prox_R(m_k - tau riesz(g_k + D^T W p_k), tau),
    p_(k+1) = P(p_k + sigma / b D(2 m_(k+1) - m_k)),    P: onto the balls of radius `weight`

misfit="gradient" (Condat 2013; Vu 2013): g_k = J'(m_k), L its Lipschitz constant, tau (L / 2 + sigma) <= 1.
misfit="dual" (Chambolle and Pock 2011): the misfit 1/2 ||r(m)||^2 has a dual too,

    g_k = r'(m_k)^T s_k,    s_(k+1) = (s_k + r(2 m_(k+1) - m_k)) / 2,   tau (L + sigma) <= 1,   L = ||r'||^2,

which for a nonlinear r is the method of Valkonen (2014). L is doubled where a step shows it too small. The
objective need not fall at every step; where J is convex its mean iterates converge as O(1/k).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from inverse.optimizers.iteration import DEFAULT_STOPPING, Callback, Recorder, Result, Start, Stopping
from inverse.optimizers.proximal import NonSmooth, Point, check_space, norm_of_smooth, plain
from inverse.problem import InverseProblem, LeastSquares, ResidualEvaluation
from inverse.regularizers.interface import Proximable
from inverse.regularizers.total_variation import TotalVariation
from solvers.errors import GliodeError
from solvers.spaces import reduce


def minimise(
    problem: InverseProblem,
    m0: Start,
    variation: TotalVariation,
    nonsmooth: Proximable | None = None,
    misfit: str = "gradient",
    balance: float = 1.0,
    stopping: Stopping = DEFAULT_STOPPING,
    callback: Callback | None = None,
) -> Result:
    """Minimise J + variation + nonsmooth from m0 (or on from the state_dict of an earlier run).

    variation: the exact one, in the problem's space; nonsmooth, bounds: as for `proximal.minimise`. misfit:
    "gradient", or "dual" (LeastSquares without a regularizer). balance: sigma / L; about 10 is fast for
    denoising, 0.1 to 1 where the misfit is ill-conditioned. gradient_norm: of the step that led to m (at the
    start: that leads on) in the metric of the method,
    (||dm||^2 + tau ||dp||^2 b / sigma + tau ||ds||^2)^(1/2) / tau, 0 at a solution alone. Raises GliodeError
    where the metric is not diagonal.
    """
    if misfit not in ("gradient", "dual"):
        raise GliodeError(f"primal_dual: misfit {misfit!r} is not 'gradient' or 'dual'")
    if not (math.isfinite(balance) and balance > 0):
        raise GliodeError(f"primal_dual: balance must be positive and finite, got {balance}")
    if misfit == "dual" and not (isinstance(problem, LeastSquares) and problem.regularizer is None):
        raise GliodeError(
            "primal_dual: misfit='dual' needs LeastSquares without a regularizer; take misfit='gradient'"
        )
    if variation.smoothing > 0:
        raise GliodeError("primal_dual: the variation is smoothed; take smoothing 0, or a smooth optimizer")
    term = NonSmooth("primal_dual", problem, nonsmooth)
    check_space("primal_dual", problem, "the total variation", variation.space.scaling())
    run = Recorder(f"primal_dual, {misfit}", problem, m0, stopping, callback)
    with run:
        here = term.start(run.start, variation)
        if run.memory:
            state = _State(**{name: plain(value) for name, value in run.memory.items()})
            ahead = None
        else:
            duals = _duals(here) if misfit == "dual" else here.m.new_zeros(0)
            L, p = 1.05 * norm_of_smooth(problem, here.m), torch.zeros_like(variation.operator(here.m))
            state = _State(p, duals, L, torch.zeros_like(here.m), 0.0)
            ahead = _step(term, variation, balance, misfit, state, here)
            state = replace(ahead[1], p=p, duals=duals)
        while not run.record(here.iterate(problem, state.mapping, state.norm), dict(vars(state))):
            here, state = ahead or _step(term, variation, balance, misfit, state, here)
            ahead = None
    return run.result()


@dataclass(frozen=True)
class _State:
    """The dual slopes, those of the misfit (empty without), L, and the step that led here: -dm / tau and the
    norm of all of it.
    """

    p: Tensor
    duals: Tensor
    L: float
    mapping: Tensor
    norm: float


def _duals(here: Point) -> Tensor:
    """r(m), the duals of the misfit at a solution."""
    assert isinstance(here.smooth, ResidualEvaluation)
    return here.smooth.residual


def _step(
    term: NonSmooth, variation: TotalVariation, balance: float, misfit: str, state: _State, here: Point
) -> tuple[Point, _State]:
    """The next point and state, L doubled until the misfit is below its model there."""
    problem, D, m = term.problem, variation.operator, here.m
    space = problem.space
    w, bound = D.weights.to(m)[:, None], D.bound.to(m).reshape(-1, 1)
    smooth = here.smooth or problem.evaluate(m)
    here.smooth = None  # its graph is of no more use
    value, L = smooth.value, state.L
    residual = smooth.residual if isinstance(smooth, ResidualEvaluation) else None
    if misfit == "dual" and isinstance(smooth, ResidualEvaluation):
        dual = smooth.vjp(state.duals)
    else:
        dual = smooth.gradient()
    del smooth
    direction = space.riesz(dual + D.adjoint(w * state.p))
    for _ in range(60):
        sigma = balance * L
        tau = 1 / (sigma + (L if misfit == "dual" else L / 2))
        there = term.at(term.prox(m - tau * direction, tau), variation)
        move = there.m - m
        square = space.inner(move, move)
        if misfit == "dual" and isinstance(problem, LeastSquares):
            assert residual is not None
            change = _duals(there) - residual
            excess = float(problem.data_product(change, change)) - L * square
        else:
            assert there.smooth is not None
            excess = there.smooth.value - value - space.pair(dual, move) - L / 2 * square
        if excess <= 10 * torch.finfo(m.dtype).eps * abs(value):
            break
        L *= 2
    beyond = m + 2 * move
    p = state.p + sigma / bound * D(beyond)
    p = p / (torch.linalg.vector_norm(p, dim=1, keepdim=True) / variation.weight).clamp(min=1)
    moved = square + tau * float(reduce((w * bound * (p - state.p).square()).sum(), space.comm)) / sigma
    duals = state.duals
    if misfit == "dual" and isinstance(problem, LeastSquares):
        duals = (duals + problem.residual(beyond)) / 2
        moved += tau * float(problem.data_product(duals - state.duals, duals - state.duals))
    return there, _State(p, duals, L, -move / tau, math.sqrt(moved) / tau)
