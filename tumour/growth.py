"""Growth laws: du/dt = rho g(u), u the cell density over carrying capacity, rho in 1/day, as exact or
resolved flows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from solvers.errors import GliodeError
from solvers.evolution import is_dual

Flow = Callable[[Tensor, Tensor, Tensor], Tensor]
Rate = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GrowthLaw:
    """A growth law: `flow(u, dt, rho)` is the state after dt days, `rate(u)` is g(u).

    closed_form: the flow keeps no more than u for its gradient, so there is nothing to save by running it
    again.
    """

    name: str
    flow: Flow
    rate: Rate
    closed_form: bool = False


def _exponential(u: Tensor, dt: Tensor, rho: Tensor) -> Tensor:
    return u * torch.exp(rho * dt)


class _Logistic(torch.autograd.Function):
    """u e / (1 + u (e - 1)) with e = exp(t): derivatives in closed form, from u alone, a third of the tape's
    cost.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, t: Tensor) -> Tensor:
        ctx.save_for_backward(u, t)
        ctx.save_for_forward(u, t)
        growth = torch.expm1(t)
        return (u * (1.0 + growth)).div_((u * growth).add_(1.0))

    @staticmethod
    def _slopes(u: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """By u and by t: e / (1 + u (e - 1))^2 and u (1 - u) times it."""
        slope = torch.exp(t) * (u * torch.expm1(t) + 1.0).reciprocal().square()
        return slope, u * (1.0 - u) * slope

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        u, t = ctx.saved_tensors
        if torch.is_grad_enabled() or t.ndim or is_dual(grads[0], u, t):
            by_u, by_t = _Logistic._slopes(u, t)
            grad_t = (grads[0] * by_t).sum_to_size(t.shape) if ctx.needs_input_grad[1] else None
            return grads[0] * by_u, grad_t
        # The same in place, for the first derivatives by a number.
        growth, decay = torch.expm1(t), torch.exp(t)
        grad_u = (u * growth).add_(1.0).reciprocal_().square_().mul_(decay).mul_(grads[0])
        grad_t = torch.dot(grad_u.flatten(), (u - u.square()).flatten()) if ctx.needs_input_grad[1] else None
        return grad_u, grad_t

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        by_u, by_t = _Logistic._slopes(*ctx.saved_tensors)
        parts = [d * by for d, by in zip(tangents, (by_u, by_t), strict=True) if d is not None]
        return sum(parts[1:], parts[0])


def _logistic(u: Tensor, dt: Tensor, rho: Tensor) -> Tensor:
    return _Logistic.apply(u, rho * dt)  # type: ignore[no-any-return]


_LONGEST = 0.25


def _resolved(per_capita: Rate) -> Flow:
    """A flow by Runge-Kutta substeps, order 4, for the growth s = ln(u(t)/u(0)): s' = rho c(u(0) e^s), c =
    g(u)/u.

    In this variable 0 and the roots of c are kept exactly, no density turns negative, and the equation is
    smooth with slopes of at most 1 even where g'(0) is large, so substeps of rho dt <= 1/4 are accurate to
    1e-4.
    """

    def flow(u: Tensor, dt: Tensor, rho: Tensor) -> Tensor:
        t = rho * dt
        count = max(1, math.ceil(float(t.detach().max()) / _LONGEST - 1e-9))
        h, s = t / count, torch.zeros_like(u)
        for _ in range(count):
            k1 = per_capita(u * torch.exp(s))
            k2 = per_capita(u * torch.exp(s + h / 2 * k1))
            k3 = per_capita(u * torch.exp(s + h / 2 * k2))
            k4 = per_capita(u * torch.exp(s + h * k3))
            s = s + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return u * torch.exp(s)

    return flow


def exponential() -> GrowthLaw:
    """Malthus: g(u) = u, flow u exp(rho dt). The density is not bounded by 1."""
    return GrowthLaw("exponential", _exponential, lambda u: u, closed_form=True)


def logistic() -> GrowthLaw:
    """Verhulst: g(u) = u (1 - u), flow u e / (1 + u (e - 1)) with e = exp(rho dt)."""
    return GrowthLaw("logistic", _logistic, lambda u: u * (1.0 - u), closed_form=True)


def gompertz(eps: float = 1e-3) -> GrowthLaw:
    """Gompertz, regularised at zero: g(u) = u ln((1 + eps)/(u + eps)); Runge-Kutta substeps.

    Without eps g'(0) is infinite: the front is nowhere sharp and the gradient undefined at u = 0. Raises
    GliodeError unless 0 < eps < 1.
    """
    if not 0.0 < eps < 1.0:
        raise GliodeError(f"growth.eps: {eps} is not in (0, 1); 1e-3 is usual")

    def per_capita(u: Tensor) -> Tensor:
        return torch.log((1.0 + eps) / (u + eps))

    return GrowthLaw("gompertz", _resolved(per_capita), lambda u: u * per_capita(u))


def allee(threshold: float = 0.05) -> GrowthLaw:
    """Strong Allee effect: g(u) = u (1 - u)(u - a); densities below the threshold a die out; Runge-Kutta
    substeps.

    Raises GliodeError unless 0 < a < 1.
    """
    if not 0.0 < threshold < 1.0:
        raise GliodeError(f"growth.threshold: {threshold} is not in (0, 1)")

    def per_capita(u: Tensor) -> Tensor:
        return (1.0 - u) * (u - threshold)

    return GrowthLaw("allee", _resolved(per_capita), lambda u: u * per_capita(u))


LAWS: dict[str, Callable[..., GrowthLaw]] = {
    "exponential": exponential,
    "logistic": logistic,
    "gompertz": gompertz,
    "allee": allee,
}
