r"""Denoising score matching at all noise levels, for a `ScorePrior`:

    min_theta E 1/(2 n) w(s) ||D_s(x + s e) - x||^2,    log s uniform, e ~ N(0, 1),    w = 1/s^2 + 1/spread^2,

x the fields of n values that a training set has; w makes all levels weigh alike (Vincent 2011; Song and Ermon
2019; Karras, Aittala, Aila and Laine 2022).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from inverse.regularizers.learned.score import ScorePrior


class ScoreMatching(nn.Module):
    """Fields (batch, *shape) -> costs (batch, 1) for `inverse.losses.Mean`; each visit draws new noise.

    In evaluation mode the levels and the noise are the same at every call, so that a validation loss shows
    the network alone.
    """

    def __init__(self, energy: ScorePrior) -> None:
        super().__init__()
        self.energy = energy

    def forward(self, x: Tensor) -> Tensor:
        ones = [1] * len(self.energy.shape)
        generator = None if self.training else torch.Generator().manual_seed(0)
        share = torch.rand(len(x), *ones, generator=generator).to(x)
        e = torch.randn(x.shape, generator=generator).to(x)
        least, most = (math.log(level) for level in self.energy.levels)
        s = torch.exp(least + (most - least) * share)
        apart = self.energy.denoised(x + s * e, s) - x
        weight = 1 / s.square() + 1 / self.energy.spread**2
        return (weight * apart.square()).flatten(1).mean(1, keepdim=True) / 2
