r"""Where a tumour came from: the backward reaction-diffusion problem u(T) -> u(0).

    u_t = div(D grad u) + rho g(u) on (0, T),    D, rho, T known,    data: noisy images of u(T)

Diffusion over T = 120 days damps a detail of wave number k by exp(-D k^2 T): what is finer than some
sqrt(D T) is lost in the noise, and the problem is ill-posed without end (Isakov 2017, chapter 9). The flow of
logistic growth u -> u e / (1 + u (e - 1)) has a pole at a negative density, and far above 1 it no longer
depends on u; so densities stay between 0 and the carrying capacity, by

    u(0) = w ln((1 + exp(m / w)) / (1 + exp((m - 1) / w))),    w = 0.01,

which is m itself from a few w on to a few w below 1, and the search is for the field m, free of bounds.
(Projections onto u >= 0 end the conjugacy of conjugate gradients; logarithms of the density see factors
where the data see sums.)

Residuals. r = B (F(u(0)) - y) / sd, B a Gaussian of 1.5 voxels' standard deviation on each image. White noise
of N voxels has ||noise||^2 = N +- sqrt(2 N), and that scatter alone hides most of what the images have to
say; smoothing takes it away and leaves the signal, which diffusion made smooth. The discrepancy principle is
stated for this r, with delta^2 = E ||B n||^2 = trace(B^T B) (Blanchard and Mathe 2012, conjugate gradients
under white noise).

Discretisation. The mesh's own error is as large as the noise. With a finer anatomy given, the data are
corrected by the defect F_(h/2) - F_h at a first estimate, one run on voxels half as large with half the step.
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
from solvers.fem.mesh import Domain
from solvers.fem.spaces import communicator
from solvers.spaces import symmetric
from tumour.anatomy import Anatomy
from tumour.growth import GrowthLaw
from tumour.model import Seed, TumourModel, domain_of
from tumour.patients import Scan, camera, visible

WIDTH = 0.01
"""w of the positive map: densities below it are as good as none (an outline of oedema is at 0.16)."""

SMOOTHING = 1.5
"""Standard deviation of B in voxels: 6 mm on those of 4 mm, less than the 9 mm of 120 days of diffusion."""

MARGIN = 12.0
"""mm of mesh around the voxels compared, so that the cut is not felt."""


@dataclass(frozen=True)
class Known:
    """What is known of the tumour: D in mm^2/day, rho in 1/day, age in days from u(0) to the first scan."""

    D_white: float
    D_grey: float
    rho: float
    age: float

    def __post_init__(self) -> None:
        for name in ("D_white", "D_grey", "rho", "age"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise GliodeError(f"locate.{name}: {value} must be positive and finite")


def positive(m: Tensor) -> Tensor:
    """u = w ln((1 + exp(m / w)) / (1 + exp((m - 1) / w))) in (0, 1), pointwise, increasing."""
    softplus = torch.nn.functional.softplus
    return WIDTH * (softplus(m / WIDTH) - softplus((m - 1.0) / WIDTH))


def inverse_positive(u: float) -> float:
    """The m of a density u in (0, 1)."""
    return u + WIDTH * (math.log(-math.expm1(-u / WIDTH)) - math.log(-math.expm1((u - 1.0) / WIDTH)))


class Growing:
    """u(0) -> images in the region, on one mesh.

    anatomy: of the scans; on: of the mesh (default the same), cut to the voxels of `region` (nx, ny, nz) of
    the scans' anatomy; scans: of one or several days; step: days.
    """

    def __init__(
        self,
        known: Known,
        anatomy: Anatomy,
        scans: Sequence[Scan],
        region: np.ndarray,
        law: GrowthLaw | None = None,
        seed: Seed | None = None,
        step: float = 5.0,
        on: Anatomy | None = None,
        reach: float = MARGIN,
    ) -> None:
        self.known, self.anatomy = known, anatomy
        wide = ndimage.distance_transform_edt(~region, sampling=anatomy.spacing) <= reach
        if on is None:
            domain = domain_of(anatomy, wide)
        else:
            domain = domain_of(on, _refined(wide, anatomy, on))
        self.model = TumourModel(domain, law, seed, step)
        self.days = sorted({scan.day for scan in scans})
        order = [[k for k, scan in enumerate(scans) if scan.day == day] for day in self.days]
        self._order = torch.tensor(np.argsort(np.concatenate(order)))
        self._wanted = [[scans[k].modality for k in ks] for ks in order]
        self._look = camera(self.model, anatomy, region)
        self.shown = torch.from_numpy(np.stack([scan.mask[region] for scan in scans]))
        D_white, D_grey, self._rho, self._age = (
            torch.tensor(value, dtype=torch.float64)
            for value in (known.D_white, known.D_grey, known.rho, known.age)
        )
        self._D = self.model.diffusivity(D_white, D_grey)

    @property
    def domain(self) -> Domain:
        """The mesh."""
        return self.model.domain

    def states(self, u: Tensor, days: Sequence[float] | None = None) -> list[Tensor]:
        """Densities (owned dofs,) at days (default: the scans') after the first scan."""
        return self.model.evolve(u, self._D, self._rho, self._age, self.days if days is None else days)

    def images(self, u: Tensor) -> Tensor:
        """The images of all scans where they hold, (data,), on every rank."""
        visits = zip(self.states(u), self._wanted, strict=True)
        images = torch.stack([image for state, wanted in visits for image in self._look(state, wanted)])
        return images[self._order][self.shown]


class SourceProblem:
    """The data, the forward map and the residuals' smoothing, on the scans' own voxels.

    finer: the same brain on voxels half as large, for the defect (None: no correction). region: mm around
    what the scans show in which voxels are compared.
    """

    def __init__(
        self,
        known: Known,
        anatomy: Anatomy,
        scans: Sequence[Scan],
        law: GrowthLaw | None = None,
        seed: Seed | None = None,
        step: float = 5.0,
        region: float = 15.0,
        finer: Anatomy | None = None,
    ) -> None:
        if not scans:
            raise GliodeError("scans: none given; at least one image is needed to go back from")
        for scan in scans:
            if scan.values.shape != anatomy.shape:
                raise GliodeError(
                    f"scan of day {scan.day:g}: shape {scan.values.shape}, the anatomy has {anatomy.shape}"
                )
        if min(scan.day for scan in scans) <= -known.age:
            raise GliodeError(f"locate.age: {known.age:g} days, but a scan is of a day before the source's")
        self.anatomy, self.scans, self.region = anatomy, list(scans), visible(anatomy, scans, region)
        self.growing = Growing(known, anatomy, scans, self.region, law, seed, step)
        self.shown = self.growing.shown
        for scan, covered in zip(self.scans, self.shown, strict=True):
            if not bool(covered.any()):
                raise GliodeError(
                    f"scan of day {scan.day:g} ({scan.modality.kind}): covers no voxel near the tumour; leave"
                    " it out or correct its mask"
                )
        self.data = torch.cat([torch.from_numpy(s.values[self.region & s.mask]) for s in self.scans])
        self.sd = torch.tensor([scan.sd for scan in self.scans], dtype=torch.float64)[
            self.shown.nonzero()[:, 0]
        ]
        impulse = np.zeros(2 * math.ceil(4 * SMOOTHING) + 1)
        impulse[len(impulse) // 2] = 1.0
        self._kernel = ndimage.gaussian_filter1d(impulse, SMOOTHING, mode="constant")
        self._finer: Growing | None = None
        self._reference = None if finer is None else (finer, law, seed, step / 2)

    @property
    def domain(self) -> Domain:
        """The mesh of the source."""
        return self.growing.domain

    @property
    def delta(self) -> float:
        """The root mean square of ||B n||, n white noise of variance 1."""
        total = 0.0
        for scan in self.scans:
            covered = self.region & scan.mask
            total += float(self._filtered(covered.astype(np.float64), self._kernel**2)[covered].sum())
        return math.sqrt(total)

    def smooth(self, values: Tensor) -> Tensor:
        """B values, (data,) -> (data,), on the tape: each image smoothed by itself, zero outside."""
        return symmetric(values, self._smooth)

    def _smooth(self, values: Tensor) -> Tensor:
        smoothed = []
        for image, scan in zip(values.split(self.shown.sum(1).tolist()), self.scans, strict=True):
            covered = self.region & scan.mask
            volume = np.zeros(covered.shape)
            volume[covered] = image.numpy()
            smoothed.append(self._filtered(volume, self._kernel)[covered])
        return torch.from_numpy(np.concatenate(smoothed))

    def _filtered(self, volume: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        for axis, count in enumerate(volume.shape):
            if count > 1:  # nothing to smooth across a slab
                volume = ndimage.correlate1d(volume, kernel, axis=axis, mode="constant")
        return volume

    def defect(self, u: Tensor) -> Tensor:
        """F_(h/2) - F_h at a source u, (data,); zero without a finer anatomy."""
        if self._reference is None:
            return torch.zeros_like(self.data)
        if self._finer is None:
            on, law, seed, step = self._reference
            known = self.growing.known
            self._finer = Growing(known, self.anatomy, self.scans, self.region, law, seed, step, on)
        with torch.no_grad():
            return self._finer.images(prolonged(self.domain, u, self._finer.domain)) - self.growing.images(u)

    @property
    def defect_cost(self) -> float:
        """What a defect costs in forward solves: one, and a finer one by its dofs times steps."""
        if self._finer is None:
            return 0.0
        return 1.0 + 2.0 * self._finer.domain.n_global / self.domain.n_global


def corner_values(domain: Domain, u: Tensor, empty: float = 0.0) -> np.ndarray:
    """A state at the corners of the voxel grid, (nx + 1, ny + 1, nz + 1) on every rank; `empty` elsewhere."""
    grid = domain.grid
    assert grid is not None
    volume = np.zeros((2, *(n + 1 for n in grid.shape)))
    where = tuple(grid.dof_corner[: domain.n_owned].T)
    volume[0][where], volume[1][where] = u.detach().numpy(), 1.0
    comm = communicator(domain)
    if comm is not None:
        total = np.empty_like(volume)
        comm.Allreduce(volume, total)
        volume = total
    return np.where(volume[1] > 0, volume[0], empty)


def prolonged(domain: Domain, u: Tensor, finer: Domain) -> Tensor:
    """A state at the vertices of a mesh of other voxels: interpolated, past the mesh's edge the nearest."""
    grid = domain.grid
    assert grid is not None
    values = corner_values(domain, u, math.nan)
    nearest = ndimage.distance_transform_edt(np.isnan(values), return_distances=False, return_indices=True)
    at = grid.coordinates(finer.points[: finer.n_owned]) + 0.5
    found = ndimage.map_coordinates(values[tuple(nearest)], at.T, order=1, mode="nearest")
    return torch.from_numpy(found)


def _refined(mask: np.ndarray, anatomy: Anatomy, finer: Anatomy) -> np.ndarray:
    """A mask of the anatomy's voxels on a finer anatomy's, by its voxels' centres."""
    centres = np.argwhere(finer.brain) @ finer.affine[:3, :3].T + finer.affine[:3, 3]
    at = np.clip(np.rint(anatomy.index(centres)).astype(np.int64), 0, np.array(mask.shape) - 1)
    out = np.zeros(finer.shape, dtype=bool)
    out[finer.brain] = mask[tuple(at.T)]
    return out
