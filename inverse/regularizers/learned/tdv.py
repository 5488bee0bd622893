r"""Total deep variation (Kobler, Effland, Kunisch and Pock 2020):

    R(x) = sum over pixels of w . N(K x) + squares / 2 ||x||^2,

K with kernels that sum to 0, N a network that goes down to coarser grids and up again. Its blocks are
h + B s(A h), s(t) = log(1 + 9 t^2) / 18, without biases: flat fields have R = 0, and R' = 0 inside,
but for the squares.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inverse.regularizers.learned.deep import STUDENT, DeepSum, Features, Layer
from solvers.errors import GliodeError


class Block(nn.Module):
    """h -> h + B s(A h)."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.A = Layer((channels, channels), 3, dim, bias=False, gain=2.0)
        self.B = Layer((channels, channels), 3, dim, bias=False)

    def forward(self, h: Features) -> Features:
        out: Features = h + self.B(STUDENT(self.A(h)))
        return out


class TDV(DeepSum):
    """Not convex: weakly so, with the modulus that is certified, a large one. Images or volumes (`dim`).

    channels: of all features; scales: grids, each half as fine as the one before; squares: weight of
    ||x||^2 / 2.
    """

    def __init__(self, dim: int = 2, channels: int = 12, scales: int = 3, squares: float = 1e-3) -> None:
        super().__init__(dim, 3, squares)
        if scales < 1:
            raise GliodeError(f"TDV: {scales} scales; give 1 or more")
        self.channels, self.scales = channels, scales
        pair = channels, channels
        self.K = Layer((1, channels), 3, dim, valid=True, mean_free=True, bias=False, gain=8.0)
        self.descent = nn.ModuleList(Block(channels, dim) for _ in range(scales))
        self.ascent = nn.ModuleList(Block(channels, dim) for _ in range(scales - 1))
        self.down = nn.ModuleList(Layer(pair, 3, dim, 2, bias=False) for _ in range(scales - 1))
        self.up = nn.ModuleList(Layer(pair, 3, dim, 2, bias=False, back=True) for _ in range(scales - 1))
        self.w = nn.Parameter(torch.randn(channels) / channels)

    def settings(self) -> dict[str, Any]:
        return {"dim": self.dim, "channels": self.channels, "scales": self.scales, "squares": self.squares}

    def weights(self) -> Tensor:
        return self.w

    def features(self, x: Features) -> Features:
        h = self.descent[0](self.K(x))
        fine = [h]
        for block, down in zip(self.descent[1:], self.down, strict=True):
            h = block(down(h))
            fine.append(h)
        fine.pop()
        for block, up in zip(reversed(self.ascent), reversed(self.up), strict=True):
            skip = fine.pop()
            grid = skip.shape[2:] if isinstance(skip, Tensor) else ()
            h = block(skip + up(h, tuple(grid)))
        return h
