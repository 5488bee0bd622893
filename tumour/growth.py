"""Growth laws: du/dt = rho g(u), u the cell density over carrying capacity, rho in 1/day, as exact or resolved flows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.errors import GliodeError

Flow = Callable[[Tensor, Tensor, Tensor], Tensor]
Rate = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GrowthLaw:
    """A growth law: `flow(u, dt, rho)` is the state after dt days, `rate(u)` is g(u).

    largest_rate bounds |g'(u)| on [0, 1]: it sets the substeps of flows without a closed form.
    """

    name: str
    flow: Flow
    rate: Rate
    largest_rate: float


def _exponential(u: Tensor, dt: Tensor, rho: Tensor) -> Tensor:
    return u * torch.exp(rho * dt)


def _logistic(u: Tensor, dt: Tensor, rho: Tensor) -> Tensor:
    growth = torch.expm1(rho * dt)
    return u * (1.0 + growth) / (1.0 + u * growth)


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
    return GrowthLaw("exponential", _exponential, lambda u: u, 1.0)


def logistic() -> GrowthLaw:
    """Verhulst: g(u) = u (1 - u), flow u e / (1 + u (e - 1)) with e = exp(rho dt)."""
    return GrowthLaw("logistic", _logistic, lambda u: u * (1.0 - u), 1.0)


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
