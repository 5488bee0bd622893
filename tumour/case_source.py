"""The keys of source localisation: the section `locate`, and further foci of a truth."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tumour import case_fields
from tumour.case_sections import File, NotNegative, Number, Point, Positive, Section, Whole


class Truth(case_fields.Truth):
    """The tumour that simulate.py grows, and that the searches hide where the visits have no files."""

    foci: list[Point] = Field(
        default=[], description="further places where it started, for locate_source.py: [x, y, z] in RAS mm"
    )


class Slice(Section):
    """One layer of voxels in place of the brain: a problem in two dimensions."""

    axis: Literal["x", "y", "z"] = Field(default="z", description="across the layer")
    point: Point | None = Field(
        default=None, description="a point of it in the brain, in RAS mm; default: the truth's position"
    )


class SourcePosterior(Section):
    """How sure: the Laplace posterior under a Gaussian prior of the field."""

    sd: Positive = Field(default=0.1, description="prior standard deviation of the source's density")
    length: Positive = Field(default=12.0, description="its correlation length in mm")
    threshold: Annotated[Number, Field(gt=0, lt=1)] = Field(
        default=0.05, description="density of the source whose probability of being exceeded is mapped"
    )
    samples: Annotated[Whole, Field(ge=1)] = Field(
        default=50, description="draws for the map of the density above 0.16 at the scans, a run each"
    )


class Locate(Section):
    """How locate_source.py goes back to the source, with everything else known."""

    D_white: Positive | None = Field(default=None, description="mm^2/day; default: the truth's")
    D_grey: Positive | None = Field(default=None, description="mm^2/day; default: the truth's")
    rho: Positive | None = Field(default=None, description="1/day; default: the truth's")
    age: Positive | None = Field(
        default=None, description="days from the source to the first visit; default: the truth's"
    )
    unknown: Literal["field", "sparse", "points"] = Field(
        default="field", description="a density, a density of few places, or seeds of the model's width"
    )
    regularizer: Literal["stopping", "h1", "tv", "learned"] = Field(
        default="stopping",
        description="of a field: the search's early end, or a term weighed by the discrepancy principle",
    )
    weights: File | None = Field(
        default=None, description="trained weights for regularizer: learned; default: those that come along"
    )
    foci: Annotated[Whole, Field(ge=1)] = Field(default=1, description="how many points")
    starts: Annotated[Whole, Field(ge=1)] = Field(
        default=3, description="sets of the field's foci that the search for points starts from"
    )
    length: NotNegative = Field(
        default=0.0, description="mm over which the field's gradient is smooth; 0: L2"
    )
    tau: Annotated[Number, Field(gt=1)] = Field(
        default=1.05, description="the search stops at a residual of tau times the noise"
    )
    region: Positive = Field(default=15.0, description="mm around the visible tumour in which voxels count")
    max_iterations: Annotated[Whole, Field(ge=1)] = Field(default=100, description="of each stage")
    level: Annotated[Number, Field(gt=0, lt=1)] = Field(
        default=0.5, description="share of the largest density above which a focus is counted"
    )
    slice: Slice | None = Field(default=None, description="search in one slice; default: in three dimensions")
    posterior: SourcePosterior | None = Field(
        default=SourcePosterior(), description="how sure; null for none; of points it is their own"
    )
