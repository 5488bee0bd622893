r"""Coefficient fields as unknowns of the tumour problem: log D(x) and log rho(x), alone or together.

    D(x) = D_ref(x) exp(a_D(x)),    rho(x) = rho_ref exp(a_rho(x)),

a the departure from a reference: nodal values on the mesh (D of a cell takes the mean of its vertices' a; the
reaction acts at vertices), or, as the special case of few unknowns, one number a tissue,

    D_white exp(a_white), D_grey exp(a_grey) mixed as `TumourModel.diffusivity` does,
    rho = rho_ref exp(white a_white + grey a_grey).

A tumour of known start (a seed of known place and age, or the density of a visit) is grown with them to the
days of the scans, and imaged on the voxels that each scan covers: `FieldMap`. Under MPI a nodal field is
distributed over the ranks as any state, the images are on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from solvers.errors import GliodeError
from solvers.fem.mesh import Domain
from solvers.fem.spaces import communicator, lumped, sobolev
from solvers.spaces import Euclidean, Product, Space, replicate
from tumour.anatomy import Anatomy
from tumour.imaging import Camera
from tumour.model import TumourModel
from tumour.patients import Scan, camera

Name = Literal["D", "rho"]
By = Literal["vertex", "tissue"]
TISSUES = ("white", "grey")

FARTHEST = math.log(100.0)
"""No coefficient is tried beyond this factor from its reference: the map is not a number there."""


@dataclass(frozen=True)
class Reference:
    """What is expected beforehand, and holds where a coefficient is no unknown: mm^2/day and 1/day."""

    D_white: float
    D_grey: float
    rho: float

    def __post_init__(self) -> None:
        for name in ("D_white", "D_grey", "rho"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise GliodeError(f"reference.{name}: {getattr(self, name)} must be positive and finite")


@dataclass(frozen=True)
class Start:
    """The tumour as known: the density u (owned dofs,) on a day, before the first scan that is compared."""

    u: Tensor
    day: float


class Coefficients:
    """The unknown m -> D per cell and rho per owned dof, for the fields `of` by vertex or by tissue.

    of: "D", "rho" or both; m is flat, D's part first. Raises GliodeError for names unknown or given twice.
    """

    def __init__(
        self, model: TumourModel, of: Sequence[Name], reference: Reference, by: By = "vertex"
    ) -> None:
        if not of or not set(of) <= {"D", "rho"} or len(set(of)) < len(of):
            raise GliodeError(f"fields: {list(of)}; give D, rho, or both, each once")
        if by not in ("vertex", "tissue"):
            raise GliodeError(f"fields: by {by!r} is neither 'vertex' nor 'tissue'")
        self.model, self.domain, self.reference, self.by = model, model.domain, reference, by
        self.of: tuple[Name, ...] = tuple(name for name in ("D", "rho") if name in of)  # type: ignore[misc]
        self.comm = communicator(self.domain)
        self.D_reference = model.diffusivity(*_numbers(reference.D_white, reference.D_grey))
        self._white = vertex_means(self.domain, self.domain.cell_data["white"])
        self._dofs = torch.from_numpy(self.domain.cell_dofs.astype(np.int64))

    @property
    def size(self) -> int:
        """Number of (local) unknowns of one field."""
        return self.domain.n_owned if self.by == "vertex" else len(TISSUES)

    def product(self, space: Space) -> Product:
        """The space of m when each field lies in `space`."""
        return Product(dict.fromkeys(self.of, space))

    def space(self, length: float = 0.0) -> Product:
        """Of the fields: H1 of a length in mm (0: L2), by tissue Euclidean."""
        if self.by == "tissue":
            return self.product(Euclidean(len(TISSUES)))
        return self.product(sobolev(self.domain, length) if length else lumped(self.domain))

    def parts(self, m: Tensor) -> dict[Name, Tensor]:
        """Each field's part of m."""
        return dict(zip(self.of, m.split(self.size), strict=True))

    def D(self, a: Tensor | None) -> Tensor:
        """D per cell, mm^2/day, of the departure a (None: the reference); on the tape."""
        if a is None:
            return self.D_reference
        if self.by == "tissue":
            white, grey = replicate(a, self.comm).exp().unbind()
            return self.model.diffusivity(self.reference.D_white * white, self.reference.D_grey * grey)
        return self.D_reference * self.domain.ghosts.extend(a)[self._dofs].mean(1).exp()

    def rho(self, a: Tensor | None) -> Tensor:
        """rho per owned dof (None: the reference's number), 1/day; on the tape."""
        if a is None:
            return torch.tensor(self.reference.rho, dtype=torch.float64)
        return self.reference.rho * self.nodal(a).exp()

    def nodal(self, a: Tensor) -> Tensor:
        """The departure at the owned dofs; by tissue its mean over the tissues around each vertex."""
        if self.by == "vertex":
            return a
        white, grey = replicate(a, self.comm).unbind()
        return self._white * white + (1.0 - self._white) * grey

    def far(self, m: Tensor) -> bool:
        """Whether any rank holds a departure beyond `FARTHEST`. Collective."""
        most = float(m.detach().abs().max()) if len(m) else 0.0
        if self.comm is not None:
            most = self.domain.comm.allreduce(most, op=MPI.MAX)
        return not most <= FARTHEST


class FieldMap:
    """The forward map m -> images of all scans, each on the voxels it covers, flat and on every rank.

    region: (nx, ny, nz) voxels that count; scan.mask takes away what that scan does not show (missing
    slices). The therapy of the model is dated from the first scan, day 0, as everywhere.
    """

    def __init__(
        self,
        coefficients: Coefficients,
        start: Start,
        scans: Sequence[Scan],
        anatomy: Anatomy,
        region: np.ndarray,
    ) -> None:
        if not scans:
            raise GliodeError("fields: no scan after the start; a field is seen by how the tumour changes")
        self.coefficients, self.start = coefficients, start
        self.scans = sorted(scans, key=lambda scan: scan.day)
        self.days = sorted({scan.day for scan in self.scans})
        if not start.day < self.days[0]:
            raise GliodeError(f"start: day {start.day:g} is not before the first scan, day {self.days[0]:g}")
        self.model = coefficients.model
        # One camera for all scans that cover the same voxels, one sampling for those of one day.
        cameras: dict[bytes, Camera] = {}
        self._looks: dict[tuple[float, bytes], list[int]] = {}
        for place, scan in enumerate(self.scans):
            shown = region & scan.mask
            if not shown.any():
                raise GliodeError(
                    f"scan of day {scan.day:g} ({scan.modality.kind}): covers no voxel near the tumour; leave"
                    " it out or correct its mask"
                )
            key = shown.tobytes()
            if key not in cameras:
                cameras[key] = camera(self.model, anatomy, shown)
            self._looks.setdefault((scan.day, key), []).append(place)
        self._cameras = cameras
        self.data = torch.cat([torch.from_numpy(s.values[region & s.mask]) for s in self.scans])
        sizes = torch.tensor([int((region & s.mask).sum()) for s in self.scans])
        sd = torch.tensor([s.sd for s in self.scans], dtype=torch.float64)
        self.noise = sd.repeat_interleave(sizes)

    def states(self, m: Tensor, days: Sequence[float] | None = None) -> list[Tensor]:
        """Densities (owned dofs,) on days after the start, by default those of the scans; on the tape."""
        days = self.days if days is None else list(days)
        parts = self.coefficients.parts(m)
        D, rho = self.coefficients.D(parts.get("D")), self.coefficients.rho(parts.get("rho"))
        age = torch.tensor(-self.start.day, dtype=torch.float64)
        return self.model.evolve(self.start.u, D, rho, age, days)

    def __call__(self, m: Tensor) -> Tensor:
        """The images, (data,)."""
        if self.coefficients.far(m):
            # Not a number: the optimizer takes a shorter step, and no absurd diffusion is ever run.
            return m.sum() * torch.full_like(self.data, torch.nan)
        found = dict(zip(self.days, self.states(m), strict=True))
        images: dict[int, Tensor] = {}
        for (day, key), places in self._looks.items():
            wanted = [self.scans[place].modality for place in places]
            images |= zip(places, self._cameras[key](found[day], wanted), strict=True)
        return torch.cat([images[place] for place in range(len(self.scans))])


def vertex_means(domain: Domain, values: Tensor) -> Tensor:
    """Values per cell -> their volume-weighted mean over the cells around each owned dof."""
    shares = (values * domain.cell_volumes / domain.cell_dofs.shape[1])[:, None].expand(
        domain.cell_dofs.shape
    )
    volume = (domain.cell_volumes / domain.cell_dofs.shape[1])[:, None].expand(domain.cell_dofs.shape)
    dofs = torch.from_numpy(domain.cell_dofs.astype(np.int64)).reshape(-1)
    sums = [
        domain.ghosts.gather(
            torch.zeros(len(domain.points), dtype=torch.float64).index_add(0, dofs, part.reshape(-1))
        )
        for part in (shares, volume)
    ]
    return sums[0] / sums[1]


def smoothed_density(domain: Domain, anatomy: Anatomy, scan: Scan) -> Tensor:
    """The density of a noisy scan on the mesh of its voxels (owned dofs,), to start from.

    The means of the image over the voxels around each vertex, smoothed by (M + l^2 K) u = M v, l half a
    voxel. What is then below three standard deviations of the noise that is left is cut, for it would grow
    like a tumour: so is the tumour's own thin edge, which then lags.
    """
    grid = domain.grid
    if grid is None or grid.shape != anatomy.shape:
        raise GliodeError("start: a density to start from needs the mesh of the anatomy's voxels")
    space = sobolev(domain, 0.5 * float(np.mean(anatomy.spacing)))

    def smooth(image: np.ndarray) -> Tensor:
        cells = torch.from_numpy(image[tuple(grid.cell_voxel.T)])
        return space.riesz(domain.mass * vertex_means(domain, cells))

    noise = smooth(np.random.default_rng(0).normal(0.0, scan.sd, anatomy.shape))
    volume = domain.comm.allreduce(float(domain.mass.sum()))
    left = math.sqrt(domain.integral(noise.square()) / volume)
    u = smooth(np.where(scan.mask, scan.values, 0.0))
    return torch.where(u > 3.0 * left, u, 0.0).clamp(max=1.0)


def _numbers(*values: float) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(value, dtype=torch.float64) for value in values)
