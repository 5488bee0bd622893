"""identify.py as a user runs it: what it finds and leaves, going on after it was stopped, scans as files."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import yaml

from tests.scripts.helpers import Script, result

CASE: dict[str, Any] = {
    "anatomy": {"source": "mni152", "spacing": 8},
    "model": {"seed": {"width": 6}, "step": 10},
    "truth": {"D_white": 0.4, "D_grey": 0.08, "rho": 0.03, "position": [-25, -15, 25], "age": 150, "step": 5},
    "visits": [
        {"day": 0, "scans": [{"kind": "density"}]},
        {"day": 60, "scans": [{"kind": "density"}, {"kind": "oedema"}]},
    ],
    "identify": {"starts": 1, "discretisation_error": False},  # the truth is grown on the same mesh
    "output": {"days": [-50]},
}
NAMES = ["D_white", "D_grey", "rho", "seed_x", "seed_y", "seed_z", "age"]


SCRIPT = Script("identify.py", CASE)
write_case, command, identify, failed = SCRIPT.write_case, SCRIPT.command, SCRIPT.run, SCRIPT.failed


def values(out: Path) -> dict[str, float]:
    return {name: estimate["value"] for name, estimate in result(out)["estimates"].items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run from beginning to end: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    done = identify(write_case(folder), folder / "out")
    return folder / "out", done.stdout


def test_the_result_folder(whole: tuple[Path, str]) -> None:
    out, _ = whole
    record = result(out)
    assert record["kind"] == "identify" and list(record["estimates"]) == NAMES
    for estimate in record["estimates"].values():
        low, high = estimate["interval"]
        assert low < estimate["value"] < high and estimate["truth"] is not None and estimate["unit"]
    assert [row["iteration"] for row in record["history"]] == list(range(len(record["history"])))
    assert {"misfit", "gradient_norm"} <= set(record["history"][0])
    assert record["stopping"]["rule"] and record["counts"]["fine forward"] > 0
    assert len(record["identifiable"]) == 7 and record["identifiable"][0]["fixed"]
    maps = {file.name.removesuffix(".nii.gz") for file in (out / "maps").iterdir()}
    grown = {f"{kind}_day{day}" for kind in ("truth", "density") for day in (-50, 0, 60)}
    scans = {"scan_day0_density", "scan_day60_density", "scan_day60_oedema"}
    assert maps == {"t1", "white", "grey", "brain"} | grown | scans
    assert not (out / "restart.npz").exists() and (out / "paraview" / "density.bp").is_dir()


def test_it_finds_the_tumour(whole: tuple[Path, str]) -> None:
    """On one mesh with half the time step: the noise is all there is, so a few per cent."""
    out, _ = whole
    for name, estimate in result(out)["estimates"].items():
        slack = 1.0 if name.startswith("seed") else 0.1 * estimate["truth"]
        assert abs(estimate["value"] - estimate["truth"]) < slack, name
    for day in (0, 60):
        found, truth = (nibabel.load(out / "maps" / f"{n}_day{day}.nii.gz") for n in ("density", "truth"))
        difference = np.asarray(found.dataobj) - np.asarray(truth.dataobj)  # type: ignore[attr-defined]
        assert np.abs(difference).max() < 0.05


def test_it_prints_the_table(whole: tuple[Path, str]) -> None:
    out, said = whole
    for word in (*NAMES, "truth", "estimate", "90 % interval", "mm^2/day", "The scans fix", "Stopped by"):
        assert word in said
    assert str(out / "result.json") in said


def test_the_resolved_case_and_its_scans_as_files(whole: tuple[Path, str], tmp_path: Path) -> None:
    """The scans that the run left, given back as a patient's: much the same estimates, without a truth."""
    out, _ = whole
    visits = [
        {"day": 0, "scans": [{"kind": "density", "file": str(out / "maps" / "scan_day0_density.nii.gz")}]},
        {"day": 60, "scans": [{"kind": "density", "file": str(out / "maps" / "scan_day60_density.nii.gz")}]},
    ]
    maps = {name: str(out / "maps" / f"{name}.nii.gz") for name in ("white", "grey", "t1")}
    case = yaml.safe_load((out / "case.yaml").read_text())
    del case["truth"]
    case |= {"anatomy": {"source": "nifti", **maps}, "visits": visits}
    (tmp_path / "patient.yaml").write_text(yaml.safe_dump(case))
    identify(tmp_path / "patient.yaml", tmp_path / "out")
    record = result(tmp_path / "out")
    assert all(estimate["truth"] is None for estimate in record["estimates"].values())
    for name, value in values(out).items():
        assert record["estimates"][name]["value"] == pytest.approx(value, rel=0.1, abs=1.0), name
    assert (tmp_path / "out" / "maps" / "original" / "density_day60.nii.gz").is_file()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_search_goes_on_to_the_same_estimates(
    whole: tuple[Path, str], tmp_path: Path, number: signal.Signals
) -> None:
    case, out = write_case(tmp_path), tmp_path / "out"
    process = subprocess.Popen(command(case, out), stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (out / "restart.npz").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=120)
    assert not (out / "result.json").exists()
    if number == signal.SIGINT:
        assert process.returncode == 130 and "interrupted in the search" in said and "Traceback" not in said
    again = identify(case, out)
    assert "going on with the saved search" in again.stderr
    assert values(out) == pytest.approx(values(whole[0]), rel=1e-12)
    history = [row["misfit"] for row in result(out)["history"]]
    assert history == pytest.approx([row["misfit"] for row in result(whole[0])["history"]], rel=1e-12)


def test_two_ranks_find_what_one_finds(whole: tuple[Path, str], tmp_path: Path) -> None:
    identify(write_case(tmp_path), tmp_path / "out", ranks=2)
    assert values(tmp_path / "out") == pytest.approx(values(whole[0]), rel=1e-3)


def test_cases_that_cannot_be_identified(tmp_path: Path) -> None:
    said = failed(str(write_case(tmp_path, visits=[{"day": 0}])), "--out", str(tmp_path / "out"))
    assert said == "identify.py: tiny.yaml: visits: no scans; name those to identify the tumour from"
    surgery = [{"kind": "resection", "day": 30, "centre": [0, 0, 0], "radius": 20}]
    assert "therapy[0]: identify.py does not look through a resection" in failed(
        str(write_case(tmp_path, therapy=surgery)), "--out", str(tmp_path / "out")
    )
