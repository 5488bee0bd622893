"""Stopping rules: what they check, when they fire, what they say."""

import math
from typing import Any

import pytest
import torch

from inverse.optimizers import conjugate_gradients
from inverse.problem import InverseProblem
from inverse.stopping import Discrepancy, GradientTolerance, MaxIterations, State, StepTolerance
from solvers.errors import GliodeError
from solvers.spaces import Euclidean


def state(**changed: Any) -> State:
    m = torch.zeros(2).double()
    values: dict[str, Any] = {
        "method": "test",
        "iteration": 3,
        "m": m,
        "value": 1.0,
        "misfit": 0.5,
        "residual_norm": 1.0,
        "gradient_norm": 0.01,
        "first_gradient_norm": 10.0,
        "step_norm": 1e-3,
        "point_norm": 2.0,
        "counts": {},
        "history": [],
    }
    return State(**(values | changed))


@pytest.mark.parametrize(
    ("tau", "delta"), [(1.0, 1.0), (0.9, 1.0), (math.nan, 1.0), (1.1, 0.0), (1.1, math.nan), (1.1, -1.0)]
)
def test_the_discrepancy_needs_tau_above_one_and_a_known_noise_level(tau: float, delta: float) -> None:
    with pytest.raises(GliodeError, match="tau" if not tau > 1 else "delta"):
        Discrepancy(tau, delta)


def test_the_discrepancy_needs_a_residual() -> None:
    with pytest.raises(GliodeError, match="LeastSquares"):
        Discrepancy(1.1, 1.0)(state(residual_norm=None))


def test_rules_fire_at_their_limits_and_give_their_numbers() -> None:
    assert Discrepancy(1.1, 1.0)(state(residual_norm=1.2)) is None
    assert Discrepancy(1.1, 1.0)(state(residual_norm=1.1)) == {"residual_norm": 1.1, "tau": 1.1, "delta": 1.0}
    assert GradientTolerance(1e-4)(state()) is None
    assert GradientTolerance(1e-3)(state()) == {"gradient_norm": 0.01, "limit": 0.01}
    assert GradientTolerance(0, 0.02)(state()) == {"gradient_norm": 0.01, "limit": 0.02}
    assert StepTolerance(1e-4)(state()) is None
    assert StepTolerance(1e-3)(state()) == {"step_norm": 1e-3, "limit": 2e-3}
    assert StepTolerance(1.0)(state(iteration=0, step_norm=0.0)) is None
    assert MaxIterations(4)(state()) is None
    assert MaxIterations(3)(state()) == {"iterations": 3.0}


def test_any_callable_is_a_rule_and_every_run_ends() -> None:
    problem = InverseProblem(Euclidean(1), lambda m: (m - 3).square().sum())
    start = torch.zeros(1).double()

    def near_enough(state: State) -> dict[str, float] | None:
        return {"value": state.value} if state.value < 1e-3 else None

    assert conjugate_gradients.minimise(problem, start, stopping=near_enough).stopped_by == "near_enough"
    endless = conjugate_gradients.minimise(problem, start, stopping=[])
    assert endless.stopped_by == "StationaryPoint" and float(endless.m) == 3.0


def test_the_callback_sees_every_iteration_from_the_start_on() -> None:
    problem = InverseProblem(Euclidean(2), lambda m: (m[0] - 1) ** 4 + m[1] ** 2)
    seen: list[State] = []
    start = torch.tensor([0.0, 2.0], dtype=torch.float64)
    result = conjugate_gradients.minimise(problem, start, callback=seen.append)
    assert [s.iteration for s in seen] == list(range(result.iterations + 1))
    assert seen[0].m.tolist() == start.tolist() and seen[-1].m is result.m
    assert all(s.first_gradient_norm == seen[0].gradient_norm for s in seen)
    assert seen[2].step_norm == pytest.approx(float((seen[2].m - seen[1].m).norm()))
