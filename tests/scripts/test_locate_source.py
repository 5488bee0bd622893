"""locate_source.py as a user runs it: what it finds and leaves, going on after it was stopped, refusals."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from solvers.errors import GliodeError
from tests.scripts.helpers import Script, result, volume
from tumour import case as cases
from tumour import source_study
from tumour.pictures import make

CASE: dict[str, Any] = {
    "anatomy": {"source": "mni152", "spacing": 8},
    "model": {"seed": {"width": 6}, "step": 10},
    "truth": {
        "D_white": 0.3,
        "D_grey": 0.06,
        "rho": 0.02,
        "position": [-28, -14, 26],
        "age": 100,
        "spacing": 4,
        "step": 5,
    },
    "visits": [{"day": 0, "scans": [{"kind": "density"}]}],
    "locate": {"slice": {"axis": "z"}, "posterior": {"samples": 5}},
    "output": {"days": [-40]},
}
SHORT = {"locate": {"slice": {"axis": "z"}, "posterior": None}}
SCRIPT = Script("locate_source.py", CASE)
write_case, command, locate = SCRIPT.write_case, SCRIPT.command, SCRIPT.run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run from beginning to end: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    done = locate(write_case(folder), folder / "out")
    return folder / "out", done.stdout


def test_the_result_folder(whole: tuple[Path, str]) -> None:
    out, said = whole
    record = result(out)
    assert record["kind"] == "locate" and record["stopping"]["rule"] == "Discrepancy"
    assert record["residual_norm"] <= 1.05 * record["delta"] and record["posterior"]["directions"] > 0
    assert [row["iteration"] for row in record["history"]] == list(range(len(record["history"])))
    maps = {file.name.removesuffix(".nii.gz") for file in (out / "maps").iterdir()}
    source = {"source", "source_truth", "source_mean", "source_sd", "source_exceedance"}
    grown = {"density_day-40", "density_day0", "truth_day0", "exceedance_day0", "scan_day0_density"}
    assert maps == {"t1", "white", "grey", "brain"} | source | grown
    assert not (out / "restart.npz").exists() and (out / "paraview" / "source.bp").is_dir()
    for word in ("where it started", "True centres", "Stopped by Discrepancy", str(out / "result.json")):
        assert word in said


def test_it_finds_the_source(whole: tuple[Path, str]) -> None:
    """Within a third of a voxel, of the truth's cells, and the tumour grown from it much the scanned one."""
    out, _ = whole
    assert result(out)["truth"]["distances"][0] < 3.0
    found, truth = volume(out, "source"), volume(out, "source_truth")
    assert found.shape[2] == 1 and found.sum() == pytest.approx(truth.sum(), rel=0.3)
    grown, seen = volume(out, "density_day0"), volume(out, "truth_day0")
    assert np.linalg.norm(grown - seen) < 0.25 * np.linalg.norm(seen)  # 8 mm against 4 mm
    chance = volume(out, "source_exceedance")
    assert chance.min() >= 0 and chance.max() <= 1


def test_its_picture(whole: tuple[Path, str]) -> None:
    made = make(whole[0])
    assert {path.name for path in made.paths} == {"source.png", "convergence.png", "estimates.png"}
    assert all(path.stat().st_size > 10_000 for path in made.paths)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_search_goes_on_to_the_same_source(
    whole: tuple[Path, str], tmp_path: Path, number: signal.Signals
) -> None:
    case, out = write_case(tmp_path, **SHORT), tmp_path / "out"
    process = subprocess.Popen(command(case, out), stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (out / "restart.npz").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=120)
    assert not (out / "result.json").exists()
    if number == signal.SIGINT:
        assert process.returncode == 130 and "interrupted in the search" in said and "Traceback" not in said
    again = locate(case, out)
    assert "going on with the saved search" in again.stderr
    assert result(out)["foci"][0]["centre"] == pytest.approx(result(whole[0])["foci"][0]["centre"], rel=1e-9)
    assert volume(out, "source") == pytest.approx(volume(whole[0], "source"), abs=1e-9)


def test_two_ranks_find_what_one_finds(whole: tuple[Path, str], tmp_path: Path) -> None:
    locate(write_case(tmp_path, **SHORT), tmp_path / "out", ranks=2)
    one, two = (volume(out, "source") for out in (whole[0], tmp_path / "out"))
    assert np.linalg.norm(two - one) < 1e-6 * np.linalg.norm(one)


def test_a_refusal_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        command(write_case(tmp_path, visits=[{"day": 0}]), tmp_path / "out"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 2
    assert lines == ["locate_source.py: tiny.yaml: visits: no scans; name those to go back from"]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"visits": [{"day": 0, "scans": [{"kind": "density", "noise": 0}]}]}, "noise: must be positive"),
        ({"locate": {"age": 0}}, "locate.age: must be positive (got 0)"),
        ({"locate": {"tau": 1}}, "locate.tau: must be above 1"),
        ({"truth": None}, "truth: missing"),
        ({"locate": {"unknown": "seed"}}, "locate.unknown: must be"),
        ({"locate": {"slice": {"axis": "z", "point": [0, 0, 200]}}}, "locate.slice.point: (0.0, 0.0, 200.0)"),
        (
            {"truth": CASE["truth"] | {"foci": [[0, 0, 200]]}},
            "truth.foci[0]: (0.0, 0.0, 200.0) mm lies outside",
        ),
        (
            {"therapy": [{"kind": "radiotherapy", "day": 0}]},
            "therapy: the way back through a treatment is not there yet",
        ),
    ],
)
def test_cases_that_cannot_be_followed_back(tmp_path: Path, parts: dict[str, Any], message: str) -> None:
    with pytest.raises(GliodeError) as error:
        case = cases.read(write_case(tmp_path, **parts))
        source_study.require_locatable(case, "tiny.yaml")
        source_study.true_centres(case, source_study.brains_of(case).coarse)
    assert message in str(error.value)
