r"""A generative prior of small fields: energies of all noise levels, by denoising score matching.

With p_s the density of field + s noise, the score -R'_s = (log p_s)' is what the best denoiser tells
(Miyasawa 1961; Vincent 2011),

    D_s(x) = E[field | x] = x - s^2 R'_s(x),

so a network trained to denoise at all s knows the prior, from the broad p_s at large s, where chains move
freely, down to p_s at the least s, which stands for the prior itself. Here R_s is an energy, so that its
chains have an acceptance ratio: with N_s a network of the field,

    R_s(x) = 1/(2 s^2) ||x - N_s(x)||^2,    D_s(x) = N_s(x) + N_s'(x)^T (x - N_s(x))

(the denoiser of Cohen, Blau, Freedman and Rivlin 2021 and Hurault, Leclaire and Papadakis 2022), N_s(x) =
mean + a (x - mean) + b net(c (x - mean), log s), with the a, b, c of Karras, Aittala, Aila and Laine (2022).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from inverse.regularizers.learned.energy import Energy, Guarantee
from solvers.errors import GliodeError


class ScorePrior(Energy):
    """R_s of fields (batch, *shape) in one to three dimensions, at the noise level `sigma`, by default least.

    levels: (least, most) noise in the units of the fields; mean, spread: of the fields, numbers. The network
    has `depth` convolutions of `channels` 3-wide filters, dilated by 1, 2, 4, 1, 2, ..., and is told where it
    is by a channel for each axis: fields of one frame, not pictures that move. Its last features are in
    (-1, 1), so R_s grows as ||x||^2: exp(-R_s) is the density of a distribution.
    """

    def __init__(
        self,
        shape: tuple[int, ...] | list[int],
        levels: tuple[float, float] | list[float],
        mean: float = 0.0,
        spread: float = 1.0,
        channels: int = 24,
        depth: int = 4,
    ) -> None:
        super().__init__()
        self.shape, self.levels = tuple(shape), (float(levels[0]), float(levels[1]))
        if not 1 <= len(self.shape) <= 3 or min(self.shape) < 1:
            raise GliodeError(f"score prior: fields of shape {self.shape}; one to three axes")
        if not (0 < self.levels[0] < self.levels[1] < math.inf and spread > 0 and math.isfinite(mean)):
            raise GliodeError(
                f"score prior: levels {self.levels}, mean {mean}, spread {spread}: give 0 < least < most, and"
                " a positive spread"
            )
        if min(channels, depth - 1) < 1:
            raise GliodeError(f"score prior: {channels} channels, {depth} layers; give 1 or more, 2 or more")
        self.mean, self.spread, self.channels, self.depth = mean, spread, channels, depth
        axes = [torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1) for n in self.shape]
        self.register_buffer("places", torch.stack(torch.meshgrid(*axes, indexing="ij")), persistent=False)
        layer: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(self.shape) - 1]
        sizes = [2 + len(self.shape), *[channels] * (depth - 1), 1]
        dilations = [1, 2, 4]
        self.layers = nn.ModuleList(
            layer(sizes[k], sizes[k + 1], 3, padding=dilations[k % 3], dilation=dilations[k % 3])
            for k in range(depth)
        )
        for part in self.layers[-1].parameters():
            nn.init.zeros_(part)

    def settings(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape),
            "levels": list(self.levels),
            "mean": self.mean,
            "spread": self.spread,
            "channels": self.channels,
            "depth": self.depth,
        }

    def guarantee(self) -> Guarantee:
        return Guarantee(math.inf, math.inf, True)

    def require_fit(self, shape: tuple[int, ...]) -> None:
        if tuple(shape) != self.shape:
            raise GliodeError(f"score prior: made for fields of shape {self.shape}, not {tuple(shape)}")

    def _noise(self, x: Tensor, sigma: float | Tensor | None) -> Tensor:
        """(batch, 1, ...)."""
        s = torch.as_tensor(self.levels[0] if sigma is None else sigma, dtype=x.dtype, device=x.device)
        return s.reshape(-1, *[1] * len(self.shape)).expand(len(x), *[1] * len(self.shape))

    def forward(self, x: Tensor, sigma: float | Tensor | None = None) -> Tensor:
        """R_s(x), (batch,); sigma: s, one number or one a field."""
        s, places = self._noise(x, sigma), self.get_buffer("places").to(x)
        total = (s.square() + self.spread**2).sqrt()
        z = (x - self.mean) / total
        told = (s.log() / 4).expand(x.shape)[:, None], places.expand(len(x), *places.shape)
        h = torch.cat([z[:, None], *told], dim=1)
        for layer in self.layers[:-2]:
            h = nn.functional.silu(layer(h))
        out = self.layers[-1](torch.tanh(self.layers[-2](h)))[:, 0]
        apart = (s * z - self.spread * out) / total  # (x - N_s(x)) / s
        return apart.square().flatten(1).sum(1) / 2

    def denoised(self, x: Tensor, sigma: float | Tensor | None = None) -> Tensor:
        """D_s(x) = x - s^2 R'_s(x); on the tape where grad mode is on."""
        recording = torch.is_grad_enabled()
        with torch.enable_grad():
            leaf = x if x.requires_grad else x.detach().requires_grad_()
            (dual,) = torch.autograd.grad(self(leaf, sigma).sum(), leaf, create_graph=recording)
        return x - self._noise(x, sigma).square() * dual
