#!/usr/bin/env python3
"""Train the network of a case file; see `train.py --help`."""

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
    from scripts.training_case import Case

DIVERGED = 1


def main(
    case: Annotated[
        Path,
        typer.Argument(
            help="The case, a YAML file (its keys: data/cases/networks/README.md).", show_default=False
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
    """Train the network of CASE and report its accuracy on data it has not seen.

    OUT gets the resolved case, result.json (accuracies, counts, history), weights.safetensors, pictures,
    checkpoints, and curves for TensorBoard (tensorboard --logdir OUT).

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
    from scripts import training_case
    from solvers.errors import GliodeError
    from solvers.files import write_json, write_text

    if device != "cpu" and not (device == "cuda" and torch.cuda.is_available()):
        raise GliodeError(f"--device: {device!r} is not here; give cpu, or cuda on a machine that has one")
    if resume and out is None:
        raise GliodeError("--resume: give the folder to go on in by --out")
    case = training_case.read(file)
    if seed is not None:
        case = case.model_copy(update={"seed": seed})
    sets = training_case.load(case)
    network = training_case.build(case.model, case.features, case.scores, case.seed)
    network.to(device, getattr(torch, case.precision))
    sets = training_case.moved(sets, device)
    loss, section = training_case.loss_of(case.loss, case.scores), case.training
    if out is not None:
        write_text(out / "case.yaml", yaml.safe_dump(case.record(), sort_keys=False))
    found = train(
        network,
        loss,
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
    parts = {"train": sets.train, "validation": sets.validation, "test": sets.test}
    scores = {name: evaluate(network, loss, part) for name, part in parts.items() if part is not None}
    record = report(case, found, scores, sum(p.numel() for p in network.parameters() if p.requires_grad))
    files: list[Path] = []
    if out is not None:
        write_json(out / "result.json", finite(record))
        files = [out / "result.json", out / "weights.safetensors"]
        if draw:
            from scripts.network_pictures import draw as draw_pictures

            files += draw_pictures(out, case.name, network.cpu(), loss, sets.test, found.history)
    show(record)
    for path in files:
        print(path)
    if out is None:
        print("Nothing is written; --out FOLDER keeps weights, numbers, pictures and checkpoints.")
    return found.stopped_by


def report(
    case: Case, found: Training, scores: dict[str, tuple[float, float]], weights: int
) -> dict[str, Any]:
    """The record of result.json."""
    from inverse.datasets import bayes_accuracy
    from scripts.training_case import PlanarData

    best = round(bayes_accuracy(case.data.set), 4) if isinstance(case.data, PlanarData) else None
    return {
        "case": case.name,
        "seed": case.seed,
        "accuracy": {name: accuracy for name, (_, accuracy) in scores.items()},
        "loss": {name: loss for name, (loss, _) in scores.items()},
        **({} if best is None else {"best_possible_accuracy": best}),
        "weights": weights,
        "stopping": {"rule": found.stopped_by, "note": found.note, "kept_epoch": found.kept_epoch},
        "counts": found.counts,
        "seconds": round(found.seconds, 2),
        "history": found.history,
    }


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
    counts = record["counts"]
    console.print(
        f"{counts['adjoint']} gradients, {counts['forward']} forward and {counts['tangent']} tangent solves, "
        f"{record['seconds']:.1f} s of the process; {record['stopping']['note']}.",
        highlight=False,
    )


if __name__ == "__main__":
    with missing_packages("train.py"):
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(main)
        app()
