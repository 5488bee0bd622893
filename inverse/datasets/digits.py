"""scikit-learn's handwritten digits: 1797 pictures of 8 x 8 pixels, ten classes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from solvers.errors import GliodeError

COUNT, CLASSES = 1797, 10


class Digits(NamedTuple):
    """Three parts, each (pixels (n, 64) in [0, 1], labels (n,) int64)."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def digits(seed: int, test: int = 360, validation: int = 0, dtype: torch.dtype = torch.float32) -> Digits:
    """Random parts in which each class has its share (to one picture): pixels / 16, row after row.

    The set's own order keeps writers together, and its last 360 are harder than most: hence at random. `test`
    pictures depend on the seed alone, whatever `validation`, which comes out of the rest. GliodeError: a part
    smaller than the ten classes (validation may be 0), or too few pictures left to train on, or a seed
    outside [0, 2^32).
    """
    for name, size in (("test", test), ("validation", validation)):
        if size < CLASSES and not (name == "validation" and size == 0):
            raise GliodeError(f"digits: {name} must be at least {CLASSES}, one picture a class, got {size}")
    if test + validation > COUNT - CLASSES:
        raise GliodeError(
            f"digits: test + validation = {test + validation} leaves fewer than {CLASSES} of the {COUNT}"
            " pictures to train on; ask for less"
        )
    if not 0 <= seed < 2**32:
        raise GliodeError(f"digits: seed must lie in [0, 2^32), got {seed}")
    pixels, labels = load_digits(return_X_y=True)

    def part(chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(pixels[chosen] / 16).to(dtype), torch.from_numpy(labels[chosen]).long()

    def split(indices: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        left, taken = train_test_split(indices, test_size=size, stratify=labels[indices], random_state=seed)
        return left, taken

    rest, tested = split(np.arange(COUNT), test)
    rest, validated = split(rest, validation) if validation else (rest, rest[:0])
    return Digits(part(rest), part(validated), part(tested))
