"""The case file: one study in YAML, checked before anything long starts, with messages that name the key.

    case = read("data/cases/demo.yaml")
    case.truth.D_white

`python -m tumour.case` prints the table of all keys for data/cases/README.md.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticUndefined
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode

from solvers.errors import GliodeError
from tumour.case_sections import (
    Anatomy,
    Dated,
    Identify,
    MeshFile,
    Mni152,
    Model,
    Output,
    Scan,
    Section,
    Treatment,
    Truth,
    Visit,
    Whole,
    problem,
)


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


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise ConstructorError(None, None, f"key {key!r} is there twice", key_node.start_mark)
            seen.add(key if isinstance(key, str) else None)
        return super().construct_mapping(node, deep)


def read(path: str | Path) -> Case:
    """The case in a YAML file; its relative paths are relative to its folder.

    Raises GliodeError, a line a key at fault, such as "demo.yaml: truth.D_white: must be positive (got -1)".
    """
    path = Path(path)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise GliodeError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        text = getattr(error, "problem", None) or str(error)
        raise GliodeError(f"{path.name}: not valid YAML{where}: {text}") from error
    if not isinstance(data, dict):
        raise GliodeError(f"{path.name}: holds {_shown(data)}, not keys; see data/cases for examples")
    return parse(data, path.name, path.parent, path.stem)


def parse(data: Mapping[str, Any], label: str = "case", folder: Path = Path(), name: str = "") -> Case:
    """The case in plain values; `label` stands for the file in messages, `name` is that key's default."""
    try:
        case = Case.model_validate(data, context={"folder": folder.resolve()})
    except ValidationError as error:
        lines = [_message(detail, data) for detail in error.errors(include_url=False)]
        raise GliodeError("\n".join(f"{label}: {line}" for line in dict.fromkeys(lines))) from error
    return case if case.name else case.model_copy(update={"name": name})


_TAGS = ("source", "law", "kind")
_MESSAGES = {
    "missing": "missing",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be {le} or less",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "string_type": "must be text",
    "path_type": "must be a path",
    "list_type": "must be a list",
    "model_type": "must be a section of keys",
    "model_attributes_type": "must be a section of keys",
    "literal_error": "must be {expected}",
    "union_tag_not_found": "needs the key {discriminator}",
    "union_tag_invalid": "{discriminator} must be one of {expected_tags}",
    "date_type": "must be a date, YYYY-MM-DD",
    "date_parsing": "must be a date, YYYY-MM-DD",
    "date_from_datetime_parsing": "must be a date, YYYY-MM-DD",
    "date_from_datetime_inexact": "must be a date, YYYY-MM-DD",
    "too_short": "must have {min_length} or more entries",
    "too_long": "must have {max_length} entries",
}
_WITHOUT_VALUE = ("gliode", "missing", "union_tag_not_found")


def _message(detail: ErrorDetails, data: Any) -> str:
    """One line: where, what is wrong, and the value."""
    key, at = "", data
    for part in detail["loc"]:
        if isinstance(part, int):
            key, at = f"{key}[{part}]", at[part] if isinstance(at, list) and part < len(at) else None
            continue
        # pydantic puts the tag of a union ("mni152") between the keys: it is a value, not a key.
        if isinstance(at, dict) and part not in at and part in [at.get(tag) for tag in _TAGS]:
            continue
        key, at = f"{key}.{part}" if key else part, at.get(part) if isinstance(at, dict) else None
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        word = str(detail["loc"][-1])
        where = key.removesuffix(f".{word}") if "." in key else "case"
        return f"{where}: unknown key {word!r}{_did_you_mean(word, _section_at(detail['loc'][:-1]))}"
    if kind == "greater_than" and context["gt"] == 0:
        text = "must be positive"
    elif kind == "greater_than_equal" and context["ge"] == 0:
        text = "must not be negative"
    elif kind in _MESSAGES:
        limits = {name: f"{x:g}" if isinstance(x, float) else x for name, x in context.items()}
        text = _MESSAGES[kind].format(**limits)
    else:
        text = detail["msg"]
    got = "" if kind in _WITHOUT_VALUE else f" (got {_shown(detail['input'])})"
    if kind == "union_tag_invalid":
        got = f" (got {context['tag']!r})"
    return f"{key}: {text}{got}" if key else f"{text}{got}"


def _section_at(loc: Sequence[int | str]) -> type[Section]:
    """The section that a pydantic location leads to."""
    found: list[tuple[type[Section], str]] = [(Case, "")]
    for part in loc:
        tagged = [section for section, tag in found if tag.endswith(f": {part}")]
        if tagged:
            found = [(tagged[0], "")]
        elif isinstance(part, str):
            fields = {field.alias or name: field for name, field in found[0][0].model_fields.items()}
            found = [(section, tag) for section, _, tag in _inner(fields[part].annotation)]
    return found[0][0]


def _did_you_mean(word: str, section: type[Section]) -> str:
    known = {(field.alias or name) for name, field in section.model_fields.items()}
    lower = {name.lower(): name for name in sorted(known)}
    near = difflib.get_close_matches(word.lower(), lower, n=1)
    return f" (did you mean {lower[near[0]]!r}?)" if near else f" (known: {', '.join(sorted(known))})"


def _shown(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def table() -> str:
    """All keys as a Markdown table: key, meaning, default."""
    rows = ["| key | what it is | default |", "|---|---|---|"]
    rows += [f"| `{key}` | {text} | {default} |" for key, text, default in _rows(Case, "")]
    return "\n".join(rows) + "\n"


def _rows(section: type[Section], prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in section.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        if field.description is not None:
            if field.is_required():
                default = "required"
            elif isinstance(field.default, Section):
                default = ""
            elif field.default in (None, PydanticUndefined, ""):
                default = "none"
            else:
                default = f"`{json.dumps(field.default)}`"
            yield key, field.description, default
        for inner, is_list, tag in _inner(field.annotation):
            inside = f"{key}[]" if is_list else key
            if tag:
                yield inside, f"**`{tag}`**: {(inner.__doc__ or '').strip()}", ""
            yield from _rows(inner, f"{inside}.")


def _inner(annotation: Any, is_list: bool = False) -> Iterator[tuple[type[Section], bool, str]]:
    """The sections inside a field's type, whether in a list, and the tag that chooses each of several."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        tags = [(tag, annotation.model_fields.get(tag)) for tag in _TAGS]
        chosen = [f"{tag}: {get_args(f.annotation)[0]}" for tag, f in tags if f and f.description is None]
        yield annotation, is_list, chosen[0] if chosen else ""
    elif get_origin(annotation) in (Union, types.UnionType, list, Annotated):
        for part in get_args(annotation):
            yield from _inner(part, is_list or get_origin(annotation) is list)


if __name__ == "__main__":
    print(table(), end="")
