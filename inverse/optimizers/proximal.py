r"""Proximal gradient methods for J(m) + R(m): J smooth, R convex with a prox, such as sparsity and bounds.

    m = prox_R(y - tau riesz(J'(y)), tau)

    ista          y_k = m_k                                       falls as O(1/k) where J is convex
    fista         y_k = m_k + (t_(k-1) - 1)/t_k (m_k - m_(k-1))   O(1/k^2); t_(k+1)^2 - t_(k+1) = t_k^2
    nonmonotone   Li and Lin's accelerated method (2015, algorithm 2), for J that need not be convex

(Beck and Teboulle 2009.) tau is halved for good where J rises above its quadratic model at y. fista begins
its momentum anew where the objective would rise (O'Donoghue and Candes 2015), so ista and fista are monotone.
nonmonotone takes the extrapolated step where the objective falls below a mean of its past values, else the
better of that one and a plain step: every limit point is stationary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

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
from inverse.optimizers.landweber import norm_of_hessian
from inverse.problem import Evaluation, InverseProblem
from inverse.regularizers.interface import Proximable
from inverse.stopping import Value
from solvers.errors import GliodeError

MEMORY, DECREASE = 0.8, 1e-4  # eta and delta of Li and Lin, delta in units of 1 / tau


def minimise(
    problem: InverseProblem,
    m0: Start,
    nonsmooth: Proximable | None = None,
    method: str = "fista",
    step: float | str = "power",
    stopping: Stopping = DEFAULT_STOPPING,
    callback: Callback | None = None,
) -> Result:
    """Minimise J + nonsmooth from m0 (or on from the state_dict of an earlier run).

    nonsmooth: in the problem's space; None: the bounds alone. Bounds of the problem are kept exactly where
    `nonsmooth` is separable. method: "fista", "ista" or "nonmonotone". step: tau, or "power": a little below
    1 / ||J''|| at m0 by power iteration. Values are those of J + nonsmooth; gradient_norm is that of the
    gradient mapping (y - m) / tau that led to m (at the start: that leads on): where tau <= 1 / L some
    subgradient at m is at most twice as long. stopped_by "NoDescent": no step lowers the objective any more,
    because of rounding or of a prox solved no further than to its tolerance. Raises GliodeError where the
    metric is not diagonal.
    """
    if method not in _METHODS:
        raise GliodeError(f"proximal: method {method!r} is not one of {', '.join(_METHODS)}")
    if isinstance(step, str) and step != "power":
        raise GliodeError(f"proximal: step {step!r} is not a number or 'power'")
    if not isinstance(step, str) and not (math.isfinite(step) and step > 0):
        raise GliodeError(f"proximal: the step must be positive and finite, got {step}")
    term = NonSmooth("proximal", problem, nonsmooth)
    run = Recorder(method, problem, m0, stopping, callback)
    with run:
        here, ahead = term.start(run.start), None
        if run.memory:
            state = _State(**{name: plain(value) for name, value in run.memory.items()})
        else:
            tau = 0.95 / norm_of_smooth(problem, here.m) if isinstance(step, str) else step
            state = _State(here.m, here.m, 0.0, 1.0, here.value, 1.0, tau, torch.full_like(here.m, math.nan))
            ahead = _move(term, state, here)
        while not run.record(here.iterate(problem, state.mapping), dict(vars(state))):
            there = ahead if ahead is not None else _METHODS[method](term, state, here)
            ahead = None
            if there is None:
                run.stop("NoDescent", {"value": here.value, "tau": state.tau})
                break
            state.advance(here, there)
            here = there
    return run.result()


@dataclass
class Point:
    """A point, what its record needs, and J there while its graph may still be of use."""

    m: Tensor
    misfit: float
    value: float
    smooth: Evaluation | None

    def iterate(self, problem: InverseProblem, mapping: Tensor, norm: float | None = None) -> Iterate:
        """For the Recorder, with the gradient mapping in the gradient's place (norm None: its own)."""
        if norm is None:
            norm = math.sqrt(problem.space.inner(mapping, mapping))  # NaN stays NaN
        return Iterate(self.m, self.value, self.misfit, problem.space.gram(mapping), mapping, norm)


class NonSmooth:
    """A problem's J with a non-smooth term and its bounds, checked to belong together."""

    def __init__(self, name: str, problem: InverseProblem, term: Proximable | None) -> None:
        self.name, self.problem, self.term = name, problem, term
        scaling = problem.space.scaling()
        if scaling is None:
            raise GliodeError(
                f"{name}: the problem's metric is not diagonal, and no prox is known in it; state the "
                "problem in Euclidean, Diagonal, or `lumped` of the domain"
            )
        if term is not None:
            check_space(name, problem, type(term).__name__, term.space.scaling())
            if problem.bounds is not None and not term.separable:
                raise GliodeError(
                    f"{name}: bounds and {type(term).__name__} have no joint prox; take primal_dual.minimise "
                    "for total variation, which treats them apart"
                )

    def start(self, m: Tensor, *more: Callable[[Tensor], Tensor]) -> Point:
        """`at` the start; raises GliodeError where the term is infinite."""
        if self.term is not None and math.isinf(float(self.term(m))):
            raise GliodeError(
                f"{self.name}: {type(self.term).__name__} is infinite at the start; start from its prox"
            )
        return self.at(m, *more)

    def at(self, m: Tensor, *more: Callable[[Tensor], Tensor]) -> Point:
        """J + R (+ more) at m: one forward solve."""
        smooth = self.problem.evaluate(m)
        terms: list[Callable[[Tensor], Tensor]] = [*more] if self.term is None else [self.term, *more]
        extra = math.fsum(float(term(smooth.m)) for term in terms)
        return Point(smooth.m, smooth.misfit, smooth.value + extra, smooth)

    def prox(self, m: Tensor, step: float) -> Tensor:
        """The prox of R and of the bounds."""
        return self.problem.project(m if self.term is None else self.term.prox(m, step))


def check_space(name: str, problem: InverseProblem, what: str, scaling: Tensor | None) -> None:
    """Raise GliodeError unless a term's metric is that of the problem."""
    own = problem.space.scaling()
    same = scaling is not None and own is not None and scaling.shape == own.shape
    if scaling is None or own is None or not same or not torch.allclose(scaling, own, rtol=1e-9):
        raise GliodeError(
            f"{name}: {what} lives in another space than the problem; give both the same "
            "(that of a gradient operator is its `space`)"
        )


def norm_of_smooth(problem: InverseProblem, m: Tensor) -> float:
    """The norm of J'' (least squares: of J^T J + R'') at m in the space; 1 where it vanishes."""
    here = Iterate.of(problem.evaluate(m))
    if not here.gradient_norm > 0:
        here = replace(here, riesz=torch.ones_like(m))
    return norm_of_hessian(problem, here) or 1.0


@dataclass
class _State:
    """What the next step needs: m_(k-1), the last extrapolated step z, t_(k-1), t_k, the mean of the
    objective and its weight, tau, the gradient mapping.
    """

    before: Tensor
    z: Tensor
    last: float
    t: float
    mean: float
    mass: float
    tau: float
    mapping: Tensor

    def advance(self, here: Point, there: Point) -> None:
        self.before = here.m
        self.last, self.t = self.t, (1 + math.sqrt(1 + 4 * self.t**2)) / 2
        mass = MEMORY * self.mass + 1
        self.mean, self.mass = (MEMORY * self.mass * self.mean + there.value) / mass, mass


def plain(value: Value) -> Any:
    """A number of a saved state as a float again."""
    return float(value) if isinstance(value, Tensor) and value.ndim == 0 else value


def _move(term: NonSmooth, state: _State, at: Point) -> Point | None:
    """The proximal gradient step from a point, tau halved while J is above its model; None: to no end."""
    problem = term.problem
    smooth = at.smooth or problem.evaluate(at.m)
    at.smooth = None  # its graph is of no more use
    value, dual = smooth.value, smooth.gradient()
    del smooth
    direction = problem.space.riesz(dual)
    slack = 10 * torch.finfo(at.m.dtype).eps * abs(value)
    for _ in range(60):
        there = term.at(term.prox(at.m - state.tau * direction, state.tau))
        assert there.smooth is not None
        move = there.m - at.m
        bend = problem.space.inner(move, move) / (2 * state.tau)
        if there.smooth.value <= value + problem.space.pair(dual, move) + bend + slack:
            state.mapping = -move / state.tau
            return there
        state.tau /= 2
        del there
    return None


def _falling(here: Point, there: Point | None) -> Point | None:
    slack = 10 * torch.finfo(here.m.dtype).eps * abs(here.value)
    return there if there is not None and there.value <= here.value + slack else None


def _ista(term: NonSmooth, state: _State, here: Point) -> Point | None:
    return _falling(here, _move(term, state, here))


def _fista(term: NonSmooth, state: _State, here: Point) -> Point | None:
    share = (state.last - 1) / state.t
    if share > 0:
        here.smooth = None
        y = here.m + share * (here.m - state.before)
        there = _falling(here, _move(term, state, Point(y, math.nan, math.nan, None)))
        if there is not None:
            return there
        state.last, state.t = 0.0, 1.0
    return _falling(here, _move(term, state, here))


def _nonmonotone(term: NonSmooth, state: _State, here: Point) -> Point | None:
    back, on = (state.last - 1) / state.t, state.last / state.t
    y = here.m + on * (state.z - here.m) + back * (here.m - state.before)
    far = _move(term, state, Point(y, math.nan, math.nan, None))
    if far is not None:
        state.z = far.m
        step = term.problem.space.norm(far.m - y)
        if far.value <= state.mean - DECREASE / state.tau * step**2:
            return far
    mapping = state.mapping
    near = _move(term, state, here)
    if near is None or (far is not None and far.value <= near.value):
        state.mapping, near = mapping, far
    return near


_METHODS = {"fista": _fista, "ista": _ista, "nonmonotone": _nonmonotone}
