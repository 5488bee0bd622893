"""A disc of unknown place, size and height in a small field: a prior of four numbers, so that what is said of
posteriors of the whole field can be held to the posterior of the numbers.

    x(p) = a / (1 + exp((|p - c| - r) / 0.5)),    c uniform, r in [2, 4.5], a in [0.6, 1.4], in pixels
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from solvers.errors import GliodeError

EDGE, RADII, HEIGHTS, MARGIN = 0.5, (2.0, 4.5), (0.6, 1.4), 3.0


def discs(n: int, size: int, seed: int) -> Tensor:
    """(n, size, size) of n draws, float64."""
    return fields(drawn(n, size, seed), size)


def limits(size: int) -> tuple[Tensor, Tensor]:
    """Of the numbers (row, column, r, a)."""
    last = size - 1 - MARGIN
    return (
        torch.tensor([MARGIN, MARGIN, RADII[0], HEIGHTS[0]], dtype=torch.float64),
        torch.tensor([last, last, RADII[1], HEIGHTS[1]], dtype=torch.float64),
    )


def drawn(n: int, size: int, seed: int) -> Tensor:
    """(n, 4) numbers (row, column, r, a), uniform within `limits`."""
    if n < 1 or size < 12:
        raise GliodeError(f"discs: {n} of {size} pixels a side; ask for 1 or more of 12 or more")
    low, high = limits(size)
    share = torch.from_numpy(np.random.default_rng(seed).random((n, 4)))
    return low + (high - low) * share


def fields(numbers: Tensor, size: int) -> Tensor:
    """(n, size, size) of the numbers (n, 4), on the tape."""
    row, column, r, a = numbers[:, :, None, None].unbind(1)
    line = torch.arange(size, dtype=numbers.dtype)
    far = torch.hypot(line[:, None] - row, line - column)
    return a * torch.sigmoid((r - far) / EDGE)
