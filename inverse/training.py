"""Training a network as an inverse problem: the weights are the unknown, the labels the data.

One loop serves all methods (inverse.methods): each epoch visits the problems of its mini-batches
(inverse.batch_problems), one after the other, in the space of the weights, H1 in depth with a chosen length
scale where they depend on the depth (solvers.node.weights).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from inverse.batch_problems import BatchProblems, Data, digest, require_fit
from inverse.checkpoints import load, read_checkpoint, write_checkpoint, write_weights
from inverse.losses import Loss
from inverse.methods import ConjugateGradients, Method, stepper
from inverse.optimizers.iteration import SOLVES, NonFiniteError
from inverse.training_log import Log
from solvers.errors import GliodeError

Entry = dict[str, float]
Callback = Callable[[Entry, nn.Module], object]
Checkpoint = tuple[dict[str, Tensor], dict[str, Any]]


@dataclass(frozen=True)
class Training:
    """What `train` returns; the model holds the weights kept, in evaluation mode.

    history: an entry an epoch: `epoch`, `objective` (the mean over its batches of J before each was visited),
    validation_loss and validation_accuracy (or the loss's own figure) where there are such data, and what was
    spent so far: `forward`, `adjoint` (gradients) and `tangent` solves, `seconds` of the process in training
    alone. stopped_by:
    "epochs", "max_gradients", "max_seconds", "patience", "NonFinite", "interrupted", or on the full batch the
    optimizer's own reason ("GradientTolerance", "LineSearch", "StationaryPoint"); note: a sentence about it.
    kept_epoch: whose weights are kept, the last's or the best's.
    """

    history: list[Entry]
    counts: dict[str, int]
    seconds: float
    stopped_by: str
    note: str
    kept_epoch: int


def train(
    model: nn.Module,
    loss: Loss,
    data: Data,
    method: Method | None = None,
    *,
    epochs: int,
    batch: int | None = None,
    length: float = 0.0,
    decay: float = 0.0,
    validation: Data | None = None,
    patience: int | None = None,
    max_gradients: int | None = None,
    max_seconds: float | None = None,
    seed: int = 0,
    callback: Callback | None = None,
    folder: str | Path | None = None,
    checkpoint_every: int = 1,
    resume: bool = False,
    key: str = "",
    progress: bool = False,
) -> Training:
    """Train the model on data, in its own arithmetic and on its own device.

    data: inputs (n, ...) and a label or target for each, as the loss takes them (inverse.losses).

    method: ConjugateGradients() unless given. batch: inputs a mini-batch (or a few more, so that all are
    used and no batch is small); None: all, and the method's memory goes on from epoch to epoch. length: the
    length scale of H1 in depth; decay: weight of the parameters' norm in that space. patience: end after so
    many epochs without a lower validation loss, and keep the weights of the lowest. max_gradients: end when
    they are spent; max_seconds: end after the epoch in which the process has spent them. callback: called
    after each epoch with its entry of the history and the model.

    folder: gets a checkpoint every `checkpoint_every` epochs and at the end, curves for TensorBoard, and
    weights.safetensors. resume: go on from the checkpoint there, if there is one, to the numbers of a run
    without a break; it must be of the same settings and `key`, whatever the caller wants to tell apart.

    An interruption (Ctrl-C) ends the run and keeps what is done; its checkpoint is of the last whole epoch.
    Where the objective is no longer finite the best weights are kept. Raises GliodeError for data, a loss or
    settings that do not fit.
    """
    method = ConjugateGradients() if method is None else method
    limits = {"epochs": epochs, "patience": patience, "checkpoint_every": checkpoint_every}
    for name, value in limits.items():
        if value is not None and value < 1:
            raise GliodeError(f"train: {name} must be 1 or more, got {value}")
    if max_gradients is not None and max_gradients < 2:
        raise GliodeError(f"train: max_gradients must be 2 or more, got {max_gradients}")
    if max_seconds is not None and not max_seconds > 0:
        raise GliodeError(f"train: max_seconds must be positive, got {max_seconds}")
    if patience is not None and validation is None:
        raise GliodeError("train: patience needs validation data to watch")
    if resume and folder is None:
        raise GliodeError("train: resume needs the folder of the run to go on with")
    problems = BatchProblems(model, loss, data, batch, length, decay, seed)
    if validation is not None:
        require_fit(model, loss, validation, "validation")
    run = _Run(problems, method, validation, epochs, patience, max_gradients, max_seconds)
    if folder is not None:
        run.settings = {
            "key": key,
            "method": {"name": type(method).__name__, **asdict(method)},
            "loss": f"{type(loss).__name__} {sorted(vars(loss).items())}",
            "data": digest(data),
            "validation": None if validation is None else digest(validation),
            **{"batch": batch, "length": length, "decay": decay, "seed": seed},
            **({"batches in all": run.visits} if getattr(method, "cosine", False) else {}),
        }
    return run(callback, None if folder is None else Path(folder), checkpoint_every, resume, progress)


def evaluate(model: nn.Module, loss: Loss, data: Data, chunk: int = 4096) -> tuple[float, float]:
    """The loss and its figure (of a classifier the accuracy) on data, in evaluation mode and off the tape,
    `chunk` inputs at a time.
    """
    inputs, labels = data
    training = model.training
    model.eval()
    with torch.no_grad():
        scores = torch.cat([model(part) for part in inputs.split(chunk)])
        found = float(loss(scores, labels)), loss.measure(scores, labels)
    model.train(training)
    return found


@dataclass(frozen=True)
class _Best:
    epoch: int
    criterion: float
    weights: Mapping[str, Tensor]


class _Run:
    """The loop, and what it knows; `settings`: what a checkpoint must agree in."""

    def __init__(
        self,
        problems: BatchProblems,
        method: Method,
        validation: Data | None,
        epochs: int,
        patience: int | None,
        max_gradients: int | None,
        max_seconds: float | None,
    ) -> None:
        self.problems, self.method, self.validation = problems, method, validation
        self.model, self.parameters = problems.model, problems.parameters
        self.epochs, self.patience = epochs, patience
        self.max_gradients = math.inf if max_gradients is None else max_gradients
        self.max_seconds = math.inf if max_seconds is None else max_seconds
        self.visits = int(min(epochs * problems.count, self.max_gradients))
        self.settings: dict[str, Any] = {}
        self.history: list[Entry] = []
        self.counts = dict.fromkeys(SOLVES, 0)
        self.seconds = 0.0
        self.best = _Best(0, math.inf, self._weights())
        self.stopped_by = self.note = ""

    def __call__(
        self, callback: Callback | None, folder: Path | None, every: int, resume: bool, progress: bool
    ) -> Training:
        saved = self._restored(folder) if resume and folder is not None else None
        count = self.problems.count
        self.work = stepper(self.method, self.parameters.pack(), self.visits, count == 1)
        if saved is not None:
            self.work.restore(*saved)
            self._watch()
        first = len(self.history)
        whole: Checkpoint | None = None  # of the last whole epoch, if not written yet
        with Log(folder, first, first * count, self.epochs * count, progress) as log:
            try:
                while not self.stopped_by:
                    before = len(self.history)
                    complete = self._epoch(log)
                    if complete and folder is not None:
                        whole = self._checkpoint()
                        if len(self.history) % every == 0:
                            write_checkpoint(folder, *whole)
                            whole = None
                    if len(self.history) > before and callback is not None:
                        callback(self.history[-1], self.model)
            except KeyboardInterrupt:
                self._stop("interrupted", f"interrupted after {len(self.history)} epochs")
                self.parameters.load(self.work.m)
            except NonFiniteError as error:
                self._stop("NonFinite", f"{error}; the weights of epoch {self.best.epoch} are kept")
        kept = len(self.history)
        if self.patience is not None or self.stopped_by == "NonFinite":
            kept = self.best.epoch
            self.model.load_state_dict(self.best.weights)
        self.model.eval()
        if folder is not None:
            if whole is not None:
                write_checkpoint(folder, *whole)
            write_weights(folder / "weights.safetensors", self.model)
        return Training(self.history, self.counts, self.seconds, self.stopped_by, self.note, kept)

    def _epoch(self, log: Log) -> bool:
        """Visit the batches of the next epoch, and note it if any was visited; whether all were."""
        epoch, values = len(self.history), []
        self.model.train()
        begin = time.process_time()
        try:
            for problem in self.problems.of(epoch):
                left = self.max_gradients - self.counts["adjoint"]
                if left < self.work.least:
                    self._stop("max_gradients", f"{self.counts['adjoint']} gradients are spent")
                    break
                visit = self.work.visit(problem, left)
                for name, count in problem.counts.items():
                    self.counts[name] += count
                if visit.interrupted:
                    raise KeyboardInterrupt
                values.append(visit.value)
                log.visit(visit.value)
                if visit.stuck and self.problems.count == 1:
                    self._stop(visit.stuck, "no step lowers the objective of all data any more")
        finally:
            self.seconds += time.process_time() - begin
        if not bool(torch.isfinite(self.work.m).all()):
            raise NonFiniteError("objective: a step led to weights that are not finite; take smaller steps")
        self.parameters.load(self.work.m)
        if values:
            self._note(epoch + 1, float(np.mean(values)), log)
        return len(values) == self.problems.count

    def _note(self, epoch: int, objective: float, log: Log) -> None:
        entry: Entry = {"epoch": epoch, "objective": objective}
        if self.validation is not None:
            loss, figure = evaluate(self.model, self.problems.loss, self.validation)
            entry |= {"validation_loss": loss, f"validation_{self.problems.loss.figure}": figure}
        self.history.append({**entry, **self.counts, "seconds": self.seconds})
        log.epoch(self.history[-1])
        criterion = entry.get("validation_loss", objective)
        if criterion < self.best.criterion:
            self.best = _Best(epoch, criterion, self._weights())
        if not self.stopped_by:
            self._watch()

    def _watch(self) -> None:
        """End where the patience, the epochs or the time have run out."""
        done = len(self.history)
        if self.patience is not None and done - self.best.epoch >= self.patience:
            self._stop("patience", f"the validation loss was lowest after epoch {self.best.epoch}")
        elif done >= self.epochs:
            self._stop("epochs", f"all {done} epochs are done")
        elif self.seconds >= self.max_seconds:
            self._stop("max_seconds", f"{self.seconds:.3g} s of the process are spent")

    def _stop(self, reason: str, note: str) -> None:
        self.stopped_by, self.note = reason, note

    def _weights(self) -> dict[str, Tensor]:
        return {name: t.detach().clone() for name, t in self.model.state_dict().items()}

    def _checkpoint(self) -> Checkpoint:
        """All that a resumed run needs, copied."""
        memory, values = self.work.memory()
        parts = {"weights": self._weights(), "best": self.best.weights, "memory": memory}
        record = {
            "settings": self.settings,
            "history": list(self.history),
            "best": {"epoch": self.best.epoch, "criterion": self.best.criterion},
            "memory": values,
        }
        return {f"{part}.{name}": t for part, of in parts.items() for name, t in of.items()}, record

    def _restored(self, folder: Path) -> Checkpoint | None:
        """Take up the checkpoint in the folder, if there is one; what the method remembered."""
        found = read_checkpoint(folder)
        if found is None:
            return None
        tensors, record = found
        parts: dict[str, dict[str, Tensor]] = {"weights": {}, "best": {}, "memory": {}}
        try:
            settings = dict(record["settings"])
            history = [
                {name: math.nan if value is None else value for name, value in entry.items()}
                for entry in record["history"]
            ]
            counts = {name: int(history[-1][name]) for name in SOLVES}
            seconds, criterion = float(history[-1]["seconds"]), record["best"]["criterion"]
            best, values = int(record["best"]["epoch"]), dict(record["memory"])
            for name, tensor in tensors.items():
                part, _, own = name.partition(".")
                parts[part][own] = tensor
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise GliodeError(f"{folder}: no checkpoint of a training; train anew, without resume") from error
        different = [name for name, value in self.settings.items() if settings.get(name) != value]
        if different:
            raise GliodeError(
                f"{folder}: its checkpoint is of another run, different in {', '.join(different)}; go on "
                "with the same settings, or train anew, without resume"
            )
        load(self.model, parts["weights"], str(folder))
        device = next(self.model.parameters()).device
        weights = {name: tensor.to(device) for name, tensor in parts["best"].items()}
        self.history, self.counts, self.seconds = history, counts, seconds
        self.best = _Best(best, math.inf if criterion is None else criterion, weights)
        return parts["memory"], values
