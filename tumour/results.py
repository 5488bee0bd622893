"""Writing a result folder: what simulate.py and identify.py leave, and visualise.py reads.

case.yaml       the resolved case: reading it gives the same run
result.json     estimates, misfit, stopping rule, counts, history, versions, seconds; written last: a folder
                without it is a run that has not finished
maps/           NIfTI on the anatomy's grid: t1, white, grey, brain, density_day<T>, truth_day<T>,
                scan_day<T>_<kind>; of fields D, rho, <field>_log_sd, <field>_truth,
                exceedance_day<T>; for a user's files maps/original/ holds densities on their own grid
paraview/       the mesh with the density against time
restart.npz     only while a run is unfinished
"""

from __future__ import annotations

import math
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from mpi4py import MPI
from torch import Tensor

from inverse.uncertainty import FIXED
from solvers.errors import GliodeError
from solvers.fem.io import Film, on_root
from solvers.fem.mesh import Domain
from solvers.files import write_json, write_text
from tumour.anatomy import Anatomy
from tumour.case import Case
from tumour.identification import DERIVED, Identification
from tumour.nifti import write_nifti
from tumour.patients import Scan
from tumour.study import truth_of

PACKAGES = (
    "numpy",
    "scipy",
    "torch",
    "dolfinx",
    "petsc4py",
    "mpi4py",
    "nibabel",
    "nilearn",
    "meshio",
    "pyvista",
)


def day_name(day: float) -> str:
    """A day as it stands in file names: 60, -12.5."""
    return f"{round(day, 4) + 0.0:.4f}".rstrip("0").rstrip(".")  # + 0.0: no minus zero


class Results:
    """A result folder being written. Every method is collective; rank 0 writes."""

    def __init__(self, folder: str | Path, comm: MPI.Comm) -> None:
        self.folder = Path(folder)
        self.comm = comm

    @property
    def restart(self) -> Path:
        """The restart file."""
        return self.folder / "restart.npz"

    def begin(self, case: Case) -> None:
        """Take the folder: remove an earlier run's results (not its restart file), write the case.

        Raises GliodeError for a folder that holds something else.
        """

        def take() -> None:
            if self.folder.exists() and not self.folder.is_dir():
                raise GliodeError(f"--out {self.folder}: is a file; give a folder")
            if (
                self.folder.exists()
                and any(self.folder.iterdir())
                and not (self.folder / "case.yaml").is_file()
            ):
                raise GliodeError(f"--out {self.folder}: holds other things than results; give a new folder")
            (self.folder / "result.json").unlink(missing_ok=True)
            for name in ("maps", "paraview", "pictures"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            for left in self.folder.glob(".*.npz"):  # half-written by a run that was killed
                left.unlink()
            text = yaml.safe_dump(case.record(), sort_keys=False, allow_unicode=True, default_flow_style=None)
            write_text(self.folder / "case.yaml", text)

        on_root(self.comm, take)

    def anatomy(self, brain: Anatomy) -> None:
        """Write the brain's maps."""
        maps = {"t1": brain.t1, "white": brain.white, "grey": brain.grey, "brain": brain.brain}
        for name, array in maps.items():
            if array is not None:
                self.map(name, array, brain)

    def map(self, name: str, array: np.ndarray, brain: Anatomy, original: bool = False) -> None:
        """Write maps/NAME.nii.gz on the anatomy's grid; `original`: also on that of the user's files."""

        def write() -> None:
            write_nifti(self.folder / "maps" / f"{name}.nii.gz", array, brain.affine)
            if original and brain.stored is not None:
                brain.write(self.folder / "maps" / "original" / f"{name}.nii.gz", array)

        on_root(self.comm, write)

    def scans(self, scans: Sequence[Scan], brain: Anatomy) -> None:
        """Write the scans."""
        for scan in scans:
            self.map(f"scan_day{day_name(scan.day)}_{scan.modality.kind}", scan.values, brain)

    def film(self, domain: Domain, states: Mapping[float, Tensor], name: str = "density") -> Path:
        """Write the densities (or another field) against time for ParaView; the file's path."""
        with Film(self.folder / "paraview" / name, domain, name) as film:
            for day in sorted(states):
                film.add(day, states[day])
        return film.path

    def finish(self, record: Mapping[str, Any]) -> Path:
        """Write result.json, remove the restart file."""
        path = self.folder / "result.json"

        def write() -> None:
            write_json(path, _finite({**record, "versions": versions(), "ranks": self.comm.size}))
            self.restart.unlink(missing_ok=True)

        on_root(self.comm, write)
        return path


def _finite(value: Any) -> Any:
    """Plain values with null for what is not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def identified(case: Case, found: Identification) -> dict[str, Any]:
    """The record of an identification: result.json but for versions and seconds.

    The history is that of the search's last two stages, one after the other; what came before them
    is under `search`.
    """
    truth = truth_of(case) if case.synthetic else {}
    estimates = {
        f"seed_{name}" if name in "xyz" else name: {
            "value": estimate.value,
            "unit": estimate.unit,
            "interval": list(estimate.interval),
            "truth": truth.get(name),
        }
        for name, estimate in found.estimates.items()
    }
    fine = list(dict.fromkeys(row["stage"] for row in found.history))[-2:]
    chosen = [row for row in found.history if row["stage"] in fine]
    solves = {f"{level} {kind}": n for level in ("fine", "coarse") for kind, n in found.counts[level].items()}
    return {
        "case": case.name,
        "kind": "identify",
        "estimates": estimates,
        "derived": {
            name: {
                **asdict(quantity),
                "formula": DERIVED[name][0],
                "fixed": quantity.variance_ratio <= FIXED,
            }
            for name, quantity in found.derived.items()
        },
        "level": case.identify.level,
        "misfit": found.misfit,
        "data": found.data,
        "stopping": found.stopping,
        "counts": {**solves, "forward equivalents": round(found.forward_equivalents, 1)},
        "history": [{**row, "iteration": place} for place, row in enumerate(chosen)],
        "search": [row for row in found.history if row["stage"] not in fine],
        "identifiable": [asdict(combination) for combination in found.combinations],
        "alternatives": found.alternatives,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages in use."""
    found = {name: sys.modules[name] for name in PACKAGES if name in sys.modules}
    return {
        "python": platform.python_version(),
        **{name: str(getattr(module, "__version__", "unknown")) for name, module in found.items()},
    }
