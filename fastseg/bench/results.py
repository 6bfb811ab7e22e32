"""The schema of all measurements, and the JSON-lines files that store them."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..version import __version__

IDENTITY = ("part", "where", "operator", "provider", "mode", "launch", "dtype", "layout", "shape", "metric")
VALUES = ("p20", "p50", "p80")
MACHINE = ("gpu", "driver", "torch", "triton", "fastseg", "commit")
FIELDS = (*IDENTITY, *VALUES, "note", *MACHINE, "time")
METRICS = ("status", "ms", "MiB", "GB/s", "of copy", "TFLOP/s", "of matmul", "us")

Record = dict[str, Any]
ROOT = Path(__file__).parents[2]


class Unable(Exception):
    """A provider cannot run a case; the message says why."""


def _output(*command: str) -> str | None:
    """The output of a command; None if it fails or does not exist."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _commit() -> str:
    """The commit of this checkout, with "+" if files are changed; without git, a digest of the package's sources."""
    if (ROOT / ".git").exists() and (commit := _output("git", "rev-parse", "--short=10", "HEAD")):
        return commit + ("+" if _output("git", "status", "--porcelain", "fastseg", "kernels") else "")
    digest = hashlib.sha1()
    for folder in ("fastseg", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return f"sha1:{digest.hexdigest()[:10]}"


def machine() -> Record:
    """The GPU (None on a CPU), its driver, and the versions of the software."""
    found: Record = dict.fromkeys(MACHINE)
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        drivers = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["driver"] = drivers.splitlines()[0] if drivers else None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["triton"] = importlib.metadata.version("triton")
    return found | {"torch": torch.__version__, "fastseg": __version__, "commit": _commit()}


def default_path(facts: Record) -> Path:
    """benchmarks/results/<gpu>-<date>.jsonl in the checkout, or in the current folder without a checkout."""
    gpu = re.sub(r"[^a-z0-9]+", "-", facts["gpu"].lower()).strip("-")
    root = ROOT if (ROOT / "benchmarks").is_dir() else Path()
    return root / "benchmarks" / "results" / f"{gpu}-{datetime.date.today().isoformat()}.jsonl"


class Recorder:
    """Collects records. With a path, each record is appended to the file at once.

    Each line is written in one call. An incomplete line of an interrupted run is removed first.
    """

    def __init__(self, path: Path | None, facts: Record, progress: Callable[[Record], None] | None = None) -> None:
        self.path, self.facts, self.progress, self.records = path, facts, progress, []
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                whole = path.read_bytes().rpartition(b"\n")
                os.truncate(path, len(whole[0]) + len(whole[1]))

    def add(self, metric: str, values: tuple[Any, Any, Any] = (None,) * 3, note: str = "", **identity: str) -> None:
        """Add one record. identity: the remaining fields of IDENTITY."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        made = identity | {"metric": metric, **dict(zip(VALUES, values, strict=True)), "note": note}
        record = checked(made | self.facts | {"time": now})
        self.records.append(record)
        if self.path is not None:
            with self.path.open("ab", buffering=0) as file:
                file.write(json.dumps(record).encode() + b"\n")
        if self.progress is not None:
            self.progress(record)

    @contextlib.contextmanager
    def shown(self, **identity: str) -> Iterator[None]:
        """Turn an exception of the block into a record, so that a provider that fails is reported and not dropped."""
        try:
            yield
        except Unable as error:
            self.add("status", note=f"unable: {error}", **identity)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()  # has no effect on a CPU
            self.add("status", note="out of memory", **identity)
        except Exception as error:  # compilers and other libraries may raise anything
            lines = str(error).strip().splitlines() or [""]
            self.add("status", note=f"unable: {type(error).__name__}: {lines[0][:300]}", **identity)


def checked(record: Record) -> Record:
    """The record with its fields in order. Raises ValueError if it does not match the schema."""
    if not isinstance(record, dict) or set(record) != set(FIELDS):
        names = sorted(set(record) ^ set(FIELDS)) if isinstance(record, dict) else "all"
        raise ValueError(f"not a benchmark record: fields missing or unknown: {names}")
    if record["metric"] not in METRICS:
        raise ValueError(f"not a benchmark record: its metric is {record['metric']!r}")
    numbers = all(type(record[key]) in (int, float) for key in VALUES)
    if not numbers and (record["metric"] != "status" or any(record[key] is not None for key in VALUES)):
        raise ValueError(f"not a benchmark record: {record['metric']} is {[record[key] for key in VALUES]}")
    return {key: record[key] for key in FIELDS}


def read(paths: Iterable[str | Path]) -> list[Record]:
    """All records of the files, in order. Of several records of the same measurement only the last is kept.

    An incomplete last line of an interrupted run is skipped. Raises ValueError for any other line that is not a record.
    """
    found: dict[tuple[Any, ...], Record] = {}
    for path in paths:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines[:-1], 1):
            try:
                record = checked(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            key = (record["gpu"], *(record[name] for name in IDENTITY))
            found.pop(key, None)
            found[key] = record
    if not found:
        raise ValueError(f"no record in {', '.join(map(str, paths))}")
    return list(found.values())
