r"""Adversarial training: an energy that is low on true fields and high on naive reconstructions,

    min_theta mean_i ( R(x_i) - R(z_i) ) / n + penalty (|R'(t x_i + (1 - t) z_i)| - 1)_+^2,

for pairs of a true field x_i and what a naive method makes of its data, z_i, of n values each; t is uniform
in [0, 1], and |g| the root mean square of a field, so that neither term knows how many values a field has.
Where the penalty holds R to slopes of 1, the first term is minus the Wasserstein distance of the two
distributions in that norm, and descent along R' lowers it (Lunz, Oktem and Schonlieb 2018; Mukherjee et al.
2021 for convex R). The pairs need not belong together: any true fields, any naive ones.

At a truth with |R'| = 1 the misfit's gradient is that of the noise e alone. So the truth can be stationary
for 1/(2 sd^2) ||A x - y||^2 + weight R(x) at the weight |A^T e| / sd^2 (`balanced_weight`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from inverse.regularizers.learned.energy import Energy
from solvers.errors import GliodeError


class Adversarial(nn.Module):
    """Pairs (batch, 2, *field) of a true and a naive field -> costs (batch, 1), for `inverse.losses.Mean`.

    t is drawn anew at each visit in training, and 1/2 in evaluation. Raises GliodeError for a penalty that is
    not positive, and for fields that are no pairs.
    """

    def __init__(self, energy: Energy, penalty: float = 10.0) -> None:
        super().__init__()
        if not (math.isfinite(penalty) and penalty > 0):
            raise GliodeError(f"adversarial: the penalty must be positive and finite, got {penalty}")
        self.energy, self.penalty = energy, penalty

    def forward(self, pairs: Tensor) -> Tensor:
        if pairs.ndim < 3 or pairs.shape[1] != 2:
            raise GliodeError(
                f"adversarial: inputs of shape {tuple(pairs.shape)}; give (n, 2, *field), as `pairs` does"
            )
        true, naive = pairs.unbind(1)
        shape = (len(pairs), *[1] * (true.ndim - 1))
        t = torch.rand(shape).to(true) if self.training else true.new_full(shape, 0.5)
        slope = self.energy.gradient(torch.lerp(naive, true, t))
        # clamped before the root, whose derivative at 0 is infinite
        excess = slope.square().flatten(1).mean(1).clamp(min=1.0).sqrt() - 1
        apart = (self.energy(true) - self.energy(naive)) / true[0].numel()
        return (apart + self.penalty * excess.square())[:, None]


def pairs(true: Tensor, naive: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs (n, 2, *field) and targets (n,), which say nothing, for `inverse.training.train`.

    true, naive: (n, *field). Raises GliodeError where they differ in shape or arithmetic.
    """
    _require_same(true, naive)
    return torch.stack([true, naive], 1), true.new_zeros(len(true))


def artefacts(true: Tensor, naive: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs (2 n, *field) and targets of a network that returns what is wrong with a field (NETT).

    0 for the true ones and naive - true for the naive (Li, Schwab, Antholzer and Haltmeier 2020); the loss is
    `inverse.losses.SquaredError`. Raises GliodeError where they differ in shape or arithmetic.
    """
    _require_same(true, naive)
    return torch.cat([true, naive]), torch.cat([torch.zeros_like(true), naive - true])


def balanced_weight(adjoint: Callable[[Tensor], Tensor], noise: Tensor, sd: float) -> float:
    """|A^T e| / sd^2 of a sample e of the noise: what the weight should be near."""
    return float(adjoint(noise).square().mean().sqrt()) / sd**2


def _require_same(true: Tensor, naive: Tensor) -> None:
    if (true.shape, true.dtype) != (naive.shape, naive.dtype) or true.ndim < 2:
        raise GliodeError(
            f"pairs: true fields {true.dtype} of shape {tuple(true.shape)}, naive ones {naive.dtype} of "
            f"{tuple(naive.shape)}; give (n, *field), a naive one for each"
        )
