"""The regularisation flow: its field and gradients, stability, and convergence as the noise vanishes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from solvers.errors import GliodeError
from solvers.node.activations import Activation
from solvers.node.regularisation_flow import RegularisationFlow
from solvers.ode.integrate import integrate

N = 24


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def learned(flow: RegularisationFlow, rough: float = 1.0) -> RegularisationFlow:
    """The flow in float64 with random weights of its own at every knot."""
    flow.double().reset(1.0, rough)
    nn.init.normal_(flow.weights("b").values)
    return flow


def along(flow: RegularisationFlow, y: Tensor, duration: float, steps: int, scheme: str = "kutta4") -> Tensor:
    """The trajectory (steps + 1, ...)."""
    times = torch.linspace(0, duration, steps + 1, dtype=torch.float64)
    with torch.no_grad():
        return integrate(flow, y, times, scheme, trajectory=True)


# ---- The field --------------------------------------------------------------------------------------------


def test_field_is_the_equation_for_a_matrix_and_for_a_pair() -> None:
    A, f, y = normal(3, 5), normal(7, 3), normal(7, 5)
    flow = learned(RegularisationFlow(5, A, f, 0.7, width=4, kind="constant", knots=1))
    K, b = flow.weights("K").values[0], flow.weights("b").values[0]
    expected = torch.stack(
        [-K.T @ torch.tanh(K @ yi + b) - 0.7 * A.T @ (A @ yi - fi) for yi, fi in zip(y, f, strict=True)]
    )
    pair = RegularisationFlow(5, (lambda y: y @ A.T, lambda r: r @ A), f, 0.7, 4, kind="constant", knots=1)
    pair.load_state_dict(flow.state_dict())
    for found in (flow, pair):
        assert torch.allclose(found.rhs(y, K, b, f), expected, rtol=1e-12)


@pytest.mark.parametrize("sigma", ["tanh", "softplus"])
def test_gradients_by_hand_are_those_of_the_tape(sigma: str) -> None:
    """With respect to y(0), the weights, and the data: one for all states and one for each."""
    for data in (normal(3), normal(7, 3)):
        flow = learned(RegularisationFlow(5, normal(3, 5), data.requires_grad_(), 0.7, 6, sigma, "cubic", 4))
        y = normal(7, 5).requires_grad_()
        inputs, goal, found = (y, data, *flow.parameters()), normal(7, 5), []
        for gradient in ("adjoint", "autograd"):
            end = integrate(flow, y, torch.linspace(0, 1, 9, dtype=torch.float64), "kutta4", gradient)
            found.append(torch.autograd.grad((end * goal).sum(), inputs))
        for ours, tape in zip(*found, strict=True):
            assert torch.allclose(ours, tape, rtol=1e-11, atol=1e-12)


# ---- Stability --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", ["tanh", "relu", "softplus"])
def test_stability_estimate(sigma: str) -> None:
    """||y_delta(t) - y(t)|| <= min(lambda ||A|| t delta, delta sqrt(lambda t / 2)), for any weights."""
    weight, delta, duration, steps = 0.6, 0.3, 4.0, 400
    A, f = normal(N, N) / math.sqrt(N), normal(N)
    norm = float(torch.linalg.matrix_norm(A, 2))
    t = torch.linspace(0, duration, steps + 1, dtype=torch.float64)[1:, None]
    allowed = torch.minimum(weight * norm * t * delta, delta * (weight * t / 2).sqrt())
    flow = learned(RegularisationFlow(N, A, f, weight, None, sigma, "cubic", 6, duration))
    start = normal(N)
    exact = along(flow, start, duration, steps)
    U = torch.linalg.svd(A)[0]
    # At random, and each singular vector.
    noise = torch.cat([nn.functional.normalize(normal(20, N)), U.T]) * delta
    flow.data = f + noise
    apart = (along(flow, start.expand(len(noise), N), duration, steps) - exact[:, None])[1:].norm(dim=2)
    assert bool((apart <= allowed * (1 + 1e-6)).all())

    # Without a learned part the worst singular vector nearly attains it, so that no factor is lost.
    flow.weights("K").values.data.zero_()
    noisy = along(flow, start.expand(len(noise), N), duration, steps)
    flow.data = f
    apart = noisy - along(flow, start, duration, steps)[:, None]
    share = (apart[1:].norm(dim=2) / allowed).amax(1)
    assert share.max() <= 1 + 1e-6 and share[0] > 0.98 and share.min() > 0.7


def test_euler_keeps_the_first_estimate_up_to_its_limit_and_loses_it_above() -> None:
    """h (||K||^2 + lambda ||A||^2) <= 2, to rounding: A = I, K = I, relu active."""
    f, start, noise = (
        torch.full((4,), 10.0, dtype=torch.float64),
        5 * torch.ones(4, dtype=torch.float64),
        normal(4),
    )
    flow = RegularisationFlow(4, torch.eye(4), f, 1.0, None, "relu", "constant", 1).double()
    flow.weights("K").values.data[0] = torch.eye(4)
    ends = []
    for h in (1.0, 1.2):  # the limit is 1
        gaps = []
        for data in (f, f + 0.1 * noise):
            flow.data = data
            gaps.append(along(flow, start, 20 * h, 20, "euler"))
        ends.append(float((gaps[1] - gaps[0])[-1].norm() / (20 * h * 0.1 * noise.norm())))
    assert ends[0] <= 1 < ends[1]


# ---- Convergence ------------------------------------------------------------------------------------------


def rate(error: Callable[[float], float], deltas: list[float]) -> float:
    """The power of delta with which the error falls, over the whole range."""
    return math.log(error(deltas[0]) / error(deltas[-1])) / math.log(deltas[0] / deltas[-1])


DELTAS = [1e-1, 1e-2, 1e-3, 1e-4]


def test_denoising_stops_at_a_depth_of_the_order_of_the_noise() -> None:
    """A = I, y(0) = f_delta: ||y_delta(t) - f|| <= delta + int_0^t ||B(s, f)|| ds; rate 1 at t* = delta."""
    f, eta = normal(N), nn.functional.normalize(normal(30, N))
    flow = learned(RegularisationFlow(N, torch.eye(N, dtype=torch.float64), f, 2.0, kind="linear", knots=3))
    times = torch.linspace(0, 1, 201, dtype=torch.float64)
    with torch.no_grad():
        K, b, _ = (s.table for s in flow.sample(times[:, None]))
        learned_part = [float((k.T @ torch.tanh(k @ f + c)).norm()) for k, c in zip(K, b, strict=True)]
    sup = max(learned_part)

    def errors(delta: float, depth: float) -> Tensor:
        """The largest at each time."""
        flow.data = f + delta * eta
        return torch.linalg.vector_norm(along(flow, flow.data, depth, 60) - f, dim=2).amax(1)

    for delta in DELTAS:
        t = torch.linspace(0, 1, 61, dtype=torch.float64)
        assert bool((errors(delta, 1.0) <= (delta + t * sup) * (1 + 1e-9)).all())
        assert float(errors(delta, delta)[-1]) <= (1 + sup) * delta
    assert rate(lambda delta: float(errors(delta, delta)[-1]), DELTAS) == pytest.approx(1, abs=0.05)
    # A depth that stays does not converge: the learned part has its way.
    assert float(errors(1e-4, 1.0)[-1]) > 0.1 * sup > 100 * float(errors(1e-4, 1e-4)[-1])


def integration() -> Tensor:
    """The antiderivative on [0, 1], with singular values from 2 / pi down to 1 / (2 N)."""
    return torch.tril(torch.ones(N, N, dtype=torch.float64)) / N


def worst(flow: RegularisationFlow, truth: Tensor, f: Tensor, delta: float, depth: float) -> float:
    """The largest ||y_delta(depth) - truth|| from y(0) = 0 over random noise and the singular vectors."""
    U = torch.linalg.svd(integration())[0]
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(10, N, generator=generator, dtype=torch.float64)
    flow.data = f + delta * torch.cat([nn.functional.normalize(drawn), U.T])
    steps = max(20, math.ceil(depth))  # kutta4 is stable for h lambda ||A||^2 < 2.78
    return float((along(flow, torch.zeros_like(flow.data), depth, steps)[-1] - truth).norm(dim=1).max())


def test_ill_posed_rate_with_thresholds_in_the_singular_basis() -> None:
    """||y_delta(t*) - truth|| <= 1.11 sqrt(||w|| delta) at t* = ||w|| / (sqrt e delta)."""
    A = integration()
    w = nn.functional.normalize(normal(N), dim=0)
    truth = A.T @ w
    flow = RegularisationFlow(N, A, A @ truth, 1.0, None, "relu", "constant", 1).double()
    for part in ("thresholds", "none"):
        if (
            part == "thresholds"
        ):  # half of them touch the truth, half are a little away from it: all rest there
            K = (torch.rand(N, 1, dtype=torch.float64) + 0.5) * torch.linalg.svd(A)[2]
            slack = 0.05 * torch.rand(N, dtype=torch.float64) * (torch.arange(N) % 2)
            flow.weights("K").values.data[0], flow.weights("b").values.data[0] = K, -K @ truth - slack
        else:
            flow.weights("K").values.data.zero_()
        for delta in DELTAS[:3]:
            found = worst(flow, truth, A @ truth, delta, 1 / (math.sqrt(math.e) * delta))
            assert found <= 1.11 * math.sqrt(delta)
            if part == "none":  # the bound is no idle one
                assert found > 0.3 * math.sqrt(delta)


def test_ill_posed_converges_with_a_learned_constraint_and_must_be_stopped() -> None:
    """y >= 0 as -K^T relu(K y), K = -1: mixes the singular vectors, rests at a truth >= 0; t* = 1 / delta."""
    A = integration()
    truth = torch.sin(2 * math.pi * torch.linspace(0, 1, N, dtype=torch.float64)).clamp(min=0)
    flow = RegularisationFlow(N, A, A @ truth, 1.0, None, "relu", "constant", 1).double()
    plain = {t: worst(flow, truth, A @ truth, 0.1, t) for t in (10.0, 1000.0)}
    assert plain[1000.0] > 1.4 * plain[10.0]  # too deep: the noise comes through
    flow.weights("K").values.data[0] = -torch.eye(N)
    assert worst(flow, truth, A @ truth, 0.1, 1000.0) < 0.8 * plain[1000.0]
    stopped = [worst(flow, truth, A @ truth, delta, 1 / delta) for delta in DELTAS[:3]]
    assert stopped[0] > 2 * stopped[1] > 8 * stopped[2]


# ---- Errors -----------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    A, f = normal(3, 5), normal(3)
    sine = Activation.custom("sine", torch.sin, torch.cos, (-1, 1))
    with pytest.raises(GliodeError, match=r"activation sine has slopes down to -1.*monotone"):
        RegularisationFlow(5, A, f, sigma=sine)
    with pytest.raises(GliodeError, match=r"A has shape \(3, 5\).*it is \(3, 4\)"):
        RegularisationFlow(4, A, f)
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(GliodeError, match="weight must be finite and not negative"):
            RegularisationFlow(5, A, f, weight)
    with pytest.raises(GliodeError, match="not the adjoint of the first"):
        RegularisationFlow(5, (lambda y: y @ A.T, lambda r: 2 * r @ A), f)
    with pytest.raises(GliodeError, match=r"A maps \(5,\) to \(5,\)"):
        RegularisationFlow(5, (lambda y: y, lambda r: r), f)
