r"""Nonlinear diffusion from exported operators: M u' = -D K u^m, the porous medium equation.

Advection, diffusion and reaction are linear in their weights: `solvers.node.science.linear.Linear` of what
`solvers.fem.equations.advection.Transport.semidiscrete` exports. Species: `solvers.node.science.species`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from solvers.errors import GliodeError
from solvers.node.science.sparse import Stiffness, agree
from solvers.semidiscrete import SemiDiscrete

SMALL = 1e-100  # below, |u|^(m - 1) is that of SMALL, so that no derivative is infinite


def power(u: Tensor, m: Tensor | float) -> Tensor:
    """u |u|^(m - 1), differentiable in both also at u = 0; m >= 1."""
    return u * u.abs().clamp(min=SMALL) ** (m - 1)


class PorousMedium:
    """f(t, u, D=..., m=...) = -D M^-1 K u^m, u (..., n): for `ScienceActivated` and `integrate`.

    problem: an exported diffusion with conductances and a lumped mass. D > 0 in length^2 / time, m >= 1: a
    number or (batch, 1). Explicit schemes are stable for steps below their interval over D m max(u)^(m - 1)
    times the fastest rate of the heat equation. Raises GliodeError for other values.
    """

    def __init__(self, problem: SemiDiscrete) -> None:
        pairs, mass = problem.conductances, problem.mass
        if pairs is None or pairs.tensor or not isinstance(mass, Tensor):
            raise GliodeError("porous medium: needs conductances by a number per cell and a lumped mass")
        self.mass, self._stiffness = mass, Stiffness(pairs)
        self._unit = pairs(pairs.table.new_ones(pairs.n_cells))

    def __call__(self, t: Tensor | float, u: Tensor, D: Tensor | float, m: Tensor | float) -> Tensor:
        agree(self.mass, u, len(self.mass))
        if (
            not float(torch.as_tensor(D).detach().min()) > 0
            or not float(torch.as_tensor(m).detach().min()) >= 1
        ):
            raise GliodeError(f"porous medium: D = {D} must be positive and m = {m} at least 1")
        return -D * self._stiffness(self._unit, power(u, m)) / self.mass
