"""What a case of kind regularizer trains, and the file of weights with their model card that it ends in.

job(case)    model, loss and fields for inverse.training.train; `finish` tunes the weight of the energy on
             the validation problems, the same way for each, and writes NAME.safetensors
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from inverse import losses
from inverse.datasets.discs import discs
from inverse.datasets.images import TRAIN, VALIDATION, ellipses, patches
from inverse.image_problems import VALIDATION_SEED, image_problem
from inverse.optimizers import quasi_newton
from inverse.problem import InverseProblem, LeastSquares
from inverse.regularizers.learned import files
from inverse.regularizers.learned.energy import Energy
from inverse.regularizers.learned.nett import NETT
from inverse.trainers import adversarial
from inverse.trainers.bilevel import Bilevel, inner, lower_solver
from inverse.trainers.denoising import Denoising
from inverse.trainers.score_matching import ScoreMatching
from inverse.training import Training
from scripts import regularizer_case as sections
from scripts.regularizer_case import RegularizerCase
from scripts.training_case import Job, Set, Sets
from solvers.errors import GliodeError
from solvers.spaces import Euclidean

TUNED_ON, VALUES = 16, 40_000  # fields of the validation set at most, and values of them all, but 2 fields
RTOL = 0.05  # of MINRES: a gradient that is 5 % off still descends
ROOT = Path(__file__).resolve().parents[1]
APART = 10**6  # between seeds of parts


@dataclass(frozen=True)
class Problem:
    """y = A m + sd e for fields (batch, *field); naive: a quick inversion of the data."""

    words: str
    A: Callable[[Tensor], Tensor]
    adjoint: Callable[[Tensor], Tensor]
    naive: Callable[[Tensor], Tensor]
    sd: float
    field: tuple[int, ...]

    def measured(self, truths: Tensor, seed: int) -> Tensor:
        """Noisy data, one seed one noise."""
        clean = self.A(truths)
        generator = torch.Generator().manual_seed(seed)
        return clean + (self.sd * torch.randn(clean.shape, generator=generator, dtype=torch.float64)).to(
            clean
        )

    def make(self, y: Tensor, R: Callable[[Tensor], Tensor]) -> InverseProblem:
        """min 1/2 ||(A m - y) / sd||^2 + R(m), the fields of a batch behind one another."""
        space = Euclidean(len(y) * math.prod(self.field))
        return LeastSquares(space, lambda m: self.A(m.reshape(-1, *self.field)), y, self.sd, R)

    def start(self, y: Tensor) -> Tensor:
        return self.naive(y).reshape(-1)

    def minimisers(self, energy: Energy, strength: float, section: sections.ByBilevel) -> Bilevel:
        """Data -> minimisers with `strength` times the energy."""
        solve = lower_solver(section.tolerance, section.iterations, quasi_newton.minimise)
        return Bilevel(
            energy,
            self.make,
            self.start,
            self.field,
            strength,
            section.hypergradient,
            section.fixed,
            section.margin,
            solve,
            RTOL,
        )


def fields_of(case: RegularizerCase) -> tuple[Tensor, Tensor]:
    """The true fields to train on and to watch, (n, *field)."""
    data, seed, dtype = case.data, case.seed, getattr(torch, case.precision)
    if isinstance(data, sections.ImageFields):
        own = patches(data.names, data.train, data.size, seed)
        return own.to(dtype), patches(VALIDATION, data.validation, data.size, VALIDATION_SEED).to(dtype)
    if isinstance(data, sections.EllipseFields):
        own = ellipses(data.train, data.size, seed + APART)
        return own.to(dtype), ellipses(data.validation, data.size, VALIDATION_SEED).to(dtype)
    if isinstance(data, sections.DiscFields):
        own = discs(data.train, data.size, seed + APART)
        return own.to(dtype), discs(data.validation, data.size, VALIDATION_SEED).to(dtype)
    assert isinstance(data, sections.OwnFields)
    try:
        held = np.load(data.path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise GliodeError(
            f"data.path: {data.path} holds no array ({error}); write one by numpy.save"
        ) from error
    if held.ndim < 2 or held.dtype.kind != "f" or not np.isfinite(held).all():
        raise GliodeError(
            f"data.path: {data.path} holds {held.dtype} of shape {held.shape}; give finite floating-point "
            "fields (n, *field)"
        )
    if len(held) < data.train + data.validation:
        raise GliodeError(
            f"data: train + validation = {data.train + data.validation}, the file holds {len(held)} fields; "
            "ask for less"
        )
    fields = torch.from_numpy(held).to(dtype)
    return fields[: data.train], fields[len(fields) - data.validation :]


def problem_of(case: RegularizerCase, field: tuple[int, ...]) -> Problem | None:
    """What is trained for."""
    section = case.problem
    if section is None:
        return None
    if isinstance(section, sections.Denoising):

        def same(m: Tensor) -> Tensor:
            return m

        return Problem(f"denoising at {section.noise:.3g}", same, same, same, section.noise, field)
    image = image_problem(section.kind, field[0])
    words = section.kind.replace("_", " ")
    return Problem(words, image.A, image.A.adjoint, image.naive, image.sd, field)


def job(case: RegularizerCase, source: Path) -> Job:
    """What is trained; `source`: the case file, for the command in the card."""
    seed = case.seed
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        module = case.module().to(getattr(torch, case.precision))
    if isinstance(case.data, sections.CohortFields):
        return _of_cohort(case, case.data, source, module)
    own, watched = fields_of(case)
    field = tuple(own.shape[1:])
    problem = problem_of(case, field)
    if isinstance(module, Energy):
        module.require_fit(field)
    trainer = case.trainer
    loss: losses.Loss = losses.Mean()
    model: nn.Module
    if isinstance(trainer, sections.ByDenoising):
        model, sets = Denoising(_energy(module, case), trainer.noise), _alone(own, watched)
    elif isinstance(trainer, sections.ByScore):
        model, sets = ScoreMatching(_energy(module, case)), _alone(own, watched)  # type: ignore[arg-type]
    else:
        assert problem is not None
        data = problem.measured(own, seed + 2 * APART), problem.measured(watched, VALIDATION_SEED)
        pairs = (data[0], own), (data[1], watched)
        if isinstance(trainer, sections.ByAdversary):
            model = adversarial.Adversarial(_energy(module, case), trainer.penalty)
            sets = [adversarial.pairs(*cut(trainer.crop, truth, problem.naive(y))) for y, truth in pairs]
        elif isinstance(trainer, sections.ByArtefacts):
            if not isinstance(module, NETT):
                raise GliodeError(
                    f"trainer.kind: artefacts is for architecture nett, not {case.architecture}"
                )
            model, loss = module.network, losses.SquaredError()
            sets = [adversarial.artefacts(*cut(trainer.crop, truth, problem.naive(y))) for y, truth in pairs]
        else:
            loss, sets = losses.SquaredError(), [*pairs]
            if isinstance(trainer, sections.ByBilevel):
                model = problem.minimisers(_energy(module, case), trainer.strength, trainer)
                sets = [(y, inner(truth, trainer.margin)) for y, truth in pairs]
                loss = losses.LogError() if trainer.loss == "psnr" else loss
            else:
                model = module
    end = _End(case, source, module, model, problem, watched)
    return Job(model, loss, Sets(sets[0], sets[1], None), case.training, end.report, end.files, end.show)


def _of_cohort(case: RegularizerCase, data: sections.CohortFields, source: Path, module: nn.Module) -> Job:
    """Rows of numbers stand for the cases."""
    from inverse.regularizers.learned.mesh import MeshRidge
    from tumour import fields_training, source_training

    assert isinstance(case.trainer, sections.ByLinearised)
    if not isinstance(module, MeshRidge):
        raise GliodeError(
            f"architecture: a cohort's are fields of meshes; take mesh_ridge, not {case.architecture}"
        )
    shift = case.trainer.shift
    if len(shift) != (0 if module.shift is None else len(module.shift)) and shift:
        raise GliodeError(
            f"trainer.shift: {len(shift)} numbers; give one for each of `values`, with uneven: true"
        )
    if module.shift is not None and shift:
        with torch.no_grad():
            module.shift.copy_(torch.tensor(shift))
    kept = [k for k in range(data.train + data.validation + len(data.without)) if k not in data.without]
    numbers: list[tuple[Literal["train", "validation"], int]] = [
        *(("train", k) for k in kept[: data.train]),
        *(("validation", k) for k in kept[: data.validation]),
    ]
    model: nn.Module
    if data.of == "sources":
        model = source_training.SourceTraining(
            module, [source_training.prepared(part, k, data.spacing) for part, k in numbers]
        )
    else:
        model = fields_training.FieldTraining(
            module, [fields_training.prepared(part, k, data.spacing) for part, k in numbers]
        )
    rows = torch.arange(len(numbers), dtype=getattr(torch, case.precision))[:, None]
    sets = _alone(rows[: data.train], rows[data.train :])
    end = _End(case, source, module, model, None, torch.empty(0))
    return Job(
        model, losses.Mean(), Sets(sets[0], sets[1], None), case.training, end.report, end.files, end.show
    )


def cut(size: int | None, *parts: Tensor) -> list[Tensor]:
    """Images (n, rows, columns) in squares (m, size, size), as many as there is room for; None: whole."""
    if size is None:
        return list(parts)
    if min(parts[0].shape[1:]) < size:
        raise GliodeError(f"trainer.crop: {size} pixels, the fields have {tuple(parts[0].shape[1:])}")
    return [x.unfold(1, size, size).unfold(2, size, size).reshape(-1, size, size) for x in parts]


def _alone(own: Tensor, watched: Tensor) -> list[Set]:
    return [(fields, fields.new_zeros(len(fields))) for fields in (own, watched)]


def _energy(module: nn.Module, case: RegularizerCase) -> Energy:
    if not isinstance(module, Energy):
        raise GliodeError(
            f"trainer.kind: {case.trainer.kind} trains energies, {case.architecture} is none; take end_to_end"
        )
    return module


class _End:
    """After the training: the weight is tuned, figures are taken, the card is written."""

    def __init__(
        self,
        case: RegularizerCase,
        source: Path,
        module: nn.Module,
        model: nn.Module,
        problem: Problem | None,
        watched: Tensor,
    ) -> None:
        self.case, self.source, self.module, self.model = case, source, module, model
        self.problem = problem
        most = max(2, VALUES // max(1, watched[:1].numel()))
        self.watched = watched[: min(most, TUNED_ON)]
        margin = case.trainer.margin if isinstance(case.trainer, sections.ByBilevel) else 0
        self.truths = inner(self.watched, margin)

    def report(self, found: Training, scores: dict[str, tuple[float, float]]) -> dict[str, Any]:
        """The parts of result.json that are this training's own."""
        self.weight = 1.0
        self.figures: dict[str, tuple[float, str]] = {}
        if found.stopped_by != "interrupted":
            self._judge(scores)
        self.card = self._card()
        return {"loss": {name: loss for name, (loss, _) in scores.items()}, "card": self.card.record()}

    def _judge(self, scores: dict[str, tuple[float, float]]) -> None:
        if isinstance(self.case.data, sections.CohortFields):
            self.figures = {"linearised problems: mean relative error": (100 * scores["validation"][0], "%")}
            return
        if self.problem is None:
            self.figures = {"score matching": (scores["validation"][0], "per value")}
            return
        y = self.problem.measured(self.watched, VALIDATION_SEED)
        if isinstance(self.module, Energy):
            self.weight, found = self._tuned(self.module, y)
        else:
            with torch.no_grad():
                found = self.module(y)
        error = (found - self.truths).double().flatten(1)
        if isinstance(self.case.data, sections.OwnFields):
            ratio = error.norm(dim=1) / self.truths.double().flatten(1).norm(dim=1)
            self.figures = {
                f"{self.problem.words}: median relative error": (100 * float(ratio.median()), "%")
            }
        else:
            mean = -10 * math.log10(float(error.square().mean()))
            self.figures = {f"{self.problem.words}: PSNR": (mean, "dB")}

    def _tuned(self, energy: Energy, y: Tensor) -> tuple[float, Tensor]:
        """The weight whose minimisers are nearest to the truths, and these; a search along log weight."""
        assert self.problem is not None
        trainer, begin = self.case.trainer, 1.0
        section = trainer if isinstance(trainer, sections.ByBilevel) else sections.ByBilevel(kind="bilevel")
        if isinstance(self.model, Bilevel):
            begin = float(self.model.log_strength.detach().exp())
        elif isinstance(trainer, sections.ByAdversary):
            noise = self.problem.sd * torch.randn(y[0].shape, generator=torch.Generator().manual_seed(0))
            begin = adversarial.balanced_weight(self.problem.adjoint, noise.to(y), self.problem.sd)
        kept: dict[float, Tensor] = {}

        def error(log: float) -> float:
            assert self.problem is not None
            model = self.problem.minimisers(energy, math.exp(log), section).to(y.dtype)
            with torch.no_grad():
                kept[log] = model(y)
            return float((kept[log] - self.truths).square().mean())

        at = math.log(begin)
        if section.fixed:
            error(at)
            return begin, kept[at]
        best = minimize_scalar(error, (at - 0.4, at + 0.4), method="brent", tol=0.02, options={"maxiter": 8})
        return math.exp(best.x), kept[best.x]

    def _card(self) -> files.Card:
        case, data = self.case, self.case.data
        noise = (0.0, 0.0)
        if isinstance(case.trainer, sections.ByDenoising):
            noise = min(case.trainer.noise), max(case.trainer.noise)
        elif self.problem is not None:
            noise = self.problem.sd, self.problem.sd
        size = " x ".join(map(str, self.watched.shape[1:]))
        what = f"{data.train} {data.source}"
        if isinstance(data, sections.ImageFields):
            names = data.names
            if set(TRAIN) <= set(names):
                names = ["training photographs", *(name for name in names if name not in TRAIN)]
            what = f"{data.train} patches of {', '.join(names)}"
        if isinstance(data, sections.CohortFields):
            what, size, noise = f"{data.train} {data.of} on MNI152", f"{data.spacing:g} mm", (0.05, 0.05)
        own = data if isinstance(data, sections.OwnFields) else None
        source = self.source.resolve()
        if source.is_relative_to(ROOT):
            source = source.relative_to(ROOT)
        out = f"results/{case.name}"
        words = "all noise levels" if self.problem is None else self.problem.words
        if isinstance(data, sections.CohortFields):
            words = "scans of what grows"
        return files.Card(
            name=case.name,
            data=f"{what}, {size}; {words}",
            command=f"scripts/env python scripts/train.py {source} --seed {case.seed} --out {out}",
            seed=case.seed,
            noise=noise,
            units="1" if own is None else own.units,
            spacing=None if own is None else own.spacing,
            weight=self.weight,
            figures=self.figures,
        )

    def files(self, out: Path, history: list[Any], draw: bool) -> list[Path]:
        """Write the weights with their card."""
        path = out / f"{self.case.name}.safetensors"
        files.save(path, self.module, self.card)
        return [path]

    def show(self, record: dict[str, Any]) -> None:
        """What came out."""
        print(f"{self.case.architecture} on {self.card.data}; weight {self.card.weight:.4g}")
        for name, (value, unit) in self.card.figures.items():
            print(f"  {name} {value:.4g} {unit}")
