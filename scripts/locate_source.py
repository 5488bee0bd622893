#!/usr/bin/env python3
"""Follow the tumour of a case file back to where it started; see `locate_source.py --help`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.launching import Interrupted, Progress, Stop, missing_packages, pictures, run

with missing_packages("locate_source.py"):
    import typer

    from scripts.options import CaseFile, Out, Pictures, Resume

if TYPE_CHECKING:
    from mpi4py import MPI

    from tumour.case import Case
    from tumour.patients import Scan
    from tumour.results import Results
    from tumour.source import SourceProblem
    from tumour.source_search import Source
    from tumour.source_study import Brains


def main(
    case: CaseFile,
    out: Out,
    resume: Resume = True,
    draw: Pictures = True,
) -> None:
    """Recover the density from which the tumour of CASE grew, from its scans, D, rho and the time known.

    Where the visits name files, those are the scans; else a tumour is grown from `truth`, scanned with noise,
    and hidden from the search. OUT gets the resolved case, result.json (the foci, the rule that stopped the
    search and its numbers, counts), the source, its standard deviation and the probability that it exceeds a
    threshold as NIfTI (maps/) and for ParaView (paraview/), and pictures.

    Several processes: mpirun -n 2 python scripts/locate_source.py CASE --out OUT. The search is saved after
    every iteration; when it is interrupted, the same command goes on from there.
    """
    with missing_packages("locate_source.py"):
        run("locate_source.py", lambda comm: locate(comm, case, out, resume, draw))


def locate(comm: MPI.Comm, file: Path, out: Path, resume: bool, draw: bool) -> None:
    """The run, on every rank."""
    from tumour import case as cases
    from tumour import source_study, study
    from tumour.results import Results

    begin = time.perf_counter()
    case = cases.read(file)
    source_study.require_locatable(case, file.name)
    brains = source_study.brains_of(case)
    results = Results(out, comm)
    with Stop(comm) as stop:
        if case.synthetic:
            source_study.true_centres(case, brains.coarse)
            results.begin(case)
            scans, maps = hide(case, brains)
            for name, volume in maps.items():
                results.map(name, volume, brains.coarse)
        else:
            scans = study.read_scans(case, brains.coarse)
            results.begin(case)
        results.anatomy(brains.coarse)
        results.scans(scans, brains.coarse)
        problem = source_study.problem_of(case, brains, scans)
        record = search(comm, case, problem, results, resume, stop)
    record["seconds"] = round(time.perf_counter() - begin, 2)
    results.finish(record)
    files = [out / "result.json", out / "maps"]
    files += pictures(comm, out, "locate_source.py") if draw else []
    if comm.rank == 0:
        show(record)
        for path in files:
            print(path)


def hide(case: Case, brains: Brains) -> tuple[list[Scan], dict[str, Any]]:
    """Scans of a tumour grown from the case's truth, and its densities by the names of their maps."""
    import torch

    from tumour import source_study, study
    from tumour.model import domain_of
    from tumour.results import day_name
    from tumour.simulation import on_grid

    assert case.truth is not None
    truth = case.truth
    model = study.model_for(case, domain_of(brains.truth), truth.step)
    u = source_study.source_of(model, source_study.true_centres(case, brains.truth))
    D, grey, rho, age = (
        torch.tensor(x, dtype=torch.float64) for x in (truth.D_white, truth.D_grey, truth.rho, truth.age)
    )
    with torch.no_grad():
        states = model.evolve(u, model.diffusivity(D, grey), rho, age, case.days)
    maps = {
        f"truth_day{day_name(day)}": on_grid(model.domain, state, brains.coarse)
        for day, state in zip(case.days, states, strict=True)
    }
    maps["source_truth"] = on_grid(model.domain, u, brains.coarse)
    return study.simulated_scans(case, model, brains.coarse, states), maps


def search(
    comm: MPI.Comm, case: Case, problem: SourceProblem, results: Results, resume: bool, stop: Stop
) -> dict[str, Any]:
    """The search, saved after every iteration, its posterior and their maps; the record but for seconds."""
    from solvers.fem.io import fingerprint, read_restart, write_restart
    from tumour import source_study, study
    from tumour.source_posterior import posterior_of
    from tumour.source_search import Locator

    domain = problem.domain
    key = f"locate {case.hash()} {study.digest(problem.anatomy, problem.scans)} {fingerprint(domain)}"
    found = read_restart(results.restart, domain, key) if resume else None
    memory = None if found is None else source_study.unpacked(found.states, found.record)
    if memory and comm.rank == 0:
        print("going on with the saved search", file=sys.stderr)
    truth = None
    if case.synthetic:
        centres = source_study.true_centres(case, problem.anatomy)
        truth = source_study.source_of(problem.growing.model, centres)
    most = case.locate.max_iterations
    with Progress(comm, f"{case.name}: search") as progress:

        def save(memory: dict[str, Any]) -> None:
            states, record = source_study.packed(memory, domain.n_owned)
            write_restart(results.restart, domain, key, states, record)
            if stop.asked():
                raise Interrupted("in the search")

        def tell(text: str, iteration: int = 0) -> None:
            progress(iteration, most, text)
            if stop.asked():
                raise Interrupted("in the search")

        source = Locator(problem, source_study.settings_of(case), save, memory, tell).run()
        section, posterior = case.locate.posterior, None
        if section is not None and source.unknown == "field":
            posterior = posterior_of(
                problem, source.m, source.defect, **section.model_dump(), tick=lambda text: tell(text, most)
            )
    write_maps(case, problem, source, posterior, results)
    return source_study.record_of(case, problem, source, truth, posterior)


def write_maps(case: Case, problem: SourceProblem, source: Source, posterior: Any, results: Results) -> None:
    """The source and what is known of it, and the densities grown from it."""
    import torch

    from tumour.results import day_name
    from tumour.simulation import on_grid

    brain, domain, growing = problem.anatomy, problem.domain, problem.growing
    fields = {"source": source.u}
    if posterior is not None:
        last = day_name(growing.days[-1])
        fields |= {"source_mean": posterior.mean, "source_sd": posterior.sd}
        fields |= {"source_exceedance": posterior.exceedance, f"exceedance_day{last}": posterior.later}
    for name, field in fields.items():
        results.map(name, on_grid(domain, field, brain), brain, original=True)
        results.film(domain, {-growing.known.age: field}, name)
    days = sorted({*case.days, *(day for day in case.output.days if day > -growing.known.age)})
    with torch.no_grad():
        states = dict(zip(days, growing.states(source.u, days), strict=True))
    for day, u in states.items():
        results.map(f"density_day{day_name(day)}", on_grid(domain, u, brain), brain, original=True)
    results.film(domain, {-growing.known.age: source.u, **states})


def show(record: dict[str, Any]) -> None:
    """The foci, how the search ended, and how near the truth it came."""
    from rich.console import Console
    from rich.table import Table

    console, truth = Console(), record.get("truth")
    table = Table(title=f"{record['case']}: where it started", title_justify="left")
    for column in ("focus", "x", "y", "z", "largest density", "cells (mm^3)"):
        table.add_column(column, justify="right")
    for number, focus in enumerate(record["foci"], start=1):
        x, y, z = (f"{value:.1f}" for value in focus["centre"])
        table.add_row(str(number), x, y, z, f"{focus['peak']:.3g}", f"{focus['cells']:.4g}")
    console.print(table)
    if truth is not None:
        away = ", ".join(f"{d:.1f}" for d in truth["distances"])
        console.print(
            f"True centres: a focus is {away} mm away; the density's error {truth['error']:.2f} in L2."
        )
    for name, point in record.get("points", {}).items():
        low, high = point["interval"]
        console.print(f"  {name}: {point['value']:.4g} ({low:.4g} to {high:.4g})", highlight=False)
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in record["stopping"].items() if name != "rule")
    console.print(f"Stopped by {record['stopping']['rule']} ({numbers}).", highlight=False)
    counts = ", ".join(f"{n} {name}" for name, n in record["counts"].items())
    console.print(
        f"Solves: {counts}; {record['data']} voxel values; {record['seconds']:.0f} s.", highlight=False
    )


if __name__ == "__main__":
    with missing_packages("locate_source.py"):
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(main)
        app()
