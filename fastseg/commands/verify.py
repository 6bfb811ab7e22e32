"""`fastseg verify`: every operator against torch in float64."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time

import torch

from .. import dispatch
from ..verification import cases
from ..verification.operators import SIZES, verify
from . import terminal


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Check every operator's kernels against torch in float64, forward and backward: on the GPU if there is one, "
        "else Triton's in its interpreter on the CPU. Exit code 1 if anything fails."
    )
    parser.epilog = "examples:\n  fastseg verify --quick\n  fastseg verify --op max_unpool2d --dtype bfloat16 --json"
    parser.add_argument("--op", action="append", choices=list(SIZES), help="only this operator (may be repeated)")
    parser.add_argument(
        "--dtype", action="append", choices=list(cases.DTYPES), help="only this dtype (may be repeated)"
    )
    parser.add_argument("--backend", choices=list(dispatch.NAMES), default="triton", help="whose kernels (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="one size of each operator, dtype and layout")
    parser.add_argument("--seed", type=int, help="of the random inputs (default: a fresh one, printed)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


def main(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.backend == "cuda" and device == "cpu":
        raise ValueError("--backend cuda needs a CUDA GPU, and torch finds none on this machine")
    if args.backend == "triton" and (lacking := dispatch.without_triton(torch.device(device))) is not None:
        raise ValueError(f"--backend triton cannot run: {lacking}")
    if device == "cpu":
        dispatch.interpret_kernels()
    seed = args.seed if args.seed is not None else torch.seed() % 2**31
    where = torch.cuda.get_device_name() if device == "cuda" else "the CPU, kernels interpreted"
    started, rows, uncovered = time.perf_counter(), [], 0
    console = terminal.console(stderr=args.json)
    runs = verify(args.op or list(SIZES), args.dtype or list(cases.DTYPES), args.quick, device, seed, args.backend)
    progress = Console(file=sys.stderr)
    interrupted = False
    try:
        for what, comparisons in track(
            runs, "verifying", console=progress, transient=True, disable=not progress.is_terminal
        ):
            if comparisons:
                rows.append((what, comparisons))
            else:
                uncovered += 1
    except KeyboardInterrupt:  # what is done is shown all the same
        interrupted = True
    failed = [(what, c) for what, comparisons in rows for c in comparisons if not c.passed]
    code = 130 if interrupted else 1 if failed else 0
    if args.json:
        runs = [{**what, "results": [c.as_dict() for c in cs]} for what, cs in rows]
        print(json.dumps({"device": where, "seed": seed, "passed": code == 0, "interrupted": interrupted, "cases": runs,
                          "backend": args.backend, "uncovered": uncovered}))  # fmt: skip
        return code
    table = Table(title=f"largest error against float64, on {where}, seed {seed}")
    for column in ("operator", "dtype", "layout", "cases", "fastseg", "torch", ""):
        table.add_column(column)
    for key, group in itertools.groupby(rows, lambda row: (row[0]["operator"], row[0]["dtype"], row[0]["layout"])):
        found = [comparisons for _, comparisons in group]
        flat = [c for comparisons in found for c in comparisons]
        table.add_row(
            *key, str(len(found)), f"{max(c.error for c in flat):.1e}", f"{max(c.torch_error for c in flat):.1e}",
            "ok" if all(c.passed for c in flat) else "[red]FAILED",
        )  # fmt: skip
    console.print(table)
    for what, c in failed:
        console.print(f"FAILED {what['case']} {what['dtype']} {what['layout']}: {c.tensor} is off by {c.error:.2e}, "
                      f"allowed {c.allowed:.2e}", markup=False)  # fmt: skip
    seconds = time.perf_counter() - started
    console.print(f"{len(rows)} cases, {len(failed)} failed results, {seconds:.0f} s")
    if uncovered:
        console.print(f"{uncovered} cases are not covered by the {dispatch.NAMES[args.backend]} kernels")
    if interrupted:
        console.print("interrupted: the other cases were not run")
    return code
