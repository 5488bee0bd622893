"""The case file of a training: data, network, loss and method, checked before anything starts.

    case = read("data/cases/networks/spiral.yaml")
    sets = load(case)
    model = build(case.model, case.features, case.scores, case.seed)

`python -m scripts.training_case` prints the table of all keys for data/cases/networks/README.md.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from inverse import losses, methods, training
from inverse.datasets import PLANAR, digits, mnist, planar
from scripts.training_sections import (
    ByMethod,
    DigitsData,
    IdxData,
    Loss,
    Model,
    NetModel,
    NonExpansiveModel,
    ODENetModel,
    PlanarData,
    RungeKuttaModel,
    SimplexModel,
    Squared,
    StandaloneModel,
    Training,
)
from solvers.errors import GliodeError
from solvers.node import models
from solvers.node.fields import ODENet, Standalone
from solvers.node.nonexpansive import Lipschitz1Linear, NonExpansive
from solvers.ode.integrate import Noise
from tumour.case_reading import load_yaml, table, validated
from tumour.case_sections import Section, Whole, problem

Set = tuple[Tensor, Tensor]


class Case(Section):
    """One training."""

    name: str = Field(default="", description="for titles; default the file's name")
    seed: Whole = Field(default=1, description="of data, first weights, batches and noise")
    precision: Literal["float32", "float64"] = Field(default="float32", description="of the arithmetic")
    data: Annotated[PlanarData | DigitsData | IdxData, Field(discriminator="source")]
    model: Model
    loss: Loss
    training: Training = Training()

    @model_validator(mode="after")
    def _fits_together(self) -> Case:
        if self.training.patience is not None and not self.data.validation:
            raise problem("training.patience: needs validation data; give data.validation")
        features, classes, scores = self.features, self.classes, self.scores
        dim = self.model.dim or features
        if scores != classes and (scores, classes) != (1, 2):
            raise problem(f"loss.scores: must be {classes}, one a class (got {scores})")
        if dim < features and self.model.lift == "zeros":
            raise problem(f"model.dim: {dim} for {features} inputs; give {features} or more, or lift: linear")
        if dim < scores and self.model.classifier == "fixed":
            raise problem(f"model.dim: {dim}, fewer than the {scores} scores, which are its components")
        return self

    @property
    def features(self) -> int:
        """Numbers of an input."""
        if isinstance(self.data, IdxData):
            return self.data.size**2
        return 2 if isinstance(self.data, PlanarData) else 64

    @property
    def classes(self) -> int:
        return 2 if isinstance(self.data, PlanarData) else 10

    @property
    def scores(self) -> int:
        """Scores that the network gives."""
        return self.loss.scores or (1 if self.classes == 2 else self.classes)

    def record(self) -> dict[str, Any]:
        """The resolved case as plain values, defaults filled in, paths absolute; `parse` gives it back."""
        return self.model_dump(mode="json", exclude_none=True)

    def key(self) -> str:
        """Of all that the numbers depend on but the length of the run: what a checkpoint belongs to."""
        record = {**self.record(), "name": None, "training": None}
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def read(path: str | Path) -> Case:
    """The case in a YAML file. Raises GliodeError, a line a key at fault."""
    path = Path(path)
    return parse(load_yaml(path), path.name, path.parent, path.stem)


def parse(data: Mapping[str, Any], label: str = "case", folder: Path = Path(), name: str = "") -> Case:
    """The case in plain values; `label` stands for the file in messages, `name` is that key's default."""
    case = validated(Case, data, label, folder, unknown="{key}: unknown key")
    return case if case.name else case.model_copy(update={"name": name})


# -- what the sections stand for -----------------------------------------------------------------------------


class Sets(NamedTuple):
    """Inputs and labels to train on, to watch and to report on (None: no such)."""

    train: Set
    validation: Set | None
    test: Set | None


class Job(NamedTuple):
    """What scripts/train.py trains. report: of the training and (loss, figure) of each set, parts of
    result.json; files: written to a folder, of the history, and whether to draw; show: the record, printed.
    """

    model: nn.Module
    loss: losses.Loss
    sets: Sets
    training: Training
    report: Callable[[training.Training, dict[str, tuple[float, float]]], dict[str, Any]]
    files: Callable[[Path, list[Any], bool], list[Path]]
    show: Callable[[dict[str, Any]], None]


def load(case: Case) -> Sets:
    """The data of a case, drawn or split by its seed."""
    data, dtype, seed = case.data, getattr(torch, case.precision), case.seed
    if isinstance(data, PlanarData):
        sizes = (data.train or PLANAR[data.set].size, data.validation, data.test)
        # Seeds a million apart: a study of many seeds never tests on what it has trained on.
        drawn = [
            planar(data.set, size, seed + part * 10**6, dtype=dtype) if size else None
            for part, size in zip((0, 2, 1), sizes, strict=True)
        ]
        assert drawn[0] is not None and drawn[2] is not None
        return Sets(drawn[0], drawn[1], drawn[2])
    low, high = data.range

    def scaled(part: Set) -> Set:
        return low + (high - low) * part[0], part[1]

    if isinstance(data, DigitsData):
        parts = digits(seed, data.test, data.validation, dtype)
        validation = scaled(parts.validation) if data.validation else None
        return Sets(scaled(parts.train), validation, scaled(parts.test))
    pictures, labels = scaled(mnist(data.folder, True, data.size, dtype))
    if data.train + data.validation > len(labels):
        raise GliodeError(
            f"data: train + validation = {data.train + data.validation}, the files hold {len(labels)} "
            "pictures; ask for less"
        )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    own, watched = order[: data.train], order[data.train : data.train + data.validation]
    test, truth = scaled(mnist(data.folder, False, data.size, dtype))
    return Sets(
        (pictures[own], labels[own]),
        (pictures[watched], labels[watched]) if data.validation else None,
        (test[: data.test], truth[: data.test]),
    )


def moved(sets: Sets, device: str) -> Sets:
    """The sets on a device."""
    return Sets(*(None if part is None else (part[0].to(device), part[1].to(device)) for part in sets))  # type: ignore[arg-type]


def build(section: Model, features: int, scores: int, seed: int) -> nn.Sequential:
    """The network of a section, nn.Sequential(lift, block, classifier), with first weights of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        dim = section.dim or features
        certified = isinstance(section, NonExpansiveModel)
        affine = Lipschitz1Linear if certified else nn.Linear
        learned = section.classifier == "learned"
        parts: dict[str, nn.Module] = {
            "lift": affine(features, dim) if section.lift == "linear" else models.Augment(dim - features),
            "block": _block(section, dim),
            "classifier": affine(dim, scores) if learned else models.Components(scores),
        }
        return nn.Sequential(OrderedDict(parts))


def _block(section: Model, dim: int) -> nn.Module:
    if isinstance(section, NetModel):
        net = models.Net(dim, section.steps, section.activation)
        start = torch.randn(dim, dim) + section.rough * torch.randn(section.steps, dim, dim)
        net.K.values.data = section.gain / dim**0.5 * start
        return net
    if isinstance(section, NonExpansiveModel):
        return NonExpansive(
            dim,
            section.width,
            section.activation,
            section.weights,
            section.knots,
            section.duration,
            section.steps,
            section.scheme,
        )
    field: Standalone | ODENet
    if isinstance(section, StandaloneModel):
        field = Standalone(dim, section.activation, section.weights, section.knots, section.duration)
    else:
        kind: type[Standalone | ODENet] = ODENet if isinstance(section, ODENetModel) else Standalone
        field = kind(dim, section.activation, "steps", section.steps, section.duration)
    field.reset(section.gain, section.rough)
    scheme = section.scheme if isinstance(section, RungeKuttaModel | StandaloneModel) else "euler"
    noise = None if section.noise is None else Noise(section.noise.std, section.noise.where)
    learned = "simplex" if isinstance(section, SimplexModel) else None
    return models.Node(field, section.duration, section.steps, scheme, learned=learned, noise=noise)


def loss_of(section: Loss, scores: int) -> losses.ClassLoss:
    """The loss of a section."""
    if isinstance(section, Squared):
        off, on = section.targets
        return losses.SquaredLoss(scores, off, on, section.hypothesis, section.magnitude)
    return losses.CrossEntropy(scores, section.magnitude)


def method_of(section: ByMethod) -> methods.Method:
    """The method of a section."""
    settings = section.model_dump(exclude={"kind"})
    kinds: dict[str, type[methods.Method]] = {
        "conjugate_gradients": methods.ConjugateGradients,
        "landweber": methods.Landweber,
        "quasi_newton": methods.QuasiNewton,
        "adam": methods.Adam,
        "sgd": methods.SGD,
    }
    return kinds[section.kind](**settings)


if __name__ == "__main__":
    print(table(Case))
