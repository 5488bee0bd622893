"""When an iteration ends.

A rule is called with the State after every iteration and returns None to go on, or the numbers that made it
stop. Its name and its numbers go into the result: for an ill-posed problem they are the regularization.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from solvers.errors import GliodeError

Value = Tensor | float
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class State:
    """An iteration's state, as rules and callbacks see it.

    value: J(m); misfit: its data part; residual_norm: ||r(m)|| of a LeastSquares problem (None for others),
    in units of the noise; gradient_norm: of the Riesz gradient in the space (under bounds: of its free part);
    first_gradient_norm: at iteration 0; step_norm: ||m - previous m||; point_norm: ||m||; counts: solves made
    so far; history: one entry an iteration; memory: what the method needs to go on.
    """

    method: str
    iteration: int
    m: Tensor
    value: float
    misfit: float
    residual_norm: float | None
    gradient_norm: float
    first_gradient_norm: float
    step_norm: float
    point_norm: float
    counts: dict[str, int]
    history: list[dict[str, float]]
    memory: dict[str, Value] = field(default_factory=dict)

    def state_dict(self) -> Arrays:
        """A plain dict of arrays (numpy.savez takes it) that `minimise` accepts in place of its start."""
        saved: Arrays = {
            "method": np.array(self.method),
            "m": self.m.cpu().numpy().copy(),
            "history": np.array([list(entry.values()) for entry in self.history]),
            "history_keys": np.array(list(self.history[0])),
        }
        for name, value in self.memory.items():
            array = value.detach().cpu().numpy().copy() if isinstance(value, Tensor) else np.array(value)
            saved[f"memory.{name}"] = array
        return saved


Rule = Callable[[State], dict[str, float] | None]


@dataclass(frozen=True)
class Discrepancy:
    """Stop when ||r(m)|| <= tau delta: fitting closer than the noise would fit the noise (Morozov 1966).

    delta: the noise level in the norm of the residual, which is in units of the noise's standard deviation:
    sqrt(data_size) for independent noise of the given standard deviation; tau > 1.
    """

    tau: float
    delta: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tau) and self.tau > 1):
            raise GliodeError(f"Discrepancy: tau must be above 1, got {self.tau}; 1.1 is usual")
        if not (math.isfinite(self.delta) and self.delta > 0):
            raise GliodeError(
                f"Discrepancy: delta must be a known noise level above 0, got {self.delta}; "
                "estimate the noise, or stop by another rule"
            )

    def __call__(self, state: State) -> dict[str, float] | None:
        if state.residual_norm is None:
            raise GliodeError(
                "Discrepancy: this problem has no residual; state it as LeastSquares or use another rule"
            )
        if state.residual_norm > self.tau * self.delta:
            return None
        return {"residual_norm": state.residual_norm, "tau": self.tau, "delta": self.delta}


@dataclass(frozen=True)
class GradientTolerance:
    """Stop when ||g|| <= max(relative ||g_0||, absolute), norms of the space."""

    relative: float = 1e-6
    absolute: float = 0.0

    def __call__(self, state: State) -> dict[str, float] | None:
        limit = max(self.relative * state.first_gradient_norm, self.absolute)
        return None if state.gradient_norm > limit else {"gradient_norm": state.gradient_norm, "limit": limit}


@dataclass(frozen=True)
class StepTolerance:
    """Stop when ||m_k - m_(k-1)|| <= relative ||m_k||."""

    relative: float = 1e-8

    def __call__(self, state: State) -> dict[str, float] | None:
        limit = self.relative * state.point_norm
        if state.iteration == 0 or state.step_norm > limit:
            return None
        return {"step_norm": state.step_norm, "limit": limit}


@dataclass(frozen=True)
class MaxIterations:
    """Stop after n iterations, those before a resumption counted."""

    n: int

    def __call__(self, state: State) -> dict[str, float] | None:
        return None if state.iteration < self.n else {"iterations": float(state.iteration)}
