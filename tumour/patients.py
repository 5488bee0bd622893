"""Synthetic patients: parameters drawn from published ranges, tumours of realistic size, scans with noise;
seeded.

Ranges. D_white: log-normal, median 0.35 mm^2/day, sd of the logarithm 0.5; rho: log-normal, median 0.02/day,
sd 0.35 (inside the spread of glioblastoma in Harpold, Alvord & Swanson 2007: D 6 to 324 mm^2/year, rho 1 to
32 /year); D_white/D_grey: log-normal, median 6, sd 0.3 (Swanson et al. 2000 use 5, Lipkova et al. 2019 use
10). The seed lies in white-dominated tissue. The age is the time the tumour takes to reach an oedema volume
drawn uniformly from 20 to 100 cm^3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from solvers.errors import GliodeError
from solvers.fem.mesh import FloatArray
from tumour.anatomy import Anatomy
from tumour.imaging import LEVELS, Camera, Modality, add_noise, noise_sd
from tumour.model import TumourModel, domain_of


@dataclass(frozen=True)
class Scan:
    """One image at one visit on the grid of an anatomy.

    day: days after the first scan; values: (nx, ny, nz), used where `mask` (the same shape) is true; sd:
    standard deviation of the noise at each voxel.
    """

    day: float
    modality: Modality
    values: FloatArray
    mask: np.ndarray
    sd: float

    def __post_init__(self) -> None:
        if self.values.shape != self.mask.shape:
            raise GliodeError(
                f"scan of day {self.day:g}: values {self.values.shape} and mask {self.mask.shape} disagree"
            )
        if not np.isfinite(self.values[self.mask]).all():
            raise GliodeError(
                f"scan of day {self.day:g} ({self.modality.kind}): holds NaN or infinite values in the brain"
            )
        if not self.sd > 0:
            raise GliodeError(
                f"scan of day {self.day:g} ({self.modality.kind}): the noise level {self.sd} must be positive"
            )


def visible(anatomy: Anatomy, scans: Sequence[Scan], reach: float) -> np.ndarray:
    """Voxels of the brain within `reach` mm of what any scan shows (values over 0.3 of the largest)."""
    shown = np.zeros(anatomy.shape, dtype=bool)
    for scan in scans:
        # A 3x3x3 median removes lone noisy voxels.
        values = ndimage.median_filter(np.where(scan.mask, scan.values, 0.0), 3)
        shown |= values > 0.3 * max(values.max(), 6 * scan.sd)
    if not shown.any():
        raise GliodeError("scans: nothing is visible above the noise; check the images and their noise level")
    near = ndimage.distance_transform_edt(~shown, sampling=anatomy.spacing) <= reach
    region: np.ndarray = near & anatomy.brain
    return region


def camera(model: TumourModel, anatomy: Anatomy, mask: np.ndarray, sub: int = 2) -> Camera:
    """A camera whose voxels are those of the anatomy's grid inside the mask."""
    centres = np.argwhere(mask) @ anatomy.affine[:3, :3].T + anatomy.affine[:3, 3]
    return Camera(model.domain, centres, anatomy.affine[:3, :3], sub)


def observe(
    model: TumourModel,
    parameters: dict[str, float],
    anatomy: Anatomy,
    visits: Sequence[float],
    modalities: Sequence[Modality],
    noise_seed: int,
    sub: int = 4,
) -> list[Scan]:
    """Noisy scans on the anatomy's grid of a tumour grown by `model` (best on a finer mesh than the
    anatomy's).
    """
    states = model.states({k: torch.tensor(v, dtype=torch.float64) for k, v in parameters.items()}, visits)
    look = camera(model, anatomy, anatomy.brain, sub)
    return scans_of(states, look, anatomy, visits, modalities, noise_seed)


def scans_of(
    states: Sequence[Tensor],
    look: Camera,
    anatomy: Anatomy,
    visits: Sequence[float],
    modalities: Sequence[Modality],
    noise_seed: int,
) -> list[Scan]:
    """Noisy scans of given states, one for each visit and modality; the noise is that of `noise_seed`."""
    generator = np.random.default_rng(noise_seed)
    scans = []
    for day, u in zip(visits, states, strict=True):
        for modality, image in zip(modalities, look(u, modalities), strict=True):
            clean = image.numpy()
            values = np.zeros(anatomy.shape)
            values[anatomy.brain] = add_noise(clean, modality, generator)
            scans.append(Scan(float(day), modality, values, anatomy.brain, noise_sd(clean, modality)))
    return scans


def draw(anatomy: Anatomy, seed: int, growth_model: TumourModel | None = None) -> dict[str, float]:
    """Parameters of the synthetic patient number `seed` on this anatomy (drawn until the tumour is
    realistic).

    Realistic: the oedema volume is reached at an age of 60 to 1500 days and the enhancing core holds at least
    1 cm^3. growth_model: a cheap model (a coarse mesh) that finds the age; made at 8 mm by default.
    """
    generator = np.random.default_rng([seed, 20261120])
    model = growth_model or TumourModel(domain_of(anatomy.resample(8.0)))
    inside = np.argwhere(anatomy.brain & (anatomy.white > 0.6))
    while True:
        D = math.exp(generator.normal(math.log(0.35), 0.5))
        rho = math.exp(generator.normal(math.log(0.02), 0.35))
        ratio = math.exp(generator.normal(math.log(6.0), 0.3))
        voxel = inside[generator.integers(len(inside))] + generator.uniform(-0.5, 0.5, 3)
        centre = voxel @ anatomy.affine[:3, :3].T + anatomy.affine[:3, 3]
        volume = generator.uniform(20e3, 100e3)
        parameters = {
            "D_white": D, "D_grey": D / ratio, "rho": rho,
            "x": float(centre[0]), "y": float(centre[1]), "z": float(centre[2]),
        }  # fmt: skip
        age = _age_at(model, parameters, volume)
        if age is not None:
            return {**parameters, "age": age}


def _age_at(model: TumourModel, parameters: dict[str, float], volume: float) -> float | None:
    """The age at which {u > 0.16} first holds `volume` mm^3; None where it is not realistic."""
    m = {k: torch.tensor(v, dtype=torch.float64) for k, v in parameters.items()}
    low, high = 60.0, 1500.0

    def grown(age: float) -> Tensor:
        return model.states({**m, "age": torch.tensor(age, dtype=torch.float64)})[0]

    def oedema(u: Tensor) -> float:
        # A smooth count of the volume: sharp thresholds jump by whole control volumes on a coarse mesh.
        shown = torch.sigmoid((u - LEVELS["oedema"]) / 0.02)
        return model.domain.integral(shown) - model.domain.integral(torch.zeros_like(u) + shown.min())

    if oedema(grown(low)) > volume or oedema(grown(high)) < volume:
        return None
    while high - low > 1.0:
        middle = (low + high) / 2
        low, high = (middle, high) if oedema(grown(middle)) < volume else (low, middle)
    u = grown(low)
    core = model.domain.integral((u > LEVELS["enhancing"]).to(torch.float64))
    return low if core >= 1e3 else None
