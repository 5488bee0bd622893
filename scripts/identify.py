#!/usr/bin/env python3
"""Recover the tumour of a case file from its scans; see `identify.py --help`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts import identify_fields
from scripts.launching import Interrupted, Progress, Stop, missing_packages, pictures, run

with missing_packages("identify.py"):
    import typer

    from scripts.options import CaseFile, Out, Pictures, Resume

if TYPE_CHECKING:
    from mpi4py import MPI

    from tumour.anatomy import Anatomy
    from tumour.case import Case
    from tumour.identification import Identification
    from tumour.patients import Scan
    from tumour.results import Results


def main(
    case: CaseFile,
    out: Out,
    resume: Resume = True,
    draw: Pictures = True,
) -> None:
    """Find where the tumour of CASE started, how fast it spreads and grows, and its age, from its scans.

    With `identify: {unknown: field}` it finds D(x), rho(x) or both in place of those numbers.

    Where the visits name files, those are the scans; else a tumour is grown from `truth`, scanned with noise,
    and hidden from the search. OUT gets the resolved case, result.json (estimates, intervals, which
    combinations the scans fix, counts), the recovered densities, scans and truth as NIfTI (maps/), the
    recovered densities for ParaView (paraview/), and pictures; of fields maps of the estimate, its
    standard deviation and the probability that the density exceeds a threshold.

    Several processes: mpirun -n 2 python scripts/identify.py CASE --out OUT. The search is saved after every
    iteration; when it is interrupted, the same command goes on from there.
    """
    with missing_packages("identify.py"):
        run("identify.py", lambda comm: identify(comm, case, out, resume, draw))


def identify(comm: MPI.Comm, file: Path, out: Path, resume: bool, draw: bool) -> None:
    """The run, on every rank."""
    from solvers.errors import GliodeError
    from tumour import case as cases
    from tumour import study
    from tumour.results import Results

    begin = time.perf_counter()
    case = cases.read(file)
    if not any(visit.scans for visit in case.visits):
        raise GliodeError(f"{file.name}: visits: no scans; name those to identify the tumour from")
    brain = study.anatomy_of(case)
    assert brain is not None  # a mesh has no scans
    fields = case.identify.unknown == "field"
    settings = study.settings_of(case)
    results = Results(out, comm)
    with Stop(comm) as stop:
        if case.synthetic:
            study.require_seed_inside(case, brain)
            results.begin(case)
            scans, truth = hide(comm, case, brain, stop)
            for name, volume in truth.items():
                results.map(name, volume, brain)
        else:
            scans = study.read_scans(case, brain)
            results.begin(case)
        results.anatomy(brain)
        results.scans(scans, brain)
        if fields:
            record = identify_fields.identify(comm, case, brain, scans, results, resume, stop)
        else:
            found = search(comm, case, brain, scans, results, resume, stop, settings)
            record = write(case, brain, found, results)
    record["seconds"] = round(time.perf_counter() - begin, 2)
    results.finish(record)
    files = [out / "result.json", out / "maps"]
    files += pictures(comm, out, "identify.py") if draw else []
    if comm.rank == 0:
        identify_fields.show(record) if fields else show(record)
        for path in files:
            print(path)


def hide(comm: MPI.Comm, case: Case, brain: Anatomy, stop: Stop) -> tuple[list[Scan], dict[str, Any]]:
    """Scans of a tumour grown from the case's truth, and its densities by the names of their maps."""
    from tumour import simulation, study
    from tumour.fields_study import true_coefficients
    from tumour.results import day_name
    from tumour.simulation import Snapshot

    assert case.truth is not None
    finer = case.truth.spacing
    domain = study.domain_for(case, brain if finer is None else study.anatomy_of(case, finer))
    model = study.model_for(case, domain, case.truth.step)
    days = sorted({*case.days, *case.output.days})
    steps = sum(stretch.steps for stretch in simulation.plan(model, case.truth.age, days))
    with Progress(comm, f"{case.name}: growing the truth") as progress:
        done = 0

        def tick(now: Snapshot) -> None:
            nonlocal done
            done += 1
            progress(done, steps)
            if stop.asked():
                raise Interrupted("while the truth was growing")

        coefficients = true_coefficients(case, model)
        states = simulation.grow(model, study.truth_of(case), days, None, tick, coefficients)
    scans = study.simulated_scans(case, model, brain, [states[day] for day in case.days])
    return scans, {
        f"truth_day{day_name(day)}": simulation.on_grid(domain, u, brain) for day, u in states.items()
    }


def search(
    comm: MPI.Comm,
    case: Case,
    brain: Anatomy,
    scans: list[Scan],
    results: Results,
    resume: bool,
    stop: Stop,
    settings: Any,
) -> Identification:
    """The identification, saved after every iteration."""
    from solvers.files import read_arrays, write_arrays
    from tumour import study
    from tumour.identification import Identifier

    key = f"identify {case.hash()} {study.digest(brain, scans)}"
    path, saved = results.restart, None
    if resume:
        from solvers.fem.io import on_root

        saved = on_root(comm, lambda: read_arrays(path, key))
    if saved is not None and comm.rank == 0:
        print("going on with the saved search", file=sys.stderr)
    with Progress(comm, f"{case.name}: search") as progress:

        def save(memory: dict[str, Any]) -> None:
            if comm.rank == 0:
                write_arrays(path, key, memory)
            if stop.asked():
                raise Interrupted("in the search")

        return Identifier(
            brain,
            scans,
            settings,
            law=study.law_of(case),
            seed=study.seed_of(case),
            scheme=case.model.scheme,
            rtol=case.model.tolerance,
            therapy=study.treatments(case, None),
            save=save,
            resume=saved,
            progress=lambda text, share: progress(round(100 * share), 100, text),
        ).run()


def write(case: Case, brain: Anatomy, found: Identification, results: Results) -> dict[str, Any]:
    """Write what was found; the record of result.json but for seconds."""
    from tumour import simulation
    from tumour.results import day_name, identified

    values = {name: estimate.value for name, estimate in found.estimates.items()}
    scanned = [case.day_of(visit) for visit in case.visits if visit.scans]
    states = dict(zip(scanned, found.states, strict=True))
    further = sorted({*case.days, *case.output.days} - set(scanned))
    further = [day for day in further if day > -values["age"]]
    if further:
        grown = simulation.grow(found.model, values, further)
        states |= grown
    domain = found.model.domain
    for day, u in states.items():
        results.map(f"density_day{day_name(day)}", simulation.on_grid(domain, u, brain), brain, original=True)
    results.film(domain, states)
    record = identified(case, found)
    record["days"] = [simulation.volumes(domain, day, states[day]) for day in sorted(states)]
    return record


def show(record: dict[str, Any]) -> None:
    """The table of estimates, what the scans fix, and how the search ended."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{record['case']}: what was found", title_justify="left")
    table.add_column("parameter")
    known = any(estimate["truth"] is not None for estimate in record["estimates"].values())
    for column in (*(["truth"] if known else []), "estimate", f"{100 * record['level']:g} % interval"):
        table.add_column(column, justify="right")
    table.add_column("unit")
    for name, estimate in record["estimates"].items():
        low, high = estimate["interval"]
        truth = [f"{estimate['truth']:.4g}"] if known else []
        table.add_row(name, *truth, f"{estimate['value']:.4g}", f"{low:.4g} to {high:.4g}", estimate["unit"])
    console.print(table)
    for name, quantity in record["derived"].items():
        low, high = quantity["interval"]
        verdict = "fixed by the scans" if quantity["fixed"] else "left open by the scans"
        text = f"{quantity['value']:.4g} ({low:.4g} to {high:.4g}) {quantity['unit']}".rstrip()
        console.print(f"{name.replace('_', ' ')} {quantity['formula']}: {text}, {verdict}", highlight=False)
    for fixed, title in (
        (True, "The scans fix"),
        (False, "The scans do not fix, beyond what was known before"),
    ):
        lines = [c for c in record["identifiable"] if c["fixed"] is fixed]
        if lines:
            console.print(f"[bold]{title}[/bold]")
        for c in lines:
            share = 100 * c["variance_ratio"] ** 0.5
            part = f"{share:.0f}" if share >= 10 else f"{share:.2g}"
            console.print(f"  {c['text']}  (sd {c['sd']:.2g}, {part} % of the prior's)", highlight=False)
    for other in record["alternatives"]:
        place = ", ".join(f"{other[axis]:.0f}" for axis in "xyz")
        console.print(
            f"Another start ended at ({place}) mm, its objective {other['above']:.3g} above.", highlight=False
        )
    counts = ", ".join(f"{n} {name}" for name, n in record["counts"].items())
    console.print(f"Stopped by {record['stopping']['rule']}; solves: {counts}.", highlight=False)
    console.print(
        f"Misfit {record['misfit']:.6g} for {record['data']} voxel values; {record['seconds']:.0f} s."
    )


if __name__ == "__main__":
    with missing_packages("identify.py"):
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(main)
        app()
