r"""Trained weights on disk: one safetensors file (which runs no code when read) that says what it holds.

    save("crr.safetensors", energy, Card(name="crr", data="dead leaves", noise=(0.0, 0.1), command="..."))
    energy, card = load_energy("crr.safetensors", units="1")

Its header has a record in JSON: version of the format, architecture and its settings, and the model card.
Everything is checked when it is read, and the guarantee in the card must hold of the weights in the file.

`python -m inverse.regularizers.learned.files` prints the table of the weights that come with Gliode.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inverse.regularizers.learned.energy import Energy, Guarantee
from solvers.errors import GliodeError
from solvers.files import atomic

KEY, VERSION = "gliode.regularizer", 1  # of the file's header; raise the version when the format changes
FOLDER = Path(__file__).resolve().parents[3] / "data" / "regularizers"

_HERE = "inverse.regularizers.learned"
ARCHITECTURES = {
    "ridge": f"{_HERE}.ridge:Ridge",
    "icnn": f"{_HERE}.icnn:ICNN",
    "adversarial": f"{_HERE}.adversarial:AdversarialNetwork",
    "nett": f"{_HERE}.nett:NETT",
    "tdv": f"{_HERE}.tdv:TDV",
    "mesh_ridge": f"{_HERE}.mesh:MeshRidge",
    "score": f"{_HERE}.score:ScorePrior",
    "learned_descent": f"{_HERE}.unrolled:LearnedDescent",
    "continuous_unrolling": f"{_HERE}.unrolled:ContinuousUnrolling",
    "non_expansive": "solvers.node.convolution_flow:NonExpansiveDenoiser",
}
"""name -> module:class, imported when a file asks for it: an nn.Module with settings() to make it again."""


@dataclass(frozen=True)
class Card:
    """What one should know of trained weights before using them.

    name; data: what it was trained on; command: that trains it anew, with `seed`.
    units: of the values of a field ("1": images in [0, 1]); noise: the smallest and the largest standard
    deviation it was trained for, in these units; spacing: of the grid that its filters belong to, in mm,
    None where they are of pixels whatever these are, or know no grid.
    weight, scale: of `Learned`, tuned for the problems in `data`.
    figures: name -> (number, unit), on data that it was not trained on.
    guarantee: None of a module that is no energy; `save` fills it in.
    """

    name: str
    data: str
    command: str
    seed: int = 0
    noise: tuple[float, float] = (0.0, 0.0)
    units: str = "1"
    spacing: float | None = None
    weight: float = 1.0
    scale: float = 1.0
    figures: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    guarantee: Guarantee | None = None

    def __post_init__(self) -> None:
        for key in ("name", "data", "command", "units"):
            value = getattr(self, key)
            if not (isinstance(value, str) and value.strip()):
                raise GliodeError(f"card.{key}: {value!r}; give words")
        if type(self.seed) is not int:
            raise GliodeError(f"card.seed: {self.seed!r}; give a whole number")
        positive = {"weight": self.weight, "scale": self.scale}
        for key, value in {**positive, **({} if self.spacing is None else {"spacing": self.spacing})}.items():
            if not (_number(value) and value > 0):
                raise GliodeError(f"card.{key}: {value!r}; give a positive number")
        if not (
            len(self.noise) == 2 and all(map(_number, self.noise)) and 0 <= self.noise[0] <= self.noise[1]
        ):
            raise GliodeError(f"card.noise: {self.noise!r}; give the smallest and the largest deviation")
        for name, figure in self.figures.items():
            if not (len(figure) == 2 and _number(figure[0]) and isinstance(figure[1], str)):
                raise GliodeError(f"card.figures.{name}: {figure!r}; give a finite number and its unit")

    def require(self, units: str | None = None, spacing: float | None = None) -> None:
        """Raise GliodeError unless it was trained for fields in these units, on a grid of this spacing in mm.

        What is None is not asked; weights that belong to no spacing fit any.
        """
        if units is not None and units != self.units:
            raise GliodeError(
                f"trained on values in units {self.units!r}, this problem's are in {units!r}; convert the "
                "field, or take weights trained in its units"
            )
        if spacing is None or self.spacing is None:
            return
        if not math.isclose(spacing, self.spacing, rel_tol=0.01):
            raise GliodeError(
                f"its filters are of a grid of {self.spacing:g} mm, this one's spacing is {spacing:g} mm; "
                f"resample to {self.spacing:g} mm, train at {spacing:g} mm, or take a mesh regularizer: it "
                "fits any"
            )

    def record(self) -> dict[str, Any]:
        """Plain values for JSON; an infinite constant is null."""
        plain = asdict(self)
        if self.guarantee is not None:
            for key in ("modulus", "lipschitz"):
                plain["guarantee"][key] = _finite(getattr(self.guarantee, key))
        return plain


def shipped(name: str) -> Path:
    """The file of weights that come with Gliode (data/regularizers). Raises GliodeError for no such name."""
    path = FOLDER / f"{name}.safetensors"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.safetensors"))) or "none"
        raise GliodeError(f"no weights {name!r} come with Gliode ({known}); give the path of a file of yours")
    return path


def build(name: str, settings: Mapping[str, Any]) -> nn.Module:
    """A module of an architecture, with first weights. Raises GliodeError where the settings make none."""
    if name not in ARCHITECTURES:
        raise GliodeError(f"architecture {name!r}: not one of {', '.join(sorted(ARCHITECTURES))}")
    where, _, kind = ARCHITECTURES[name].partition(":")
    try:
        module: nn.Module = getattr(importlib.import_module(where), kind)(**settings)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise GliodeError(f"settings: they make no {name} ({error})") from error
    return module


def save(path: str | Path, module: nn.Module, card: Card) -> Card:
    """Write the weights, atomically; the card as written, with the guarantee of the present weights.

    Raises GliodeError for an architecture that is not in ARCHITECTURES, and for weights that are not finite.
    """
    from safetensors.torch import save_file

    kind = f"{type(module).__module__}:{type(module).__qualname__}"
    names = [name for name, where in ARCHITECTURES.items() if where == kind]
    if not names:
        raise GliodeError(f"{kind}: no architecture of inverse.regularizers.learned.files.ARCHITECTURES")
    tensors = {name: t.detach().cpu().clone().contiguous() for name, t in module.state_dict().items()}
    _require_finite(tensors)
    card = replace(card, guarantee=_guarantee(module))
    record = {
        "version": VERSION,
        "architecture": names[0],
        "settings": module.settings(),  # type: ignore[operator]
        "card": card.record(),
    }
    with atomic(path) as temporary:
        save_file(tensors, temporary, {KEY: json.dumps(record, allow_nan=False)})
    return card


def load(path: str | Path, units: str | None = None, spacing: float | None = None) -> tuple[nn.Module, Card]:
    """What `save` wrote, on the CPU, in the arithmetic and evaluation mode it is used in, and its card.

    units, spacing: of the fields it is to be used on (`Card.require`). Raises GliodeError naming the file:
    missing, damaged, of something else, of a newer version, of an architecture that this Gliode has not,
    settings, tensors or a guarantee that do not fit together, numbers that are not finite.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            header = (file.metadata() or {}).get(KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise GliodeError(
            f"{path}: missing or no safetensors file ({error}); name a file that scripts/train.py wrote from "
            "a case of kind: regularizer"
        ) from error
    try:
        module, card = _made(header, tensors)
        card.require(units, spacing)
    except GliodeError as error:
        raise GliodeError(f"{path}: {error}") from error
    return module, card


def load_energy(
    path: str | Path, units: str | None = None, spacing: float | None = None
) -> tuple[Energy, Card]:
    """`load` of a file that must hold an energy. Raises GliodeError for a denoiser or a whole method too."""
    module, card = load(path, units, spacing)
    if not isinstance(module, Energy):
        raise GliodeError(
            f"{path}: holds {type(module).__name__}, which has no energy R(m); take the weights of an energy"
        )
    return module, card


def table() -> str:
    """The weights that come with Gliode, as Markdown: from the files alone."""
    rows = [
        "| file | trained on, for noise | guarantee | held-out figures | command |",
        "|---|---|---|---|---|",
    ]
    for path in sorted(FOLDER.glob("*.safetensors")):
        card = load(path)[1]
        low, high = card.noise
        units = "" if card.units == "1" else f" {card.units}"
        noise = f"{high:.3g}{units}" if low == high else f"{low:.3g} to {high:.3g}{units}"
        figures = "; ".join(
            f"{name} {value:.4g} {unit}".strip() for name, (value, unit) in card.figures.items()
        )
        rows.append(
            f"| `{path.name}` | {card.data}; {noise} | {_words(card.guarantee)} | {figures} "
            f"| `{card.command}` |"
        )
    return "\n".join(rows)


# -- what a file must be -------------------------------------------------------------------------------------


def _made(header: str | None, tensors: Mapping[str, Tensor]) -> tuple[nn.Module, Card]:
    if header is None:
        raise GliodeError("no regularizer of Gliode: its header has no record of one")
    try:
        record = json.loads(header)
        version, name, settings, card = (record[k] for k in ("version", "architecture", "settings", "card"))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise GliodeError(f"its record is damaged ({error!r}); train anew") from error
    if version != VERSION:
        raise GliodeError(
            f"written in version {version} of the format, this Gliode reads {VERSION}; update Gliode, or "
            "train anew by the command of its card"
        )
    own = _card(card)
    try:
        with torch.random.fork_rng(devices=[]):  # first weights are drawn, and replaced at once
            module = build(name, settings)
    except GliodeError as error:
        raise GliodeError(f"{error}; train anew, or update Gliode") from error
    _fill(module, tensors)
    _hold(own.guarantee, _guarantee(module))
    return module.eval().requires_grad_(False), own


def _card(plain: Any) -> Card:
    if not isinstance(plain, dict):
        raise GliodeError("card: its record is damaged (no keys); train anew")
    try:
        held = plain["guarantee"]
        guarantee = None
        if held is not None:
            numbers = [
                math.inf if held[key] is None else float(held[key]) for key in ("modulus", "lipschitz")
            ]
            guarantee = Guarantee(numbers[0], numbers[1], bool(held["coercive"]))
        figures = {name: (value, unit) for name, (value, unit) in plain["figures"].items()}
        return Card(**{**plain, "noise": tuple(plain["noise"]), "figures": figures, "guarantee": guarantee})
    except GliodeError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise GliodeError(f"card: its record is damaged ({error!r}); train anew") from error


def _fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors in their places, in their arithmetic."""
    places = module.state_dict()
    missing, unknown = sorted(places.keys() - tensors.keys()), sorted(tensors.keys() - places.keys())
    if missing or unknown:
        raise GliodeError(
            "the weights of another architecture: "
            + "; ".join(
                f"{what} {', '.join(n)}" for what, n in (("without", missing), ("with", unknown)) if n
            )
        )
    for name, place in places.items():
        held = tensors[name]
        if held.shape != place.shape or held.is_floating_point() != place.is_floating_point():
            raise GliodeError(
                f"{name}: {held.dtype} of shape {tuple(held.shape)}, its settings ask for {place.dtype} of "
                f"{tuple(place.shape)}: the weights of another architecture"
            )
    _require_finite(tensors)
    kinds = {t.dtype for t in tensors.values() if t.is_floating_point()}
    if not kinds <= {torch.float32, torch.float64} or len(kinds) > 1:
        raise GliodeError(f"tensors of {', '.join(sorted(map(str, kinds)))}; all must be float32, or float64")
    for dtype in kinds:
        module.to(dtype)
    module.load_state_dict(dict(tensors))


def _require_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, t in tensors.items():
        if not bool(torch.isfinite(t).all()):
            raise GliodeError(f"{name}: holds NaN or infinite weights; train anew")


def _guarantee(module: nn.Module) -> Guarantee | None:
    return module.guarantee() if isinstance(module, Energy) else None


def _hold(said: Guarantee | None, found: Guarantee | None) -> None:
    """Raise unless what is found is as good as what was said."""
    if said is None:
        return
    if found is None or not (
        found.modulus <= 1.001 * said.modulus
        and found.lipschitz <= 1.001 * said.lipschitz
        and found.coercive >= said.coercive
    ):
        raise GliodeError(
            f"its card says {_words(said)}, its weights are {_words(found)}: altered, or of another version; "
            "train anew"
        )


def _words(of: Guarantee | None) -> str:
    if of is None:
        return "none as an energy"
    convex = "convex" if of.convex else f"weakly convex, modulus {of.modulus:.4g}"
    smooth = f"gradient {of.lipschitz:.4g}-Lipschitz"
    words = [
        *([] if math.isinf(of.modulus) else [convex]),
        *([] if math.isinf(of.lipschitz) else [smooth]),
        *(["coercive"] if of.coercive else []),
    ]
    return ", ".join(words) or "none"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    print(table())
