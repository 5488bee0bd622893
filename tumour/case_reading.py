"""Reading a YAML file into sections of keys, checked, with messages that name the key."""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode

from solvers.errors import GliodeError
from tumour.case_sections import Section

S = TypeVar("S", bound=Section)


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


def load_yaml(path: Path) -> dict[str, Any]:
    """The keys in a YAML file. Raises GliodeError naming it."""
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
    return data


def validated(
    root: type[S],
    data: Mapping[str, Any],
    label: str,
    folder: Path,
    unknown: str = "{section}: unknown key {word!r}",
) -> S:
    """The section `root` of plain values; relative paths are relative to `folder`.

    unknown: how a key that is not known is told, before the hint. Raises GliodeError, a line a key at fault,
    such as "demo.yaml: truth.D_white: must be positive (got -1)".
    """
    try:
        return root.model_validate(data, context={"folder": folder.resolve()})
    except ValidationError as error:
        lines = [_message(root, detail, data, unknown) for detail in error.errors(include_url=False)]
        raise GliodeError("\n".join(f"{label}: {line}" for line in dict.fromkeys(lines))) from error


def table(root: type[Section]) -> str:
    """All keys as a Markdown table: key, meaning, default."""
    rows = ["| key | what it is | default |", "|---|---|---|"]
    return "\n".join(
        [*rows, *(f"| `{key}` | {text} | {default} |" for key, text, default in _rows(root, ""))]
    )


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


def _message(root: type[Section], detail: ErrorDetails, data: Any, unknown: str) -> str:
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
        hint = _did_you_mean(word, _section_at(root, detail["loc"][:-1]))
        return unknown.format(section=where, key=key, word=word) + hint
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


def _section_at(root: type[Section], loc: Sequence[int | str]) -> type[Section]:
    """The section that a pydantic location leads to, from the root."""
    found: list[tuple[type[Section], str]] = [(root, "")]
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
