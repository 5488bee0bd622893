"""train.py and its cases of kind regularizer: every trainer, the file it ends in, messages, resumption."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from inverse.image_problems import VALIDATION_SEED
from inverse.linear_problems import LinearMap
from inverse.optimizers import quasi_newton
from inverse.problem import LeastSquares
from inverse.regularizers.learned import files
from inverse.regularizers.learned.energy import Learned
from inverse.stopping import GradientTolerance, MaxIterations
from scripts import regularizer_case, regularizer_training, train
from scripts.regularizer_case import RegularizerCase
from solvers.errors import GliodeError
from solvers.spaces import Euclidean
from tumour.case_reading import table

ROOT = Path(__file__).parents[2]
CASES = sorted((ROOT / "data" / "cases" / "regularizers").glob("*.yaml"))
RIDGE = {"channels": [4], "sizes": [3]}
TINY: dict[str, Any] = {
    "kind": "regularizer",
    "precision": "float64",
    "architecture": "ridge",
    "settings": RIDGE,
    "data": {"source": "ellipses", "size": 12, "train": 8, "validation": 2},
    "problem": {"kind": "denoising", "noise": 0.1},
    "trainer": {"kind": "bilevel", "strength": 100},
    "training": {"method": {"kind": "adam", "lr": 0.02}, "epochs": 3, "batch": 4},
}
TOMOGRAPHY = {"kind": "sparse_tomography"}


def tiny(**changes: Any) -> dict[str, Any]:
    """TINY with changes: `data__size=8`, None to leave a key out."""
    case: dict[str, Any] = json.loads(json.dumps(TINY))
    for path, value in changes.items():
        *above, last = path.split("__")
        at = case
        for part in above:
            at = at[part]
        at[last] = value
        if value is None:
            del at[last]
    return case


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny(**changes)))
    return path


# -- case files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CASES, ids=lambda p: getattr(p, "stem", ""))
def test_the_cases_are_valid_and_come_back_from_their_record(path: Path) -> None:
    case = regularizer_case.read(path)
    assert case.name == path.stem
    assert regularizer_case.parse(yaml.safe_load(yaml.safe_dump(case.record()))) == case


def test_the_tables_of_keys_and_cases_are_in_step() -> None:
    readme = (ROOT / "data" / "cases" / "regularizers" / "README.md").read_text(encoding="utf-8")
    assert readme.endswith(f"in step -->\n{table(RegularizerCase)}\n")
    assert all(f"`{path.name}`" in readme for path in CASES)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "rigde"}, "architecture: 'rigde' is not one of adversarial, "),
        ({"settings": {"chanels": [4]}}, "settings: they make no ridge .*chanels"),
        ({"settings": {"channels": [4], "sizes": [2]}}, "settings: they make no ridge"),
        (
            {"data": {"source": "images", "train": 3, "names": ["camera"]}},
            "data.names: 'camera' is no picture to train on; there are motorcycle",
        ),
        ({"data__size": 0}, r"data.size: must be 1 or more \(got 0\)"),
        ({"data": {"source": "file", "path": "x.npy", "train": 3}}, "data.path: no such file"),
        ({"problem": None}, "problem: missing; trainer bilevel needs one, kind: denoising"),
        ({"problem__noise": -1}, r"problem.noise: must be positive \(got -1\)"),
        ({"problem__kind": "tomograhy"}, r"problem: 'kind' must be one of 'denoising'.*\(got 'tomograhy'\)"),
        ({"trainer__kind": "score"}, "trainer.strength: unknown key"),
        ({"trainer": {"kind": "score"}}, "problem: a score prior is trained for none, a cohort .* out"),
        ({"trainer": {"kind": "linearised"}}, "trainer.kind: linearised is for data of source: cohort"),
        ({"trainer__strenght": 2}, r"trainer.strenght: unknown key \(did you mean 'strength'\?\)"),
    ],
)
def test_messages_name_the_key_and_the_way_out(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(GliodeError, match=f"case: {words}"):
        regularizer_case.parse(tiny(**changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trainer": {"kind": "artefacts"}}, "trainer.kind: artefacts is for architecture nett, not ridge"),
        ({"data__size": 2}, r"2"),
    ],
)
def test_what_only_the_modules_can_tell_is_told_before_the_training(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(GliodeError, match=words):
        regularizer_training.job(regularizer_case.parse(tiny(**changes)), Path("tiny.yaml"))


# -- training ------------------------------------------------------------------------------------------------

TRAINERS: list[dict[str, Any]] = [
    {"trainer": {"kind": "bilevel", "strength": 100, "hypergradient": "jacobian_free"}},
    {"trainer": {"kind": "denoising", "noise": [0.05, 0.1]}, "architecture": "tdv"},
    {"trainer": {"kind": "adversarial"}, "architecture": "icnn", "problem": TOMOGRAPHY},
    {"trainer": {"kind": "artefacts"}, "architecture": "nett", "problem": TOMOGRAPHY},
]


@pytest.mark.parametrize("changes", TRAINERS, ids=lambda c: f"{c['trainer']['kind']}-{c.get('architecture')}")
def test_every_trainer_ends_in_weights_that_load(changes: dict[str, Any], tmp_path: Path) -> None:
    small = {} if "architecture" not in changes else {"settings": {"channels": 2}}
    train.main(written(tmp_path, **{**small, **changes}), tmp_path / "out")
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    history = [entry["validation_loss"] for entry in record["history"]]
    assert history[-1] < history[0]
    energy, card = files.load_energy(tmp_path / "out" / "tiny.safetensors", units="1")
    assert record["card"]["weight"] == card.weight and card.weight > 0
    ((name, (value, unit)),) = card.figures.items()
    assert name.endswith("PSNR") and unit == "dB" and 5 < value < 60
    x = torch.rand(2, 12, 12, dtype=torch.float64)
    assert energy(x).shape == (2,) and energy(x).dtype == torch.float64


def test_the_weight_in_the_card_is_the_best_on_the_validation_fields(tmp_path: Path) -> None:
    """Solved again, field by field with another optimizer, at the card's weight and at others."""
    data = {"source": "ellipses", "size": 24, "train": 8, "validation": 2}
    exact = {"trainer__tolerance": 1e-5, "trainer__iterations": 500, "data": data}
    train.main(written(tmp_path, **exact), tmp_path / "out")
    energy, card = files.load_energy(tmp_path / "out" / "tiny.safetensors")
    case = regularizer_case.read(tmp_path / "tiny.yaml")
    truths = regularizer_training.fields_of(case)[1]
    problem = regularizer_training.problem_of(case, (24, 24))
    assert problem is not None
    noisy = problem.measured(truths, VALIDATION_SEED)
    space = Euclidean(576)
    A = LinearMap((24, 24), (24, 24), torch.clone, torch.clone)

    def psnr(weight: float) -> tuple[float, float]:
        errors = []
        for y, truth in zip(noisy, truths, strict=True):
            J = LeastSquares(space, A, y, 0.1, Learned(energy, space, (24, 24), weight))
            stopping = (GradientTolerance(1e-6), MaxIterations(500))
            found = quasi_newton.minimise(J, y.reshape(-1), stopping=stopping)
            errors.append(float((found.m.view(24, 24) - truth).square().mean()))
        return float(np.mean(errors)), float(-10 * np.log10(np.mean(errors)))

    error, own = psnr(card.weight)
    assert own == pytest.approx(card.figures["denoising at 0.1: PSNR"][0], abs=0.01)
    assert error < min(psnr(1.3 * card.weight)[0], psnr(card.weight / 1.3)[0])
    assert own > -20 * np.log10(0.1)  # better than the noise


def test_fields_are_cut_into_squares() -> None:
    x = torch.arange(2 * 5 * 7).view(2, 5, 7)
    squares, same = regularizer_training.cut(2, x, -x)
    assert squares.shape == (12, 2, 2) and torch.equal(same, -squares)
    assert torch.equal(squares[4], x[0, 2:4, 2:4]) and torch.equal(squares[11], x[1, 2:4, 4:6])
    with pytest.raises(GliodeError, match=r"trainer.crop: 6 pixels, the fields have \(5, 7\)"):
        regularizer_training.cut(6, x)


def test_a_score_prior_of_fields_of_a_file(tmp_path: Path) -> None:
    fields = np.random.default_rng(1).normal(3, 0.5, (20, 6)).astype(np.float32)
    np.save(tmp_path / "fields.npy", fields)
    data = {"source": "file", "path": "fields.npy", "train": 16, "validation": 4, "units": "1/day"}
    changes = {
        **{"architecture": "score", "trainer": {"kind": "score"}, "problem": None},
        "settings": {"shape": [6], "levels": [0.1, 1.0], "mean": 3.0, "spread": 0.5, "channels": 4},
    }
    path = written(tmp_path, data={**data, "spacing": 2.0}, **changes)
    case = regularizer_case.read(path)
    own, watched = regularizer_training.fields_of(case)
    assert torch.equal(own, torch.from_numpy(fields[:16]).double()) and len(watched) == 4
    train.main(path, tmp_path / "out")
    card = files.load(tmp_path / "out" / "tiny.safetensors", units="1/day", spacing=2.0)[1]
    assert set(card.figures) == {"score matching"}
    for change, words in (
        ({"train": 18}, r"train \+ validation = 22, the file holds 20 fields; ask for less"),
        ({"path": "ints.npy"}, r"holds int64 of shape \(3, 4\); give finite floating-point fields"),
        ({"path": "tiny.yaml"}, "holds no array"),
    ):
        np.save(tmp_path / "ints.npy", np.ones((3, 4), int))
        case = regularizer_case.read(written(tmp_path, data={**data, **change}, **changes))
        with pytest.raises(GliodeError, match=words):
            regularizer_training.fields_of(case)


# -- the script ----------------------------------------------------------------------------------------------


def test_the_command_in_the_card_makes_the_same_weights(tmp_path: Path) -> None:
    path = written(tmp_path)
    train.main(path, tmp_path / "out", seed=3)
    card = files.load(tmp_path / "out" / "tiny.safetensors")[1]
    assert card.seed == 3 and card.command.startswith("scripts/env python scripts/train.py ")
    words = [sys.executable, str(ROOT / "scripts" / "train.py"), *card.command.split()[3:]]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "PSNR" in done.stdout
    again, other = files.load(tmp_path / "results" / "tiny" / "tiny.safetensors")
    for name, tensor in files.load(tmp_path / "out" / "tiny.safetensors")[0].state_dict().items():
        torch.testing.assert_close(tensor, again.state_dict()[name], rtol=1e-6, atol=1e-9)
    assert other.weight == pytest.approx(card.weight, rel=1e-4) and other.data == card.data


def test_an_interrupted_run_goes_on_by_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path)
    train.main(path, tmp_path / "whole")
    measured, count = regularizer_training.Bilevel.forward, 0

    def forward(self: Any, inputs: Any) -> Any:
        nonlocal count
        count += torch.is_grad_enabled()
        if count == 4:
            count += 1
            raise KeyboardInterrupt
        return measured(self, inputs)

    monkeypatch.setattr(regularizer_training.Bilevel, "forward", forward)
    with pytest.raises(SystemExit) as ended:
        train.main(path, tmp_path / "broken")
    assert ended.value.code == 130 and "with --resume goes on" in capsys.readouterr().err
    assert files.load(tmp_path / "broken" / "tiny.safetensors")[1].figures == {}
    train.main(path, tmp_path / "broken", resume=True)
    one, two = (files.load(tmp_path / name / "tiny.safetensors") for name in ("whole", "broken"))
    assert one[1] == two[1] and one[1].figures
    assert all(torch.equal(t, two[0].state_dict()[name]) for name, t in one[0].state_dict().items())
    with pytest.raises(SystemExit) as ended:
        train.main(written(tmp_path, problem__noise=0.2), tmp_path / "broken", resume=True)
    assert ended.value.code == 2 and "of another run, different in" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        train.main(tmp_path / "none.yaml", None)
    assert ended.value.code == 2 and "cannot be read" in capsys.readouterr().err
