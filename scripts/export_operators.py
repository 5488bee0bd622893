#!/usr/bin/env python3
"""Save a brain's operators for machines with torch alone; see `export_operators.py --help`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.launching import missing_packages, run

with missing_packages("export_operators.py"):
    import typer

if TYPE_CHECKING:
    from mpi4py import MPI

    from solvers.fem.mesh import Domain


def main(
    out: Annotated[Path, typer.Option(help="The file to write, .safetensors.", show_default=False)],
    case: Annotated[
        Path | None,
        typer.Argument(help="A case, a YAML file (its keys: data/cases/README.md).", show_default=False),
    ] = None,
    anatomy: Annotated[
        str | None, typer.Option(help="A brain instead of a case: mni152.", show_default=False)
    ] = None,
    spacing: Annotated[float, typer.Option(help="Of --anatomy: the voxels' side in mm, 1 or more.")] = 3.0,
) -> None:
    """Assemble tumour diffusion on the brain of CASE, or of --anatomy, and save it in one file.

    The file holds what solvers.semidiscrete.SemiDiscrete.load gives back where there is no DOLFINx: mass,
    conductances, tissue fractions, coordinates, voxels, units and provenance. It is the same from any number
    of processes: mpirun -n 2 python scripts/export_operators.py CASE --out FILE.
    """
    with missing_packages("export_operators.py"):
        run("export_operators.py", lambda comm: save(comm, case, anatomy, spacing, out))


def save(comm: MPI.Comm, file: Path | None, anatomy: str | None, spacing: float, out: Path) -> None:
    """The work, on every rank."""
    from solvers.errors import GliodeError
    from solvers.fem.export import export
    from solvers.fem.io import on_root

    if anatomy not in (None, "mni152"):
        raise GliodeError(
            f"--anatomy {anatomy}: the only one without files is mni152; give a case for others"
        )
    if (file is None) == (anatomy is None):
        raise GliodeError("give a case file, or --anatomy mni152 with its --spacing, one of the two")
    domain, source = of_case(file) if file is not None else of_brain(spacing)
    problem = export(domain, source)
    on_root(comm, lambda: problem.save(out))
    if comm.rank == 0:
        pairs = problem.conductances
        assert pairs is not None
        print(f"{source}: {problem.n} vertices, {pairs.n_cells} cells, {pairs.n_edges} pairs")
        print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


def of_case(file: Path) -> tuple[Domain, str]:
    """The mesh that a case is identified on, and what it is."""
    from tumour import case as cases
    from tumour import study

    case = cases.read(file)
    return study.domain_for(case, study.anatomy_of(case)), f"case {case.name}"


def of_brain(spacing: float) -> tuple[Domain, str]:
    """MNI152."""
    from tumour.anatomy import mni152
    from tumour.model import domain_of

    return domain_of(mni152(spacing)), f"MNI152 at {spacing:g} mm"


if __name__ == "__main__":
    with missing_packages("export_operators.py"):
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(main)
        app()
