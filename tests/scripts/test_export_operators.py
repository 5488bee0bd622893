"""scripts/export_operators.py as a user runs it: a case, a brain, and calls that make no sense."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mpi4py import MPI
from torch import Tensor

from scripts.export_operators import save
from solvers.errors import GliodeError
from solvers.semidiscrete import SemiDiscrete
from tumour.anatomy import Anatomy

SCRIPT = Path(__file__).parents[2] / "scripts" / "export_operators.py"


def called(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def case(tmp_path: Path) -> Path:
    """A box of 4 x 3 x 2 voxels of 2 mm, as NIfTI."""
    white = np.full((4, 3, 2), 0.25)
    brain = Anatomy(white, 1 - white, 0 * white, np.diag([2.0, 2.0, 2.0, 1.0]))
    for name in ("white", "grey"):
        brain.write(tmp_path / f"{name}.nii.gz", getattr(brain, name))
    text = {
        "anatomy": {"source": "nifti", "white": "white.nii.gz", "grey": "grey.nii.gz"},
        "truth": {"D_white": 0.4, "D_grey": 0.1, "rho": 0.02, "position": [3, 2, 1], "age": 90},
        "visits": [{"day": 0, "scans": [{"kind": "density"}]}],
    }
    (tmp_path / "box.yaml").write_text(yaml.safe_dump(text))
    return tmp_path / "box.yaml"


def test_a_case_gives_one_file(case: Path) -> None:
    out = case.with_name("box.safetensors")
    done = called(str(case), "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "60 vertices, 24 cells" in done.stdout and "MB" in done.stdout
    problem = SemiDiscrete.load(out)
    assert problem.provenance["source"] == "case box"
    assert isinstance(problem.mass, Tensor) and float(problem.mass.sum()) == pytest.approx(24 * 8.0)
    assert torch.allclose(problem.fractions["white"], torch.tensor(0.25).double(), atol=1e-6)


def test_a_wrong_call_is_one_line_and_writes_nothing(tmp_path: Path) -> None:
    done = called(str(tmp_path / "none.yaml"), "--out", str(tmp_path / "x.safetensors"))
    assert done.returncode == 2 and "none.yaml" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(
    ("file", "anatomy", "spacing", "message"),
    [
        (None, None, 3.0, "give a case file, or --anatomy mni152"),
        (Path("a.yaml"), "mni152", 3.0, "one of the two"),
        (None, "colin27", 3.0, "the only one without files is mni152"),
        (None, "mni152", 0.5, "spacing 0.5"),
    ],
)
def test_calls_that_make_no_sense(
    file: Path | None, anatomy: str | None, spacing: float, message: str, tmp_path: Path
) -> None:
    with pytest.raises(GliodeError, match=message):
        save(MPI.COMM_SELF, file, anatomy, spacing, tmp_path / "x.safetensors")
