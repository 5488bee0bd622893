"""A case script run as a user runs it: what the tests of such scripts share."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import yaml

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Script:
    """A script of scripts/ and the tiny case that its tests start from."""

    name: str
    case: dict[str, Any]

    @property
    def path(self) -> Path:
        return ROOT / "scripts" / self.name

    def write_case(self, folder: Path, **parts: Any) -> Path:
        """The case with some of its sections replaced, as a file."""
        file = folder / "tiny.yaml"
        file.write_text(yaml.safe_dump(self.case | parts))
        return file

    def command(self, case: Path, out: Path, *options: str, ranks: int = 1) -> list[str]:
        return [
            *_mpi(ranks),
            *(sys.executable, str(self.path), str(case), "--out", str(out), "--no-pictures"),
            *options,
        ]

    def run(self, case: Path, out: Path, *options: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
        """A run that ends well."""
        command = self.command(case, out, *options, ranks=ranks)
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done

    def failed(self, *arguments: str, program: Path | None = None, ranks: int = 1) -> str:
        """What a run with bad input says: one line (the same whatever the number of ranks), exit code 2."""
        command = [*_mpi(ranks), sys.executable, str(program or self.path), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        lines = [line for line in done.stderr.splitlines() if line.startswith(f"{self.name}: ")]
        assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
        return lines[0]


def _mpi(ranks: int) -> list[str]:
    return ["mpirun", "--oversubscribe", "-n", str(ranks)] if ranks > 1 else []


def result(out: Path) -> dict[str, Any]:
    """The record that a run left."""
    found: dict[str, Any] = json.loads((out / "result.json").read_text())
    return found


def volume(out: Path, name: str) -> np.ndarray:
    """A map that a run left."""
    return np.asarray(nibabel.load(out / "maps" / f"{name}.nii.gz").dataobj)  # type: ignore[attr-defined]
