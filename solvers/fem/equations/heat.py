r"""Heat on an interval in closed form, and what of an initial state a later, noisy one determines.

u_t = D u_xx on [0, L] without flux: u = sum_k a_k exp(-D (k pi / L)^2 t) cos(k pi x / L). Backwards, noise of
the k-th amplitude grows by exp(D (k pi / L)^2 T): modes whose signal has sunk below it are lost, whatever the
method. The steps forward are `solvers.fem.diffusion.DiffusionStep`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.errors import GliodeError


@dataclass(frozen=True)
class Cosines:
    """The eigenfunctions of u -> D u_xx on [0, length] without flux; length > 0, D > 0."""

    length: float
    D: float

    def __post_init__(self) -> None:
        if not (self.length > 0 and self.D > 0):
            raise GliodeError(f"heat: length {self.length} and D {self.D} must be positive")

    def decay(self, count: int, t: float) -> Tensor:
        """exp(-D (k pi / L)^2 t) for k < count."""
        k = torch.arange(count, dtype=torch.float64)
        return torch.exp(-self.D * (k * math.pi / self.length) ** 2 * t)

    def modes(self, x: Tensor, count: int) -> Tensor:
        """cos(k pi x / L) at points (n,), (count, n)."""
        k = torch.arange(count, dtype=torch.float64)[:, None]
        return torch.cos(k * math.pi / self.length * x)

    def state(self, x: Tensor, amplitudes: Tensor, t: float) -> Tensor:
        """u at points (n,) from the amplitudes (count,) at time 0."""
        return (amplitudes * self.decay(len(amplitudes), t)) @ self.modes(x, len(amplitudes))

    def amplitudes(self, x: Tensor, u: Tensor, mass: Tensor, count: int) -> Tensor:
        """The first `count` amplitudes of nodal values u with lumped mass, (count,)."""
        modes = self.modes(x, count)
        return modes @ (mass * u) / (modes.square() @ mass)

    def errors(self, count: int, t: float, sd: float, data: int) -> Tensor:
        """The standard deviation of each amplitude at time 0 fitted to `data` values at time t with noise sd,
        spread evenly over the interval: any unbiased estimate has at least this (Cramer, Rao)."""
        each = torch.full((count,), sd * math.sqrt(2 / data), dtype=torch.float64)
        each[0] = sd / math.sqrt(data)
        return each / self.decay(count, t)
