"""What the tests of sensitivity share: seeded numbers, and a residual network."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class ResNet(nn.Module):
    """x + f_n(x), layer by layer."""

    def __init__(self, dim: int, layers: int, classes: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 8), nn.Tanh(), nn.Linear(8, dim)) for _ in range(layers)
        )
        self.head = nn.Linear(dim, classes)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.head(x)
        return out
