"""A row for each equation: error and order of the direct problem, truth and estimate at 1 % noise.

The rows are those of scripts/benchmarks/equation_rows, each module in a process of its own, two at a time. At
most two rows may miss 5 % in a parameter or a field, over three seeds of noise; the worst seed counts, and
the row's note must say why. `--full` adds the cylinder DFG 2D-2.
"""

from __future__ import annotations

import importlib
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from rich.console import Console
from rich.table import Table

from scripts.benchmarks import Check
from scripts.benchmarks.equation_rows import Row

FOLDER = Path(__file__).with_name("equation_rows")
MAY_MISS = 2


def run(full: bool) -> list[Check]:
    """All rows, and how many miss in their parameters."""
    names = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))
    found: dict[str, list[Row]] = {}
    context = multiprocessing.get_context("spawn")  # MPI does not survive a fork
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        waiting = {pool.submit(_rows, name, full): name for name in names}
        for done in as_completed(waiting):
            name = waiting[done]
            found[name], seconds = done.result()
            print(f"{name}: {len(found[name])} rows in {seconds:.0f} s", file=sys.stderr)
    rows = [row for name in names for row in found[name]]
    show(rows)
    misses = [row.case for row in rows if row.misses]
    unexplained = [row.case for row in rows if row.misses and not row.note]
    assert not unexplained, f"rows that miss and whose note does not say why: {', '.join(unexplained)}"
    checks = [check for row in rows for check in row.checks()]
    checks.append(Check("rows", len(rows)))
    what = "rows that miss 5 % in a parameter or a field"
    checks.append(Check.at_most(what + (f" ({', '.join(misses)})" if misses else ""), len(misses), MAY_MISS))
    return checks


def show(rows: list[Row]) -> None:
    """One line for each case; the notes below."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table(title="equations", title_justify="left")
    for column in ("case", "reference", "error", "order", "truth: estimates at 1 % noise", "worst"):
        table.add_column(column, justify="right" if column in ("error", "order", "worst") else "left")
    for row in rows:
        order = "" if row.order is None else f"{row.order:.2f} ({row.expected:g})"
        worst = f"{100 * row.worst:.1f} %" if row.identifies else ""
        table.add_row(row.case, row.reference, f"{row.error:.1e}", order, row.estimates, worst)
    console.print(table)
    for row in rows:
        if row.note:
            console.print(f"{row.case}: {row.note}", highlight=False)


def _rows(name: str, full: bool) -> tuple[list[Row], float]:
    """The rows of a module, and the seconds they took."""
    start = time.perf_counter()
    rows = importlib.import_module(f"scripts.benchmarks.equation_rows.{name}").rows(full)
    return rows, time.perf_counter() - start
