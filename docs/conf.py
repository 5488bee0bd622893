"""Sphinx: the pages are Markdown (MyST), the API pages come from the docstrings, which are plain text."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

project = "Gliode"
author = "Gliode developers"
project_copyright = "Gliode developers; BSD-3-Clause"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
html_theme = "sphinx_rtd_theme"
html_show_sourcelink = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True

_CODE = re.compile(r"(``[^`]+``|`[^`]+`)")


def _inline(text: str) -> str:
    """Plain text as reStructuredText: `code` stays code, every other character stands for itself."""
    # An escaped space ends the code where a letter follows, and is not shown.
    parts = _CODE.split(text)
    return "".join(
        rf"\ ``{part.strip('`')}``\ " if number % 2 else re.sub(r"([\\*|_`])", r"\\\1", part)
        for number, part in enumerate(parts)
    )


def _blocks(lines: list[str]) -> list[list[str]]:
    """The paragraphs of a docstring, each item of a list by itself."""
    blocks: list[list[str]] = [[]]
    for line in lines:
        in_item = bool(blocks[-1]) and blocks[-1][0].startswith("- ")
        if not line.strip() or line.startswith("- ") or (in_item and not line.startswith(" ")):
            blocks.append([])
        if line.strip():
            blocks[-1].append(line)
    return [block for block in blocks if block]


def _markup(block: list[str]) -> list[str]:
    """A block as reStructuredText: literal (indented, or set in columns), an item of a list, or prose."""
    if block[0].startswith("  ") or any(re.search(r"\S {3,}\S", line) for line in block):
        return ["::", "", *(f"    {line}" for line in block)]
    text = " ".join(line.strip() for line in block)
    return [f"- {_inline(text[2:])}" if text.startswith("- ") else _inline(text)]


def plain_docstring(app: Any, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    """Turn the plain text of a docstring into reStructuredText, in place."""
    lines[:] = [line for block in _blocks(lines) for line in (*_markup(block), "")]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", plain_docstring)
