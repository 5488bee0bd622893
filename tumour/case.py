"""The case file: one study in YAML, checked before anything long starts, with messages that name the key.

    case = read("data/cases/demo.yaml")
    case.truth.D_white

`python -m tumour.case` prints the table of all keys for data/cases/README.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tumour import case_fields, case_reading
from tumour.case_fields import Identify
from tumour.case_reading import load_yaml, validated
from tumour.case_sections import (
    Anatomy,
    Dated,
    MeshFile,
    Mni152,
    Model,
    Output,
    Scan,
    Section,
    Treatment,
    Visit,
    Whole,
    problem,
)
from tumour.case_source import Locate, Truth


class Case(Section):
    """One study."""

    name: str = Field(default="", description="for titles; default the file's name")
    anatomy: Anatomy = Field(description="the brain: `source: mni152`, `nifti`, `labels` or `mesh`")
    model: Model = Field(default=Model(), description="what grows, and how it is solved")
    truth: Truth | None = Field(default=None, description="the tumour to simulate; left out for a patient")
    visits: Annotated[list[Visit], Field(min_length=1)] = Field(
        description="the days of scans, the first on day 0"
    )
    therapy: list[Treatment] = Field(default=[], description="treatments")
    identify: Identify = Field(default=Identify(), description="how identify.py searches")
    locate: Locate = Field(default=Locate(), description="how locate_source.py searches")
    output: Output = Field(default=Output(), description="what is written besides the visits")
    noise_seed: Whole = Field(default=1, description="of the noise of simulated scans")

    @model_validator(mode="after")
    def _fits_together(self) -> Case:
        dated: list[tuple[str, Dated]] = [(f"visits[{i}]", v) for i, v in enumerate(self.visits)]
        dated += [(f"therapy[{i}]", t) for i, t in enumerate(self.therapy)]
        for key, item in dated:
            if (item.day is None) == (item.date_ is None):
                raise problem(f"{key}: give either day or date")
            if item.date_ is not None and self.visits[0].date_ is None:
                raise problem(f"{key}.date: the first visit has no date; give day, or dates to all")
        days = self.days
        if days[0] != 0:
            raise problem(f"visits[0].day: the first visit is day 0, days count from it (got {days[0]:g})")
        for i, (before, after) in enumerate(pairwise(days), start=1):
            if after <= before:
                raise problem(f"visits[{i}]: day {after:g} is not after the visit before, day {before:g}")
        last = max([*days, *self.output.days])
        for i, treatment in enumerate(self.therapy):
            if self.day_of(treatment) > last:
                raise problem(
                    f"therapy[{i}]: day {self.day_of(treatment):g} is past the last visit and output"
                )
        self._check_scans()
        case_fields.check(self.identify, self.visits)
        if self.truth is not None:
            for i, day in enumerate(self.output.days):
                if day <= -self.truth.age:
                    raise problem(
                        f"output.days[{i}]: day {day:g} is before the seed, day {-self.truth.age:g}"
                    )
        return self

    def _check_scans(self) -> None:
        scans = [
            (f"visits[{i}].scans[{j}]", s) for i, v in enumerate(self.visits) for j, s in enumerate(v.scans)
        ]
        with_file = [s.file is not None for _, s in scans]
        if isinstance(self.anatomy, MeshFile):
            if scans:
                raise problem(f"{scans[0][0]}: a mesh has no voxels to scan; leave scans out")
            if self.truth is not None and self.truth.spacing is not None:
                raise problem("truth.spacing: the mesh has its own; leave it out")
        if isinstance(self.anatomy, Mni152) and self.truth is not None and (self.truth.spacing or 1) < 1:
            raise problem(f"truth.spacing: MNI152 comes in voxels of 1 mm (got {self.truth.spacing:g})")
        if any(with_file) and not all(with_file):
            key = scans[with_file.index(False)][0]
            raise problem(f"{key}.file: missing; either all scans have files or all are simulated")
        if scans and not any(with_file) and self.truth is None:
            raise problem("truth: missing; scans without files are simulated from it")
        for i, visit in enumerate(self.visits):
            kinds = [kind for scan in visit.scans for kind in outlines_of(scan)]
            twice = next((kind for kind in kinds if kinds.count(kind) > 1), None)
            if twice:
                raise problem(f"visits[{i}].scans: {twice} is there twice")

    def day_of(self, item: Dated) -> float:
        """Days after the first visit."""
        if item.day is not None:
            return item.day
        first = self.visits[0].date_
        assert item.date_ is not None and first is not None  # checked above
        return float((item.date_ - first).days)

    @property
    def days(self) -> list[float]:
        """The visits' days."""
        return [self.day_of(visit) for visit in self.visits]

    @property
    def synthetic(self) -> bool:
        """Whether the scans are simulated."""
        return not any(scan.file for visit in self.visits for scan in visit.scans)

    def record(self) -> dict[str, Any]:
        """The resolved case as plain values, defaults filled in, paths absolute; `parse` gives it back."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    def hash(self) -> str:
        """Of everything that the numbers depend on but the contents of files."""
        text = json.dumps({k: v for k, v in self.record().items() if k != "name"}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def outlines_of(scan: Scan) -> tuple[Literal["density", "enhancing", "oedema"], ...]:
    """The images that a scan stands for."""
    return ("enhancing", "oedema") if scan.kind == "segmentation" else (scan.kind,)


def read(path: str | Path) -> Case:
    """The case in a YAML file; its relative paths are relative to its folder.

    Raises GliodeError, a line a key at fault, such as "demo.yaml: truth.D_white: must be positive (got -1)".
    """
    path = Path(path)
    return parse(load_yaml(path), path.name, path.parent, path.stem)


def parse(data: Mapping[str, Any], label: str = "case", folder: Path = Path(), name: str = "") -> Case:
    """The case in plain values; `label` stands for the file in messages, `name` is that key's default."""
    case = validated(Case, data, label, folder)
    return case if case.name else case.model_copy(update={"name": name})


def table() -> str:
    """All keys as a Markdown table: key, meaning, default."""
    return case_reading.table(Case) + "\n"


if __name__ == "__main__":
    print(table(), end="")
