"""train.py and its cases: networks against their formulas, data, messages, files, resumption."""

import gzip
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from inverse import checkpoints, methods
from inverse.training import evaluate
from scripts import train, training_case
from solvers.errors import GliodeError
from solvers.node.models import Node
from tumour.case_reading import table

ROOT = Path(__file__).parents[2]
CASES = sorted((ROOT / "data" / "cases" / "networks").glob("*.yaml"))
TINY: dict[str, Any] = {
    "precision": "float64",
    "data": {"source": "planar", "set": "donut2d", "train": 60, "validation": 40, "test": 200},
    "model": {"kind": "odenet_simplex", "steps": 4, "rough": 1},
    "loss": {"kind": "squared", "hypothesis": "sigmoid"},
    "training": {"method": {"kind": "conjugate_gradients", "steps": 3}, "epochs": 4, "batch": 30},
}


FEW = {"kind": "resnet", "classifier": "fixed", "lift": "linear", "dim": 7}


def tiny(**changes: Any) -> dict[str, Any]:
    """TINY with changes: `model__steps=3`, or `model__steps=None` to leave it out."""
    case: dict[str, Any] = json.loads(json.dumps(TINY))
    for path, value in changes.items():
        *above, last = path.split("__")
        at = case
        for part in above:
            at = at.setdefault(part, {})
        at[last] = value
        if value is None:
            del at[last]
    return case


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny(**changes)))
    return path


def build(**model: Any) -> tuple[torch.nn.Sequential, Tensor]:
    """A network of three inputs and two scores in float64, and inputs."""
    case = training_case.parse({**TINY, "model": {"steps": 3, **model}})
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
    return training_case.build(case.model, 3, 2, 5).double(), x


# -- case files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [path for path in CASES if path.stem != "mnist"], ids=lambda p: p.stem)
def test_the_cases_are_valid_and_come_back_from_their_record(path: Path) -> None:
    case = training_case.read(path)
    assert case.name == path.stem
    assert training_case.parse(yaml.safe_load(yaml.safe_dump(case.record()))) == case
    assert training_case.build(case.model, case.features, case.scores, 0)(
        torch.zeros(2, case.features)
    ).shape == (2, case.scores)


def test_the_table_of_keys_and_cases_is_in_step() -> None:
    readme = (ROOT / "data" / "cases" / "networks" / "README.md").read_text()
    assert readme.endswith(f"in step -->\n{table(training_case.Case)}\n")
    assert len(CASES) == 7 and all(f"`{path.name}`" in readme for path in CASES)


def test_mnist_asks_for_its_folder() -> None:
    with pytest.raises(GliodeError, match=r"mnist.yaml: data.folder: no such folder: .*put the four files"):
        training_case.read(ROOT / "data" / "cases" / "networks" / "mnist.yaml")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__stpes": 3}, r"model.stpes: unknown key \(did you mean 'steps'\?\)"),
        ({"training__method__lr": 3}, r"training.method.lr: unknown key \(known: kind, steps, variant\)"),
        ({"optimizer": "x"}, r"optimizer: unknown key \(known: .*training\)"),
        ({"model__steps": 0}, r"model.steps: must be 1 or more \(got 0\)"),
        ({"model__kind": "resent"}, r"model: 'kind' must be one of 'net', 'resnet'.*\(got 'resent'\)"),
        ({"model__kind": None}, "model: needs the key 'kind'"),
        ({"model__activation": "gelu"}, "model.activation: activation 'gelu' is not one of tanh"),
        ({"model__kind": "runge_kutta", "model__scheme": "rk5"}, "model.scheme: scheme 'rk5' is not one of"),
        ({"model__dim": 1}, "model.dim: 1 for 2 inputs; give 2 or more, or lift: linear"),
        ({"loss__scores": 3}, r"loss.scores: must be 2, one a class \(got 3\)"),
        ({"data__validation": 0, "training__patience": 3}, "training.patience: needs validation data"),
        ({"loss__targets": [0]}, "loss.targets: must have 2 or more entries"),
        ({"data": {"source": "digits"}, "model": FEW}, "model.dim: 7, fewer than the 10 scores"),
    ],
)
def test_messages_name_the_key_and_the_way_out(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(GliodeError, match=f"^case: {words}"):
        training_case.parse(tiny(**changes))


def test_a_broken_file_is_told(tmp_path: Path) -> None:
    for text, words in (("a: [", "broken.yaml: not valid YAML at line 1"), ("7", "broken.yaml: holds 7")):
        (tmp_path / "broken.yaml").write_text(text)
        with pytest.raises(GliodeError, match=words):
            training_case.read(tmp_path / "broken.yaml")
    with pytest.raises(GliodeError, match="cannot be read"):
        training_case.read(tmp_path / "none.yaml")


# -- networks ------------------------------------------------------------------------------------------------


def test_networks_are_their_formulas() -> None:
    """Three layers written out in NumPy from the parameters."""
    for kind in ("net", "resnet", "odenet"):
        model, x = build(kind=kind, rough=1, **({} if kind == "net" else {"duration": 1.5}))
        own = {name: p.detach().numpy() for name, p in model.named_parameters()}
        prefix = "block." if kind == "net" else "block.field."
        K = own[f"{prefix}{'W' if kind == 'resnet' else 'K'}.values"]
        y = x.numpy()
        for n in range(3):
            s = np.tanh(y @ K[n].T + own[f"{prefix}b.values"][n])
            if kind == "net":
                y = s
            else:
                y = y + 0.5 * s * (own[f"{prefix}alpha.values"][n] if kind == "odenet" else 1)
        scores = y @ own["classifier.weight"].T + own["classifier.bias"]
        np.testing.assert_allclose(model(x).detach().numpy(), scores, rtol=1e-12)


def test_what_goes_before_and_after_the_block() -> None:
    model, x = build(kind="resnet", dim=5, classifier="fixed")
    y = model.get_submodule("block")(torch.nn.functional.pad(x, (0, 2)))
    assert torch.equal(model(x), y[:, :2])
    model, x = build(kind="standalone", knots=3, scheme="heun")
    block = model.get_submodule("block")
    assert isinstance(block, Node) and block.scheme.name == "heun"
    assert torch.equal(model(x), block(x)[:, :2]) and len(list(model.parameters())) == 2
    model, x = build(kind="odenet_simplex")
    block = model.get_submodule("block")
    assert isinstance(block, Node) and block.free_steps is not None
    model, x = build(kind="runge_kutta", noise={"std": 0.5})
    assert not torch.equal(model(x), model(x)) and torch.equal(model.eval()(x), model(x))


def test_the_certified_network_does_not_expand() -> None:
    """With weights that would expand if they were let."""
    model, _ = build(kind="nonexpansive", lift="linear", dim=6, knots=3)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(20).add_(torch.randn_like(p))
    x, y = torch.randn(2, 300, 3, dtype=torch.float64)
    with torch.no_grad():
        ratio = (model(x) - model(y)).norm(dim=1) / (x - y).norm(dim=1)
    assert 0 < float(ratio.max()) <= 1 + 1e-12


def test_first_weights_follow_from_the_seed_alone() -> None:
    state = torch.get_rng_state()
    one, x = build(kind="resnet")
    torch.manual_seed(99)
    again, _ = build(kind="resnet")
    assert torch.equal(one(x), again(x))
    other = training_case.build(training_case.parse(TINY).model, 3, 2, 6).double()
    assert not torch.equal(one(x), other(x))
    torch.set_rng_state(state)
    build(kind="net")
    assert torch.equal(state, torch.get_rng_state())


# -- data ----------------------------------------------------------------------------------------------------


def test_planar_parts_are_drawn_apart_and_digits_split() -> None:
    sets = training_case.load(training_case.parse(TINY))
    assert sets.validation is not None and sets.test is not None
    assert [len(part[0]) for part in (sets.train, sets.validation, sets.test)] == [60, 40, 200]
    assert sets.train[0].dtype == torch.float64
    together = torch.cat([sets.train[0], sets.validation[0], sets.test[0]])
    assert len(together.unique(dim=0)) == 300
    section = {"source": "digits", "validation": 100, "range": [0, -2]}
    case = training_case.parse({**TINY, "data": section, "model": {"kind": "standalone", "knots": 2}})
    sets = training_case.load(case)
    assert [len(part[0]) for part in sets if part is not None] == [1337, 100, 360]
    assert (float(sets.train[0].min()), float(sets.train[0].max())) == (-2.0, 0.0)


def test_idx_files_from_a_folder(tmp_path: Path) -> None:
    """Pictures that are all of one grey, the label's: what comes back must be that."""
    for stem, count in (("train", 12), ("t10k", 5)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        pictures = np.broadcast_to(20 * labels[:, None, None], (count, 28, 28)).astype(np.uint8)
        head = struct.pack(">HBBIII", 0, 8, 3, count, 28, 28)
        (tmp_path / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + pictures.tobytes()))
        head = struct.pack(">HBBI", 0, 8, 1, count)
        (tmp_path / f"{stem}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
    section = {"source": "idx", "folder": ".", "train": 8, "validation": 3, "range": [1, 0]}
    case = {**TINY, "data": section, "model": {"kind": "standalone"}}
    sets = training_case.load(training_case.parse(case, folder=tmp_path))
    assert sets.validation is not None and sets.test is not None
    assert [len(part[0]) for part in (sets.train, sets.validation, sets.test)] == [8, 3, 5]
    for x, y in (sets.train, sets.validation, sets.test):
        torch.testing.assert_close(x, (1 - 20 * y.double() / 255)[:, None].expand(-1, 196))
    section["train"] = 10
    with pytest.raises(GliodeError, match="train \\+ validation = 13, the files hold 12"):
        training_case.load(training_case.parse(case, folder=tmp_path))


def test_methods_carry_their_keys() -> None:
    made = [
        training_case.method_of(training_case.parse(tiny(training__method=section)).training.method)
        for section in (
            {"kind": "conjugate_gradients", "variant": "DY", "steps": 2},
            {"kind": "landweber", "step": 0.5},
            {"kind": "quasi_newton", "memory": 3},
            {"kind": "adam", "lr": 0.5, "cosine": True},
            {"kind": "sgd"},
        )
    ]
    assert made == [
        methods.ConjugateGradients("DY", 2),
        methods.Landweber(0.5),
        methods.QuasiNewton(memory=3),
        methods.Adam(0.5, True),
        methods.SGD(0.1, 0.9),
    ]


# -- the script ----------------------------------------------------------------------------------------------


def test_a_run_writes_what_it_found_and_draws_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), str(written(tmp_path)), "--out", str(out)]
    done = subprocess.run([*command, "--seed", "3"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    record = json.loads((out / "result.json").read_text())
    case = training_case.read(out / "case.yaml")
    assert case.seed == record["seed"] == 3 and case.name == record["case"] == "tiny"
    assert record["counts"]["adjoint"] == 4 * 2 * (3 + 1) == record["history"][-1]["adjoint"]
    assert f"{100 * record['accuracy']['test']:.2f} %" in done.stdout
    model = training_case.build(case.model, case.features, case.scores, 0).double()
    checkpoints.read_weights(out / "weights.safetensors", model)
    loss, sets = training_case.loss_of(case.loss, case.scores), training_case.load(case)
    assert sets.test is not None
    found = evaluate(model, loss, sets.test)
    assert found == pytest.approx((record["loss"]["test"], record["accuracy"]["test"]), rel=1e-12)
    pictures = {path.name for path in (out / "pictures").iterdir()}
    assert pictures == {"curves.png", "prediction.png", "states.png", "time_steps.png"}
    assert list((out / "tensorboard").iterdir())


def test_an_interrupted_run_says_so_and_goes_on_by_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path)
    train.main(path, tmp_path / "whole", draw=False)
    visit, calls = methods._OverSpaces.visit, iter(range(100))

    def visited(self: Any, problem: Any, left: float) -> methods.Visit:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return visit(self, problem, left)

    monkeypatch.setattr(methods._OverSpaces, "visit", visited)
    with pytest.raises(SystemExit) as ended:
        train.main(path, tmp_path / "broken", draw=False)
    assert ended.value.code == 130
    assert "with --resume goes on" in capsys.readouterr().err
    assert json.loads((tmp_path / "broken" / "result.json").read_text())["stopping"]["rule"] == "interrupted"
    train.main(path, tmp_path / "broken", resume=True, draw=False)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "broken")]
    for record in results:
        record.pop("seconds")
        for entry in record["history"]:
            entry.pop("seconds")
    assert results[0] == results[1]
    with pytest.raises(SystemExit) as ended:
        train.main(written(tmp_path, model__steps=5), tmp_path / "broken", resume=True, draw=False)
    assert ended.value.code == 2 and "of another run, different in key" in capsys.readouterr().err


def test_bad_input_and_divergence_have_codes_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path)
    for options, words in (
        ({"resume": True}, "--resume: give the folder"),
        ({"device": "gpu"}, "--device: 'gpu' is not here"),
        ({"case": tmp_path / "none.yaml"}, "cannot be read"),
    ):
        with pytest.raises(SystemExit) as ended:
            train.main(**{"case": path, "out": None, **options})  # type: ignore[arg-type]
        assert ended.value.code == 2 and words in capsys.readouterr().err
    wild = written(
        tmp_path,
        model={"kind": "resnet", "activation": "identity", "rough": 1},
        training__method={"kind": "sgd", "lr": 1e300},
        loss={"kind": "cross_entropy"},
    )
    with pytest.raises(SystemExit) as ended:
        train.main(wild, None)
    shown = capsys.readouterr().out
    assert ended.value.code == 1 and "weights of epoch 0 are kept" in " ".join(shown.split())
    assert "Nothing is written" in shown and sorted(tmp_path.iterdir()) == [path]
