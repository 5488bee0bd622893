"""The part of identify.py for `identify.unknown: field`: the search, its maps, the record, what it prints."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from scripts.launching import Interrupted, Progress, Stop

if TYPE_CHECKING:
    import numpy as np
    from mpi4py import MPI

    from tumour.anatomy import Anatomy
    from tumour.case import Case
    from tumour.patients import Scan
    from tumour.results import Results


def identify(
    comm: MPI.Comm,
    case: Case,
    brain: Anatomy,
    scans: list[Scan],
    results: Results,
    resume: bool,
    stop: Stop,
) -> dict[str, Any]:
    """Search, saved after every iteration, and write the maps; the record of result.json but for seconds."""
    from solvers.fem.io import fingerprint, read_restart, write_restart
    from tumour import simulation, study
    from tumour.fields_study import field_study, memory_of, restart_of
    from tumour.results import day_name

    work = field_study(case, brain, scans)
    domain = work.model.domain
    key = f"fields {case.hash()} {study.digest(brain, scans)} {fingerprint(domain)}"
    saved = read_restart(results.restart, domain, key) if resume else None
    if saved is not None and comm.rank == 0:
        print("going on with the saved search", file=sys.stderr)
    with Progress(comm, f"{case.name}: search") as progress:
        steps = 0

        def save(memory: dict[str, np.ndarray]) -> None:
            states, record = restart_of(work.coefficients, memory)
            write_restart(results.restart, domain, key, states, record)
            if stop.asked():
                raise Interrupted("in the search")

        def tell(text: str) -> None:
            nonlocal steps
            steps += 1
            progress(steps, steps, text)

        memory = None if saved is None else memory_of(work.coefficients, saved.states, saved.record)
        search = work.search(save, memory, tell)
        found = search.run()
    states = work.states(found, sorted({*case.days, *case.output.days}))
    for day, u in states.items():
        results.map(f"density_day{day_name(day)}", simulation.on_grid(domain, u, brain), brain, original=True)
    results.film(domain, states)
    with Progress(comm, f"{case.name}: uncertainty") as progress:
        posterior = search.posterior(found)
        fields = work.fields(found, posterior, lambda done, of: progress(done, of))
    for name, u in fields.items():
        results.map(name, simulation.on_grid(domain, u, brain), brain, original=True)
        results.film(domain, {0.0: u}, name)
    record = work.record(found, fields)
    record["days"] = [simulation.volumes(domain, day, u) for day, u in states.items()]
    return record


def show(record: dict[str, Any]) -> None:
    """The fields' ranges, how alpha was chosen, what the search cost."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{record['case']}: what was found", title_justify="left")
    table.add_column("field")
    for column in ("lowest", "mean", "highest", "sd of log"):
        table.add_column(column, justify="right")
    table.add_column("unit")
    for name, entry in record["fields"].items():
        numbers = [f"{entry[key]:.3g}" for key in ("lowest", "mean", "highest", "log_sd")]
        table.add_row(name, *numbers, entry["unit"])
    console.print(table)
    console.print("Lowest to highest where the tumour is seen; sd relative to the regularizer as a prior.")
    console.print(record["stopping"]["why"], highlight=False)
    counts = ", ".join(f"{n} {name}" for name, n in record["counts"].items())
    console.print(f"Solves: {counts}; {record['seconds']:.0f} s.", highlight=False)
