"""Reading a YAML file into sections of keys, with the tumour cases' checks and messages (tumour.case)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from solvers.errors import GliodeError
from tumour.case import _did_you_mean, _inner, _Loader, _message, _rows, _shown
from tumour.case_sections import Section

S = TypeVar("S", bound=Section)


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


def validated(root: type[S], data: Mapping[str, Any], label: str, folder: Path) -> S:
    """The section `root` of plain values; relative paths are relative to `folder`.

    Raises GliodeError, a line a key at fault, such as "spiral.yaml: model.steps: must be 1 or more (got 0)".
    """
    try:
        return root.model_validate(data, context={"folder": folder.resolve()})
    except ValidationError as error:
        lines = [_line(root, detail, data) for detail in error.errors(include_url=False)]
        raise GliodeError("\n".join(f"{label}: {line}" for line in dict.fromkeys(lines))) from error


def table(root: type[Section]) -> str:
    """All keys as a Markdown table: key, meaning, default."""
    rows = ["| key | what it is | default |", "|---|---|---|"]
    return "\n".join(
        [*rows, *(f"| `{key}` | {text} | {default} |" for key, text, default in _rows(root, ""))]
    )


def _line(root: type[Section], detail: ErrorDetails, data: Mapping[str, Any]) -> str:
    if detail["type"] != "extra_forbidden":
        return _message(detail, data)
    *above, word = detail["loc"]
    found: list[tuple[type[Section], str]] = [(root, "")]
    for part in above:  # keys, and the values of those that choose one of several sections
        chosen = [section for section, tag in found if tag.endswith(f": {part}")]
        if chosen:
            found = [(chosen[0], "")]
        else:
            field = found[0][0].model_fields[str(part)]
            found = [(section, tag) for section, _, tag in _inner(field.annotation)]
    hint = _did_you_mean(str(word), found[0][0])
    return _message({**detail, "type": "gliode", "msg": f"unknown key{hint}"}, data)
