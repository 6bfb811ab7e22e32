"""The records of a run, in files: metrics.jsonl always, a table or TensorBoard's files on request."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from ..atomic_write import atomic_write

METRICS_FILE, TABLE_FILE, TENSORBOARD_FOLDER = "metrics.jsonl", "metrics.csv", "tensorboard"
FORMATS = ("csv", "tensorboard")
COLUMNS = ("step", "loss", "lr", "miou")
MISSING_TENSORBOARD = 'log tensorboard needs TensorBoard: pip install "fastseg-kernels[tensorboard]"'

Record = dict[str, Any]
"""A line of metrics.jsonl: "step", "loss" (mean since the previous record, or None if only ignored pixels were seen),
"lr", and "miou" after a validation."""


class RunLog:
    """The records of one run.

    Args:
        folder: the folder of the run.
        formats: a subset of FORMATS.

    Attributes:
        history: the records so far.

    Raises:
        ImportError: TensorBoard is wanted and not installed.
    """

    def __init__(self, folder: Path, formats: tuple[str, ...] = ()) -> None:
        self.folder, self.formats = folder, formats
        self.history: list[Record] = []
        self._writer: Any = None
        if "tensorboard" in formats:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(MISSING_TENSORBOARD) from error
            self._open = SummaryWriter

    def append(self, record: Record) -> None:
        """Write a record to every file."""
        self.history.append(record)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if "csv" in self.formats:
            path = self.folder / TABLE_FILE
            is_new = not path.exists()
            with path.open("a", encoding="utf-8", newline="") as file:
                table = csv.DictWriter(file, COLUMNS)
                if is_new:
                    table.writeheader()
                table.writerow(record)
        if "tensorboard" in self.formats:
            if self._writer is None:  # records of a run that was stopped and went on from an earlier step are hidden
                self._writer = self._open(str(self.folder / TENSORBOARD_FOLDER), purge_step=record["step"])
            for name in COLUMNS[1:]:
                if record.get(name) is not None:
                    self._writer.add_scalar(name, record[name], record["step"])
            self._writer.flush()

    def restore(self, source: Path, step: int) -> None:
        """Continue with the records up to `step` of the run in the folder `source`."""
        self.history = _read_records(source / METRICS_FILE, step)
        with atomic_write(self.folder / METRICS_FILE) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in self.history), encoding="utf-8")
        if "csv" in self.formats:
            with (
                atomic_write(self.folder / TABLE_FILE) as temporary,
                temporary.open("w", encoding="utf-8", newline="") as file,
            ):
                table = csv.DictWriter(file, COLUMNS)
                table.writeheader()
                table.writerows(self.history)

    def clear(self) -> None:
        """Remove the files of an earlier run that left no checkpoint."""
        for name in (METRICS_FILE, TABLE_FILE):
            (self.folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _read_records(path: Path, step: int) -> list[Record]:
    """The records up to `step` in a metrics.jsonl; an empty list if there is no such file."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # a run that was killed may leave an incomplete line
            break
        if not (isinstance(record, dict) and record.keys() >= {"step", "loss", "lr"}) or record["step"] > step:
            break
        records.append(record)
    return records
