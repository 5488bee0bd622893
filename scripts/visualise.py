#!/usr/bin/env python3
"""Pictures of a result folder, worth a paper; see `visualise.py --help`."""

from __future__ import annotations

import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.launching import BAD_INPUT, missing_packages

with missing_packages("visualise.py"):
    import typer


class Kind(StrEnum):
    """The pictures, by the names that --only takes."""

    glass = "glass"
    slices = "slices"
    convergence = "convergence"
    estimates = "estimates"
    fields = "fields"
    source = "source"
    growth = "growth"
    html = "html"


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not WIDTHxHEIGHT in pixels, such as 1600x1200")
    return int(match.group(1)), int(match.group(2))


def main(
    results: Annotated[
        Path, typer.Argument(help="The --out folder of simulate.py or identify.py.", show_default=False)
    ],
    only: Annotated[
        list[Kind] | None, typer.Option(help="Only this picture; may be repeated.", show_default=False)
    ] = None,
    size: Annotated[str, typer.Option(help="Pixels of each PNG, width x height.")] = "1600x1200",
) -> None:
    """Make the pictures of a result folder; they go to RESULTS/pictures. No display is needed.

    glass.png: the brain as glass, the true and the recovered tumour in it, and how far apart they are.

    slices.png: three slices through the seed over the T1, density in colour, outlines, axes in mm.

    convergence.png: misfit and gradient by iteration, and the rule that stopped the search.

    estimates.png: truth, estimate and 90 % interval of each parameter.

    fields.png: coefficient fields: truth, estimate, standard deviation, chance of a tumour.

    source.png: where it started: truth, estimate, standard deviation, probability.

    growth.png: the tumour at several days, and its volume against time.

    turn.html: the glass brain in a page that turns in a browser, without a network.

    Without --only, pictures that the result does not allow (a simulation has no estimates, a single day no
    growth) are left out, and a line says why.
    """
    from solvers.errors import GliodeError
    from tumour.pictures import make

    width_and_height = _size(size)
    try:
        made = make(results, [kind.value for kind in only or ()], width_and_height)
    except GliodeError as error:
        typer.echo(f"visualise.py: {error}", err=True)
        raise typer.Exit(BAD_INPUT) from None
    for note in made.notes:
        typer.echo(f"left out {note}", err=True)
    for path in made.paths:
        typer.echo(str(path))


if __name__ == "__main__":
    with missing_packages("visualise.py"):
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(main)
        app()
