"""Treatments as pointwise steps at their dates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.errors import GliodeError


@dataclass(frozen=True)
class Radiotherapy:
    """One fraction of `dose` Gy at `day`: u -> u exp(-(alpha d + beta d^2)), the linear-quadratic model
    (Rockne 2010).

    alpha in 1/Gy, beta in 1/Gy^2 (default alpha/beta = 10 Gy). Raises GliodeError for a negative dose or
    alpha.
    """

    day: float
    dose: float = 2.0
    alpha: float = 0.035
    beta: float = 0.0035

    def __post_init__(self) -> None:
        if min(self.dose, self.alpha, self.beta) < 0:
            raise GliodeError(
                f"therapy: dose {self.dose}, alpha {self.alpha}, beta {self.beta} must not be negative"
            )

    def __call__(self, u: Tensor) -> Tensor:
        """The density after the fraction."""
        survival = -(self.alpha * self.dose + self.beta * self.dose**2)
        return u * torch.exp(torch.tensor(survival, dtype=u.dtype))


@dataclass(frozen=True)
class Resection:
    """Surgery at `day`: the tumour is removed where `kept` (owned dofs,) is 0 and stays where it is 1."""

    day: float
    kept: Tensor

    def __call__(self, u: Tensor) -> Tensor:
        """The density after surgery."""
        if self.kept.shape != u.shape or bool(((self.kept < 0) | (self.kept > 1)).any()):
            raise GliodeError(
                f"resection: kept has shape {tuple(self.kept.shape)}; values in [0, 1], one per dof of u"
            )
        return u * self.kept


Treatment = Radiotherapy | Resection


def course(start: float, fractions: int, dose: float = 2.0, **quality: float) -> list[Radiotherapy]:
    """A course of daily fractions on weekdays: five on, two off, from day `start`."""
    return [Radiotherapy(start + 7 * (k // 5) + k % 5, dose, **quality) for k in range(fractions)]
