r"""Input-convex networks (Amos, Xu and Kolter 2017) as regularizers, convolutional:

    z_1 = s(K_0 x + b_0),    z_{l+1} = s(W_l z_l + K_l x + b_l),    R(x) = sum over pixels of w . z_L
                                                                            + squares / 2 ||x||^2

with W_l >= 0 and w >= 0 entry by entry, s convex and increasing: z_l is convex in x, channel by channel and
pixel by pixel, by induction. The K_l are free but sum to 0 each, so R sees no constants but by the squares.
Trained adversarially it is the convex regularizer of Mukherjee et al. (2021).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inverse.regularizers.learned.deep import SOFT, DeepSum, Features, Layer
from inverse.regularizers.learned.energy import Guarantee
from solvers.errors import GliodeError


class ICNN(DeepSum):
    """Convex for whatever weights; with squares > 0 strongly so, and coercive. Images or volumes (`dim`).

    channels: of z_l; size: of the kernels K_l, those of W_l are 3; layers: L; squares: weight of ||x||^2 / 2.
    """

    def __init__(
        self, dim: int = 2, channels: int = 16, size: int = 5, layers: int = 3, squares: float = 1e-3
    ) -> None:
        super().__init__(dim, size, squares)
        if layers < 1 or size < 3:
            raise GliodeError(f"ICNN: {layers} layers, kernels of {size}; give 1 or more, 3 or more")
        self.channels, self.size, self.layers = channels, size, layers
        self.direct = nn.ModuleList(
            Layer((1, channels), size, dim, valid=True, mean_free=True, gain=40.0) for _ in range(layers)
        )
        self.hidden = nn.ModuleList(
            Layer((channels, channels), 3, dim, nonnegative=True, bias=False) for _ in range(layers - 1)
        )
        self.free = nn.Parameter(torch.full((channels,), -2.0))

    def settings(self) -> dict[str, Any]:
        return {
            "dim": self.dim,
            "channels": self.channels,
            "size": self.size,
            "layers": self.layers,
            "squares": self.squares,
        }

    def weights(self) -> Tensor:
        return nn.functional.softplus(self.free) / self.channels

    def features(self, x: Features) -> Features:
        z = SOFT(self.direct[0](x))
        for hidden, direct in zip(self.hidden, self.direct[1:], strict=True):
            z = SOFT(hidden(z) + direct(x))
        return z

    def guarantee(self) -> Guarantee:
        return Guarantee(0.0, self.bound() + self.squares, self.squares > 0)
