r"""NETT (Li, Schwab, Antholzer and Haltmeier 2020): the size of what a network finds wrong with a field,

    R(x) = 1/2 ||Phi(x)||^2 + squares / 2 ||x||^2,

Phi from a field to a field, trained to return 0 for true fields and the artefact z - x for naive
reconstructions z (`inverse.trainers.adversarial.artefacts`). Its last features are in (-1, 1), so

    ||R''|| <= ||Phi'||^2 + sup |Phi| (the curvature of Phi) + squares,

and only the second term may be negative.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from inverse.regularizers.learned.deep import ROUNDING, TANH, Features, Layer, Reach, require_grid
from inverse.regularizers.learned.energy import Energy, Guarantee
from solvers.errors import GliodeError


class Phi(nn.Module):
    """An encoder and decoder (batch, *grid) -> (batch, *grid), 0 near the edge; scale: of its values.

    Every step down halves the grid, and what was there is added again on the way up; tanh throughout.
    """

    def __init__(self, dim: int, channels: int, scales: int, scale: float) -> None:
        super().__init__()
        pair = channels, channels
        self.scale = scale
        self.first = Layer((1, channels), 5, dim, valid=True, mean_free=True, gain=8.0)
        self.down = nn.ModuleList(Layer(pair, 3, dim, 2, gain=1.5) for _ in range(scales - 1))
        self.same = nn.ModuleList(Layer(pair, 3, dim) for _ in range(scales))
        self.up = nn.ModuleList(Layer(pair, 3, dim, 2, back=True) for _ in range(scales - 1))
        self.last = Layer((channels, 1), 5, dim, valid=True, bias=False, back=True)

    def features(self, x: Features) -> Features:
        """Of x (batch, 1, *grid), all in (-1, 1)."""
        h = TANH(self.first(x))
        fine = []
        for same, down in zip(self.same, self.down, strict=False):
            fine.append(TANH(same(h)))
            h = TANH(down(fine[-1]))
        h = TANH(self.same[-1](h))
        for up in reversed(self.up):
            skip = fine.pop()
            grid = skip.shape[2:] if isinstance(skip, Tensor) else ()
            h = TANH(skip + up(h, tuple(grid)))
        return h

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.last(self.features(x[:, None]), tuple(x.shape[1:]))[:, 0]


class NETT(Energy):
    """Not convex: weakly so, with the modulus that is certified, a large one. Images or volumes (`dim`).

    channels: of all features; scales: grids, each half as fine as the one before; squares > 0 makes it
    coercive; network: Phi, which is what is trained.
    """

    def __init__(
        self, dim: int = 2, channels: int = 12, scales: int = 3, squares: float = 1e-3, scale: float = 0.1
    ) -> None:
        super().__init__()
        if scales < 1 or not (math.isfinite(squares) and squares >= 0 and math.isfinite(scale) and scale > 0):
            raise GliodeError(
                f"NETT: {scales} scales, squares {squares}, scale {scale}; give 1 or more, a finite number "
                "of 0 or more, a positive one"
            )
        self.dim, self.channels, self.scales = dim, channels, scales
        self.squares, self.scale = squares, scale
        self.network = Phi(dim, channels, scales, scale)

    def settings(self) -> dict[str, Any]:
        return {
            "dim": self.dim,
            "channels": self.channels,
            "scales": self.scales,
            "squares": self.squares,
            "scale": self.scale,
        }

    def forward(self, x: Tensor) -> Tensor:
        size = self.network(x).square() + self.squares * x.square()
        return size.flatten(1).sum(1) / 2

    def guarantee(self) -> Guarantee:
        with torch.enable_grad():
            features = self.network.features(Reach.of_images())
            out = self.network.last(features)
            most = self.scale * float(self.network.last.kernel().detach().double().abs().sum())
            bent = most * out.curvature(torch.tensor([self.scale]))
        straight = ROUNDING * (self.scale * out.lipschitz) ** 2
        return Guarantee(max(bent - self.squares, 0.0), bent + straight + self.squares, self.squares > 0)

    def require_fit(self, shape: tuple[int, ...]) -> None:
        require_grid("NETT", shape, self.dim, 5)
