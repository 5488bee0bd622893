"""Keys of coefficient fields: `identify.unknown: field`, `identify.field`, and inclusions of a truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from tumour import case_sections as sections
from tumour.case_sections import File, Number, Point, Positive, Section, Whole, problem


class Inclusion(Section):
    """A ball that is not in the anatomy, in which D and rho are other than the tissues'."""

    centre: Point = Field(description="its centre, [x, y, z] in RAS mm")
    radius: Positive = Field(description="its radius in mm")
    D: Positive = Field(default=1.0, description="factor on D inside")
    rho: Positive = Field(default=1.0, description="factor on rho inside")


class Truth(sections.Truth):
    """The tumour that simulate.py grows, and that identify.py hides where the visits have no files."""

    inclusions: list[Inclusion] = Field(
        default=[], description="balls of other D and rho, which no reference knows of"
    )


class FieldReference(Section):
    """What is expected beforehand; the fields are departures from it."""

    D_white: Positive = Field(default=0.3, description="in mm^2/day")
    D_grey: Positive = Field(default=0.05, description="in mm^2/day")
    rho: Positive = Field(default=0.02, description="in 1/day")


class FieldStart(Section):
    """The tumour as known: a seed of known place and age."""

    position: Point = Field(description="where it started: [x, y, z] in RAS mm")
    age: Positive = Field(description="days from the seed to the first visit")


class FieldSearch(Section):
    """Coefficient fields log D(x) and log rho(x) in place of the seven parameters."""

    of: Annotated[list[Literal["D", "rho"]], Field(min_length=1)] = Field(
        default=["D"], description="the unknown fields: D, rho or both; the other keeps its reference"
    )
    by: Literal["vertex", "tissue"] = Field(
        default="vertex", description="a value at each vertex of the mesh, or one for each tissue"
    )
    reference: FieldReference = Field(
        default=FieldReference(), description="what the fields are departures from"
    )
    start: FieldStart | None = Field(
        default=None, description="the tumour's start; default: the density scanned at the first visit"
    )
    regularizer: Literal["h1", "tv", "learned"] = Field(
        default="h1",
        description="h1: smooth departures; tv: total variation, with sharp edges; learned: trained",
    )
    weights: File | None = Field(
        default=None, description="with learned: the trained weights; default: those that come with Gliode"
    )
    length: Positive = Field(default=20.0, description="mm over which h1 keeps a departure alike")
    spread: Positive = Field(
        default=1.0, description="prior standard deviation of the logarithm of a tissue's departure"
    )
    tau: Annotated[Number, Field(gt=1)] = Field(
        default=1.05, description="alpha is such that the residual is tau times the noise"
    )
    max_iterations: Annotated[Whole, Field(ge=1)] = Field(
        default=40, description="Gauss-Newton steps for each alpha tried"
    )
    threshold: Annotated[Number, Field(gt=0, lt=1)] = Field(
        default=0.16, description="density whose probability of being exceeded is mapped"
    )
    samples: Annotated[Whole, Field(ge=1)] = Field(
        default=100, description="draws of the posterior for that map, a forward run each"
    )

    @model_validator(mode="after")
    def _each_once(self) -> FieldSearch:
        if len(set(self.of)) < len(self.of):
            raise problem("of: each field once")
        if self.weights is not None and self.regularizer != "learned":
            raise problem("weights: only with `regularizer: learned`; leave them out")
        if self.regularizer == "learned" and self.by == "tissue":
            raise problem("regularizer: learned is of fields; with `by: tissue` leave it out")
        return self


class Identify(sections.Identify):
    """How to identify, on voxels of the anatomy's spacing and on twice that."""

    unknown: Literal["parameters", "field"] = Field(
        default="parameters", description="the seven parameters, or coefficient fields"
    )
    field: FieldSearch = Field(default=FieldSearch(), description="with `unknown: field`")


def check(identify: Identify, visits: Sequence[sections.Visit]) -> None:
    """Refuse a search for fields without a start, or without a scan after it."""
    if identify.unknown != "field" or identify.field.start is not None:
        return
    if not any(scan.kind == "density" for scan in visits[0].scans):
        raise problem(
            "identify.field.start: missing, and the first visit has no density scan to start from; give the"
            " seed's position and age"
        )
    if not any(visit.scans for visit in visits[1:]):
        raise problem(
            "visits: none with scans after the first, whose density is the start; a field is seen by how the"
            " tumour changes"
        )
