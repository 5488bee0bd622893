"""Evolution, Strang and recomputation on small matrices: torch alone, no finite elements."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor
from torch.autograd import forward_ad

from solvers.errors import GliodeError
from solvers.evolution import Evolution, PointwiseStep, Strang, recomputed

N = 5
A = torch.from_numpy(np.diag(np.full(N, -2.0)) + np.diag(np.ones(N - 1), 1) + np.diag(np.ones(N - 1), -1))
U0 = torch.linspace(0.1, 0.6, N, dtype=torch.float64)


def linear(u: Tensor, dt: Any, k: Tensor) -> Tensor:
    return torch.linalg.matrix_exp(dt * k * A) @ u


def logistic(u: Tensor, dt: Any, rho: Tensor) -> Tensor:
    growth = torch.exp(rho * dt)
    return u * growth / (1 + u * (growth - 1))


def tensors(*values: float) -> list[Tensor]:
    return [torch.tensor(v, dtype=torch.float64) for v in values]


def model(checkpoint: int | None = None, steps: int = 7) -> Callable[..., Tensor]:
    """(u, duration, k, rho) -> u."""
    evolution = Evolution(Strang(PointwiseStep(logistic), linear), checkpoint)
    return lambda u, duration, *parameters: evolution(u, duration, steps, *parameters)


POINT = [U0, *tensors(2.0, 0.4, 0.9)]
ALONG = [torch.sin(torch.arange(N)).double(), *tensors(0.3, -0.2, 0.5)]


def loss(u: Tensor) -> Tensor:
    return (u**3).sum() + torch.cos(2 * u).sum()


def test_strang_is_of_order_two_for_the_coupled_equation() -> None:
    def rate(_: float, u: Any) -> Any:
        return 0.4 * A.numpy() @ u + 0.9 * u * (1 - u)

    exact = solve_ivp(rate, (0, 2.0), U0.numpy(), rtol=1e-12, atol=1e-13).y[:, -1]
    errors = [float(np.abs(model(steps=n)(*POINT).numpy() - exact).max()) for n in (8, 16, 32)]
    slopes = [np.log2(a / b) for a, b in itertools.pairwise(errors)]
    np.testing.assert_allclose(slopes, 2.0, atol=0.05)


def test_half_steps_that_meet_are_joined_without_changing_the_result() -> None:
    """Exact flows: two half steps of diffusion are one, so the joined run is the run of closed steps."""
    calls: list[float] = []

    def counted(u: Tensor, dt: Any, k: Tensor) -> Tensor:
        calls.append(float(dt))
        return linear(u, dt, k)

    step = Strang(PointwiseStep(logistic), counted)
    u, duration, *parameters = POINT
    closed = u
    for _ in range(4):
        closed = step(closed, duration / 4, *parameters)
    calls.clear()
    torch.testing.assert_close(Evolution(step)(u, duration, 4, *parameters), closed, rtol=1e-13, atol=0)
    assert calls == [0.25, 0.5, 0.5, 0.5, 0.25]


@pytest.mark.parametrize("checkpoint", [1, 2, 3, 7, 20])
def test_checkpointing_changes_nothing_but_the_memory(checkpoint: int) -> None:
    results = []
    for size in (None, checkpoint):
        at = [x.clone().requires_grad_() for x in POINT]
        u = model(size)(*at)
        grads = torch.autograd.grad(loss(u), at, create_graph=True)
        slope = sum((g * d).sum() for g, d in zip(grads, ALONG, strict=True))
        assert isinstance(slope, Tensor)
        results.append([u, *grads, *torch.autograd.grad(slope, at)])
        with forward_ad.dual_level():
            dual = [forward_ad.make_dual(x, d) for x, d in zip(POINT, ALONG, strict=True)]
            results[-1].append(forward_ad.unpack_dual(model(size)(*dual)).tangent)
    for plain, blocked in zip(*results, strict=True):
        torch.testing.assert_close(blocked, plain, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("checkpoint", [None, 3])
def test_derivatives_against_differences(checkpoint: int | None) -> None:
    assert torch.autograd.gradcheck(model(checkpoint, 4), [x.clone().requires_grad_() for x in POINT])
    assert torch.autograd.gradgradcheck(model(checkpoint, 3), [x.clone().requires_grad_() for x in POINT])


def test_blocks_keep_their_first_state_only() -> None:
    """The memory that checkpointing is for: states held by the tape between forward and backward."""

    def held(checkpoint: int | None) -> int:
        sizes = set()

        def pack(x: Tensor) -> Tensor:
            if x.numel() == N:
                sizes.add(x.data_ptr())
            return x

        at = [x.clone().requires_grad_() for x in POINT]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            u = model(checkpoint, 16)(*at)
        assert u.requires_grad
        return len(sizes)

    assert held(4) == 4 < held(None)


def test_recomputation_runs_again_only_where_a_gradient_needs_it() -> None:
    calls = []

    def f(u: Tensor, k: Tensor) -> Tensor:
        calls.append(1)
        return k * u**2

    u, k = U0.clone().requires_grad_(), tensors(3.0)[0]
    with torch.no_grad():
        recomputed(f, u, k)
    assert len(calls) == 1
    out = recomputed(f, u, k)
    (gradient,) = torch.autograd.grad(out.sum(), u)
    assert len(calls) == 3
    torch.testing.assert_close(gradient, 6.0 * U0)
    # An input that the function does not use has no gradient, and is not asked for one.
    other = torch.ones((), dtype=torch.float64, requires_grad=True)
    grads = torch.autograd.grad(recomputed(lambda u, k: u * 2, u, other).sum(), (u, other), allow_unused=True)
    assert grads[1] is None


def test_progress_and_what_makes_no_sense() -> None:
    seen: list[tuple[int, int]] = []
    evolution = Evolution(lambda u, dt: u * (1 + dt), checkpoint=3, progress=lambda *now: seen.append(now))
    torch.testing.assert_close(evolution(U0, 1.0, 7), U0 * (1 + 1 / 7) ** 7)
    assert seen == [(3, 7), (6, 7), (7, 7)]
    with pytest.raises(GliodeError, match="steps: 0"):
        evolution(U0, 1.0, 0)
    with pytest.raises(GliodeError, match="checkpoint: 0"):
        Evolution(linear, checkpoint=0)
