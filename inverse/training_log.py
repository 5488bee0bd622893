"""What a training shows while it runs: a progress bar, and curves for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch.utils.tensorboard import SummaryWriter


class Log:
    """`with Log(...) as log`: curves in folder/tensorboard if there is a folder, in place of those from epoch
    `first` + 1 on; a bar of `total` batches on standard error if `progress`.
    """

    def __init__(self, folder: Path | None, first: int, done: int, total: int, progress: bool) -> None:
        self._folder, self._first, self._progress = folder, first, progress
        self._done, self._total = done, total
        self._stack = ExitStack()
        self._writer: SummaryWriter | None = None
        self._bar: Progress | None = None
        self._note = ""

    def __enter__(self) -> Log:
        if self._folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            logs = self._folder / "tensorboard"
            if not self._first:
                for old in logs.glob("events.out.tfevents.*"):
                    old.unlink()
            self._writer = SummaryWriter(str(logs), purge_step=self._first + 1)
            self._stack.callback(self._writer.close)
        if self._progress:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = ("training", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True))
            self._task = self._bar.add_task("", total=self._total, completed=self._done, note="")
            self._stack.enter_context(self._bar)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def visit(self, value: float) -> None:
        """A batch is done, on which the objective was `value`."""
        if self._bar is not None:
            self._bar.update(self._task, advance=1, note=f"J {value:.4g}{self._note}")

    def epoch(self, entry: Mapping[str, Any]) -> None:
        """An epoch is done."""
        if "validation_accuracy" in entry:
            self._note = f", validation {100 * entry['validation_accuracy']:.2f} %"
        if self._writer is not None:
            for name, value in entry.items():
                if name != "epoch":
                    self._writer.add_scalar(name, value, int(entry["epoch"]))
