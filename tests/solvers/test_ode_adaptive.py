"""Adaptive steps: against SciPy and closed forms, in both directions of time, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from solvers.errors import GliodeError
from solvers.ode.adaptive import adaptive_grid
from solvers.ode.fields import Sampled, VectorField
from solvers.ode.integrate import integrate
from solvers.ode.tableau import Tableau
from solvers.ode.tableaux import TABLEAUX


def van_der_pol(t: Any, x: Tensor) -> Tensor:
    q, p = x.unbind(-1)
    return torch.stack([p, 4 * (1 - q**2) * p - q], -1)


START = torch.tensor([2.0, 0.0], dtype=torch.float64)


def by_scipy(method: str, rtol: float, atol: float) -> Any:
    """SciPy's solution and its steps; numpy's copy of the equation."""
    return solve_ivp(
        lambda t, x: [x[1], 4 * (1 - x[0] ** 2) * x[1] - x[0]],
        (0, 12),
        START.numpy(),
        method,
        rtol=rtol,
        atol=atol,
    )


@pytest.mark.parametrize("rtol", [1e-3, 1e-6, 1e-9])
def test_dormand_prince_against_scipy(rtol: float) -> None:
    """SciPy's RK45 is the same pair: at most 3 times its error, at most half as many steps again."""
    exact = by_scipy("DOP853", 1e-13, 1e-14).y[:, -1]
    rival = by_scipy("RK45", rtol, rtol / 100)
    times = adaptive_grid(van_der_pol, START, 0.0, 12.0, rtol=rtol, atol=rtol / 100)
    error = np.abs(integrate(van_der_pol, START, times, "dormand_prince").numpy() - exact).max()
    assert error <= 3 * np.abs(rival.y[:, -1] - exact).max()
    assert len(times) <= 1.5 * len(rival.t)
    assert times[0] == 0 and times[-1] == 12 and bool((times.diff() > 0).all())
    steps = times.diff()[1:-1]
    assert float(steps.max() / steps.min()) > 5  # it does adapt


@pytest.mark.parametrize(("scheme", "k", "coarse"), [("dormand_prince", 5, 1e-8), ("heun", 2, 1e-4)])
def test_the_error_follows_the_tolerance(scheme: str, k: int, coarse: float) -> None:
    """x' = -2 t x, x = exp(-t^2): errors near rtol, and steps in proportion to rtol^(-1/k)."""

    def f(t: Any, x: Tensor) -> Tensor:
        return -2 * t * x

    x0, counts = torch.ones(1, dtype=torch.float64), []
    for rtol in (coarse, coarse / 1e3):
        times = adaptive_grid(f, x0, 0.0, 1.5, scheme, rtol, rtol)
        assert abs(float(integrate(f, x0, times, scheme)) - math.exp(-2.25)) < 3 * rtol
        counts.append(len(times) - 1)
    assert counts[1] / counts[0] == pytest.approx(1e3 ** (1 / k), rel=0.3)


def logistic(t: Any, x: Tensor, r: Tensor) -> Tensor:
    return r * x * (1 - x)


def test_the_gradient_of_a_fine_solution_is_that_of_the_closed_form() -> None:
    x0 = torch.tensor([[0.1], [0.3]], dtype=torch.float64, requires_grad=True)
    r = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    times = adaptive_grid(logistic, x0, 0.0, 2.0, rtol=1e-11, atol=1e-13, parameters=(r,))
    assert not times.requires_grad
    x = integrate(logistic, x0, times, "dormand_prince", parameters=(r,))
    grown = x0 * torch.exp(2 * r)
    exact = grown / (1 - x0 + grown)
    torch.testing.assert_close(x, exact, rtol=1e-10, atol=0)
    found = torch.autograd.grad(x.square().sum(), [x0, r])
    expected = torch.autograd.grad(exact.square().sum(), [x0, r])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_backwards_in_time_returns_to_the_start() -> None:
    def pendulum(t: Tensor, x: Tensor) -> Tensor:
        return torch.stack([x[..., 1], -torch.sin(x[..., 0]) + 0.1 * torch.cos(t)], -1)

    x0 = torch.tensor([1.0, 0.2], dtype=torch.float64)
    there = adaptive_grid(pendulum, x0, 0.0, 3.0, rtol=1e-10, atol=1e-12)
    end = integrate(pendulum, x0, there, "dormand_prince")
    back = adaptive_grid(pendulum, end, 3.0, 0.0, rtol=1e-10, atol=1e-12)
    assert back[0] == 3 and back[-1] == 0 and bool((back.diff() < 0).all())
    torch.testing.assert_close(integrate(pendulum, end, back, "dormand_prince"), x0, rtol=1e-8, atol=1e-8)


def test_every_state_of_a_batch_keeps_the_tolerance() -> None:
    """One fast state among a thousand slow ones: a mean over the batch would not see it."""
    rate = torch.ones(1000, 1, dtype=torch.float64) * 0.01
    rate[7] = 20.0
    x0 = torch.ones_like(rate)

    def turn(t: Any, x: Tensor) -> Tensor:
        return torch.cat([x[..., 1:], -x[..., :1]], -1) * rate

    x0 = torch.cat([x0, 0 * x0], -1)
    x = integrate(turn, x0, adaptive_grid(turn, x0, 0.0, 1.0, rtol=1e-7), "dormand_prince")
    exact = torch.cat([torch.cos(rate), -torch.sin(rate)], -1)
    assert float((x - exact).abs().max()) < 1e-5


def test_an_implicit_scheme_with_an_embedded_one() -> None:
    """Crank-Nicolson with an embedded Euler, on a stiff equation that follows cos t after a layer."""
    scheme = Tableau("trapezoidal", [[0, 0], [1 / 2, 1 / 2]], [1 / 2, 1 / 2], b_embedded=[1, 0])

    def stiff(t: Tensor, x: Tensor) -> Tensor:
        return -200 * (x - torch.cos(t)) - torch.sin(t)

    x0 = torch.zeros(1, dtype=torch.float64)
    times = adaptive_grid(stiff, x0, 0.0, 1.0, scheme, rtol=1e-3, atol=1e-3)
    x = integrate(stiff, x0, times, scheme)
    assert abs(float(x) - math.cos(1.0)) < 1e-3


def test_float32() -> None:
    times = adaptive_grid(van_der_pol, START.float(), 0.0, 12.0, rtol=1e-4, atol=1e-6)
    assert times.dtype == torch.float32
    x = integrate(van_der_pol, START.float(), times, "dormand_prince")
    np.testing.assert_allclose(x.numpy(), by_scipy("DOP853", 1e-10, 1e-10).y[:, -1], atol=0.02)


def test_the_first_step_can_be_given() -> None:
    times = adaptive_grid(van_der_pol, START, 0.0, 1.0, first_step=0.01)
    assert float(times[1]) == pytest.approx(0.01)
    times = adaptive_grid(
        van_der_pol, START, 0.0, 1.0, rtol=1e-9, first_step=1.0
    )  # far too long: tried again
    assert 0 < float(times[1]) < 0.1
    still = adaptive_grid(lambda t, x: 0 * x, START, 0.0, 1.0)
    assert float(still[-1]) == 1 and len(still) < 20


class Layers(VectorField):
    """Weights of their own for each of `n` steps."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.w = torch.ones(n, 1, dtype=torch.float64)

    def sample(self, stages: Tensor) -> Sequence[Sampled]:
        return [Sampled.stepwise(self.w, stages, "weights")]

    def rhs(self, x: Tensor, *w: Tensor) -> Tensor:
        return w[0] * x


@pytest.mark.parametrize("n", [1, 2, 5])
def test_layers_for_each_step_cannot_be_adaptive(n: int) -> None:
    with pytest.raises(GliodeError, match=r"adaptive steps: .* layers? .* take 'linear'"):
        adaptive_grid(Layers(n), START, 0.0, 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheme": "kutta4"}, "kutta4: no b_embedded"),
        ({"scheme": TABLEAUX["lobatto"]}, "lobatto: no b_embedded"),
        ({"rtol": -1.0}, "rtol = -1"),
        ({"atol": 0.0}, "atol = 0"),
        ({"atol": math.nan}, "atol = nan"),
        ({"t1": 0.0}, "two different finite times"),
        ({"t1": math.inf}, "two different finite times"),
        ({"first_step": 0.0}, "first_step: 0"),
        ({"first_step": -0.1}, "first_step: -0.1"),
        ({"max_steps": 3, "t1": 100.0}, "3 steps took it to t = .*raise max_steps"),
        ({"field": Layers(1), "parameters": (START,)}, "parameters: a VectorField has its own"),
        ({"x0": START * math.nan}, "x0 or the right-hand side at t = 0 is not finite"),
        ({"field": lambda t, x: x / 0}, "not finite"),
        ({"field": lambda t, x: x**2, "t1": 1.0}, "at t = 0.5 the step shrinks"),  # 2 / (1 - 2 t)
    ],
)
def test_bad_input_is_refused_with_the_way_out(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"field": van_der_pol, "x0": START, "t0": 0.0, "t1": 1.0}
    adaptive_grid(**good)
    with pytest.raises(GliodeError, match=message):
        adaptive_grid(**(good | change))
