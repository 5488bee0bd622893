"""Case files: every message names its key, paths follow the file, and the table of keys is in step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from solvers.errors import GliodeError
from tumour import case as cases

ROOT = Path(__file__).parents[2]
GOOD: dict[str, Any] = {
    "anatomy": {"source": "mni152", "spacing": 4},
    "truth": {"D_white": 0.3, "D_grey": 0.05, "rho": 0.02, "position": [-25, -15, 25], "age": 200},
    "visits": [{"day": 0, "scans": [{"kind": "density"}]}, {"day": 60, "scans": [{"kind": "oedema"}]}],
}


def with_change(path: str, value: Any) -> dict[str, Any]:
    """GOOD with the value at a path such as visits.0.day; ... takes the key away."""
    data = copy.deepcopy(GOOD)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    at: Any = data
    for part in parents:
        at = at[part]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return data


def message(data: Any, tmp_path: Path) -> str:
    file = tmp_path / "demo.yaml"
    file.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    with pytest.raises(GliodeError) as caught:
        cases.read(file)
    return str(caught.value)


WRONG = [
    ("truth.D_white", -1, "demo.yaml: truth.D_white: must be positive (got -1)"),
    ("truth.D_white", float("nan"), "demo.yaml: truth.D_white: must be a finite number (got NaN)"),
    ("truth.D_white", "fast", 'demo.yaml: truth.D_white: must be a number (got "fast")'),
    ("truth.D_white", True, "demo.yaml: truth.D_white: must be a number (got true)"),
    ("truth.D_white", ..., "demo.yaml: truth.D_white: missing"),
    ("truth.position", [1, 2], "demo.yaml: truth.position: must have 3 or more entries (got [1, 2])"),
    ("truth.position", [1, 2, "z"], 'demo.yaml: truth.position[2]: must be a number (got "z")'),
    ("truth.spacing", 0.5, "demo.yaml: truth.spacing: MNI152 comes in voxels of 1 mm (got 0.5)"),
    ("truth.rhoo", 1, "demo.yaml: truth: unknown key 'rhoo' (did you mean 'rho'?)"),
    ("truth", ..., "demo.yaml: truth: missing; scans without files are simulated from it"),
    ("anatomy.spacing", 0.5, "demo.yaml: anatomy.spacing: must be 1 or more (got 0.5)"),
    ("anatomy.spacng", 2, "demo.yaml: anatomy: unknown key 'spacng' (did you mean 'spacing'?)"),
    (
        "anatomy.source",
        "mni",
        "demo.yaml: anatomy: 'source' must be one of 'mni152', 'nifti', 'labels', 'mesh'",
    ),
    ("anatomy", {"spacing": 3}, "demo.yaml: anatomy: needs the key 'source'"),
    ("anatomy", 3, "demo.yaml: anatomy: must be a section of keys (got 3)"),
    ("model", {"growth": {"law": "gompertz", "eps": 2}}, "model.growth.eps: must be below 1 (got 2)"),
    ("model", {"growth": {"law": "logistic", "eps": 0.1}}, "model.growth: unknown key 'eps'"),
    ("model", {"step": 0}, "demo.yaml: model.step: must be positive (got 0)"),
    (
        "model",
        {"scheme": "euler"},
        "model.scheme: must be 'rkl2', 'sdirk2', 'crank-nicolson' or 'implicit-euler'",
    ),
    ("visits", [], "demo.yaml: visits: must have 1 or more entries (got [])"),
    ("visits", None, "demo.yaml: visits: must be a list (got nothing)"),
    ("visits.0.day", 3, "demo.yaml: visits[0].day: the first visit is day 0"),
    ("visits.1.day", 0, "demo.yaml: visits[1]: day 0 is not after the visit before, day 0"),
    ("visits.1.day", ..., "demo.yaml: visits[1]: give either day or date"),
    ("visits.1.date", "2024-05-01", "demo.yaml: visits[1]: give either day or date"),
    (
        "visits.0.scans.0.kind",
        "mri",
        "visits[0].scans[0].kind: must be 'density', 'enhancing', 'oedema' or 'segm",
    ),
    ("visits.0.scans.0.noise", 0, "demo.yaml: visits[0].scans[0].noise: must be positive (got 0)"),
    ("visits.0.scans.0.level", 0.5, "demo.yaml: visits[0].scans[0]: a density has no level"),
    ("visits.0.scans.0.kind", "segmentation", "demo.yaml: visits[0].scans[0]: a segmentation needs a file"),
    ("visits.0.scans", [{"kind": "oedema"}] * 2, "demo.yaml: visits[0].scans: oedema is there twice"),
    (
        "visits.0.scans.0.file",
        "demo.yaml",
        "demo.yaml: visits[1].scans[0].file: missing; either all scans have",
    ),
    (
        "therapy",
        [{"kind": "surgery"}],
        "demo.yaml: therapy[0]: 'kind' must be one of 'radiotherapy', 'resection'",
    ),
    (
        "therapy",
        [{"kind": "resection", "day": 3}],
        "demo.yaml: therapy[0]: give either cavity, or centre and",
    ),
    (
        "therapy",
        [{"kind": "radiotherapy", "day": 61}],
        "demo.yaml: therapy[0]: day 61 is past the last visit and output",
    ),
    (
        "therapy",
        [{"kind": "radiotherapy", "day": 1, "fractions": 2.5}],
        "fractions: must be a whole number (got 2.5)",
    ),
    ("output", {"days": [-200]}, "demo.yaml: output.days[0]: day -200 is before the seed, day -200"),
    ("visits.0.scans.0.slices", [3, 1], "visits[0].scans[0]: slices: 3 must be below 1"),
    ("visits.0.scans.0.mask", "no.nii", "visits[0].scans[0].mask: no such file"),
    ("identify", {"unknown": "fields"}, "identify.unknown: must be 'parameters' or 'field'"),
    ("identify", {"field": {"of": []}}, "identify.field.of: must have 1 or more entries"),
    (
        "truth.inclusions",
        [{"centre": [0, 0, 0], "radius": 0}],
        "truth.inclusions[0].radius: must be positive",
    ),
    ("noise_seed", -1, "demo.yaml: noise_seed: must not be negative (got -1)"),
    ("noize_seed", 1, "demo.yaml: case: unknown key 'noize_seed' (did you mean 'noise_seed'?)"),
]


@pytest.mark.parametrize(
    ("path", "value", "expected"), WRONG, ids=[f"{p}={str(v)[:12]}" for p, v, _ in WRONG]
)
def test_messages_name_the_key(tmp_path: Path, path: str, value: Any, expected: str) -> None:
    found = message(with_change(path, value), tmp_path)
    assert expected in found and "\n" not in found


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    data = with_change("truth.rho", -2) | {"noise_seed": "x"}
    assert [line.split(": ")[1] for line in message(data, tmp_path).splitlines()] == [
        "truth.rho",
        "noise_seed",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("anatomy: {source: mni152\nvisits: []", "demo.yaml: not valid YAML at line 2"),
        ("a: 1\nb: 2\na: 3", "demo.yaml: not valid YAML at line 3: key 'a' is there twice"),
        ("just words", 'demo.yaml: holds "just words", not keys'),
        ("", "demo.yaml: holds nothing, not keys"),
        (
            "a: !!python/object/apply:os.getcwd []",
            "demo.yaml: not valid YAML at line 1: could not determine a const",
        ),
        ("[" * 5000, "demo.yaml: not valid YAML"),
    ],
    ids=["open", "twice", "words", "empty", "python", "deep"],
)
def test_yaml_that_is_no_case(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in message(text, tmp_path)


def test_missing_and_binary_case_files(tmp_path: Path) -> None:
    with pytest.raises(GliodeError, match=r"none\.yaml: cannot be read \(No such file"):
        cases.read(tmp_path / "none.yaml")
    (tmp_path / "bin.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(GliodeError, match=r"bin\.yaml: cannot be read"):
        cases.read(tmp_path / "bin.yaml")


def test_paths_are_relative_to_the_case_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("w.nii", "sub/g.nii"):
        (tmp_path / name).touch()
    anatomy = {"source": "nifti", "white": "../w.nii", "grey": "g.nii"}
    data = {"anatomy": anatomy, "visits": [{"day": 0}]}
    (tmp_path / "sub" / "c.yaml").write_text(yaml.safe_dump(data))
    monkeypatch.chdir("/")
    case = cases.read(tmp_path / "sub" / "c.yaml")
    assert case.name == "c"
    assert case.record()["anatomy"]["white"] == str(tmp_path / "w.nii")
    (tmp_path / "w.nii").unlink()
    with pytest.raises(GliodeError, match=rf"c\.yaml: anatomy\.white: no such file: {tmp_path}/w\.nii"):
        cases.read(tmp_path / "sub" / "c.yaml")


def test_yaml_numbers_that_yaml_reads_as_text() -> None:
    """YAML 1.1 takes 1e-2 for text; a case takes it for a number."""
    data = yaml.safe_load("D: 1e-2")
    assert data["D"] == "1e-2"
    assert cases.parse(with_change("truth.rho", data["D"])).truth.rho == 0.01  # type: ignore[union-attr]


def test_dates_become_days() -> None:
    visits = [{"date": "2024-02-01"}, {"date": "2024-03-02", "scans": [{"kind": "density"}]}]
    therapy = [{"kind": "radiotherapy", "date": "2024-02-11"}, {"kind": "radiotherapy", "day": 3}]
    case = cases.parse(GOOD | {"visits": visits, "therapy": therapy})
    assert case.days == [0, 30]  # 2024 is a leap year
    assert [case.day_of(treatment) for treatment in case.therapy] == [10, 3]
    with pytest.raises(GliodeError, match=r"therapy\[0\]\.date: the first visit has no date"):
        cases.parse(GOOD | {"therapy": therapy})


def test_the_resolved_case_is_the_case() -> None:
    case = cases.parse(
        GOOD | {"therapy": [{"kind": "resection", "day": 1, "centre": [0, 0, 0], "radius": 9}]}
    )
    again = cases.parse(yaml.safe_load(yaml.safe_dump(case.record())))
    assert again == case and again.hash() == case.hash()
    assert cases.parse(with_change("truth.rho", 0.021)).hash() != cases.parse(GOOD).hash()


def test_the_cases_here_are_good_and_the_table_of_keys_is_in_step() -> None:
    for file in sorted((ROOT / "data" / "cases").glob("*.yaml")):
        if file.name != "nifti_folder.yaml":  # its files are made first
            cases.read(file)
    readme = (ROOT / "data" / "cases" / "README.md").read_text(encoding="utf-8")
    assert readme.endswith(cases.table()), "run: scripts/env python -m tumour.case"
    assert all(f"`{file.name}`" in readme for file in (ROOT / "data" / "cases").glob("*.yaml"))
