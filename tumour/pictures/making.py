"""Make the pictures of a result folder, each by its own module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from solvers.errors import GliodeError
from tumour.pictures import display, fields, plots, slices, source
from tumour.pictures.results import Inapplicable, ResultFolder

if TYPE_CHECKING:
    from tumour.pictures.surfaces import Surfaces

KINDS = ("glass", "slices", "convergence", "estimates", "fields", "source", "growth", "html")
SMALLEST = 400
LARGEST = 8000


@dataclass
class Pictures:
    """Files that were written, and a line for each picture that this result does not allow."""

    paths: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def make(
    folder: Path,
    only: Sequence[str] = (),
    size: tuple[int, int] = (1600, 1200),
) -> Pictures:
    """Write the pictures of FOLDER to FOLDER/pictures: those in `only`, or all that the result allows.

    size: pixels (width, height) of each PNG.
    Errors: GliodeError for an unreadable folder, an unknown kind, an impossible size, and for a picture that
    `only` asks for and the result does not allow (without `only` that is a note).
    """
    for kind in only:
        if kind not in KINDS:
            raise GliodeError(f"picture {kind!r} is not one of {', '.join(KINDS)}")
    if not all(SMALLEST <= side <= LARGEST for side in size):
        raise GliodeError(f"size {size[0]}x{size[1]}: each side is between {SMALLEST} and {LARGEST} pixels")
    maker = Maker(ResultFolder(folder), size)
    made = Pictures()
    for kind in only or KINDS:
        try:
            made.paths.append(maker.draw(kind))
        except Inapplicable as error:
            if only:
                raise
            made.notes.append(f"{kind}: {error}")
    return made


class Maker:
    """Draws one result; the surfaces are made once, and only where a picture needs them."""

    def __init__(self, results: ResultFolder, size: tuple[int, int]) -> None:
        self.results = results
        self.size = size

    @cached_property
    def surfaces(self) -> Surfaces:
        """What the three-dimensional pictures share."""
        from tumour.pictures.surfaces import Surfaces

        return Surfaces(self.results)

    @property
    def flat(self) -> bool:
        """Whether the result is of one slice."""
        return self.results.has("brain") and 1 in self.results.map("brain").values.shape

    def draw(self, kind: str) -> Path:
        """Write one picture. Errors: GliodeError."""
        path = self.results.pictures / f"{kind}.png"
        if kind in ("slices", "html", "glass", "growth") and self.flat:
            raise Inapplicable("a single slice; source shows it")
        if kind == "slices":
            return slices.draw(self.results, self.size, path)
        if kind == "convergence":
            return plots.convergence(self.results, self.size, path)
        if kind == "estimates":
            return plots.estimates(self.results, self.size, path)
        if kind == "fields":
            return fields.draw(self.results, self.size, path)
        if kind == "source":
            return source.draw(self.results, self.size, path)
        if kind == "html":
            display.require_pyvista()
            from tumour.pictures import turning

            return turning.draw(self.surfaces, self.results.pictures / "turn.html")
        display.require()
        from tumour.pictures import glass, growth

        return {"glass": glass.draw, "growth": growth.draw}[kind](self.surfaces, self.size, path)
