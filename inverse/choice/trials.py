"""What a rule chooses from, Trials (a sweep over alpha, or the path of an iteration), and what it returns."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from inverse.optimizers.iteration import Result
from inverse.stopping import State
from solvers.errors import GliodeError
from solvers.spaces import Space

UNFINISHED = ("MaxIterations", "interrupted")  # how a solve ends that has not reached the minimiser


class Solution(Protocol):
    """A regularized solution: an optimizer's Result, or anything with its point, objective and ||r(m)||."""

    @property
    def m(self) -> Tensor: ...

    @property
    def value(self) -> float: ...

    @property
    def residual_norm(self) -> float | None: ...


Solve = Callable[[float, Tensor], Solution]


@dataclass(frozen=True)
class Trial:
    """One solution tried.

    at: its alpha or iteration; residual_norm: ||r(m)||, in units of the noise; penalty: R(m) without alpha,
    of a path 1/2 ||m - m_0||^2; result: what `solve` returned (a path: None).
    """

    at: float
    m: Tensor
    residual_norm: float
    penalty: float
    result: Solution | None = None


@dataclass(frozen=True)
class Trials:
    """Solutions from the most regularized to the least; parameter: "alpha" (falling) or "iteration"."""

    parameter: str
    entries: tuple[Trial, ...]


@dataclass(frozen=True)
class Choice:
    """What a rule chose and why.

    alpha: the weight, or None; index: the iteration, or None; solution: the chosen m; result: the chosen
    solve's (a path: None); numbers: those that decided; trail: all that was tried, from the most regularized
    to the least, as {alpha or iteration, residual_norm, penalty, score}; at_end: the choice lies at an end of
    the grid or path, so a better one may lie beyond; why: one sentence.
    """

    rule: str
    alpha: float | None
    index: int | None
    solution: Tensor
    result: Solution | None
    numbers: dict[str, float]
    trail: list[dict[str, float]]
    at_end: bool
    why: str


class ChoiceError(GliodeError):
    """No alpha or index meets the rule; `.best`: the nearest Trial, `.trail`: all that was tried."""

    def __init__(self, message: str, best: Trial, trail: list[dict[str, float]]) -> None:
        super().__init__(message)
        self.best, self.trail = best, trail


def attempt(solve: Solve, alpha: float, start: Tensor) -> Trial:
    """The solution at alpha from a start, as a Trial; R(m) is (J - 1/2 ||r||^2) / alpha."""
    try:
        found = solve(alpha, start)
    except GliodeError as error:
        error.add_note(f"while solving at alpha = {alpha:.3g}")
        raise
    norm = found.residual_norm
    if norm is None:
        raise GliodeError("solve: its result has no residual_norm; state the problem as LeastSquares")
    if not math.isfinite(norm):
        raise GliodeError(f"solve: ||r|| is {norm} at alpha = {alpha:.3g}; bound the unknown or raise alpha")
    return Trial(alpha, found.m, norm, max((found.value - norm**2 / 2) / alpha, 0.0), found)


def sweep(solve: Solve, start: Tensor, alphas: Iterable[float]) -> Trials:
    """The solutions at all alphas, from the largest down, each started at the one before.

    solve(alpha, start): minimises 1/2 ||r(m)||^2 + alpha R(m). alphas: at least three, all different, in any
    order. Raises GliodeError for others.
    """
    grid = sorted(map(float, alphas), reverse=True)
    if len(set(grid)) != len(grid) or len(grid) < 3:
        raise GliodeError(f"alphas: give at least three different ones, got {len(set(grid))}")
    if not (math.isfinite(grid[0]) and grid[-1] > 0):
        raise GliodeError(f"alphas: all must be positive and finite, got {grid[-1]:g} to {grid[0]:g}")
    entries: list[Trial] = []
    for alpha in grid:
        entries.append(attempt(solve, alpha, entries[-1].m if entries else start))
    return Trials("alpha", tuple(entries))


@dataclass
class Path:
    """A callback that keeps an iteration's path, every m of it (mind the memory): rules choose its index.

    Pass it as `callback` to an optimizer that runs on a LeastSquares problem until it fits the noise, then
    its `trials` to a rule. space: of the problem.
    """

    space: Space
    entries: list[Trial] = field(default_factory=list)

    def __call__(self, state: State) -> None:
        if state.residual_norm is None:
            raise GliodeError("Path: this problem has no residual; state it as LeastSquares")
        m = state.m.detach().clone()
        away = self.space.norm(m - self.entries[0].m) if self.entries else 0.0
        self.entries.append(Trial(float(state.iteration), m, state.residual_norm, away**2 / 2))

    @property
    def trials(self) -> Trials:
        """The path so far; GliodeError with fewer than three iterates."""
        if len(self.entries) < 3:
            raise GliodeError(f"Path: {len(self.entries)} iterates are too few for a choice; run on")
        return Trials("iteration", tuple(self.entries))


def trail_of(trials: Trials, scores: Sequence[float]) -> list[dict[str, float]]:
    """A Choice's trail."""
    return [
        {trials.parameter: t.at, "residual_norm": t.residual_norm, "penalty": t.penalty, "score": score}
        for t, score in zip(trials.entries, scores, strict=True)
    ]


def choose(
    rule: str,
    trials: Trials,
    scores: Sequence[float],
    at: int,
    why: str,
    at_end: bool = False,
    numbers: dict[str, float] | None = None,
) -> Choice:
    """The Choice of trials.entries[at]; `why` goes on about how it was reached."""
    entry, is_alpha = trials.entries[at], trials.parameter == "alpha"
    ended = Counter(t.result.stopped_by for t in trials.entries if isinstance(t.result, Result))
    unfinished = sum(ended[name] for name in UNFINISHED)
    if unfinished:
        why += f"; {unfinished} of {len(trials.entries)} solves stopped before they converged"
    return Choice(
        rule=rule,
        alpha=entry.at if is_alpha else None,
        index=None if is_alpha else int(entry.at),
        solution=entry.m,
        result=entry.result,
        numbers={"score": scores[at], "residual_norm": entry.residual_norm} | (numbers or {}),
        trail=trail_of(trials, scores),
        at_end=at_end,
        why=f"{rule}: {trials.parameter} = {entry.at:.4g}, {why}",
    )
