"""The case file of a regularizer's training: fields, problem, architecture and trainer, checked beforehand.

`python -m scripts.regularizer_case` prints the table of all keys for data/cases/regularizers/README.md;
`scripts.regularizer_training` makes data and modules of a case.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from torch import nn

from inverse.datasets.images import PROCEDURAL, TRAIN
from inverse.regularizers.learned import files
from scripts.training_sections import ByAdam, Count, Training
from solvers.errors import GliodeError
from tumour.case_reading import load_yaml, table, validated
from tumour.case_sections import File, Number, Positive, Section, Whole, problem


def _names(names: list[str]) -> list[str]:
    for name in names:
        if name not in (*TRAIN, *PROCEDURAL):
            raise problem(f"{name!r} is no picture to train on; there are {', '.join((*TRAIN, *PROCEDURAL))}")
    return names


def _architecture(name: str) -> str:
    if name not in files.ARCHITECTURES:
        raise problem(f"{name!r} is not one of {', '.join(sorted(files.ARCHITECTURES))}")
    return name


Names = Annotated[list[str], Field(min_length=1), AfterValidator(_names)]
Architecture = Annotated[str, AfterValidator(_architecture)]

# -- fields --------------------------------------------------------------------------------------------------


class _Fields(Section):
    train: Count = Field(description="fields to train on")
    validation: Count = Field(default=32, description="others to watch, and to tune the weight on")


class ImageFields(_Fields):
    """Patches of photographs and of procedural pictures (inverse.datasets.images)."""

    source: Literal["images"]
    names: Names = Field(default=[*TRAIN, "dead_leaves"], description="what they are cut from")
    size: Count = Field(default=40, description="pixels a side")


class EllipseFields(_Fields):
    """Phantoms of ellipses, whole."""

    source: Literal["ellipses"]
    size: Count = Field(default=96, description="pixels a side")


class DiscFields(_Fields):
    """One soft disc in each (inverse.datasets.discs)."""

    source: Literal["discs"]
    size: Count = Field(default=16, description="pixels a side")


class OwnFields(_Fields):
    """Fields of yours: an array (n, *field) in NumPy's .npy, the last ones for validation."""

    source: Literal["file"]
    path: File = Field(description="the file, relative to the case file's folder")
    units: str = Field(default="1", description="of the values")
    spacing: Positive | None = Field(default=None, description="mm of the grid; default: pixels, whatever")


class CohortFields(_Fields):
    """Sources of tumours, or log-diffusivities, on MNI152, with scans of what grows (tumour.priors).

    Their problems are linearised (tumour.source_training, tumour.fields_training); `trainer: linearised`.
    """

    source: Literal["cohort"]
    of: Literal["sources", "coefficients"] = Field(description="which")
    spacing: Positive = Field(default=6.0, description="mm of the voxels")
    without: list[Whole] = Field(default=[], description="numbers of cases left out")


Fields = Annotated[
    ImageFields | EllipseFields | DiscFields | CohortFields | OwnFields, Field(discriminator="source")
]

# -- problem -------------------------------------------------------------------------------------------------


class Denoising(Section):
    """y = m + noise."""

    kind: Literal["denoising"]
    noise: Positive = Field(description="standard deviation, in the units of the fields")


class Measured(Section):
    """y = A m + noise of inverse.image_problems, also sparse_tomography, deconvolution, motion."""

    kind: Literal["tomography", "sparse_tomography", "deconvolution", "motion"]


Problem = Annotated[Denoising | Measured, Field(discriminator="kind")]

# -- trainers ------------------------------------------------------------------------------------------------


class ByBilevel(Section):
    """The minimisers of the regularized problem come near the truths (inverse.trainers.bilevel)."""

    kind: Literal["bilevel"]
    strength: Positive = Field(default=1.0, description="of R at the start; trained too, unless fixed")
    fixed: bool = Field(default=False, description="keep the strength: within a guarantee's range, say")
    margin: Whole = Field(default=0, description="pixels at each edge that do not count")
    loss: Literal["squared", "psnr"] = Field(
        default="squared", description="mean squared error, or mean PSNR: easy pictures count as hard ones"
    )
    hypergradient: Literal["minres", "jacobian_free"] = Field(
        default="minres", description="by a solve with the Hessian, or by one step"
    )
    tolerance: Positive = Field(
        default=1e-3, description="of the lower problem's gradient, relative to the start's"
    )
    iterations: Count = Field(default=100, description="of the lower problem, at most")


class ByDenoising(Section):
    """x - noise^2 R'(x) takes the noise away (inverse.trainers.denoising)."""

    kind: Literal["denoising"]
    noise: Annotated[list[Positive], Field(min_length=1)] = Field(description="levels")


class ByScore(Section):
    """Denoising at all the levels of a score prior (inverse.trainers.score_matching)."""

    kind: Literal["score"]


class ByAdversary(Section):
    """R tells true fields from naive reconstructions (inverse.trainers.adversarial)."""

    kind: Literal["adversarial"]
    crop: Count | None = Field(default=None, description="pixels of the squares they are cut into; none")
    penalty: Positive = Field(default=10.0, description="of slopes beyond 1")


class ByArtefacts(Section):
    """A NETT's network returns what is wrong with a naive reconstruction."""

    kind: Literal["artefacts"]
    crop: Count | None = Field(default=None, description="as above")


class EndToEnd(Section):
    """The output for the data, or of a denoiser for the noisy field, comes near the truth."""

    kind: Literal["end_to_end"]


class ByLinearised(Section):
    """Bilevel on the linearised problems of a cohort, for architecture: mesh_ridge."""

    kind: Literal["linearised"]
    shift: list[Number] = Field(
        default=[], description="of the values' potentials at the start, in units of their edges"
    )


Trainer = Annotated[
    ByBilevel | ByDenoising | ByScore | ByAdversary | ByArtefacts | EndToEnd | ByLinearised,
    Field(discriminator="kind"),
]


class RegularizerCase(Section):
    """One training of a regularizer."""

    kind: Literal["regularizer"] = Field(description="what tells such a case from a network's")
    name: str = Field(default="", description="of the weights' file; default the case file's name")
    seed: Whole = Field(default=1, description="of fields, noise, first weights and batches")
    precision: Literal["float32", "float64"] = Field(default="float32", description="of the arithmetic")
    architecture: Architecture = Field(
        description="a name of inverse.regularizers.learned.files.ARCHITECTURES"
    )
    settings: dict[str, Any] = Field(default={}, description="the arguments of its class")
    data: Fields
    problem: Problem | None = Field(
        default=None, description="what is trained for, and the weight tuned on; a score prior has none"
    )
    trainer: Trainer
    training: Training = Training(method=ByAdam(kind="adam"), epochs=10, batch=16)

    @model_validator(mode="after")
    def _fits_together(self) -> RegularizerCase:
        if isinstance(self.data, CohortFields) != (self.trainer.kind == "linearised"):
            raise problem("trainer.kind: linearised is for data of source: cohort, and they for it")
        needed = self.trainer.kind not in ("score", "linearised")
        if (self.problem is not None) != needed:
            raise problem(
                f"problem: missing; trainer {self.trainer.kind} needs one, kind: denoising for example"
                if needed
                else "problem: a score prior is trained for none, a cohort has its own; leave it out"
            )
        if isinstance(self.problem, Measured) and isinstance(self.data, OwnFields):
            raise problem(
                f"problem.kind: {self.problem.kind} is of images; take denoising for fields of a file"
            )
        try:
            files.build(self.architecture, self.settings)
        except GliodeError as error:
            raise problem(str(error)) from error
        return self

    def module(self) -> nn.Module:
        """The module with first weights; draws from torch's generator."""
        return files.build(self.architecture, self.settings)

    def record(self) -> dict[str, Any]:
        """The resolved case as plain values, defaults filled in, paths absolute."""
        return self.model_dump(mode="json", exclude_none=True)

    def key(self) -> str:
        """Of all that the numbers depend on but the length of the run: what a checkpoint belongs to."""
        record = {**self.record(), "name": None, "training": None}
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def read(path: str | Path) -> RegularizerCase:
    """The case in a YAML file. Raises GliodeError, a line a key at fault."""
    path = Path(path)
    return parse(load_yaml(path), path.name, path.parent, path.stem)


def parse(
    data: Mapping[str, Any], label: str = "case", folder: Path = Path(), name: str = ""
) -> RegularizerCase:
    """The case in plain values; `label` stands for the file in messages, `name` is that key's default."""
    case = validated(RegularizerCase, data, label, folder, unknown="{key}: unknown key")
    return case if case.name else case.model_copy(update={"name": name})


if __name__ == "__main__":
    print(table(RegularizerCase))
