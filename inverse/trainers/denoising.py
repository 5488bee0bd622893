r"""Training by denoising: the gradient step of an energy is to take noise away.

    D(x) = x - noise^2 R'(x),    min_theta mean_i 1/2 ||D(x_i + noise e_i) - x_i||^2,    e_i ~ N(0, 1).

Best of all is the conditional mean, which is a gradient step (Miyasawa 1961): D(x) = x + noise^2 (log p)'(x)
with p the density of the noisy fields, so R becomes -log p up to a constant (Vincent 2011: denoising score
matching). The prior that is found is that of fields blurred by the noise: a small one.

    DenoisingScore    D for one noise, of noisy fields that are given (loss: SquaredError to the true ones)
    Denoising         true fields -> costs; new noise at every visit, of one or several levels at once

An energy that serves several levels alike is told none of them: it must see the noise in the field.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from inverse.regularizers.learned.energy import Energy
from solvers.errors import GliodeError


class DenoisingScore(nn.Module):
    """x (batch, *field) -> x - noise^2 R'(x), on the tape; noise: its standard deviation, in x's units."""

    def __init__(self, energy: Energy, noise: float) -> None:
        super().__init__()
        self.energy, self.noise = energy, _checked(noise)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.noise**2 * self.energy.gradient(x)


class Denoising(nn.Module):
    """True fields (batch, *field) -> costs (batch, 1) for `inverse.losses.Mean`:

    1/(2 n s^2) ||x + s e - s^2 R'(x + s e) - x||^2 of n values each, with s one of `noise` at random. So all
    levels weigh alike: a denoiser that does nothing has 1/2. In evaluation the levels take turns and the
    noise is the same at every call. Raises GliodeError for a level that is not positive.
    """

    def __init__(self, energy: Energy, noise: float | Sequence[float]) -> None:
        super().__init__()
        levels = [noise] if isinstance(noise, int | float) else list(noise)
        if not levels:
            raise GliodeError("denoising: no level of noise; give one at least")
        self.energy, self.levels = energy, [_checked(level) for level in levels]

    def forward(self, x: Tensor) -> Tensor:
        generator = None if self.training else torch.Generator().manual_seed(0)
        turn = torch.arange(len(x)) % len(self.levels)
        if self.training:
            turn = torch.randint(len(self.levels), (len(x),))
        s = torch.tensor(self.levels)[turn].to(x).reshape(-1, *[1] * (x.ndim - 1))
        e = torch.randn(x.shape, generator=generator).to(x)
        # (x + s e - s^2 R' - x) / s
        apart = e - s * self.energy.gradient(x + s * e)
        return apart.square().flatten(1).mean(1, keepdim=True) / 2


def _checked(noise: float) -> float:
    if not (math.isfinite(noise) and noise > 0):
        raise GliodeError(f"denoising: the noise must be positive and finite, got {noise}")
    return float(noise)
