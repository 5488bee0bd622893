"""What simulate.py and identify.py share on every MPI rank: one-line errors, signals, progress, pictures.

At import nothing but the standard library is needed, so that a missing package can be told in one line.
"""

from __future__ import annotations

import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpi4py import MPI

BAD_INPUT = 2
INTERRUPTED = 130


class Interrupted(Exception):
    """The run was asked to stop, and has saved where it was."""


@contextmanager
def missing_packages(script: str) -> Iterator[None]:
    """End with one line where a package of the environment is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("scripts", "tumour", "inverse", "solvers"):
            raise  # not a missing package, a mistake of ours
        print(
            f"{script}: {error.name} is not installed here; run  scripts/env python scripts/{script} ...",
            file=sys.stderr,
        )
        sys.exit(BAD_INPUT)


def run(script: str, work: Callable[[MPI.Comm], None]) -> None:
    """work(communicator), with bad input and interruptions as one line and an exit code: 2 and 130.

    An error that one rank alone meets ends all of them, which would otherwise wait for it for ever.
    """
    from solvers.errors import GliodeError

    try:
        import solvers.fem  # noqa: F401  (says what is missing)
    except GliodeError as error:
        print(f"{script}: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    from mpi4py import MPI

    comm, private = MPI.COMM_WORLD, MPI.COMM_WORLD.Dup()
    if comm.size > 1:
        sys.excepthook = lambda kind, error, trace: _abort(comm, kind, error, trace)
    try:
        work(comm)
    except GliodeError as error:
        together = _all_here(private)
        if comm.rank == 0 or not together:
            print(f"{script}: {error}", file=sys.stderr, flush=True)
        if not together:
            comm.Abort(BAD_INPUT)
        sys.exit(BAD_INPUT)
    except Interrupted as stop:
        if comm.rank == 0:
            print(
                f"{script}: interrupted {stop}; the same command goes on from there",
                file=sys.stderr,
                flush=True,
            )
        sys.exit(INTERRUPTED)


def _abort(
    comm: MPI.Comm, kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    traceback.print_exception(kind, error, trace)
    sys.stderr.flush()
    comm.Abort(1)


def _all_here(comm: MPI.Comm, patience: float = 10.0) -> bool:
    """Whether every rank comes to this line within some seconds."""
    request = comm.Ibarrier()
    end = time.monotonic() + patience
    while not request.Test():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


class Stop:
    """Ctrl-C or a batch system's SIGTERM, noticed between steps: `with Stop(comm) as stop: ... stop.asked()`.

    A second Ctrl-C ends the run at once.
    """

    def __init__(self, comm: MPI.Comm) -> None:
        self._comm = comm
        self._seen = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._seen = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether any rank was asked to stop. Collective."""
        return bool(self._comm.allreduce(int(self._seen))) if self._comm.size > 1 else self._seen


class Progress:
    """A bar with the time left on a terminal, elsewhere a line now and then; on rank 0's stderr."""

    def __init__(self, comm: MPI.Comm, title: str, every: float = 10.0) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        self._title, self._every = title, every
        self._rank = comm.rank
        self._start = self._last = time.monotonic()
        self._bar: Bar | None = None
        if comm.rank == 0 and console.is_terminal:
            columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn())
            times = (
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Bar(*columns, *times, console=console)
            self._task = self._bar.add_task(title, total=None, note="")

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Show how far the run is."""
        if self._bar:
            self._bar.update(self._task, completed=done, total=total, note=note)
        elif self._rank == 0 and time.monotonic() - self._last > self._every:
            self._last = time.monotonic()
            spent = self._last - self._start
            print(
                f"{self._title}: {done} of {total}, {spent:.0f} s {note}".rstrip(),
                file=sys.stderr,
                flush=True,
            )


def pictures(comm: MPI.Comm, folder: Path, script: str) -> list[Path]:
    """Make the result's pictures on rank 0; without pyvista those that need none, and a line about it."""
    if comm.rank != 0:
        return []
    from solvers.errors import GliodeError
    from tumour.pictures import make

    try:
        made = make(folder)
        for note in made.notes:
            if not note.startswith(("convergence", "estimates", "fields", "source")):  # not all have them
                print(f"{script}: left out {note}", file=sys.stderr)
        return made.paths
    except GliodeError as error:
        print(f"{script}: some pictures are missing: {error}", file=sys.stderr)
    flat = []
    for kind in ("slices", "convergence", "estimates", "fields", "source"):
        try:
            flat += make(folder, [kind]).paths
        except GliodeError:  # this result has none of the kind
            continue
    return flat
