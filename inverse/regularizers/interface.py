r"""What a regularizer is to an optimizer: two protocols, and the sum of several.

    Regularizer    R(m) on the tape, the dual R'(m), the dual R''(m) d
    Proximable     R(m) and prox(m, step) = argmin_z R(z) + ||z - m||^2 / (2 step), in the norm of its space

A smooth term is a problem's `regularizer`, a non-smooth one goes to `inverse.optimizers.proximal`. Some are
both. `weight` is the alpha of the theory: a float above 0 that rules of choice may set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from solvers.errors import GliodeError
from solvers.spaces import Space


class Regularizer(Protocol):
    """A twice differentiable R."""

    weight: float

    def __call__(self, m: Tensor) -> Tensor:
        """R(m), a 0-d tensor on the tape, the same on every rank."""
        ...

    def gradient(self, m: Tensor) -> Tensor:
        """The dual R'(m)."""
        ...

    def hessian_action(self, m: Tensor, d: Tensor) -> Tensor:
        """The dual R''(m) d."""
        ...


class Proximable(Protocol):
    """A convex R, which need not be smooth, nor finite everywhere.

    separable: the prox acts on each entry by itself, so bounds may be imposed after it (exactly, in one
    dimension). An indicator's weight is 1 and means nothing.
    """

    weight: float

    @property
    def space(self) -> Space: ...

    @property
    def separable(self) -> bool: ...

    def __call__(self, m: Tensor) -> Tensor:
        """R(m), a 0-d tensor, the same on every rank."""
        ...

    def prox(self, m: Tensor, step: float) -> Tensor:
        """argmin_z R(z) + ||z - m||^2 / (2 step) in the norm of `space`; a new tensor without a graph."""
        ...


class Sum:
    """weight * (R_1(m) + R_2(m) + ...), each term with its own weight too."""

    def __init__(self, terms: Sequence[Regularizer], weight: float = 1.0) -> None:
        if not terms:
            raise GliodeError("Sum: needs at least one regularizer")
        self.terms, self.weight = tuple(terms), checked_weight("Sum", weight)

    def __call__(self, m: Tensor) -> Tensor:
        """R(m), a 0-d tensor on the tape."""
        return self.weight * torch.stack([term(m) for term in self.terms]).sum()

    def gradient(self, m: Tensor) -> Tensor:
        """The dual R'(m)."""
        return self.weight * torch.stack([term.gradient(m) for term in self.terms]).sum(0)

    def hessian_action(self, m: Tensor, d: Tensor) -> Tensor:
        """The dual R''(m) d."""
        return self.weight * torch.stack([term.hessian_action(m, d) for term in self.terms]).sum(0)


def checked_diagonal(name: str, space: Space) -> Space:
    """The space; raises GliodeError unless its metric is diagonal."""
    if space.scaling() is None:
        raise GliodeError(
            f"{name}: acts on each entry by itself, which is a prox in a diagonal metric only; take "
            "Euclidean, Diagonal, or `lumped` of a domain"
        )
    return space


def checked_weight(name: str, weight: float) -> float:
    """The weight; raises GliodeError unless it is positive and finite."""
    if not (math.isfinite(weight) and weight > 0):
        raise GliodeError(f"{name}: the weight must be positive and finite, got {weight}")
    return float(weight)


def checked_step(name: str, step: float) -> float:
    """The step of a prox; raises GliodeError unless it is positive and finite."""
    if not (math.isfinite(step) and step > 0):
        raise GliodeError(f"{name}: the step of its prox must be positive and finite, got {step}")
    return float(step)
