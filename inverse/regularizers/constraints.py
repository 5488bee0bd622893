r"""Constraints as functionals: 0 inside, infinite outside; the prox is the projection, whatever the step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inverse.regularizers.interface import checked_diagonal, checked_step
from inverse.regularizers.sparsity import violations
from solvers.errors import GliodeError
from solvers.spaces import Space


class Box:
    """lower <= m <= upper, entry by entry, in a space of diagonal metric.

    lower, upper: a number, a tensor of the space's shape, or None for no bound on that side.
    """

    separable = True
    weight = 1.0

    def __init__(self, space: Space, lower: float | Tensor | None, upper: float | Tensor | None) -> None:
        self.space = checked_diagonal("Box", space)
        sides = []
        for name, side, none in (("lower", lower, -math.inf), ("upper", upper, math.inf)):
            t = torch.as_tensor(none if side is None else side, dtype=torch.float64).detach()
            if t.ndim and tuple(t.shape) != space.shape:
                raise GliodeError(f"Box: {name} has shape {tuple(t.shape)}, the space {space.shape}")
            sides.append(t.expand(space.shape).clone())
        self.lower, self.upper = sides
        if not bool((self.lower <= self.upper).all()):  # false for NaN too
            raise GliodeError("Box: each lower bound must be a number not above its upper bound")

    def __call__(self, m: Tensor) -> Tensor:
        """0 inside, infinity outside."""
        outside = (m < self.lower.to(m)) | (m > self.upper.to(m))
        return m.new_tensor(math.inf if violations(outside, self.space) else 0.0)

    def prox(self, m: Tensor, step: float = 1.0) -> Tensor:
        """The nearest point of the box."""
        checked_step("Box", step)
        return torch.minimum(torch.maximum(m.detach(), self.lower.to(m)), self.upper.to(m))


class Positivity(Box):
    """m >= 0, entry by entry."""

    def __init__(self, space: Space) -> None:
        super().__init__(space, 0.0, None)
