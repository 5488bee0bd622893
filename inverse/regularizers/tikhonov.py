r"""Tikhonov regularization: R(m) = weight / 2 ||m - reference||^2 in the norm of a Space.

In a Sobolev space it penalises values and slopes; in Euclidean(n, scale=sd) with weight 1 it is minus the
logarithm of a Gaussian prior of those standard deviations (up to a constant).
"""

from __future__ import annotations

import math

from torch import Tensor

from solvers.errors import GliodeError
from solvers.spaces import Space


class Tikhonov:
    """weight / 2 ||m - reference||^2; reference None is zero. Called, it is on the tape to any order."""

    def __init__(self, space: Space, weight: float = 1.0, reference: Tensor | None = None) -> None:
        if not (math.isfinite(weight) and weight > 0):
            raise GliodeError(f"Tikhonov: the weight must be positive and finite, got {weight}")
        if reference is not None:
            space.check(reference, "Tikhonov: reference")
        self.space, self.weight = space, weight
        self.reference = None if reference is None else reference.detach().clone()

    def _away(self, m: Tensor) -> Tensor:
        return m if self.reference is None else m - self.reference

    def __call__(self, m: Tensor) -> Tensor:
        """R(m), a 0-d tensor."""
        e = self._away(m)
        return 0.5 * self.weight * self.space.pairing(self.space.gram(e), e)

    def gradient(self, m: Tensor) -> Tensor:
        """The dual R'(m) = weight G (m - reference)."""
        return self.weight * self.space.gram(self._away(m))

    def hessian_action(self, m: Tensor, d: Tensor) -> Tensor:
        """The dual R''(m) d = weight G d."""
        return self.weight * self.space.gram(d)
