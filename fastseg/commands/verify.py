"""`fastseg verify`: check every operator against torch in float64."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from .. import dispatch
from ..verification import cases
from ..verification.operators import SIZES, verify
from . import terminal
from .options import add_json


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastseg verify`."""
    parser.description = (
        "Check every operator's kernels against torch in float64, forward and backward: on the GPU if there is one, "
        "otherwise the Triton kernels in Triton's interpreter on the CPU. Exit code 1 if a check fails."
    )
    parser.epilog = "examples:\n  fastseg verify --quick\n  fastseg verify --op max_unpool2d --dtype bfloat16 --json"
    add = parser.add_argument
    add("--op", action="append", choices=list(SIZES), help="only this operator (may be repeated)")
    add("--dtype", action="append", choices=list(cases.DTYPES), help="only this dtype (may be repeated)")
    add("--backend", choices=list(dispatch.NAMES), default="triton", help="the kernels to check (default: %(default)s)")
    add("--quick", action="store_true", help="one size per operator, dtype and layout")
    add("--seed", type=int, help="seed of the random inputs (default: a new one, which is printed)")
    add_json(parser)


def main(args: argparse.Namespace) -> int:
    """Run `fastseg verify`. Returns 0, 1 if a check failed, or 130 after Ctrl-C."""
    device = "cuda" if torch.cuda.is_available() and args.backend != "cpu" else "cpu"
    if args.backend == "cuda" and device == "cpu":
        raise ValueError("--backend cuda needs a CUDA GPU, and torch finds none on this machine")
    reasons = {"triton": lambda: dispatch.without_triton(torch.device(device)), "cpu": dispatch.without_cpu_kernels}
    if args.backend in reasons and (reason := reasons[args.backend]()) is not None:
        raise ValueError(f"--backend {args.backend} cannot run: {reason}")
    interpreted = args.backend == "triton" and device == "cpu"
    if interpreted:
        dispatch.interpret_kernels()
    seed = args.seed if args.seed is not None else torch.seed() % 2**31
    where = torch.cuda.get_device_name() if device == "cuda" else "the CPU" + ", kernels interpreted" * interpreted
    started, rows, unsupported = time.perf_counter(), [], 0
    console = terminal.console(stderr=args.json)
    runs = verify(args.op or list(SIZES), args.dtype or list(cases.DTYPES), args.quick, device, seed, args.backend)
    progress = Console(file=sys.stderr)
    interrupted = False
    try:
        for case, comparisons in track(
            runs, "verifying", console=progress, transient=True, disable=not progress.is_terminal
        ):
            if comparisons:
                rows.append((case, comparisons))
            else:
                unsupported += 1
    except KeyboardInterrupt:  # the results so far are shown
        interrupted = True
    failed = [(case, c) for case, comparisons in rows for c in comparisons if not c.passed]
    code = 130 if interrupted else 1 if failed else 0
    if args.json:
        found = [{**case, "results": [c.as_dict() for c in comparisons]} for case, comparisons in rows]
        terminal.print_json({"device": where, "seed": seed, "passed": code == 0, "interrupted": interrupted,
                             "cases": found, "backend": args.backend, "uncovered": unsupported})  # fmt: skip
        return code
    console.print(error_table(rows, f"largest error against float64, on {where}, seed {seed}"))
    for case, c in failed:
        console.print(f"FAILED {case['case']} {numbers(case)} {case['layout']}: {c.tensor} is off by {c.error:.2e}, "
                      f"allowed {c.allowed:.2e}", markup=False)  # fmt: skip
    seconds = time.perf_counter() - started
    console.print(f"{len(rows)} cases, {len(failed)} failed results, {seconds:.0f} s")
    if unsupported:
        console.print(f"{unsupported} cases are not supported by the {dispatch.NAMES[args.backend]} kernels")
    if interrupted:
        console.print("interrupted: the other cases were not run")
    return code


def numbers(case: dict[str, str]) -> str:
    """The dtype of a case, and TF32 if its products are rounded to that."""
    return case["dtype"] + " as TF32" * (case["precision"] == "tf32")


def error_table(rows: list[tuple[dict[str, str], list[Any]]], title: str) -> Table:
    """A table with the largest error of each operator, dtype, precision and layout."""
    table = Table(title=title)
    for column in ("operator", "dtype", "layout", "cases", "fastseg", "torch", ""):
        table.add_column(column)
    groups: dict[tuple[str, str, str], list[list[Any]]] = {}
    for case, comparisons in rows:
        groups.setdefault((case["operator"], numbers(case), case["layout"]), []).append(comparisons)
    for key, found in groups.items():
        flat = [c for comparisons in found for c in comparisons]
        table.add_row(
            *key, str(len(found)), f"{max(c.error for c in flat):.1e}", f"{max(c.torch_error for c in flat):.1e}",
            "ok" if all(c.passed for c in flat) else "[red]FAILED",
        )  # fmt: skip
    return table
