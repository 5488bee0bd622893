"""Weights of regularizers on disk: what comes back, what is refused and how it says so, what is shipped."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from inverse.regularizers.learned import files
from inverse.regularizers.learned.energy import Energy, Guarantee, Learned
from solvers.errors import GliodeError
from solvers.spaces import Euclidean

ROOT = Path(__file__).parents[2]
CARD = files.Card(
    name="springs",
    data="two springs",
    command="scripts/env python scripts/train.py springs.yaml",
    seed=3,
    noise=(0.01, 0.1),
    units="mm^2/day",
    spacing=6.0,
    weight=0.5,
    scale=2.0,
    figures={"PSNR": (28.5, "dB")},
)


class Springs(Energy):
    """sum_i k_i x_i^2 / 2 - dent sum cos x_i: modulus max(dent - min k, 0)."""

    def __init__(self, count: int, dent: float = 0.0) -> None:
        super().__init__()
        if count < 1:
            raise GliodeError(f"springs: {count}; give 1 or more")
        self.k, self.dent = nn.Parameter(1 + torch.rand(count)), dent

    def forward(self, x: Tensor) -> Tensor:
        return (self.k * x.square() / 2 - self.dent * x.cos()).sum(1)

    def settings(self) -> dict[str, Any]:
        return {"count": len(self.k), "dent": self.dent}

    def guarantee(self) -> Guarantee:
        low, high = float(self.k.detach().min()), float(self.k.detach().max())
        return Guarantee(max(self.dent - low, 0.0), high + self.dent, low > 0)


class Halving(nn.Module):
    """No energy."""

    def settings(self) -> dict[str, Any]:
        return {}

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


@pytest.fixture(autouse=True)
def architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind in (("springs", Springs), ("halving", Halving)):
        monkeypatch.setitem(files.ARCHITECTURES, name, f"{__name__}:{kind.__name__}")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    files.save(tmp_path / "springs.safetensors", Springs(4, 0.5), CARD)
    return tmp_path / "springs.safetensors"


def altered(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> Path:
    """The file with its record and tensors changed."""
    with safe_open(str(path), framework="pt") as file:
        record = json.loads(file.metadata()[files.KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(record, tensors)
    save_file(tensors, path, {files.KEY: json.dumps(record)})
    return path


def test_weights_come_back_to_the_bit_with_their_card(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.float64):
        energy = Springs(5, 0.25).to(dtype)
        written = files.save(tmp_path / "e.safetensors", energy, replace(CARD, spacing=None))
        state = torch.get_rng_state()
        found, card = files.load_energy(tmp_path / "e.safetensors")
        assert torch.equal(state, torch.get_rng_state())
        assert card == written and card.guarantee == energy.guarantee() == found.guarantee()
        assert replace(card, guarantee=None) == replace(CARD, spacing=None)
        x = torch.linspace(-2, 2, 10, dtype=dtype).view(2, 5)
        assert torch.equal(found(x), energy(x)) and found(x).dtype == dtype
        assert not found.training and not any(p.requires_grad for p in found.parameters())
    loose = Learned(found, Euclidean(5), weight=card.weight, scale=card.scale)
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)
    assert float(loose(x)) == pytest.approx(float(0.5 / 4 * energy(2 * x[None])[0].detach()), rel=1e-14)


def test_the_guarantee_is_that_of_the_weights_and_held_to(path: Path) -> None:
    """A file whose weights are worse than its card says is refused; infinite constants are null."""
    assert files.load(path)[1].guarantee is not None

    def softer(record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors["k"] = tensors["k"] - 1.0

    with pytest.raises(GliodeError, match=r"card says convex, .* its weights are weakly convex, modulus"):
        files.load(altered(path, softer))

    def unknown(record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        record["card"]["guarantee"] = {"modulus": None, "lipschitz": None, "coercive": False}

    held = files.load(altered(path, unknown))[1].guarantee
    assert held == Guarantee(math.inf, math.inf, False)
    files.save(path, Halving(), CARD)
    module, card = files.load(path)
    assert card.guarantee is None and float(module(torch.ones(1))) == 0.5
    with pytest.raises(GliodeError, match="holds Halving, which has no energy"):
        files.load_energy(path)


def test_units_and_spacing_are_those_of_the_training(path: Path) -> None:
    files.load(path, units="mm^2/day", spacing=6.01)
    with pytest.raises(GliodeError, match=r"springs.safetensors: trained on .* 'mm\^2/day', .*'1'; convert"):
        files.load(path, units="1")
    with pytest.raises(GliodeError, match=r"of a grid of 6 mm, this one's spacing is 4 mm; resample to 6 mm"):
        files.load(path, spacing=4.0)
    replace(CARD, spacing=None).require(spacing=4.0)


def put(part: str, **values: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], object]:
    return lambda record, tensors: (record[part] if part else record).update(values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            put("", version=2),
            "written in version 2 of the format, this Gliode reads 1; update Gliode, or train",
        ),
        (put("", architecture="mlp"), "architecture 'mlp': not one of adversarial, .*update Gliode"),
        (put("", architecture="halving"), "settings: they make no halving"),
        (put("settings", count=0), r"settings: they make no springs \(springs: 0; give 1 or more\)"),
        (put("settings", cuont=3), "settings: they make no springs .*cuont"),
        (
            put("settings", count=3),
            r"k: torch.float32 of shape \(4,\), its settings ask .*\(3,\): the weights",
        ),
        (put("", settings=[4]), "settings: they make no springs"),
        (put("", card={"name": "x"}), r"card: its record is damaged \(KeyError\('guarantee'\)\); train anew"),
        (put("card", noise=[0.2, 0.1]), r"card.noise: \(0.2, 0.1\); give the smallest and the largest"),
        (put("card", weight=-1.0), "card.weight: -1.0; give a positive number"),
        (put("card", colour="red"), "card: its record is damaged .*colour"),
        (lambda record, tensors: record.pop("card"), r"its record is damaged \(KeyError\('card'\)\)"),
        (lambda record, tensors: tensors.pop("k"), "another architecture: without k"),
        (lambda record, tensors: tensors.update(b=torch.ones(1)), "another architecture: with b$"),
        (lambda record, tensors: tensors["k"].fill_(math.nan), "k: holds NaN or infinite weights"),
        (lambda record, tensors: tensors.update(k=tensors["k"].int()), "k: torch.int32 of shape"),
        (lambda record, tensors: tensors.update(k=tensors["k"].half()), "tensors of torch.float16; all must"),
    ],
)
def test_a_file_of_something_else_is_told(path: Path, change: Any, words: str) -> None:
    with pytest.raises(GliodeError, match=f"{path.name}: (the weights of )?{words}"):
        files.load(altered(path, change))


def test_no_file_and_no_regularizer(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(GliodeError, match=r"missing or no safetensors file .*name a file that scripts/train"):
        files.load(path)
    path.write_bytes(b"\x80\x04 a pickle")
    with pytest.raises(GliodeError, match="missing or no safetensors file"):
        files.load(path)
    save_file({"k": torch.ones(2)}, path)
    with pytest.raises(GliodeError, match="no regularizer of Gliode: its header has no record"):
        files.load(path)
    save_file({"k": torch.ones(2)}, path, {files.KEY: "{"})
    with pytest.raises(GliodeError, match="its record is damaged"):
        files.load(path)
    with pytest.raises(GliodeError, match="no weights 'crrr' come with Gliode"):
        files.shipped("crrr")


def test_what_cannot_be_loaded_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(GliodeError, match="Linear: no architecture"):
        files.save(tmp_path / "w.safetensors", nn.Linear(2, 2), CARD)
    broken = Springs(2)
    broken.k.data.fill_(math.inf)
    with pytest.raises(GliodeError, match="k: holds NaN or infinite"):
        files.save(tmp_path / "w.safetensors", broken, CARD)
    assert not list(tmp_path.iterdir())
    for change, words in (
        ({"data": " "}, "card.data: ' '; give words"),
        ({"seed": 1.5}, "card.seed: 1.5; give a whole number"),
        ({"spacing": 0.0}, "card.spacing: 0.0; give a positive"),
        ({"figures": {"PSNR": (math.nan, "dB")}}, "card.figures.PSNR: .*; give a finite number"),
    ):
        with pytest.raises(GliodeError, match=words):
            replace(CARD, **change)  # type: ignore[arg-type]


SHIPPED = sorted(files.FOLDER.glob("*.safetensors"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: getattr(p, "stem", "none"))
def test_what_is_shipped_is_small_and_reproducible(path: Path, tmp_path: Path) -> None:
    """Loading holds each to its card's guarantee; its command must name a case that is there."""
    module, card = files.load(path)
    assert path.stat().st_size < 300_000 and card.name == path.stem and card.figures
    words = card.command.split()
    assert words[:2] == ["scripts/env", "python"] and words[2].startswith("scripts/train")
    assert all((ROOT / word).is_file() for word in words if word.endswith((".py", ".yaml")))
    assert files.save(tmp_path / path.name, module, card) == card


def test_the_readme_has_the_table_of_the_files() -> None:
    readme = (files.FOLDER / "README.md").read_text(encoding="utf-8")
    assert readme.endswith(f"in step -->\n{files.table()}\n")
