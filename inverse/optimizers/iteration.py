"""What all optimizers share: the iterate, the result, and the record that stops and resumes a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inverse.problem import Evaluation, InverseProblem, LeastSquares
from inverse.stopping import Arrays, GradientTolerance, MaxIterations, Rule, State, Value
from solvers.errors import GliodeError

Start = Tensor | Mapping[str, NDArray[Any]]
Stopping = Rule | Sequence[Rule]
Callback = Callable[[State], object]

DEFAULT_STOPPING: tuple[Rule, ...] = (GradientTolerance(1e-6), MaxIterations(200))
SOLVES = ("forward", "adjoint", "tangent")


class NonFiniteError(GliodeError):
    """The objective or its gradient became NaN or infinite; `.best` is the Result of the last good one."""


@dataclass(frozen=True)
class Iterate:
    """A point with its value and dual gradient.

    riesz: the primal gradient, without its entries at active bounds; gradient_norm: its norm.
    """

    m: Tensor
    value: float
    misfit: float
    gradient: Tensor
    riesz: Tensor
    gradient_norm: float

    @staticmethod
    def of(here: Evaluation) -> Iterate:
        """From an evaluation: one adjoint solve; keeps no graph."""
        problem, m, dual = here.problem, here.m, here.gradient()
        free = problem.free(m, dual)
        riesz = problem.space.riesz(free)
        norm = math.sqrt(max(problem.space.pair(free, riesz), 0.0))  # NaN stays NaN
        return Iterate(m, here.value, here.misfit, dual, riesz, norm)

    def require_finite(self) -> None:
        """Raise NonFiniteError unless the value and the gradient are finite."""
        if not (math.isfinite(self.value) and math.isfinite(self.gradient_norm)):
            raise NonFiniteError(
                f"objective: value {self.value}, gradient norm {self.gradient_norm}; "
                "start elsewhere, add bounds or scale the parameters"
            )


@dataclass(frozen=True)
class Result:
    """What `minimise` returns.

    stopped_by: the name of the rule; or "LineSearch", "NoDescent" (no step lowers J), "StationaryPoint",
    "interrupted"; numbers: those that made it stop; state: the last State, whose `memory` holds the method's
    own figures.
    """

    m: Tensor
    value: float
    gradient_norm: float
    iterations: int
    counts: dict[str, int]
    history: list[dict[str, float]]
    stopped_by: str
    numbers: dict[str, float]
    residual_norm: float | None
    state: State

    def state_dict(self) -> Arrays:
        """A plain dict of arrays from which `minimise` goes on when given it in place of its start."""
        return self.state.state_dict()


class Recorder:
    """The record of one run, used as

        with Recorder(...) as run:
            here = run.first()
            while not run.record(here, memory):
                here = ...
        return run.result()

    A KeyboardInterrupt inside ends the run with the last iterate recorded and stopped_by "interrupted"; any
    other exception leaves with that Result as its attribute `best` (the methods are monotone, so the last
    iterate is the best). MaxIterations(1000) is added where no such rule is given.
    """

    def __init__(
        self,
        method: str,
        problem: InverseProblem,
        start: Start,
        stopping: Stopping,
        callback: Callback | None,
    ) -> None:
        rules = list(stopping) if isinstance(stopping, Sequence) else [stopping]
        if not any(isinstance(rule, MaxIterations) for rule in rules):
            rules.append(MaxIterations(1000))
        self.method, self.problem, self.rules, self.callback = method, problem, rules, callback
        self.memory: dict[str, Tensor] = {}
        self._history: list[dict[str, float]] = []
        self._earlier = dict.fromkeys(SOLVES, 0)
        self._at_start = dict(problem.counts)
        self._state: State | None = None
        self._stopped: tuple[str, dict[str, float]] | None = None
        self.start = problem.start(self._restore(start) if isinstance(start, Mapping) else start)

    def _restore(self, saved: Mapping[str, NDArray[Any]]) -> Tensor:
        if str(saved["method"]) != self.method:
            raise GliodeError(
                f"resume: this state was saved by {saved['method']}, resume with that, not {self.method}"
            )
        keys = [str(key) for key in saved["history_keys"]]
        self._history = [dict(zip(keys, map(float, row), strict=True)) for row in saved["history"]]
        self._earlier = {name: int(self._history[-1][name]) for name in SOLVES}
        self.memory = {
            key.removeprefix("memory."): torch.from_numpy(np.array(value))
            for key, value in saved.items()
            if key.startswith("memory.")
        }
        return torch.from_numpy(np.array(saved["m"]))

    def first(self) -> Iterate:
        """The iterate at the start (or where the saved run ended): one forward and one adjoint solve."""
        return Iterate.of(self.problem.evaluate(self.start))

    def record(self, here: Iterate, memory: dict[str, Value] | None = None) -> bool:
        """Note an iterate, tell the callback, ask the rules; True: stop. memory: for a resumed run."""
        here.require_finite()
        space, before = self.problem.space, self._state
        if before is None and self._history:  # resumed: this iterate is in the history already
            iteration, step_norm = int(self._history[-1]["iteration"]), self._history[-1]["step_norm"]
            self._history.pop()
        else:
            iteration = 0 if before is None else before.iteration + 1
            step_norm = 0.0 if before is None else space.norm(here.m - before.m)
        counts = self._counts()
        self._history.append(
            {
                "iteration": float(iteration),
                "value": here.value,
                "misfit": here.misfit,
                "gradient_norm": here.gradient_norm,
                "step_norm": step_norm,
                **{name: float(n) for name, n in counts.items()},
            }
        )
        self._state = State(
            method=self.method,
            iteration=iteration,
            m=here.m,
            value=here.value,
            misfit=here.misfit,
            residual_norm=math.sqrt(2 * here.misfit) if isinstance(self.problem, LeastSquares) else None,
            gradient_norm=here.gradient_norm,
            first_gradient_norm=self._history[0]["gradient_norm"],
            step_norm=step_norm,
            point_norm=space.norm(here.m),
            counts=counts,
            history=self._history,
            memory=memory or {},
        )
        if self.callback is not None:
            self.callback(self._state)
        for rule in self.rules:
            numbers = rule(self._state)
            if numbers is not None:
                self.stop(getattr(rule, "__name__", type(rule).__name__), numbers)
                return True
        if here.gradient_norm == 0.0:
            self.stop("StationaryPoint", {"gradient_norm": 0.0})
        return self.stopped

    @property
    def stopped(self) -> bool:
        """Whether a rule or the method has ended the run."""
        return self._stopped is not None

    @property
    def state(self) -> State:
        """The last iterate recorded."""
        assert self._state is not None, "nothing recorded yet"
        return self._state

    def stop(self, reason: str, numbers: dict[str, float]) -> None:
        """End the run for a reason of the method's own (no step makes the objective fall)."""
        self._stopped = reason, numbers

    def _counts(self) -> dict[str, int]:
        now = self.problem.counts
        return {name: self._earlier[name] + now[name] - self._at_start[name] for name in SOLVES}

    def result(self) -> Result:
        """The Result of the last iterate recorded."""
        state = self.state
        reason, numbers = self._stopped or ("failed", {})
        return Result(
            m=state.m,
            value=state.value,
            gradient_norm=state.gradient_norm,
            iterations=state.iteration,
            counts=self._counts(),
            history=self._history,
            stopped_by=reason,
            numbers=numbers,
            residual_norm=state.residual_norm,
            state=state,
        )

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if error is None or self._state is None:
            return False
        if isinstance(error, KeyboardInterrupt):
            self.stop("interrupted", {"iterations": float(self._state.iteration)})
            return True
        vars(error)["best"] = self.result()
        error.add_note(
            f"the best iterate so far (iteration {self._state.iteration}) is this exception's `best`"
        )
        return False
