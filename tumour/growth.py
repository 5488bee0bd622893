"""Growth laws: du/dt = rho g(u), u the cell density over carrying capacity, rho in 1/day, as exact or resolved flows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from solvers.errors import GliodeError

Flow = Callable[[Tensor, Tensor, Tensor], Tensor]
Rate = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GrowthLaw:
    """A growth law: `flow(u, dt, rho)` is the state after dt days, `rate(u)` is g(u).

    largest_rate bounds |g'(u)| on [0, 1]: it sets the substeps of flows without a closed form. closed_form: the flow
    keeps no more than u for its gradient, so there is nothing to save by running it again.
    """

    name: str
    flow: Flow
    rate: Rate
    largest_rate: float
    closed_form: bool = False


def _exponential(u: Tensor, dt: Tensor, rho: Tensor) -> Tensor:
    return u * torch.exp(rho * dt)


class _Logistic(torch.autograd.Function):
    """u e / (1 + u (e - 1)) with e = exp(t): derivatives in closed form, from u alone, a third of the tape's cost."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, t: Tensor) -> Tensor:
        ctx.save_for_backward(u, t)
        ctx.save_for_forward(u, t)
        growth = torch.expm1(t)
        return (u * (1.0 + growth)).div_((u * growth).add_(1.0))

    @staticmethod
    def _slopes(u: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """By u and by t: e / (1 + u (e - 1))^2 and u (1 - u) times it."""
        slope = torch.exp(t) / (1.0 + u * torch.expm1(t)) ** 2
        return slope, u * (1.0 - u) * slope

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        by_u, by_t = _Logistic._slopes(*ctx.saved_tensors)
        return grads[0] * by_u, torch.dot(grads[0], by_t) if ctx.needs_input_grad[1] else None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        by_u, by_t = _Logistic._slopes(*ctx.saved_tensors)
        parts = [d * by for d, by in zip(tangents, (by_u, by_t), strict=True) if d is not None]
        return sum(parts[1:], parts[0])


def _logistic(u: Tensor, dt: Tensor, rho: Tensor) -> Tensor:
    return _Logistic.apply(u, rho * dt)  # type: ignore[no-any-return]


_SUBSTEPS = 4


def _resolved(rate: Rate) -> Flow:
    """A flow by classical Runge-Kutta substeps: fixed points of g are kept exactly, order 4 in dt / substeps."""

    def flow(u: Tensor, dt: Tensor, rho: Tensor) -> Tensor:
        h = rho * dt / _SUBSTEPS
        for _ in range(_SUBSTEPS):
            k1 = rate(u)
            k2 = rate(u + h / 2 * k1)
            k3 = rate(u + h / 2 * k2)
            k4 = rate(u + h * k3)
            u = u + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return u

    return flow


def exponential() -> GrowthLaw:
    """Malthus: g(u) = u, flow u exp(rho dt). The density is not bounded by 1."""
    return GrowthLaw("exponential", _exponential, lambda u: u, 1.0, closed_form=True)


def logistic() -> GrowthLaw:
    """Verhulst: g(u) = u (1 - u), flow u e / (1 + u (e - 1)) with e = exp(rho dt)."""
    return GrowthLaw("logistic", _logistic, lambda u: u * (1.0 - u), 1.0, closed_form=True)


def gompertz(eps: float = 1e-3) -> GrowthLaw:
    """Gompertz, regularised at zero: g(u) = u ln((1 + eps)/(u + eps)); Runge-Kutta substeps.

    Without eps g'(0) is infinite: the front is nowhere sharp and the gradient undefined at u = 0. Raises GliodeError
    unless 0 < eps < 1.
    """
    if not 0.0 < eps < 1.0:
        raise GliodeError(f"growth.eps: {eps} is not in (0, 1); 1e-3 is usual")
    largest = torch.log(torch.tensor((1.0 + eps) / eps)).item()

    def rate(u: Tensor) -> Tensor:
        return u * torch.log((1.0 + eps) / (u + eps))

    return GrowthLaw("gompertz", _resolved(rate), rate, largest)


def allee(threshold: float = 0.05) -> GrowthLaw:
    """Strong Allee effect: g(u) = u (1 - u)(u - a); densities below the threshold a die out; Runge-Kutta substeps.

    Raises GliodeError unless 0 < a < 1.
    """
    if not 0.0 < threshold < 1.0:
        raise GliodeError(f"growth.threshold: {threshold} is not in (0, 1)")

    def rate(u: Tensor) -> Tensor:
        return u * (1.0 - u) * (u - threshold)

    return GrowthLaw("allee", _resolved(rate), rate, 1.0)


LAWS: dict[str, Callable[..., GrowthLaw]] = {
    "exponential": exponential,
    "logistic": logistic,
    "gompertz": gompertz,
    "allee": allee,
}
