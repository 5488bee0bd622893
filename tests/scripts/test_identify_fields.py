"""identify.py with `unknown: field`: what it leaves, going on, two ranks, partial data, cases it refuses."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from solvers.errors import GliodeError
from tests.scripts.helpers import Script, result, volume
from tumour import case as cases
from tumour.pictures import make

PLACE = [-25, -15, 25]
FIELD: dict[str, Any] = {
    "of": ["D"],
    "reference": {"D_white": 0.5, "D_grey": 0.2, "rho": 0.025},
    "start": {"position": PLACE, "age": 120},
    "tau": 1.1,
    "samples": 4,
}
CASE: dict[str, Any] = {
    "anatomy": {"source": "mni152", "spacing": 10},
    "model": {"seed": {"width": 8}, "step": 60},
    "truth": {
        **{"D_white": 0.5, "D_grey": 0.2, "rho": 0.025, "position": PLACE, "age": 120},
        "inclusions": [{"centre": [-25, -40, 25], "radius": 20, "D": 5}],
    },
    "visits": [
        {"day": 0, "scans": [{"kind": "density"}]},
        {"day": 90, "scans": [{"kind": "density"}, {"kind": "oedema"}]},
    ],
    "identify": {"unknown": "field", "field": FIELD},
}
SCRIPT = Script("identify.py", CASE)


def field(**changes: Any) -> dict[str, Any]:
    return {"unknown": "field", "field": FIELD | changes}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run from beginning to end: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("fields")
    return folder / "out", SCRIPT.run(SCRIPT.write_case(folder), folder / "out").stdout


def test_the_result_folder(whole: tuple[Path, str]) -> None:
    out, said = whole
    record = result(out)
    assert record["kind"] == "identify" and record["estimates"] == {} and record["stopping"]["met"]
    assert record["stopping"]["rule"] == "Discrepancy" and record["counts"]["adjoint"] > 0
    maps = {file.name.removesuffix(".nii.gz") for file in (out / "maps").iterdir()}
    assert {"D", "D_log_sd", "D_truth", "exceedance_day90", "density_day0", "density_day90"} <= maps
    brain = volume(out, "brain") > 0
    chance, sd = volume(out, "exceedance_day90"), volume(out, "D_log_sd")
    assert chance.min() >= 0 and chance.max() == 1 and (sd[brain] > 0).all()
    assert (out / "paraview" / "D.bp").is_dir() and not (out / "restart.npz").exists()
    assert {"misfit", "gradient_norm"} <= set(record["history"][0])
    for word in ("sd of log", "mm^2/day", "discrepancy: alpha"):
        assert word in said


def test_it_finds_the_inclusion(whole: tuple[Path, str]) -> None:
    """Nearer to the truth than the reference, and highest in the ball."""
    out, _ = whole
    row = result(out)["fields"]["D"]
    assert row["log_error"] < 0.8 * row["log_error_of_reference"]
    ratio, true = volume(out, "D"), volume(out, "D_truth")
    brain = volume(out, "brain") > 0
    ball = brain & (true > 0.75 * true.max())
    assert ratio[ball].mean() > 2 * ratio[brain & ~ball].mean()


def test_its_picture(whole: tuple[Path, str]) -> None:
    out, _ = whole
    (path,) = make(out, ["fields"], (1000, 500)).paths
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=float)
    assert path.name == "fields.png" and pixels.shape == (500, 1000, 3)
    for part in np.array_split(pixels, 4, axis=1):  # truth, estimate, sd, chance
        assert part.std() > 10


def test_a_stopped_search_goes_on_to_the_same_field(whole: tuple[Path, str], tmp_path: Path) -> None:
    case, out = SCRIPT.write_case(tmp_path), tmp_path / "out"
    process = subprocess.Popen(SCRIPT.command(case, out), stderr=subprocess.PIPE, text=True)
    while not (out / "restart.npz").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "interrupted in the search" in said and "Traceback" not in said
    assert "going on with the saved search" in SCRIPT.run(case, out).stderr
    expected = volume(whole[0], "D")
    np.testing.assert_allclose(volume(out, "D"), expected, rtol=0, atol=1e-2 * float(expected.max()))


def test_two_ranks_find_what_one_finds(whole: tuple[Path, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    SCRIPT.run(SCRIPT.write_case(tmp_path), out, ranks=2)
    assert result(out)["ranks"] == 2
    for name in ("D", "D_truth"):
        expected = volume(whole[0], name)
        np.testing.assert_allclose(volume(out, name), expected, rtol=0, atol=1e-2 * float(expected.max()))


def test_both_fields_by_tissue_with_missing_slices(tmp_path: Path) -> None:
    """Other tissues than the reference; half of one scan and, later, one modality are missing."""
    truth = {"D_white": 1.0, "D_grey": 0.2, "rho": 0.03, "position": PLACE, "age": 120}
    visits = [
        {"day": 0, "scans": [{"kind": "density", "noise": 0.02, "slices": [20, 100]}, {"kind": "oedema"}]},
        {"day": 90, "scans": [{"kind": "oedema"}]},
    ]
    section = field(of=["D", "rho"], by="tissue")
    case = SCRIPT.write_case(tmp_path, truth=truth, visits=visits, identify=section)
    SCRIPT.run(case, tmp_path / "out")
    scan = volume(tmp_path / "out", "scan_day0_density")
    assert scan.any() and not scan[:, :, :6].any()
    rows = result(tmp_path / "out")["fields"]
    assert rows["D"]["highest"] == pytest.approx(0.9, rel=0.25)
    assert rows["rho"]["highest"] == pytest.approx(0.03, rel=0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"identify": field(of=["D", "D"])}, "identify.field: of: each field once"),
        ({"identify": field(tau=1.0)}, "identify.field.tau: must be above 1"),
        (
            {"identify": {"unknown": "field"}, "visits": [{"day": 0, "scans": [{"kind": "oedema"}]}]},
            "identify.field.start: missing, and the first visit has no density scan to start from",
        ),
        (
            {"identify": {"unknown": "field"}, "visits": [{"day": 0, "scans": [{"kind": "density"}]}]},
            "visits: none with scans after the first, whose density is the start",
        ),
    ],
)
def test_cases_that_say_too_little(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GliodeError) as caught:
        cases.parse(CASE | changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"identify": field(start={"position": [0, 0, 200], "age": 9})}, "identify.field.start.position: "),
        (
            {"visits": [{"day": 0, "scans": [{"kind": "density", "slices": [200, 300]}]}]},
            "visits: the mask or slices of a density scan cover nothing of the brain",
        ),
    ],
)
def test_cases_that_do_not_fit_the_brain(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    case = SCRIPT.write_case(tmp_path, **changes)
    assert message in SCRIPT.failed(str(case), "--out", str(tmp_path / "out"))
