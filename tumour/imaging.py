"""Images of the density u: outlines as smoothed thresholds, a PET-like density, and their noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from solvers.errors import GliodeError
from solvers.fem.mesh import Domain, FloatArray
from solvers.fem.sampling import Sampling

Kind = Literal["density", "enhancing", "oedema"]

LEVELS: dict[str, float] = {"enhancing": 0.6, "oedema": 0.16}
"""Densities at the outlines of T1Gd (enhancing core) and FLAIR (oedema): Swanson et al. 2008; Lipkova et al.
2019.
"""


@dataclass(frozen=True)
class Modality:
    """One kind of image and its noise.

    kind: "density" shows u itself (PET-like); "enhancing" and "oedema" show an outline, 1/(1 + exp(-(u -
    level)/width)). noise: standard deviation of independent Gaussian noise at each voxel, as a fraction of
    the image's largest value (for outlines, of 1).
    """

    kind: Kind
    noise: float = 0.05
    width: float = 0.05
    level: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("density", *LEVELS):
            raise GliodeError(f"imaging: kind {self.kind!r} is not one of density, {', '.join(LEVELS)}")
        if not self.noise > 0:
            raise GliodeError(
                f"imaging.noise: {self.noise}; a positive noise level is needed to weigh the data"
            )
        if not self.width > 0:
            raise GliodeError(f"imaging.width: {self.width} must be positive")
        if self.level is not None and not 0 < self.level < 1:
            raise GliodeError(f"imaging.level: {self.level} is not in (0, 1)")

    @property
    def threshold(self) -> float:
        """The density at the outline."""
        return self.level if self.level is not None else LEVELS[self.kind]

    def image(self, u: Tensor) -> Tensor:
        """The image of density values, pointwise and smooth."""
        return u if self.kind == "density" else torch.sigmoid((u - self.threshold) / self.width)


class Camera:
    """Images of a state on voxels: each voxel shows the mean of the image over `sub`^3 points in it.

    centres: (n, 3) voxel centres in mm; edges: (3, 3) voxel edge vectors as columns. Voxels are kept on the
    rank that holds their centre; `rows` says which. Points past the mesh's edge take the nearest value within
    `reach` mm.
    """

    def __init__(
        self, domain: Domain, centres: FloatArray, edges: FloatArray, sub: int = 2, reach: float | None = None
    ) -> None:
        reach = float(np.linalg.norm(edges, axis=0).sum()) if reach is None else reach
        self.rows = Sampling(domain, centres, reach).rows
        one = (np.arange(sub) + 0.5) / sub - 0.5
        offsets = np.stack(np.meshgrid(one, one, one, indexing="ij"), axis=-1).reshape(-1, 3) @ edges.T
        points = (centres[:, None] + offsets).reshape(-1, 3)
        self._sub = sub**3
        self._sampling = Sampling(domain, points, reach)
        self._parallel = domain.comm.size > 1
        self._voxel = torch.from_numpy(self._sampling.rows // self._sub)
        self._count = len(centres)
        self._comm = domain.comm

    def __call__(self, u: Tensor, modalities: Sequence[Modality]) -> list[Tensor]:
        """The image of each modality, (n,) on every rank."""
        from solvers.spaces import reduce

        values = self._sampling(u)
        images = []
        for modality in modalities:
            shown = modality.image(values)
            total = torch.zeros(self._count, dtype=u.dtype).index_add(0, self._voxel, shown) / self._sub
            images.append(reduce(total, self._comm) if self._parallel else total)
        return images


def add_noise(image: FloatArray, modality: Modality, generator: np.random.Generator) -> FloatArray:
    """The image with its noise; the scale is the largest value of a density, 1 for an outline."""
    return image + generator.normal(0.0, noise_sd(image, modality), image.shape)


def noise_sd(image: FloatArray, modality: Modality) -> float:
    """Standard deviation of the noise of an image."""
    largest = float(np.max(image, initial=0.0)) if modality.kind == "density" else 1.0
    if largest <= 0:
        raise GliodeError(
            "imaging: the density is zero everywhere, so its noise level is undefined; check the scan"
        )
    return modality.noise * largest
