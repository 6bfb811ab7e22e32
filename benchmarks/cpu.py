"""Times on the CPU: torch eager, torch.compile and fastseg, interleaved in this process.

    python3 benchmarks/cpu.py                          # the table: adds what is missing to benchmarks/results/cpu.jsonl
    python3 benchmarks/cpu.py --part sizes             # every function from small maps to large ones, without compile
    python3 benchmarks/cpu.py --op cross_entropy --again --limit 200
    python3 benchmarks/cpu.py --quick --out quick.jsonl

One JSON object per line and row, written as soon as it is measured. A second run goes on where the first ended, then
measures again what was measured while other programs kept the cores busy, and keeps the quieter row.
benchmarks/cpu_report.py makes the table of docs/cpu.md and the chart. A row has, in milliseconds (least and median of
all turns):

  eager, compile, fastseg    whole calls, forward and backward, with the allocation of their results; fastseg under
                             the backend that FASTSEG_BACKEND sets, else "auto"
  kernels                    fastseg's kernels alone, called again on tensors that are already there
  copy                       a copy of 64 MiB, from which copy_gb_s, the copy bandwidth of the same turns, follows

With one thread all times are the thread's own CPU time, to which other programs add least; with more, time that passed.

floor_bytes are the tensors of the call (inputs, results and the gradients of both), each moved once. peak_bytes are
what a call has allocated at once. others is how many cores other processes used meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cpu_cases
import torch
from cpu_cases import Call, Job
from memory import peak

import fastseg
from fastseg.kernels.cpu import launch

COPIED = 2**26  # bytes, more than the caches hold
BUSY = 0.1  # cores that other processes may use before a row counts as measured on a busy machine
IDENTITY = ("part", "backend", "operator", "size", "layout", "threads", "torch", "fastseg")
OUT = Path(__file__).parent / "results" / "cpu.jsonl"
Row = dict[str, Any]


# --- measuring -------------------------------------------------------------------------------------------------------


class Others:
    """How many cores other processes use from the creation on, or None where /proc/stat does not tell."""

    def __init__(self) -> None:
        self.start, self.busy, self.own = time.perf_counter(), self._busy(), sum(os.times()[:4])

    @staticmethod
    def _busy() -> float | None:
        try:
            user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        except (OSError, ValueError):
            return None
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")

    def cores(self) -> float | None:
        now = self._busy()
        if now is None or self.busy is None:
            return None
        elapsed, own = time.perf_counter() - self.start, sum(os.times()[:4]) - self.own
        return round(max(0.0, now - self.busy - own) / elapsed, 3)


def interleaved(calls: dict[str, Call], seconds: float, least: int = 5) -> dict[str, list[float]]:
    """Milliseconds of each call, turn by turn for about `seconds`, after two turns of warm-up."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    took: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-2, 10**6):
        if turn == 0:
            end = time.perf_counter() + seconds
        elif turn >= least and time.perf_counter() > end:
            break
        for name, call in calls.items():
            start = clock()
            call()
            if turn >= 0:
                took[name].append(1e3 * (clock() - start))
    return took


def kernels_alone(call: Call) -> Call | None:
    """The kernels of `call` on the tensors that it used; None if it calls none."""
    call()  # whatever is compiled or counted once
    with launch.recording() as calls:
        call()
    if not calls:
        return None

    def replay() -> None:
        for kernel in calls:
            kernel()

    return replay


def measure(job: Job, compiled: bool, whole: bool, seconds: float) -> Row:
    """The measured fields of a row. compiled: with torch.compile. whole: with kernels alone and peak memory."""
    source = torch.ones(COPIED // 4)
    target = torch.empty_like(source)
    calls: dict[str, Call] = {"copy": lambda: target.copy_(source), "eager": job.eager, "fastseg": job.fastseg}
    if compiled and job.compiled is not None:
        torch.compiler.reset()
        calls["compile"] = job.compiled()
        calls["compile"]()  # here, so that the compiler's processes are not counted as other programs
    if (alone := kernels_alone(job.fastseg)) is not None and whole:
        calls["kernels"] = alone
    others = Others()
    took = interleaved(calls, seconds)
    cores = others.cores()
    least = {name: round(min(times), 4) for name, times in took.items()}
    row: Row = {
        "ms": least, "median_ms": {name: round(statistics.median(times), 4) for name, times in took.items()},
        "turns": len(took["eager"]), "copy_gb_s": round(2 * COPIED / least.pop("copy") / 1e6, 2),
        "floor_bytes": job.floor, "others": cores, "kernels_run": alone is not None,
    }  # fmt: skip
    if whole:
        row["peak_bytes"] = {name: peak(calls[name]) for name in ("eager", "compile", "fastseg") if name in calls}
    return row


# --- results ---------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[tuple[Any, ...], Row]:
    """The rows of a file by identity; of several the last counts. A line that was cut off is left out."""
    rows: dict[tuple[Any, ...], Row] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows.pop(identity(row), None)
        rows[identity(row)] = row
    return rows


def identity(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in IDENTITY)


def is_quiet(row: Row) -> bool:
    return row["others"] is not None and row["others"] <= BUSY


def quieter(row: Row, before: Row) -> bool:
    """Whether other processes used less while the row was measured."""
    return before["others"] is None or (row["others"] is not None and row["others"] < before["others"])


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def described(row: Row) -> str:
    """A row in one line."""
    ms = row["ms"]
    ratios = [f"{ms[name] / ms['fastseg']:5.2f}x {name}" for name in ("eager", "compile") if name in ms]
    parts = [f"{ms['fastseg']:9.3f} ms", *ratios]
    if row["floor_bytes"]:
        parts.append(f"{ms['fastseg'] / (1e-6 * row['floor_bytes'] / row['copy_gb_s']):5.1f} x floor")
    busy = "" if is_quiet(row) else f"  (NOT QUIET: other processes use {row['others']} cores)"
    name = f"{row['operator']} {row['size']} {row['layout']}"
    return f"{', '.join(parts)}  {row['threads']} thread{'s' * (row['threads'] > 1)}  {name}{busy}"


def jobs(part: str, threads: Sequence[int], quick: bool) -> Iterator[tuple[int, Job]]:
    for count in threads:
        torch.set_num_threads(count)
        for layout in ("nchw", "channels_last"):
            torch.manual_seed(0)
            for job in (cpu_cases.table if part == "table" else cpu_cases.sizes)(layout, quick):
                yield count, job


def wanted(job: Job, prefixes: Iterable[str] | None) -> bool:
    return prefixes is None or job.operator.startswith(tuple(prefixes))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--part", choices=("table", "sizes"), default="table", help="what to measure (default: %(default)s)")
    add("--op", action="append", help="only operators whose name starts with this (may be repeated)")
    add("--threads", type=int, default=[1, 2], nargs="+", help="torch's threads (default: 1, then 2)")
    add("--seconds", type=float, default=3.0, help="for each row (default: %(default)s)")
    add("--limit", type=float, help="begin no row after this many seconds; a later run goes on")
    add("--again", action="store_true", help="measure again what the file has already")
    add("--quick", action="store_true", help="small sizes, few turns: to see that it runs")
    add("--compile-threads", type=int, default=[1], nargs="*",
        help="the numbers of threads with which torch.compile is timed too (default: 1)")  # fmt: skip
    add("--out", type=Path, default=OUT, help="the file of the results (default: benchmarks/results/cpu.jsonl)")
    add("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_args(arguments)
    args.seconds = 0.1 if args.quick else args.seconds
    started = time.perf_counter()
    about = {
        "backend": fastseg.get_backend(), "torch": torch.__version__, "fastseg": fastseg.__version__,
        "processor": processor(), "cores": os.cpu_count(),
    }  # fmt: skip
    found = read(args.out)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    left = 0
    for turn in ("missing",) if args.again else ("missing", "busy"):
        for threads, job in jobs(args.part, args.threads, args.quick):
            if not wanted(job, args.op):
                continue
            key: Row = {"part": args.part, "operator": job.operator, "size": job.size, "layout": job.layout}
            key |= {"threads": threads} | about
            before = None if args.again else found.get(identity(key))
            if (before is not None) == (turn == "missing") or (before is not None and is_quiet(before)):
                continue
            if args.limit is not None and time.perf_counter() - started > args.limit:
                left += 1
                continue
            whole = args.part == "table"
            row = key | measure(job, whole and threads in args.compile_threads, whole, args.seconds)
            if before is not None and not quieter(row, before):
                print(f"kept the earlier row: {described(before)}", file=sys.stderr)
                continue
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row) if args.json else described(row), flush=True)
    if left:
        print(f"{left} rows are left: run it again", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
