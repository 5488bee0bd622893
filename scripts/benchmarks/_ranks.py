"""A benchmark's worker in a process of its own, or on several MPI ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def called(code: str, count: int = 1, patience: float = 1200) -> str:
    """What Python code prints on `count` ranks, one thread each; `patience` in seconds.

    Raises RuntimeError with all output where it fails.
    """
    ranks = ["mpirun", "--oversubscribe", "-n", str(count)] if count > 1 else []
    command = [*ranks, sys.executable, "-c", code]
    settings = {"OMP_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    environment = {**os.environ, **settings, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=patience
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout
