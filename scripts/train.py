#!/usr/bin/env python3
"""Train the network or the regularizer of a case file; see `train.py --help`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.launching import BAD_INPUT, INTERRUPTED, missing_packages

with missing_packages("train.py"):
    import typer

if TYPE_CHECKING:
    from inverse.training import Training
    from scripts.regularizer_case import RegularizerCase
    from scripts.training_case import Case, Job

DIVERGED = 1


def main(
    case: Annotated[
        Path,
        typer.Argument(
            help="The case, a YAML file (its keys: data/cases/networks, data/cases/regularizers).",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results; without it nothing is written.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in OUT.")] = False,
    seed: Annotated[int | None, typer.Option(help="In place of the case's.", min=0)] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda where there is one.")] = "cpu",
    draw: Annotated[
        bool, typer.Option("--pictures/--no-pictures", help="Draw the results at the end.")
    ] = True,
) -> None:
    """Train the network or the regularizer of CASE and report how it does on data it has not seen.

    OUT gets the resolved case, result.json (accuracies, counts, history), weights.safetensors, pictures,
    checkpoints, and curves for TensorBoard (tensorboard --logdir OUT); of a regularizer also
    NAME.safetensors, the weights with their model card, which is what is used.

    Ctrl-C ends the training and keeps what is done; the same command with --resume goes on from the last
    whole epoch, to the numbers of a run without a break.
    """
    with missing_packages("train.py"):
        from solvers.errors import GliodeError

        signal.signal(signal.SIGTERM, _interrupt)  # a batch system's way to say that the time is over
        try:
            ended = run(case, out, resume, seed, device, draw)
        except GliodeError as error:
            print(f"train.py: {error}", file=sys.stderr)
            sys.exit(BAD_INPUT)
    if ended == "NonFinite":
        sys.exit(DIVERGED)
    if ended == "interrupted":
        again = "" if out is None else "; the same command with --resume goes on from there"
        print(f"train.py: interrupted{again}", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def run(file: Path, out: Path | None, resume: bool, seed: int | None, device: str, draw: bool) -> str:
    """Train, write and show; what ended the training."""
    import torch
    import yaml

    from inverse.checkpoints import finite
    from inverse.training import evaluate, train
    from scripts import regularizer_case, regularizer_training, training_case
    from solvers.errors import GliodeError
    from solvers.files import write_json, write_text
    from tumour.case_reading import load_yaml

    if device != "cpu" and not (device == "cuda" and torch.cuda.is_available()):
        raise GliodeError(f"--device: {device!r} is not here; give cpu, or cuda on a machine that has one")
    if resume and out is None:
        raise GliodeError("--resume: give the folder to go on in by --out")
    case: Case | RegularizerCase
    if load_yaml(file).get("kind") == "regularizer":
        if device != "cpu":
            raise GliodeError(f"--device: {device!r}; regularizers are trained on the cpu")
        case = regularizer_case.read(file)
        case = case.model_copy(update={} if seed is None else {"seed": seed})
        job = regularizer_training.job(case, file)
    else:
        case = training_case.read(file)
        case = case.model_copy(update={} if seed is None else {"seed": seed})
        job = network(case)
    job.model.to(device, getattr(torch, case.precision))
    sets, section = training_case.moved(job.sets, device), job.training
    if out is not None:
        write_text(out / "case.yaml", yaml.safe_dump(case.record(), sort_keys=False))
    found = train(
        job.model,
        job.loss,
        sets.train,
        training_case.method_of(section.method),
        epochs=section.epochs,
        batch=section.batch,
        length=section.length,
        decay=section.decay,
        validation=sets.validation,
        patience=section.patience,
        max_gradients=section.max_gradients,
        seed=case.seed,
        folder=out,
        checkpoint_every=section.checkpoint_every,
        resume=resume,
        key=case.key(),
        progress=sys.stderr.isatty(),
    )
    scores = {
        name: evaluate(job.model, job.loss, part)
        for name, part in zip(sets._fields, sets, strict=True)
        if part is not None
    }
    record = {
        "case": case.name,
        "seed": case.seed,
        **job.report(found, scores),
        "weights": sum(p.numel() for p in job.model.parameters() if p.requires_grad),
        "stopping": {"rule": found.stopped_by, "note": found.note, "kept_epoch": found.kept_epoch},
        "counts": found.counts,
        "seconds": round(found.seconds, 2),
        "history": found.history,
    }
    files: list[Path] = []
    if out is not None:
        write_json(out / "result.json", finite(record))
        files = [out / "result.json", out / "weights.safetensors", *job.files(out, found.history, draw)]
    job.show(record)
    counts = found.counts
    print(
        f"{counts['adjoint']} gradients, {counts['forward']} forward and {counts['tangent']} tangent solves, "
        f"{record['seconds']:.1f} s of the process; {found.note}."
    )
    for path in files:
        print(path)
    if out is None:
        print("Nothing is written; --out FOLDER keeps weights, numbers, pictures and checkpoints.")
    return found.stopped_by


def network(case: Case) -> Job:
    """What a network's case trains."""
    from inverse.datasets import bayes_accuracy
    from scripts import training_case

    sets = training_case.load(case)
    model = training_case.build(case.model, case.features, case.scores, case.seed)
    loss = training_case.loss_of(case.loss, case.scores)

    def report(found: Training, scores: dict[str, tuple[float, float]]) -> dict[str, Any]:
        record: dict[str, Any] = {
            "accuracy": {name: accuracy for name, (_, accuracy) in scores.items()},
            "loss": {name: loss for name, (loss, _) in scores.items()},
        }
        if isinstance(case.data, training_case.PlanarData):
            record["best_possible_accuracy"] = round(bayes_accuracy(case.data.set), 4)
        return record

    def files(out: Path, history: list[Any], draw: bool) -> list[Path]:
        if not draw:
            return []
        from scripts.network_pictures import draw as draw_pictures

        assert sets.test is not None
        return draw_pictures(out, case.name, model.cpu(), loss, sets.test, history)

    return training_case.Job(model, loss, sets, case.training, report, files, show)


def show(record: dict[str, Any]) -> None:
    """The table of accuracies, and what they cost."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{record['case']}, {record['weights']} weights", title_justify="left")
    for column in ("data", "accuracy", "loss"):
        table.add_column(column, justify="left" if column == "data" else "right")
    for name, accuracy in record["accuracy"].items():
        table.add_row(name, f"{100 * accuracy:.2f} %", f"{record['loss'][name]:.4g}")
    console.print(table)
    if "best_possible_accuracy" in record:
        best = 100 * record["best_possible_accuracy"]
        console.print(f"No classifier does better on new points than {best:.2f} %.", highlight=False)


if __name__ == "__main__":
    with missing_packages("train.py"):
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(main)
        app()
