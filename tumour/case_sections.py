"""The sections of a case file: every key with its meaning, default and limits (mm, days, RAS coordinates).

`tumour.case` puts them together, reads files, words messages, and makes the table in data/cases/README.md.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError


def problem(text: str) -> PydanticCustomError:
    """An error with a message of ours."""
    return PydanticCustomError("gliode", "{text}", {"text": text})


class Section(BaseModel):
    """A section of the case file: nothing but its keys, all of them finite and fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _number(value: Any) -> Any:
    if isinstance(value, bool):  # YAML reads yes and on as true
        raise problem(f"must be a number (got {str(value).lower()})")
    return value


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _existing(path: Path, info: ValidationInfo) -> Path:
    folder = (info.context or {}).get("folder", Path())
    path = (folder / path.expanduser()).resolve()
    if not path.is_file():
        raise problem(f"no such file: {path}")
    return path


Number = Annotated[float, BeforeValidator(_number)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Whole = Annotated[int, BeforeValidator(_number), Field(ge=0)]
Point = Annotated[list[Number], Field(min_length=3, max_length=3)]
File = Annotated[Path, AfterValidator(_existing)]
Labels = Annotated[list[Whole], BeforeValidator(_listed), Field(min_length=1)]


class Mni152(Section):
    """The MNI152 brain that comes with nilearn."""

    source: Literal["mni152"]
    spacing: Annotated[Number, Field(ge=1)] = Field(
        default=3.0, description="voxel side in mm of scans and maps, 1 or more"
    )


class NiftiMaps(Section):
    """Tissue probability maps on one grid, in any orientation."""

    source: Literal["nifti"]
    white: File = Field(description="NIfTI file: probability of white matter")
    grey: File = Field(description="NIfTI file: probability of grey matter")
    fluid: File | None = Field(
        default=None, description="NIfTI file: probability of fluid; default: what is left"
    )
    t1: File | None = Field(default=None, description="NIfTI file for pictures, on the same grid")
    spacing: Positive | None = Field(
        default=None, description="voxel side in mm to resample to; default: no resampling"
    )


class LabelMap(Section):
    """One map of tissue labels."""

    source: Literal["labels"]
    path: File = Field(description="NIfTI file of labels")
    white: Labels = Field(default=[3], description="label(s) of white matter; defaults: FSL FAST's")
    grey: Labels = Field(default=[2], description="the same of grey matter")
    fluid: Labels | None = Field(default=None, description="the same of fluid; default: what is left")
    t1: File | None = Field(default=None, description="NIfTI file for pictures, on the same grid")
    spacing: Positive | None = Field(
        default=None, description="voxel side in mm to resample to; default: no resampling"
    )


class MeshFile(Section):
    """A mesh of white and grey matter (tetrahedra or hexahedra, mm); results go to ParaView only."""

    source: Literal["mesh"]
    path: File = Field(description="any mesh that meshio reads, with a label for each cell")
    labels: str | None = Field(default=None, description="cell data with the labels; default: the only one")
    white: Labels = Field(description="label, or list of labels, of white matter")
    grey: Labels = Field(description="the same of grey matter")


Anatomy = Annotated[Mni152 | NiftiMaps | LabelMap | MeshFile, Field(discriminator="source")]


class Exponential(Section):
    """Malthus: g(u) = u, not bounded by 1."""

    law: Literal["exponential"]


class Logistic(Section):
    """Verhulst: g(u) = u (1 - u)."""

    law: Literal["logistic"]


class Gompertz(Section):
    """g(u) = u ln((1 + eps)/(u + eps))."""

    law: Literal["gompertz"]
    eps: Annotated[Number, Field(gt=0, lt=1)] = Field(default=1e-3, description="makes g'(0) finite")


class Allee(Section):
    """g(u) = u (1 - u)(u - threshold)."""

    law: Literal["allee"]
    threshold: Annotated[Number, Field(gt=0, lt=1)] = Field(
        default=0.05, description="density below which cells die"
    )


Growth = Annotated[Exponential | Logistic | Gompertz | Allee, Field(discriminator="law")]


class Seed(Section):
    """The tumour at age 0: u = amplitude exp(-|x - position|^2 / (2 width^2)).

    Not identified: a smaller seed and an older tumour look the same.
    """

    amplitude: Annotated[Number, Field(gt=0, le=1)] = Field(
        default=0.5, description="largest density, in (0, 1]"
    )
    width: Positive = Field(default=3.0, description="standard deviation in mm")


class Model(Section):
    """What grows, and how it is solved."""

    growth: Growth = Field(
        default=Logistic(law="logistic"), description="growth law g in u_t = div(D grad u) + rho g(u)"
    )
    seed: Seed = Field(default=Seed(), description="the tumour at age 0")
    step: Positive = Field(
        default=5.0, description="time step in days, shortened to meet visits and treatments"
    )
    scheme: Literal["rkl2", "sdirk2", "crank-nicolson", "implicit-euler"] = Field(
        default="rkl2", description="of diffusion; the default needs no linear solver"
    )
    tolerance: Annotated[Number, Field(gt=0, le=1e-2)] = Field(
        default=1e-8, description="of the linear solver of the other schemes"
    )


class Truth(Section):
    """The tumour that simulate.py grows, and that identify.py hides where the visits have no files."""

    D_white: Positive = Field(description="diffusivity in white matter, mm^2/day")
    D_grey: Positive = Field(description="diffusivity in grey matter, mm^2/day")
    rho: Positive = Field(description="growth rate, 1/day")
    position: Point = Field(description="where it started: [x, y, z] in RAS mm")
    age: Positive = Field(description="days from the seed to the first visit")
    spacing: Positive | None = Field(
        default=None, description="voxel side in mm to grow it on; default: the anatomy's"
    )
    step: Positive | None = Field(default=None, description="time step in days; default: the model's")


class Dated(Section):
    """Something that happens on a day, or on a date."""

    day: Number | None = Field(default=None, description="days after the first visit")
    date_: date | None = Field(None, alias="date", description="instead of day: YYYY-MM-DD")


class Scan(Section):
    """One image of one visit."""

    kind: Literal["density", "enhancing", "oedema", "segmentation"] = Field(
        description="density: u itself (PET-like); enhancing, oedema: the outline as a fraction in [0, 1];"
        " segmentation: a BraTS label map, read as both outlines"
    )
    noise: Positive = Field(
        default=0.05, description="standard deviation at a voxel, relative to the largest value"
    )
    width: Positive = Field(default=0.05, description="of an outline's smoothed threshold, in density")
    level: Annotated[Number, Field(gt=0, lt=1)] | None = Field(
        default=None, description="density at an outline; default: 0.6 enhancing, 0.16 oedema"
    )
    file: File | None = Field(
        default=None, description="NIfTI file in the anatomy's space; default: simulated"
    )
    mask: File | None = Field(
        default=None, description="NIfTI file, above 0.5 where the scan holds; default: everywhere"
    )
    slices: Annotated[list[Number], Field(min_length=2, max_length=2)] | None = Field(
        default=None, description="lowest and highest z in mm that the scan covers; default: all"
    )

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Scan:
        if self.slices is not None and not self.slices[0] < self.slices[1]:
            raise problem(f"slices: {self.slices[0]:g} must be below {self.slices[1]:g}")
        if self.kind == "segmentation" and self.file is None:
            raise problem("a segmentation needs a file; to simulate one, use kinds enhancing and oedema")
        if self.kind in ("density", "segmentation") and self.level is not None:
            raise problem(f"a {self.kind} has no level")
        return self


class Visit(Dated):
    """One day of scans."""

    scans: list[Scan] = Field(default=[], description="the images of that day")


class Radiotherapy(Dated):
    """A course of daily fractions on weekdays, five on and two off, by the linear-quadratic model."""

    kind: Literal["radiotherapy"]
    fractions: Annotated[Whole, Field(ge=1)] = Field(default=30, description="how many")
    dose: Positive = Field(default=2.0, description="Gy each")
    alpha: NotNegative = Field(default=0.035, description="1/Gy")
    beta: NotNegative = Field(default=0.0035, description="1/Gy^2")


class Resection(Dated):
    """Surgery: no tumour is left in the cavity."""

    kind: Literal["resection"]
    cavity: File | None = Field(
        default=None, description="NIfTI file, above 0.5 where the tumour was removed"
    )
    centre: Point | None = Field(default=None, description="or a ball: [x, y, z] in RAS mm")
    radius: Positive | None = Field(default=None, description="and its radius in mm")

    @model_validator(mode="after")
    def _one_cavity(self) -> Resection:
        if (self.cavity is None) == (self.centre is None) or (self.centre is None) != (self.radius is None):
            raise problem("give either cavity, or centre and radius")
        return self


Treatment = Annotated[Radiotherapy | Resection, Field(discriminator="kind")]


class Lognormal(Section):
    """A positive number known beforehand to some factor."""

    median: Positive = Field(description="median")
    sd: Positive = Field(description="standard deviation of the natural logarithm")


def _lognormal(median: float, sd: float) -> Lognormal:
    return Lognormal(median=median, sd=sd)


class Prior(Section):
    """What is known beforehand: a Gaussian in the logarithms and the position."""

    D_white: Lognormal = Field(default=_lognormal(0.3, 1.0), description="in mm^2/day")
    ratio: Lognormal = Field(default=_lognormal(6.0, 0.5), description="D_white / D_grey")
    rho: Lognormal = Field(default=_lognormal(0.02, 0.7), description="in 1/day")
    age: Lognormal = Field(default=_lognormal(350.0, 0.8), description="in days, at the first visit")
    position: Positive = Field(
        default=15.0, description="standard deviation in mm about the outlines' centre"
    )


class Identify(Section):
    """How to identify, on voxels of the anatomy's spacing and on twice that."""

    prior: Prior = Field(default=Prior(), description="what is known beforehand")
    starts: Annotated[Whole, Field(ge=1)] = Field(
        default=3, description="positions that the search starts from"
    )
    level: Annotated[Number, Field(gt=0, lt=1)] = Field(default=0.9, description="of the credible intervals")
    region: Positive = Field(default=20.0, description="mm around the visible tumour in which voxels count")
    max_iterations: Annotated[Whole, Field(ge=1)] = Field(
        default=25, description="of each stage of the search"
    )
    discretisation_error: bool = Field(
        default=True, description="whether the likelihood knows of the mesh's error"
    )


class Output(Section):
    """What is written besides the visits."""

    days: list[Number] = Field(default=[], description="further days, negative before the first visit")
