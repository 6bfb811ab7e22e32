"""`fastseg bench`: time operators and networks and compare with torch's, on the GPU if there is one."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from ..bench import networks, regressions, report, results
from ..bench.run import PARTS, BenchOptions, measure_all
from ..verification import cases
from . import terminal
from .options import add_json

CPU_NOTE = (
    "Times of the Triton and CUDA C++ kernels need a GPU: not measured here. Above, one thread of a CPU, where fastseg "
    "takes its CPU kernels for supported calls and falls back to PyTorch for the others."
)


def _add_run_options(parser: argparse.ArgumentParser, subcommand: bool) -> None:
    """Add the options of `run`. Those of the subcommand have no defaults, which would override options before it."""

    def add(*names: str, default: Any = None, **options: Any) -> None:
        parser.add_argument(*names, default=argparse.SUPPRESS if subcommand else default, **options)

    add("--op", action="append", help="only operators whose name starts with this (may be repeated)")
    names = [network.name for network in networks.NETWORKS]
    add("--network", action="append", choices=names, help="only this network (may be repeated)")
    add("--part", action="append", choices=PARTS, help="only this part (default: all on a GPU, operators on a CPU)")
    add("--dtype", choices=list(cases.DTYPES), help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--layout", choices=list(cases.LAYOUTS), default="channels_last")
    add("--quick", action="store_true", default=False, help="few small cases; always so on a CPU")
    add(
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile too (default: on a GPU, unless --quick)"
    )
    add("--seconds", type=float, default=float("inf"), help="start no further case after this many seconds")
    add("--out", type=Path, metavar="FILE",
        help="append the results here (default: benchmarks/results/<gpu>-<date>.jsonl; none on a CPU)")  # fmt: skip
    add("--json", action="store_true", default=False, help="print one JSON object on standard output")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastseg bench` and its actions."""
    parser.description = (
        "Time each operator and whole networks, and compare with torch, torch.compile and other libraries. Each is "
        "checked first; a wrong result, an unsupported case and lack of memory are shown in place of a time. Times of "
        "the Triton and CUDA C++ kernels need a GPU; without one, what fastseg does on a CPU is timed."
    )
    parser.epilog = (
        "examples:\n  fastseg bench\n  fastseg bench --part operators --op max_unpool2d --dtype float32 --layout nchw\n"
        "  fastseg bench report benchmarks/results/*.jsonl --out report\n"
        "  fastseg bench compare old.jsonl new.jsonl --fail-above 5%"
    )
    _add_run_options(parser, subcommand=False)
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    run = actions.add_parser("run", help="measure (the default ACTION)")
    _add_run_options(run, subcommand=True)
    tables = actions.add_parser("report", help="markdown tables and plots from result files")
    tables.add_argument("files", nargs="+", type=Path, metavar="FILE")
    tables.add_argument("--out", type=Path, default=Path("report"), metavar="DIR", help="default: report")
    compare = actions.add_parser("compare", help="exit code 1 if fastseg became slower, larger or wrong")
    compare.add_argument("old", type=Path, metavar="OLD")
    compare.add_argument("new", type=Path, metavar="NEW")
    compare.add_argument("--fail-above", default="5%", metavar="SHARE", help="default: 5%%")
    for action in (tables, compare):
        add_json(action)
    for action in (run, tables, compare):
        action.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback")


def main(args: argparse.Namespace) -> int:
    """Run `fastseg bench`. Returns 0, or 1 for a wrong result or a regression."""
    return {"report": _report, "compare": _compare}.get(args.action, _run)(args)


def _report(args: argparse.Namespace) -> int:
    """Write tables and plots."""
    written = report.write(results.read(args.files), args.out)
    if args.json:
        terminal.print_json({"files": list(map(str, written))})
    else:
        print("wrote " + ", ".join(map(str, written)))
    return 0


def _compare(args: argparse.Namespace) -> int:
    """Print the changes between two result files. Returns 1 for a regression."""
    limit = regressions.fraction(args.fail_above)
    changes = regressions.find_changes(results.read([args.old]), results.read([args.new]), limit)
    failed = [change for change in changes if change.failed]
    if args.json:
        rows = [vars(change) | {"case": change.name} for change in changes]
        terminal.print_json({"fail above": limit, "passed": not failed, "rows": rows})
        return 1 if failed else 0
    console = terminal.console()
    console.print(regressions.table(changes, limit))
    missing = sum(change.verdict == "missing" for change in changes)
    console.print(f"{len(changes)} numbers: {len(failed)} regressions, {missing} not measured again")
    return 1 if failed else 0


# --- run -------------------------------------------------------------------------------------------------------------


def _progress(began: float) -> Callable[[results.Record], None]:
    """A function that prints a line on stderr for each time, and for each problem."""
    shown = set()

    def show(record: results.Record) -> None:
        problem = record["metric"] == "status" and record["note"] != "right"
        if problem and record["note"].startswith("unable"):  # once per provider
            problem = (record["provider"], record["note"]) not in shown
            shown.add((record["provider"], record["note"]))
        if record["metric"] in ("ms", "us") or problem:
            names = ("where", "operator", "shape", "provider", "mode", "launch")
            value = record["note"] if record["p50"] is None or record["note"] else f"{record['p50']:.4g}"
            unit = "" if record["metric"] == "status" else record["metric"]
            words = " ".join(record[name] for name in names if record[name])
            print(f"[{time.monotonic() - began:5.0f} s] {words}: {value} {unit}", file=sys.stderr, flush=True)

    return show


def _run(args: argparse.Namespace) -> int:
    """Measure. Returns 1 if a result of fastseg is wrong."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    if device == "cpu":
        torch.set_num_threads(1)  # if other processes use a core, threads wait for each other
    facts = results.machine()
    path = args.out or (results.default_path(facts) if device == "cuda" else None)
    recorder = results.Recorder(path, facts, _progress(time.monotonic()))
    options = BenchOptions(
        args.part, args.op, args.network, args.dtype, args.layout, args.quick, args.compile, args.seconds
    )
    measure_all(options, device, recorder)
    measured = [r for r in recorder.records if r["part"] != "ceilings"]
    if not measured:
        raise ValueError(f"no operator's name starts with {' or '.join(args.op or [])}")
    wrong = [r for r in measured if r["provider"].startswith("fastseg") and r["note"].startswith("wrong")]
    if args.json:
        terminal.print_json({"device": facts["gpu"] or "CPU", "machine": facts, "rows": recorder.records})
        return 1 if wrong else 0
    console = terminal.console()
    for part in PARTS:
        for table in _tables(recorder.records, part, facts):
            console.print(table)
    for r in wrong:
        console.print(
            f"WRONG RESULT {r['where']} {r['operator']} {r['shape']}: {r['provider']}: {r['note']}", markup=False
        )
    if device == "cpu":
        console.print(CPU_NOTE)
    if path is not None:
        console.print(f"appended to {path}")
    return 1 if wrong else 0


def _tables(records: list[results.Record], part: str, facts: results.Record) -> list[Table]:
    """The table of a part, in a list that is empty if nothing was measured."""
    found = report.Results(records, part)
    unit = "us" if part == "overhead" else "ms"
    if not found.cases:
        return []
    unable = {who for who in found.providers if not any(key[1:] == (who, unit) for key in found.values)}
    shown = [who for who in found.providers if who not in unable]
    table = Table(title=f"{part}: {unit}, median (20 % to 80 %), {facts['gpu'] or 'CPU'}, {found.cases[0][5]}, "
                  f"{found.cases[0][6]}", caption=_caption(records, part, unable))  # fmt: skip
    for column in ("where", "operator", "size", "mode", ""):
        table.add_column(column)
    for column in (*shown, "torch / fastseg"):
        table.add_column(column, justify="right")
    for case in found.cases:
        ratio = found.speed_up(case) if unit == "ms" else None
        cells = [found.cell(case, who, unit) for who in shown] + ["" if ratio is None else f"{ratio:.2f}"]
        table.add_row(*map(Text, [*case[:4], "" if case[4] == "eager" else case[4], *cells]))
    return [table]


def _caption(records: list[results.Record], part: str, unable: set[str]) -> str:
    """Why providers have no column."""
    notes = {r["provider"]: r["note"] for r in records if r["part"] == part and r["metric"] == "status"}
    return "; ".join(f"{who}: {notes[who]}" for who in sorted(unable) if who in notes)
