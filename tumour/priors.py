r"""Cohorts on MNI152 that priors are trained and judged on: sources of tumours, grown and scanned.

A source is u(0) = min(sum_i a_i shape_i (1 + 0.5 tanh texture), 0.95): one focus (half of the cases), two
(three in ten) or three, the first in white matter, the others 12 to 25 mm from it in the brain; semi-axes of
5 to 14 mm, amplitudes of 0.3 to 0.6, both uniform; every third source is textured, over 6 mm. Family
`smooth`: balls, ellipsoids and bumps; `odd`, never trained on: bent tubes, crescents and boxes. D_white,
D_white / D_grey and rho are log-normal as in `tumour.patients`, the age is 120 days, growth is logistic.

The truth is grown on voxels of 4/3 mm with steps of 2 days, within 54 mm of its source, and scanned as a
density with noise of 5 % of its largest value, on the voxels of whichever anatomy it is looked for on. A
split, a family and a number are the seed of everything: TRAIN, VALIDATION and TEST share no draw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from solvers.fem.mesh import Domain, FloatArray
from tumour import shapes
from tumour.anatomy import Anatomy, mni152
from tumour.imaging import Modality, add_noise, noise_sd
from tumour.model import TumourModel, domain_of
from tumour.patients import Scan, camera
from tumour.source import Known, SourceProblem

Split = Literal["train", "validation", "test"]

SPLITS: dict[str, int] = {"train": 1, "validation": 2, "test": 3}
FAMILIES: dict[str, int] = {"smooth": 1, "odd": 2}

AGE, NOISE = 120.0, 0.05
SIZES, AMPLITUDES, APART = (5.0, 14.0), (0.3, 0.6), (12.0, 25.0)
FOCI = (0.5, 0.3, 0.2)
TEXTURED, TEXTURE, STRENGTH, LARGEST = 1 / 3, 6.0, 0.5, 0.95
TRUTH, STEP, REACH = 4 / 3, 2.0, 50.0
"""Of the truth: mm and days; mm around the first focus in which voxels are scanned (the mesh: 4 mm more)."""


@dataclass(frozen=True)
class SourceCase:
    """A source and the tumour it becomes. shape: u(0) at points (n, 3) in mm; centre: of its first focus."""

    name: str
    known: Known
    centre: FloatArray
    shape: shapes.Shape
    noise_seed: int


@cache
def brain(spacing: float) -> Anatomy:
    """MNI152, read once."""
    return mni152(spacing)


def source_case(split: Split, number: int, family: shapes.Family = "smooth") -> SourceCase:
    """The case of a split, a family and a number."""
    generator = np.random.default_rng([20261121, SPLITS[split], FAMILIES[family], number])
    anatomy = brain(4.0)
    D = math.exp(generator.normal(math.log(0.35), 0.5))
    rho = math.exp(generator.normal(math.log(0.02), 0.35))
    ratio = math.exp(generator.normal(math.log(6.0), 0.3))
    inside = np.argwhere(anatomy.brain & (anatomy.white > 0.6))
    voxel = inside[generator.integers(len(inside))] + generator.uniform(-0.5, 0.5, 3)
    centres = [voxel @ anatomy.affine[:3, :3].T + anatomy.affine[:3, 3]]
    count = 1 + int(generator.choice(len(FOCI), p=FOCI))
    while len(centres) < count:
        at = centres[0] + generator.uniform(*APART) * shapes.direction(generator)
        if anatomy.contains(at[None])[0]:
            centres.append(at)
    parts = [shapes.drawn(generator, centre, SIZES, family) for centre in centres]
    source = shapes.total(parts, list(generator.uniform(*AMPLITUDES, count)), LARGEST)
    if generator.uniform() < TEXTURED:
        source = shapes.modulated(source, shapes.texture(generator, TEXTURE), STRENGTH)
        source = shapes.total([source], [1.0], LARGEST)
    name = f"{split} {family} {number}"
    return SourceCase(name, Known(D, D / ratio, rho, AGE), centres[0], source, int(generator.integers(2**31)))


def boxed(domain: Domain, shape: shapes.Shape, sub: int = 4) -> Tensor:
    """The mean of a shape over the box of one voxel around each vertex, by sub^3 points, (owned dofs,)."""
    assert domain.grid is not None
    one = (np.arange(sub) + 0.5) / sub - 0.5
    cube = np.stack(np.meshgrid(one, one, one, indexing="ij"), -1).reshape(-1, 3)
    offsets = cube @ domain.grid.affine[:3, :3].T
    points = domain.points[: domain.n_owned]
    mean = sum(shape(points + offset) for offset in offsets) / len(offsets)
    return torch.from_numpy(np.asarray(mean))


@dataclass(frozen=True)
class Grown:
    """A case grown: the model of the truth's mesh, u(0) and u(T) on it."""

    case: SourceCase
    model: TumourModel
    source: Tensor
    state: Tensor

    def scan(self, anatomy: Anatomy) -> Scan:
        """The noisy density on the voxels of an anatomy."""
        mask = _near(anatomy, self.case.centre, REACH) & anatomy.brain
        modality = Modality("density", NOISE)
        with torch.no_grad():
            clean = camera(self.model, anatomy, mask, 3)(self.state, [modality])[0].numpy()
        values = np.zeros(mask.shape)
        values[mask] = add_noise(clean, modality, np.random.default_rng(self.case.noise_seed))
        return Scan(0.0, modality, values, mask, noise_sd(clean, modality))

    def problem(self, spacing: float) -> SourceProblem:
        """The search's problem on voxels of `spacing` mm, steps of 5 days, a defect on half of them."""
        anatomy = brain(spacing)
        known = self.case.known
        return SourceProblem(known, anatomy, [self.scan(anatomy)], finer=brain(spacing / 2))


def grown(case: SourceCase, spacing: float = TRUTH, step: float = STEP) -> Grown:
    """The case on its fine mesh."""
    anatomy = brain(spacing)
    model = TumourModel(domain_of(anatomy, _near(anatomy, case.centre, REACH + 4)), step=step)
    known = case.known
    numbers = [
        torch.tensor(x, dtype=torch.float64) for x in (known.D_white, known.D_grey, known.rho, known.age)
    ]
    with torch.no_grad():
        source = boxed(model.domain, case.shape, 2)
        D = model.diffusivity(numbers[0], numbers[1])
        (state,) = model.evolve(source, D, numbers[2], numbers[3])
    return Grown(case, model, source, state)


def _near(anatomy: Anatomy, centre: FloatArray, reach: float) -> np.ndarray:
    """Voxels whose centres are within `reach` mm of a point."""
    index = np.indices(anatomy.shape).reshape(3, -1).T
    points = index @ anatomy.affine[:3, :3].T + anatomy.affine[:3, 3]
    near: np.ndarray = (np.linalg.norm(points - centre, axis=1) <= reach).reshape(anatomy.shape)
    return near
