r"""Cohorts on MNI152 that priors of coefficient fields are trained and judged on: log D, grown and scanned.

    log(D(x) / D_ref(x)) = sum_i log(factor_i) shape_i(x) (1 + 0.2 tanh texture),

one or two shapes (as likely), each of a factor of 3 to 5 or of 0.2 to 0.4 (as likely, log-uniform), within 8
to 22 mm of the tumour's seed in white matter, 20 mm apart. Family `smooth`: ellipsoids with semi-axes of 10
to 20 mm, of a sharp or a soft edge; every third field is textured, over 8 mm. Family `odd`, never trained on:
bent tubes, crescents and boxes of the same sizes, factors and edges.

The tumour is known: D_white 1 and D_grey 0.3 mm^2/day, rho 0.012/day, a seed 60 days before the first of six
visits, 40 days apart. The truth is grown on voxels of 3 mm with steps of 10 days in a cube of 84 mm around
the seed, and scanned as a density with noise of 5 % of its largest value, on the voxels of whichever mesh the
field is looked for on, with steps of 20 days. What that mesh gets wrong of the growth with the reference D,
as the finer one shows, is taken off the data. A split, a family and a number are the seed of everything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

from solvers.errors import GliodeError
from solvers.fem.mesh import FloatArray
from tumour import shapes
from tumour.anatomy import Anatomy, mni152
from tumour.fields import Coefficients, FieldMap, Reference, Start
from tumour.imaging import Modality
from tumour.model import Seed, TumourModel, domain_of
from tumour.patients import camera, scans_of, visible
from tumour.priors import FAMILIES, SPLITS, Split

REFERENCE, AGE = Reference(D_white=1.0, D_grey=0.3, rho=0.012), 60.0
DAYS, NOISE, SEED = tuple(40.0 * k for k in range(6)), 0.05, Seed(0.5, 6.0)
FACTORS, SIZES, EDGES = ((3.0, 5.0), (0.2, 0.4)), (10.0, 20.0), (0.7, 2.5)
AWAY, APART = (8.0, 22.0), 20.0
TEXTURED, TEXTURE, STRENGTH = 1 / 3, 8.0, 0.2
HALF = 42
"""mm: half the cube's side; voxels of 6, 4, 3 and 2 mm fill it alike."""
TRUTH, TRUTH_STEP, STEP, REACH = 3.0, 10.0, 20.0, 15.0
DENSITY = Modality("density", NOISE)
SEEN = 0.05
"""Errors count where the true density comes to this."""


@dataclass(frozen=True)
class FieldCase:
    """A departure of log D at points (n, 3) in mm, and the seed (3,) of the tumour that meets it."""

    name: str
    seed: FloatArray
    departure: shapes.Shape
    noise_seed: int

    def problem(self, spacing: float) -> FieldProblem:
        """The search's problem on voxels of `spacing` mm."""
        return FieldProblem(self, spacing)

    @cached_property
    def grown(self) -> tuple[TumourModel, list[Tensor], list[Tensor]]:
        """The truth's model, its densities on DAYS, and those with the reference for D."""
        model = TumourModel(domain_of(cube(self.seed, TRUTH)), step=TRUTH_STEP, seed=SEED)
        domain, place = model.domain, torch.from_numpy(self.seed)
        middle = domain.points[domain.cell_dofs].mean(1)
        D = Coefficients(model, ["D"], REFERENCE).D_reference
        rho, age = (torch.tensor(x, dtype=torch.float64) for x in (REFERENCE.rho, AGE))
        with torch.no_grad():
            other = D * torch.from_numpy(np.exp(self.departure(middle)))
            u = model.seed_state(place)
            return model, model.evolve(u, other, rho, age, DAYS), model.evolve(u, D, rho, age, DAYS)


class FieldProblem:
    """What is to be found of a case on one mesh: `forward`, its data inside; `truth` as the mesh can show it,
    its means over control volumes; `weight` (owned dofs,), the mass of the vertices that count.
    """

    def __init__(self, case: FieldCase, spacing: float) -> None:
        self.case, self.brain = case, cube(case.seed, spacing)
        grown, states, expected = case.grown
        look = camera(grown, self.brain, self.brain.brain)
        scans = scans_of(states, look, self.brain, DAYS, [DENSITY], case.noise_seed)
        model = TumourModel(domain_of(self.brain), step=STEP, seed=SEED)
        start = Start(model.seed_state(torch.from_numpy(case.seed)), -AGE)
        self.domain, region = model.domain, visible(self.brain, scans, REACH)
        self.forward = FieldMap(Coefficients(model, ["D"], REFERENCE), start, scans, self.brain, region)
        self.truth = self.domain.project(case.departure, 4)
        with torch.no_grad():
            # What the mesh gets wrong is known where the field is the reference's: it is taken off the data.
            finer = torch.cat([look(u, [DENSITY])[0] for u in expected])
            finer = finer.view(len(DAYS), -1)[:, torch.from_numpy(region[self.brain.brain])].reshape(-1)
            self.forward.data += self.forward(torch.zeros_like(self.truth)) - finer
            seen = torch.stack(self.forward.states(self.truth)).amax(0) > SEEN
        self.weight = self.domain.mass * seen
        if not float((self.weight * self.truth**2).sum()) > 0:
            raise GliodeError(f"{case.name}: nothing of the field is seen")

    def error(self, m: Tensor) -> Tensor:
        """||m - truth|| / ||truth|| where the tumour has been, 0-d, on the tape; 1 of the reference."""
        square = (self.weight * (m - self.truth) ** 2).sum() / (self.weight * self.truth**2).sum()
        return square.sqrt()


def field_case(split: Split, number: int, family: shapes.Family = "smooth") -> FieldCase:
    """The case of a split, a family and a number. Raises GliodeError for names that are none."""
    if split not in SPLITS or family not in FAMILIES or number < 0:
        raise GliodeError(f"field case: no {split!r} {family!r} {number}")
    generator = np.random.default_rng([20261122, SPLITS[split], FAMILIES[family], number])
    seed = _seed(generator)
    centres: list[FloatArray] = []
    count = int(generator.integers(1, 3))
    while len(centres) < count:
        at = seed + generator.uniform(*AWAY) * shapes.direction(generator)
        if _whole().contains(at[None])[0] and all(np.linalg.norm(at - c) > APART for c in centres):
            centres.append(at)
    parts, logs = [], []
    for centre in centres:
        edge = float(generator.choice(EDGES))
        if family == "odd":
            parts.append(shapes.drawn(generator, centre, SIZES, family, edge))
        else:
            semi = generator.uniform(*SIZES, 3)
            parts.append(shapes.ellipsoid(centre, semi, shapes.rotation(generator), edge))
        logs.append(float(generator.uniform(*np.log(FACTORS[generator.integers(2)]))))
    departure = shapes.total(parts, logs, math.log(FACTORS[0][1]))
    if family == "smooth" and generator.uniform() < TEXTURED:
        departure = shapes.modulated(departure, shapes.texture(generator, TEXTURE, 64), STRENGTH)
    return FieldCase(f"{split} {family} {number}", seed, departure, int(generator.integers(2**31)))


def cube(centre: FloatArray, spacing: float) -> Anatomy:
    """Of MNI152, the cube of 2 HALF mm around a point (RAS mm), in voxels of `spacing` mm.

    Raises GliodeError where the spacing does not fill the cube, or the brain in it is in pieces.
    """
    if not math.isclose(2 * HALF / spacing, round(2 * HALF / spacing)):
        raise GliodeError(f"spacing {spacing}: {2 * HALF} mm are no whole number of voxels")
    whole = _whole()
    low = np.floor(whole.index(np.asarray(centre))).astype(int) - HALF
    low = np.clip(low, 0, np.array(whole.shape) - 2 * HALF)
    cut = tuple(slice(first, first + 2 * HALF) for first in low)
    affine = whole.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ low
    parts = (whole.white[cut], whole.grey[cut], whole.fluid[cut])
    return Anatomy(*parts, affine, source="MNI152, cut").resample(spacing)


@cache
def _whole() -> Anatomy:
    return mni152(1.0)


@cache
def _white() -> np.ndarray:
    return np.argwhere(_whole().brain & (_whole().white > 0.6))


def _seed(generator: np.random.Generator) -> FloatArray:
    """A place in white matter whose cube holds a brain in one piece at 6 mm and finer."""
    whole, inside = _whole(), _white()
    while True:
        at = inside[generator.integers(len(inside))] + generator.uniform(-0.5, 0.5, 3)
        place: FloatArray = whole.affine[:3, :3] @ at + whole.affine[:3, 3]
        try:
            for spacing in (6.0, 4.0, TRUTH):
                cube(place, spacing).require_inside(place, "seed")
        except GliodeError:
            continue
        return place
