r"""A learned regularizer: an energy R_theta(x) of trained weights theta, and what is guaranteed of it.

    Energy     R_theta: fields (batch, ...) -> (batch,), a torch module; inverse.trainers trains it
    Learned    weight / scale^2 R(scale m), frozen, on a Space: a Regularizer with a prox, as all the others

A trained R knows fields of one size of values; `scale` fits it to others (of images, to another noise level)
and leaves the modulus and the Lipschitz constant below as they are.

A guarantee is in the metric of the energy's own points (`Energy.metric`; None: sums of squares),

    <R'(x) - R'(z), x - z> >= -modulus ||x - z||^2,    ||R'(x) - R'(z)||_* <= lipschitz ||x - z||,

and holds for whatever weights a training comes to: it is built into the parametrisation. J + weight R is
convex where J's Hessian is at least weight * modulus; minimisers then depend on the data in one way only.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inverse.optimizers import conjugate_gradients
from inverse.problem import InverseProblem
from inverse.regularizers.interface import checked_step, checked_weight
from inverse.stopping import GradientTolerance, MaxIterations
from solvers.errors import GliodeError
from solvers.spaces import Space


@dataclass(frozen=True)
class Guarantee:
    """What holds of R at any point.

    modulus: of weak convexity, 0 where R is convex, inf where none is known; lipschitz: of the gradient, inf
    where none is known; coercive: whether R(x) -> inf as ||x|| -> inf.
    """

    modulus: float
    lipschitz: float
    coercive: bool

    def __post_init__(self) -> None:
        if not (self.modulus >= 0 and self.lipschitz >= 0):
            raise GliodeError(f"guarantee: modulus {self.modulus}, lipschitz {self.lipschitz}: not negative")

    @property
    def convex(self) -> bool:
        """Whether R is convex."""
        return self.modulus == 0


NOTHING = Guarantee(math.inf, math.inf, False)
"""Of an energy without structure."""


class Energy(nn.Module, ABC):
    """R_theta of each field of a batch, twice differentiable almost everywhere, on the tape.

    units: of the values ("1": images in [0, 1], densities, log-coefficients); spacing: of the grid that the
    filters are made for, in mm, None where they are pixels or know no grid.
    """

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """R(x), (batch,), of fields x (batch, ...)."""

    @abstractmethod
    def guarantee(self) -> Guarantee:
        """What holds with the present weights; not on the tape."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The arguments that make an energy of this architecture, plain values (numbers, words, lists)."""

    def require_fit(self, shape: tuple[int, ...]) -> None:
        """Raise GliodeError unless a field may have this shape."""

    def gradient(self, x: Tensor) -> Tensor:
        """The dual R'(x), (batch, ...), of each field; on the tape for x and theta where grad mode is on."""
        recording = torch.is_grad_enabled()
        with torch.enable_grad():
            leaf = x if x.requires_grad else x.detach().requires_grad_()
            (dual,) = torch.autograd.grad(self(leaf).sum(), leaf, create_graph=recording)
        return dual


class Learned:
    """weight / scale^2 R(scale m) for a point m of a space; the energy's weights are frozen and in float64.

    shape: of the field that m (n,) stands for, None: (n,). Raises GliodeError where the energy cannot be of
    such fields, and for senseless numbers.
    """

    separable = False

    def __init__(
        self,
        energy: Energy,
        space: Space,
        shape: tuple[int, ...] | None = None,
        weight: float = 1.0,
        scale: float = 1.0,
        tolerance: float = 1e-6,
        iterations: int = 500,
    ) -> None:
        self.shape = space.shape if shape is None else tuple(shape)
        if math.prod(self.shape) != space.size:
            raise GliodeError(f"learned regularizer: fields of shape {self.shape} for {space.size} unknowns")
        energy.require_fit(self.shape)
        self.energy = copy.deepcopy(energy).double().eval().requires_grad_(False)
        self.space, self.weight = space, checked_weight("learned regularizer", weight)
        if not (math.isfinite(scale) and scale > 0):
            raise GliodeError(f"learned regularizer: scale must be positive and finite, got {scale}")
        self.scale, self.tolerance, self.iterations = scale, tolerance, iterations

    def _fields(self, m: Tensor) -> Tensor:
        return self.scale * m.reshape(1, *self.shape)

    def __call__(self, m: Tensor) -> Tensor:
        """R(m), a 0-d tensor on the tape."""
        return self.weight / self.scale**2 * self.energy(self._fields(m))[0]

    def gradient(self, m: Tensor) -> Tensor:
        """The dual R'(m)."""
        with torch.no_grad():
            return self.weight / self.scale * self.energy.gradient(self._fields(m)).reshape(m.shape)

    def hessian_action(self, m: Tensor, d: Tensor) -> Tensor:
        """The dual R''(m) d."""
        with torch.enable_grad():
            leaf = m.detach().requires_grad_()
            dual = self.weight / self.scale * self.energy.gradient(self._fields(leaf)).reshape(m.shape)
            (action,) = torch.autograd.grad(dual, leaf, d)
        return action

    def guarantee(self) -> Guarantee:
        """Of weight / scale^2 R(scale m)."""
        of = self.energy.guarantee()
        return Guarantee(self.weight * of.modulus, self.weight * of.lipschitz, of.coercive)

    def require_convex(self, strength: float, what: str = "the misfit") -> None:
        """Raise GliodeError unless J + R is convex for every J whose Hessian is at least `strength`."""
        modulus = self.energy.guarantee().modulus
        if self.weight * modulus > strength:
            most = 0.0 if math.isinf(modulus) else strength / modulus
            way = f"take a weight of at most {most:.4g}" if most > 0 else "take a convex one"
            raise GliodeError(
                f"learned regularizer: weight {self.weight:g} times its modulus of weak convexity "
                f"{modulus:.4g} is above the {strength:.4g} of {what}: the problem may have several "
                f"minimisers; {way}"
            )

    def prox(self, m: Tensor, step: float) -> Tensor:
        """argmin_z R(z) + ||z - m||^2 / (2 step), unique where step * modulus < 1.

        Raises GliodeError for a longer step, and where `iterations` do not reach the relative tolerance.
        """
        strength = 1 / checked_step("learned regularizer", step)
        self.require_convex(strength, "the prox, 1 / step")
        m, space = m.detach(), self.space

        def apart(z: Tensor) -> Tensor:
            return space.pairing(space.gram(z - m), z - m) * strength / 2

        problem = InverseProblem(space, apart, self)
        limit = GradientTolerance(0.0, self.tolerance * strength * max(space.norm(m), 1e-300))
        found = conjugate_gradients.minimise(problem, m, stopping=(limit, MaxIterations(self.iterations)))
        if found.stopped_by == "MaxIterations":
            raise GliodeError(
                f"learned regularizer: its prox is not found in {self.iterations} iterations to "
                f"{self.tolerance:.0e}; raise `iterations` or `tolerance`, or take a shorter step"
            )
        return found.m
