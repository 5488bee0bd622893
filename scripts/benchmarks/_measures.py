"""Noisy data, and distances: what benchmarks share."""

from __future__ import annotations

import torch
from torch import Tensor

NOISE = 0.01


def noisy(clean: Tensor, seed: int) -> tuple[Tensor, float]:
    """The data with Gaussian noise of 1 % of their largest value, and its standard deviation."""
    sd = NOISE * float(clean.abs().max())
    generator = torch.Generator().manual_seed(seed)
    return clean + sd * torch.randn(clean.shape, generator=generator, dtype=clean.dtype), sd


def relative(found: Tensor, exact: Tensor) -> float:
    """The relative distance in the Euclidean norm."""
    return float((found - exact).norm() / exact.norm())
