"""Where the commands print: tables, sentences, and the progress of a training run."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track

if TYPE_CHECKING:
    from ..training.logs import Record

PIPED_WIDTH = 200
LINES = 20
"""About how many lines a training run prints if the output is not a terminal."""


class PipeConsole(Console):
    """A console that goes on silently when its reader has seen enough, as `head` has.

    rich would end the program with the exit code 1, which says that a check failed.
    """

    def on_broken_pipe(self) -> None:
        """Print nothing more."""
        self.quiet = True
        silence()


def silence() -> None:
    """Send what is still to be printed nowhere, because nobody reads standard output any more."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_json(result: Any) -> None:
    """Print a result as one line of JSON on standard output."""
    try:
        print(json.dumps(result), flush=True)
    except BrokenPipeError:
        silence()


def console(stderr: bool = False) -> Console:
    """A console for tables, as wide as the terminal; wide enough for every table if the output is not a terminal."""
    made = PipeConsole(stderr=stderr, highlight=False)
    if not made.is_terminal:
        made.width = PIPED_WIDTH
    return made


def text_console(stderr: bool = False) -> Console:
    """A console for sentences with file names: no markup, no line breaks."""
    return PipeConsole(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True)


def bar(items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
    """Yield the items, with a progress bar on stderr if that is a terminal. `what`: what is done, in a word or two."""
    shown = console(stderr=True)
    return track(items, what, total, console=shown, transient=True, disable=not shown.is_terminal)


class TrainingProgress:
    """A context that shows step, loss, learning rate and mIoU of a training run on stderr.

    A progress bar on a terminal, otherwise about LINES lines. `show` is for :meth:`Trainer.run`'s `on_record`.
    """

    def __init__(self, steps: int, step: int) -> None:
        self.console = PipeConsole(stderr=True, highlight=False, soft_wrap=True)
        self.steps, self.printed, self.miou = steps, step, ""
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self.progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.progress.add_task("", total=steps, completed=step)

    def __enter__(self) -> TrainingProgress:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def show(self, record: Record) -> None:
        """Show a record of the run."""
        if "miou" in record:
            self.miou = f"  mIoU {record['miou']:.3f}"
        loss = "-" if record["loss"] is None else f"{record['loss']:.4f}"
        text = f"loss {loss}  lr {record['lr']:.2e}{self.miou}"
        self.progress.update(self.task, completed=record["step"], description=text)
        due = record["step"] - self.printed >= self.steps / LINES or "miou" in record or record["step"] == self.steps
        if due and not self.console.is_terminal:
            self.printed = record["step"]
            self.console.print(f"step {record['step']}/{self.steps}  {text}")
