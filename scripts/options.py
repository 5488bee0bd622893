"""The arguments that simulate.py, identify.py and locate_source.py have in common; needs typer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

CaseFile = Annotated[
    Path, typer.Argument(help="The case, a YAML file (its keys: data/cases/README.md).", show_default=False)
]
Out = Annotated[Path, typer.Option(help="Folder for the results; made if missing.", show_default=False)]
Resume = Annotated[
    bool,
    typer.Option("--resume/--fresh", help="Go on with an interrupted run of the same case, or start anew."),
]
Pictures = Annotated[bool, typer.Option("--pictures/--no-pictures", help="Draw the results at the end.")]
