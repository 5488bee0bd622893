#!/usr/bin/env python3
"""Grow the tumour of a case file; see `simulate.py --help`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.launching import Interrupted, Progress, Stop, missing_packages, pictures, run

with missing_packages("simulate.py"):
    import typer

    from scripts.options import CaseFile, Out, Pictures, Resume

if TYPE_CHECKING:
    from mpi4py import MPI

    from tumour.case import Case
    from tumour.results import Results
    from tumour.simulation import Snapshot


def main(
    case: CaseFile,
    out: Out,
    resume: Resume = True,
    save_every: Annotated[float, typer.Option(help="Seconds between restart files.", min=0)] = 20.0,
    draw: Pictures = True,
) -> None:
    """Grow the tumour that CASE describes under `truth`, and scan it.

    OUT gets the resolved case, result.json, the densities at the visits and output days and the noisy scans
    as NIfTI (maps/), the densities for ParaView (paraview/), and pictures. A mesh file has no NIfTI maps.

    Several processes: mpirun -n 2 python scripts/simulate.py CASE --out OUT. When it is interrupted, the same
    command goes on from the last restart file, on any number of processes.
    """
    with missing_packages("simulate.py"):
        run("simulate.py", lambda comm: simulate(comm, case, out, resume, save_every, draw))


def simulate(comm: MPI.Comm, file: Path, out: Path, resume: bool, save_every: float, draw: bool) -> None:
    """The run, on every rank."""
    from solvers.errors import GliodeError
    from tumour import case as cases
    from tumour import simulation, study
    from tumour.fields_study import true_coefficients
    from tumour.results import Results, day_name

    begin = time.perf_counter()
    case = cases.read(file)
    if case.truth is None:
        raise GliodeError(f"{file.name}: truth: missing; it describes the tumour to grow")
    results = Results(out, comm)
    results.begin(case)
    brain = study.anatomy_of(case)
    finer = case.truth.spacing
    domain = study.domain_for(case, brain if finer is None else study.anatomy_of(case, finer))
    study.require_seed_inside(case, brain, domain)
    model = study.model_for(case, domain, case.truth.step)
    parameters = study.truth_of(case)
    days = sorted({*case.days, *case.output.days})
    stretches = simulation.plan(model, case.truth.age, days)
    keeper = Keeper(comm, results, case, domain, resume, save_every)
    before = [sum(s.steps for s in stretches[:i]) for i in range(len(stretches))]
    steps = sum(s.steps for s in stretches)
    title = f"{case.name}: steps"
    if keeper.start is not None and comm.rank == 0:
        done = before[keeper.start.stretch] + keeper.start.step
        print(f"going on from step {done} of {steps}", file=sys.stderr)
    with Stop(comm) as stop, Progress(comm, title) as progress:

        def tick(now: Snapshot) -> None:
            done = before[now.stretch] + now.step
            progress(done, steps)
            asked = stop.asked()
            keeper.keep(now, at_once=asked)
            if asked and done < steps:
                raise Interrupted(f"after step {done} of {steps}")

        coefficients = true_coefficients(case, model)
        states = simulation.grow(model, parameters, days, keeper.start, tick, coefficients)
    files = [results.film(domain, states)]
    if brain is not None:
        results.anatomy(brain)
        for day, u in states.items():
            results.map(
                f"density_day{day_name(day)}", simulation.on_grid(domain, u, brain), brain, original=True
            )
        results.scans(study.simulated_scans(case, model, brain, [states[day] for day in case.days]), brain)
    count = model.operator.count
    record: dict[str, Any] = {
        "case": case.name,
        "kind": "simulate",
        "estimates": {},
        "parameters": parameters,
        "days": [simulation.volumes(domain, day, states[day]) for day in days],
        "counts": {
            "forward": 1,
            "steps": steps,
            "linear solves": count.solves,
            "linear iterations": count.iterations,
            "implicit Euler fallbacks": model.diffusion.fallbacks,
        },
        "seconds": round(time.perf_counter() - begin, 2),
    }
    files.insert(0, results.finish(record))
    if draw and brain is not None:
        files += pictures(comm, out, "simulate.py")
    if comm.rank == 0:
        for row in record["days"]:
            print(f"day {row['day']:g}: largest density {row['largest']:.3f},", end=" ")
            print(f"{row['cm3 above 0.16']:.1f} cm^3 above 0.16")
        for path in files:
            print(path)


class Keeper:
    """Writes restart files now and then, and finds the one to start from."""

    def __init__(
        self, comm: MPI.Comm, results: Results, case: Case, domain: Any, resume: bool, every: float
    ) -> None:
        from solvers.fem.io import fingerprint, read_restart
        from tumour.simulation import Snapshot

        self._comm, self._domain, self._every = comm, domain, every
        self._path = results.restart
        self._key = f"simulate {case.hash()} {fingerprint(domain)}"
        self._last = time.monotonic()
        self.start: Snapshot | None = None
        found = read_restart(self._path, domain, self._key) if resume else None
        if found is not None:
            states = dict(found.states)
            u, record = states.pop("u"), found.record
            days = {float(name): state for name, state in states.items()}
            self.start = Snapshot(record["stretch"], record["step"], u, days)

    def keep(self, now: Snapshot, at_once: bool) -> None:
        """Write a restart file if it is time. Collective: rank 0's clock decides."""
        from solvers.fem.io import write_restart

        due = at_once or time.monotonic() - self._last >= self._every
        if self._comm.size > 1:
            due = self._comm.bcast(due)
        if due:
            states = {"u": now.u, **{repr(day): state for day, state in now.found.items()}}
            write_restart(
                self._path, self._domain, self._key, states, {"stretch": now.stretch, "step": now.step}
            )
            self._last = time.monotonic()


if __name__ == "__main__":
    with missing_packages("simulate.py"):
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(main)
        app()
