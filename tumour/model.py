"""The tumour model: tissue, growth law and seed on a domain, as one differentiable map from parameters to
densities.

u_t = div(D(x) grad u) + rho g(u), D grad u . n = 0 on the brain's surface, u(0) the seed; mm, days, mm^2/day,
1/day.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from solvers.errors import GliodeError
from solvers.evolution import Evolution, PointwiseStep, Strang
from solvers.fem import mesh
from solvers.fem.diffusion import DiffusionStep, Scheme
from solvers.fem.mesh import Domain
from solvers.fem.operators import DiffusionOperator
from solvers.spaces import replicate
from tumour.anatomy import Anatomy
from tumour.growth import GrowthLaw, logistic
from tumour.therapy import Treatment

PARAMETERS = ("D_white", "D_grey", "rho", "x", "y", "z", "age")
UNITS = {
    "D_white": "mm^2/day",
    "D_grey": "mm^2/day",
    "rho": "1/day",
    "x": "mm",
    "y": "mm",
    "z": "mm",
    "age": "day",
}


@dataclass(frozen=True)
class Seed:
    """The tumour at age 0: u = amplitude exp(-|x - c|^2 / (2 width^2)); width in mm.

    Fixed by the case, because a smaller amplitude and an older tumour cannot be told apart.
    """

    amplitude: float = 0.5
    width: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.amplitude <= 1:
            raise GliodeError(f"seed.amplitude: {self.amplitude} is not in (0, 1]")
        if self.width <= 0:
            raise GliodeError(f"seed.width: {self.width} mm must be positive")


def domain_of(anatomy: Anatomy, region: np.ndarray | None = None) -> Domain:
    """Bricks for the brain's voxels (white + grey), with cell data `white` + `grey` = 1.

    region: (nx, ny, nz) bool, to leave out the brain's voxels outside; the cut lets nothing through.
    """
    tissue = anatomy.white + anatomy.grey
    with np.errstate(invalid="ignore", divide="ignore"):
        white = np.where(tissue > 0, anatomy.white / tissue, 0.0)
    mask = anatomy.brain if region is None else anatomy.brain & region
    return mesh.voxels(mask, anatomy.affine, {"white": white, "grey": 1.0 - white})


def default_step(spacing: Sequence[float]) -> float:
    """Days: 10 on voxels of 1 mm and more, less in proportion below, so that both errors shrink together.

    Chosen in scripts/benchmarks/sphere.py: 0.03 to 0.1 % of the tumour's size, for steps of 10 days.
    """
    return 10.0 * min([1.0, *spacing])


class TumourModel:
    """Parameters -> densities on one domain; differentiable in all of them, in both modes.

    step: time step aimed at, in days (default: `default_step`, on general meshes 10). checkpoint: see
    `Evolution`. therapy: treatments, dated from the seed's day 0 if the age is known, i.e. by `days after the
    first scan` (negative before it). progress: (done, all) after each step.
    """

    def __init__(
        self,
        domain: Domain,
        law: GrowthLaw | None = None,
        seed: Seed | None = None,
        step: float | None = None,
        scheme: Scheme = "rkl2",
        rtol: float = 1e-8,
        checkpoint: int | None = None,
        therapy: Sequence[Treatment] = (),
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if "white" not in domain.cell_data or "grey" not in domain.cell_data:
            raise GliodeError(
                "domain: cell data 'white' and 'grey' (fractions) are needed for the diffusivity"
            )
        if step is None:
            step = default_step([] if domain.grid is None else list(domain.grid.spacing))
        if step <= 0:
            raise GliodeError(f"step: {step} days must be positive")
        self.domain, self.law, self.seed, self.step = domain, law or logistic(), seed or Seed(), step
        self.operator = DiffusionOperator(domain, rtol=rtol)
        self.diffusion = DiffusionStep(self.operator, scheme)
        self.therapy = sorted(therapy, key=lambda t: t.day)
        reaction = PointwiseStep(self.law.flow, recompute=not self.law.closed_form)
        self._evolution = Evolution(Strang(reaction, self.diffusion), checkpoint, progress)
        self._points = torch.from_numpy(domain.points[: domain.n_owned])

    def seed_state(self, centre: Tensor) -> Tensor:
        """The seed at `centre` (3,) mm on the mesh.

        On bricks: the mean of a Gaussian over the box around each vertex, its variance reduced by the box's
        h^2/12, so that mass and second moments are those of the seed at any spacing h < sqrt(12) width.
        Elsewhere: nodal values.
        """
        grid, width = self.domain.grid, self.seed.width
        if grid is None:
            return self.seed.amplitude * torch.exp(-((self._points - centre) ** 2).sum(1) / (2 * width**2))
        axes = torch.from_numpy(grid.affine[:3, :3] / grid.spacing)
        along = (self._points - centre) @ axes
        u = torch.full((len(along),), self.seed.amplitude, dtype=torch.float64)
        for axis, h in enumerate(grid.spacing):
            variance = width**2 - h**2 / 12
            if variance <= 0:
                raise GliodeError(
                    f"seed.width: {width} mm is too narrow for a spacing of {h:g} mm; "
                    f"use more than {h / math.sqrt(12):.2f} mm"
                )
            scale = math.sqrt(2 * variance)
            at = along[:, axis]
            mean = (torch.erf((at + h / 2) / scale) - torch.erf((at - h / 2) / scale)) / (2 * h)
            u = u * mean * math.sqrt(2 * math.pi) * width
        return u

    def diffusivity(self, D_white: Tensor, D_grey: Tensor) -> Tensor:
        """D per cell, mm^2/day: D^(1/3) is the mean of the tissues' D^(1/3) (Landau-Lifshitz-Looyenga
        mixture).

        The rule of an isotropic mixture in three dimensions; averaging fractions over larger voxels and then
        mixing gives the same as mixing first, so that meshes of different spacing describe one and the same
        brain. The arithmetic mean, the upper bound of all mixtures, lets grey matter spread too fast on
        coarse meshes.
        """
        white, grey = self.domain.cell_data["white"], self.domain.cell_data["grey"]
        return (white * D_white ** (1 / 3) + grey * D_grey ** (1 / 3)) ** 3

    def steps_for(self, days: float) -> int:
        """Steps that cover a stretch of time at the step aimed at."""
        return max(1, math.ceil(abs(days) / self.step - 1e-9))

    def states(
        self, parameters: Mapping[str, Tensor], visits: Sequence[float] = (0.0,), age_steps: int | None = None
    ) -> list[Tensor]:
        """Densities (owned dofs,) at the visits, days after the first scan at age `age`.

        parameters: 0-d tensors named as in PARAMETERS. age_steps: steps of the first stretch (default from
        the age).
        """
        if visits[0] != 0.0 or any(b <= a for a, b in pairwise(visits)):
            raise GliodeError(f"visits: {list(visits)} must start at day 0 (the first scan) and increase")
        missing = [name for name in PARAMETERS if name not in parameters]
        if missing:
            raise GliodeError(f"parameters: {missing} are missing")
        m = {
            name: replicate(torch.as_tensor(parameters[name], dtype=torch.float64), self.domain.comm)
            for name in PARAMETERS
        }
        seed = self.seed_state(torch.stack([m["x"], m["y"], m["z"]]))
        D = self.diffusivity(m["D_white"], m["D_grey"])
        if not float(m["age"].detach()) > 0:
            raise GliodeError(f"age: {float(m['age'].detach())} days must be positive")
        return self.evolve(seed, D, m["rho"], m["age"], visits, age_steps)

    def evolve(
        self,
        u: Tensor,
        D: Tensor,
        rho: Tensor,
        age: Tensor,
        visits: Sequence[float] = (0.0,),
        age_steps: int | None = None,
    ) -> list[Tensor]:
        """Densities (owned dofs,) at the visits, days after the first scan, from u (owned dofs,) at day -age.

        D: per cell, mm^2/day; rho: a number, or one for each owned dof, 1/day. Under MPI numbers that are
        replicated come through `solvers.spaces.replicate`.
        """
        first_day = -float(age.detach())
        if any(b <= a for a, b in pairwise([first_day, *visits])):
            raise GliodeError(
                f"visits: {list(visits)} must increase, and come after the start, day {first_day:g}"
            )
        w = self.operator.conductances(D)
        days, found = [first_day, *(float(v) for v in visits)], []
        for start, end in pairwise(days):
            events = [t for t in self.therapy if start < t.day <= end]
            edges = [start, *sorted({t.day for t in events} | {end})]
            for a, b in pairwise(edges):
                first = a == first_day
                length = age + b if first else torch.tensor(b - a, dtype=torch.float64)
                steps = age_steps if first and age_steps else self.steps_for(b - a)
                u = self._evolution(u, length, steps, w, rho)
                for treatment in (t for t in events if t.day == b):
                    u = treatment(u)
            found.append(u)
        return found
