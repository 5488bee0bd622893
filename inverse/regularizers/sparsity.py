r"""Sparsity: R(m) = weight int |m|, with or without positivity; few entries of the minimiser are not zero.

The integral is that of the space, int |m| = <G 1, |m|> (each entry weighs its mass), so that neither the
value nor the threshold of the prox depends on the mesh:

    prox(m)_i = sign(m_i) max(|m_i| - weight step, 0),    with positivity max(m_i - weight step, 0) .

(Daubechies, Defrise and De Mol 2004; as a functional of measures Bredies and Pikkarainen 2013.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inverse.regularizers.interface import checked_diagonal, checked_step, checked_weight
from solvers.errors import GliodeError
from solvers.spaces import Space, reduce


class Sparsity:
    """weight int |m| over a space of diagonal metric; positive: infinite where an entry is below 0."""

    separable = True

    def __init__(self, space: Space, weight: float = 1.0, positive: bool = False) -> None:
        self.space, self.positive = checked_diagonal("Sparsity", space), positive
        self.weight = checked_weight("Sparsity", weight)

    def __call__(self, m: Tensor) -> Tensor:
        """R(m), a 0-d tensor; on the tape (linear) with positivity only."""
        if m.requires_grad and not self.positive:
            raise GliodeError(
                "Sparsity: |m| has no derivative at 0; give it to inverse.optimizers.proximal as its "
                "non-smooth term"
            )
        measure = self.space.gram(torch.ones_like(m))
        value = self.weight * self.space.pairing(measure, m if self.positive else m.abs())
        if self.positive and violations(m < 0, self.space):
            return value + math.inf
        return value

    def prox(self, m: Tensor, step: float) -> Tensor:
        """The soft threshold by weight * step."""
        threshold = self.weight * checked_step("Sparsity", step)
        if self.positive:
            return (m.detach() - threshold).clamp(min=0)
        return torch.nn.functional.softshrink(m.detach(), threshold)


def violations(bad: Tensor, space: Space) -> bool:
    """Whether any entry on any rank is bad."""
    return bool(reduce(bad.sum(), space.comm) > 0)
