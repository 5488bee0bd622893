"""Run a benchmark: print its checks, write results/benchmarks/NAME.json, exit 1 where a bar is not met.

scripts/env python scripts/benchmark.py NAME [--full] [--device cuda]
scripts/env python scripts/benchmark.py --list
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import math
import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.benchmarks import Check

# One thread a process, also for OpenBLAS, which torch.set_num_threads does not reach and whose own threads
# cost small products more than they bring. Read when torch is first imported; workers inherit it.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "scripts" / "benchmarks"
RESULTS = ROOT / "results" / "benchmarks"


def available() -> dict[str, str]:
    """Name -> first line of the module's docstring, without importing it."""
    found = {}
    for path in sorted(FOLDER.glob("[!_]*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.stem] = text.partition("\n")[0]
    return found


def machine() -> dict[str, str | int | float]:
    """Processor, cores this process may use, memory in GiB and the system."""
    cpu = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        models = [line for line in information.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_gib": round(memory, 1),
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that the benchmark has imported."""
    names = (
        *("numpy", "scipy", "torch", "torchdiffeq"),
        *("dolfinx", "petsc4py", "mpi4py", "nilearn", "nibabel", "pyvista"),
    )
    loaded = {name: sys.modules[name] for name in names if name in sys.modules}
    return {
        "python": platform.python_version(),
        **{k: str(getattr(v, "__version__", "?")) for k, v in loaded.items()},
    }


def table(name: str, checks: list[Check], seconds: float) -> Any:
    """The checks as a rich table."""
    from rich.table import Table

    result = Table(title=f"{name} ({seconds:.0f} s)", title_justify="left")
    for column, side in (
        ("check", "left"),
        ("value", "right"),
        ("unit", "left"),
        ("bar", "left"),
        ("", "left"),
    ):
        result.add_column(column, justify=side)  # type: ignore[arg-type]
    for check in checks:
        value = f"{check.value:.4g}" if isinstance(check.value, float) else str(check.value)
        mark = {True: "[green]holds", False: "[bold red]FAILS", None: ""}[check.holds]
        result.add_row(check.what, value, check.unit, check.bar or "", mark)
    return result


def plain(value: float | int | str) -> float | int | str:
    """The value as JSON knows it, which has no nan and no inf."""
    return value if isinstance(value, str) or math.isfinite(value) else str(value)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 all bars met, 1 one was missed, 2 the call was wrong or something is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help="benchmark to run")
    parser.add_argument("--full", action="store_true", help="the long version")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where it computes; not all can use cuda"
    )
    parser.add_argument("--list", action="store_true", help="name the benchmarks and stop")
    options = parser.parse_args(arguments)
    known = available()
    if options.list:
        for name, line in known.items():
            print(f"{name:16}{line}")
        return 0
    if options.name not in known:
        parser.error(f"no benchmark {options.name!r}: choose from {', '.join(known) or 'none yet'}")
    try:
        from rich.console import Console

        module = importlib.import_module(f"scripts.benchmarks.{options.name}")
    except ImportError as error:
        again = f"scripts/env python scripts/benchmark.py {options.name}"
        print(f"benchmark {options.name}: {error}; in the environment: {again}", file=sys.stderr)
        return 2
    given: dict[str, str] = {}
    if "device" in inspect.signature(module.run).parameters:
        given["device"] = options.device
    elif options.device != "cpu":
        parser.error(f"--device {options.device}: benchmark {options.name} computes on the CPU; leave it out")
    graphics = None
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: torch sees no CUDA device here; leave it out to compute on the CPU")
        graphics = torch.cuda.get_device_name()
    console = Console(width=None if sys.stdout.isatty() else 120)
    start = time.perf_counter()
    checks: list[Check] = module.run(options.full, **given)
    seconds = time.perf_counter() - start
    console.print(table(options.name, checks, seconds))
    RESULTS.mkdir(parents=True, exist_ok=True)
    record = {
        "name": options.name,
        "full": options.full,
        "checks": [asdict(check) | {"value": plain(check.value)} for check in checks],
        "seconds": round(seconds, 1),
        "device": options.device,
        "machine": machine() | ({"gpu": graphics} if graphics else {}),
        "versions": versions(),
    }
    path = RESULTS / f"{options.name}{'_cuda' if graphics else ''}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    failed = sum(check.holds is False for check in checks)
    console.print(
        f"{path.relative_to(ROOT)}: " + (f"[bold red]{failed} bars missed" if failed else "all bars met")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
