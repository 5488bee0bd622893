r"""The critic of the adversarial regularizer (Lunz, Oktem and Schonlieb 2018): a plain small network.

    R(x) = sum over pixels of w . N(x) + squares / 2 ||x||^2,    N = s(K_L ... s(K_2 s(K_1 x + b_1) + b_2))

The kernels of K_1 sum to 0: R sees no constants. K_2 and K_3 halve the grid. s is smooth, so R has a Hessian.
w > 0 and the last s is bounded below, so R is too: a critic that falls without end far from what it was
trained on has minimisers there (docs/theory/adversarial.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inverse.regularizers.learned.deep import RAMP, SOFT, DeepSum, Features, Layer
from solvers.errors import GliodeError


class AdversarialNetwork(DeepSum):
    """Not convex: weakly so, with the modulus that is certified, a large one. Images or volumes (`dim`).

    channels: of the first layer, twice as many from the second on; layers: L; squares: weight of ||x||^2 / 2.
    """

    def __init__(self, dim: int = 2, channels: int = 16, layers: int = 4, squares: float = 1e-3) -> None:
        super().__init__(dim, 5, squares)
        if layers < 2:
            raise GliodeError(f"AdversarialNetwork: {layers} layers; give 2 or more")
        self.channels, self.layers = channels, layers
        wide = [channels, *[2 * channels] * (layers - 1)]
        self.first = Layer((1, channels), 5, dim, valid=True, mean_free=True, gain=8.0)
        self.rest = nn.ModuleList(
            Layer((wide[k], wide[k + 1]), 3, dim, stride=2 if k < 2 else 1, gain=1.5)
            for k in range(layers - 1)
        )
        self.free = nn.Parameter(torch.zeros(wide[-1]))

    def settings(self) -> dict[str, Any]:
        return {"dim": self.dim, "channels": self.channels, "layers": self.layers, "squares": self.squares}

    def weights(self) -> Tensor:
        return nn.functional.softplus(self.free) / len(self.free)

    def features(self, x: Features) -> Features:
        z = SOFT(self.first(x))
        for layer in self.rest[:-1]:
            z = SOFT(layer(z))
        return RAMP(self.rest[-1](z))
