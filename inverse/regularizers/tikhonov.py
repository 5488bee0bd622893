r"""Tikhonov regularization: R(m) = weight / 2 ||m - reference||^2 in the norm of a Space.

In a Sobolev space it penalises values and slopes; in Euclidean(n, scale=sd) with weight 1 it is minus the
logarithm of a Gaussian prior of those standard deviations (up to a constant).
"""

from __future__ import annotations

from torch import Tensor

from inverse.regularizers.interface import checked_step, checked_weight
from solvers.spaces import Space


class Tikhonov:
    """weight / 2 ||m - reference||^2; reference None is zero. Called, it is on the tape to any order."""

    def __init__(self, space: Space, weight: float = 1.0, reference: Tensor | None = None) -> None:
        if reference is not None:
            space.check(reference, "Tikhonov: reference")
        self.space, self.weight = space, checked_weight("Tikhonov", weight)
        self.reference = None if reference is None else reference.detach().clone()

    @property
    def separable(self) -> bool:
        """Whether its prox acts on each entry by itself: in a diagonal metric."""
        return self.space.scaling() is not None

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

    def prox(self, m: Tensor, step: float) -> Tensor:
        """argmin_z R(z) + ||z - m||^2 / (2 step) = (m + a reference) / (1 + a), a = weight step."""
        a = self.weight * checked_step("Tikhonov", step)
        away = m.detach() / (1 + a)
        return away if self.reference is None else away + a / (1 + a) * self.reference
