"""simulate.py as a user runs it: what it leaves, what it says, and going on after it was stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import yaml

from tests.scripts.helpers import ROOT, Script, result
from tumour.anatomy import mni152
from tumour.nifti import reorient, write_nifti

CASE: dict[str, Any] = {
    "anatomy": {"source": "mni152", "spacing": 10},
    "model": {"seed": {"width": 4}, "step": 10},
    "truth": {"D_white": 0.4, "D_grey": 0.1, "rho": 0.03, "position": [-25, -15, 25], "age": 150},
    "visits": [{"day": 0, "scans": [{"kind": "density"}]}, {"day": 60, "scans": [{"kind": "oedema"}]}],
    "output": {"days": [-50, 30]},
}


SCRIPT = Script("simulate.py", CASE)
write_case, command, simulate, failed = SCRIPT.write_case, SCRIPT.command, SCRIPT.run, SCRIPT.failed


def volume(out: Path, name: str) -> np.ndarray:
    return np.asarray(nibabel.load(out / "maps" / f"{name}.nii.gz").dataobj)  # type: ignore[attr-defined]


def density(out: Path, day: int) -> np.ndarray:
    return volume(out, f"density_day{day}")


def test_the_result_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = simulate(write_case(tmp_path), out)
    assert str(out / "result.json") in done.stdout
    maps = {file.name.removesuffix(".nii.gz") for file in (out / "maps").iterdir()}
    days = {f"density_day{day}" for day in (-50, 0, 30, 60)}
    assert maps == {"t1", "white", "grey", "brain", "scan_day0_density", "scan_day60_oedema"} | days
    assert (out / "paraview" / "density.bp" / "data.0").stat().st_size > 0
    assert not (out / "restart.npz").exists()
    record, brain = result(out), mni152(10)
    assert record["kind"] == "simulate" and record["case"] == "tiny" and record["versions"]["dolfinx"]
    assert record["counts"]["steps"] == 10 + 5 + 3 + 3  # 100, 50, 30, 30 days
    for row in record["days"]:
        u = density(out, int(row["day"]))
        assert u.shape == brain.shape and u.min() >= 0 and u.max() <= 1 and not u[~brain.brain].any()
        assert u.sum() == pytest.approx(row["cm3 of cells"], rel=1e-5)  # 1 cm^3 a voxel
    cells = [row["cm3 of cells"] for row in record["days"]]
    assert cells == sorted(cells)
    # The resolved case gives the same run.
    simulate(out / "case.yaml", tmp_path / "again")
    assert result(tmp_path / "again")["days"] == record["days"]


def test_two_ranks_give_what_one_gives(tmp_path: Path) -> None:
    case = write_case(tmp_path, model={**CASE["model"], "tolerance": 1e-12})
    simulate(case, tmp_path / "one")
    simulate(case, tmp_path / "two", ranks=2)
    assert result(tmp_path / "two")["ranks"] == 2
    for name in ("density_day60", "scan_day0_density", "scan_day60_oedema"):
        # The files hold float32.
        np.testing.assert_allclose(
            volume(tmp_path / "one", name), volume(tmp_path / "two", name), rtol=0, atol=3e-7
        )
    for one, two in zip(result(tmp_path / "one")["days"], result(tmp_path / "two")["days"], strict=True):
        assert one == pytest.approx(two, rel=1e-9)


def stopped(case: Path, out: Path, number: signal.Signals, ranks: int = 1) -> tuple[int, str]:
    """Start a run that saves after every step, stop it once it has, return its exit code and what it said."""
    process = subprocess.Popen(
        command(case, out, "--save-every", "0", ranks=ranks),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (out / "restart.npz").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    if number == signal.SIGKILL:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert (out / "restart.npz").exists() and not (out / "result.json").exists()
    return process.returncode, said


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_goes_on_to_the_same_numbers(tmp_path: Path, number: signal.Signals) -> None:
    case = write_case(tmp_path, model={**CASE["model"], "step": 0.2})
    code, said = stopped(case, tmp_path / "out", number)
    if number == signal.SIGINT:
        assert code == 130 and "interrupted after step" in said and "Traceback" not in said
    again = simulate(case, tmp_path / "out")
    assert "going on from step" in again.stderr
    simulate(case, tmp_path / "whole")
    assert result(tmp_path / "out")["days"] == result(tmp_path / "whole")["days"]
    for day in (-50, 0, 30, 60):
        assert np.array_equal(density(tmp_path / "out", day), density(tmp_path / "whole", day))


def test_a_run_stopped_on_two_ranks_goes_on_on_one(tmp_path: Path) -> None:
    case = write_case(tmp_path, model={**CASE["model"], "step": 0.5, "tolerance": 1e-12})
    stopped(case, tmp_path / "out", signal.SIGINT, ranks=2)  # mpirun forwards it, and kills soon after
    assert "going on from step" in simulate(case, tmp_path / "out").stderr
    simulate(case, tmp_path / "whole")
    for one, two in zip(result(tmp_path / "out")["days"], result(tmp_path / "whole")["days"], strict=True):
        assert one == pytest.approx(two, rel=1e-9)


def test_another_case_and_fresh_start_anew(tmp_path: Path) -> None:
    slow = {**CASE["model"], "step": 0.2}
    stopped(write_case(tmp_path, model=slow), tmp_path / "out", signal.SIGKILL)
    left = (tmp_path / "out" / "restart.npz").read_bytes()
    fresh = simulate(write_case(tmp_path, model=slow), tmp_path / "out", "--fresh")
    assert "going on" not in fresh.stderr
    (tmp_path / "out" / "restart.npz").write_bytes(left)
    other = simulate(write_case(tmp_path), tmp_path / "out")
    assert "going on" not in other.stderr and result(tmp_path / "out")["counts"]["steps"] == 21


@pytest.mark.parametrize("ranks", [1, 2])
def test_bad_input_is_one_line(tmp_path: Path, ranks: int) -> None:
    case = write_case(tmp_path, truth=CASE["truth"] | {"D_white": -1})
    said = failed(str(case), "--out", str(tmp_path / "out"), ranks=ranks)
    assert said == "simulate.py: tiny.yaml: truth.D_white: must be positive (got -1)"
    assert not (tmp_path / "out").exists()
    case = write_case(tmp_path, truth=CASE["truth"] | {"position": [0, 0, 90]})
    assert "truth.position: (0.0, 0.0, 90.0) mm lies outside the brain of MNI152" in failed(
        str(case), "--out", str(tmp_path / "out"), ranks=ranks
    )


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    case, out = write_case(tmp_path), tmp_path / "thesis"
    (out / "maps").mkdir(parents=True)
    (out / "maps" / "chapter.txt").write_text("years of work")
    assert "thesis: holds other things than results; give a new folder" in failed(
        str(case), "--out", str(out)
    )
    assert "is a file; give a folder" in failed(str(case), "--out", str(case))
    assert (out / "maps" / "chapter.txt").read_text() == "years of work"


def test_a_case_without_truth_cannot_be_simulated(tmp_path: Path) -> None:
    case = tmp_path / "c.yaml"
    case.write_text(yaml.safe_dump({"anatomy": {"source": "mni152"}, "visits": [{"day": 0}]}))
    said = failed(str(case), "--out", str(tmp_path / "out"))
    assert said == "simulate.py: c.yaml: truth: missing; it describes the tumour to grow"


@pytest.mark.parametrize("missing", ["dolfinx", "typer", "torch"])
def test_a_missing_package_is_one_line(tmp_path: Path, missing: str) -> None:
    start = tmp_path / "start.py"
    start.write_text(
        f"import sys, runpy; sys.modules[{missing!r}] = None\n"
        f"sys.argv[0] = {str(SCRIPT.path)!r}; runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    case = write_case(tmp_path)
    said = failed(str(case), "--out", str(tmp_path / "out"), program=start)
    assert "is not installed" in said and "scripts/env" in said


def test_help_documents_options_and_defaults() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT.path), "--help"], capture_output=True, text=True, timeout=60
    )
    words = " ".join(done.stdout.split())
    assert done.returncode == 0 and "[default: 20.0" in words and "--resume" in words and "mpirun" in words


def test_a_users_files_get_results_on_their_own_grid(tmp_path: Path) -> None:
    """Axes LSP, 5 x 5 x 10 mm voxels; solved on 10 mm."""
    brain = mni152(1).resample([5, 5, 10])
    for name in ("white", "grey"):
        write_nifti(tmp_path / f"{name}.nii.gz", *reorient(getattr(brain, name), brain.affine, "LSP"))
    anatomy = {"source": "nifti", "white": "white.nii.gz", "grey": "grey.nii.gz", "spacing": 10}
    simulate(write_case(tmp_path, anatomy=anatomy), tmp_path / "out")
    mine = nibabel.load(tmp_path / "white.nii.gz")
    back = nibabel.load(tmp_path / "out" / "maps" / "original" / "density_day60.nii.gz")
    assert back.shape == mine.shape and np.array_equal(back.affine, mine.affine)  # type: ignore[attr-defined]
    there = density(tmp_path / "out", 60).sum() * 1000
    assert back.get_fdata().sum() * 250 == pytest.approx(there, rel=1e-5)  # type: ignore[attr-defined]


def test_a_mesh_file_goes_to_paraview(tmp_path: Path) -> None:
    anatomy = {"source": "mesh", "path": str(ROOT / "data" / "mni152_6mm.vtu"), "white": 1, "grey": 2}
    case = write_case(tmp_path, anatomy=anatomy, visits=[{"day": 0}])
    simulate(case, tmp_path / "out")
    assert not (tmp_path / "out" / "maps").exists()
    assert (tmp_path / "out" / "paraview" / "density.bp" / "data.0").stat().st_size > 4 * 10_139 * 8
    assert result(tmp_path / "out")["days"][-1]["cm3 above 0.16"] > 1
