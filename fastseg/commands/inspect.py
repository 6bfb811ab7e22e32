"""`fastseg inspect`: bytes moved and compiled code, exact on any machine, without a GPU."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .. import dispatch
from ..verification import cases
from . import terminal
from .options import add_json

BANDWIDTH = 3.0  # TB/s: the copy bandwidth of an H100


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastseg inspect`."""
    parser.description = (
        "Instruments that need no GPU. traffic: run the kernels in Triton's interpreter and count the bytes and "
        "32-byte sectors that they move, compared with the floor (the fewest possible), torch eager and torch.compile. "
        "codegen: compile the kernels for GPUs that this machine need not have, and read registers, spills, access "
        "widths and tensor-core use from the machine code."
    )
    parser.epilog = (
        "examples:\n  fastseg inspect traffic --op max_unpool2d --png traffic.png\n  fastseg inspect codegen --json\n"
        "  fastseg inspect codegen --sass max_unpool2d_fwd_kernel"
    )
    parser.add_argument("instrument", choices=["traffic", "codegen"])
    parser.add_argument("--op", action="append", help="only operators whose name starts with this (may be repeated)")
    parser.add_argument("--dtype", choices=list(cases.DTYPES), default="bfloat16")
    parser.add_argument("--layout", choices=list(cases.LAYOUTS), help="default: both")
    add_json(parser)
    traffic = parser.add_argument_group("traffic")
    traffic.add_argument("--bandwidth", type=float, help=f"TB/s of the time model (default: {BANDWIDTH:g})")
    traffic.add_argument("--png", type=Path, help="write a bar chart to this file")
    traffic.add_argument(
        "--compile", action="store_true", default=None,
        help="also what torch.compile's kernels for a GPU move; about 3 s more per case",
    )  # fmt: skip
    codegen = parser.add_argument_group("codegen")
    codegen.add_argument(
        "--sm", type=int, action="append", choices=[80, 86, 89, 90, 100, 120], help="default: 80, 90 and 100"
    )
    codegen.add_argument("--first", action="store_true", default=None, help="one configuration per kernel and layout")
    codegen.add_argument("--sass", metavar="KERNEL", help="print the disassembly of this kernel and stop")
    codegen.add_argument("--ptx", metavar="KERNEL", help="print the PTX of this kernel and stop")


def main(args: argparse.Namespace) -> int:
    """Run `fastseg inspect`. Returns 0."""
    others = ("sm", "first", "sass", "ptx") if args.instrument == "traffic" else ("png", "bandwidth", "compile")
    for name in others:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} is not an option of {args.instrument}")
    if args.instrument == "traffic":
        args.bandwidth = BANDWIDTH if args.bandwidth is None else args.bandwidth
        if not args.bandwidth > 0:
            raise ValueError(f"--bandwidth must be above 0 TB/s, but is {args.bandwidth}")
        dispatch.interpret_kernels()
        from ..inspect import traffic_report

        return _show(traffic_report, args)
    if dispatch.interpreted():
        raise ValueError("codegen compiles the kernels, so TRITON_INTERPRET must not be set")
    from ..inspect import codegen_report

    for form in ("sass", "ptx"):
        if (kernel := getattr(args, form)) is not None:
            print(codegen_report.source(args, kernel, form))
            return 0
    return _show(codegen_report, args)


def _show(report: Any, args: argparse.Namespace) -> int:
    """Print and draw what a report module of fastseg.inspect finds. Returns 0."""
    rows = report.rows(args)
    if not rows:
        raise ValueError(f"no operator's name starts with {' or '.join(args.op)}")
    if args.json:
        print(json.dumps({"instrument": args.instrument, "dtype": args.dtype, "rows": rows}))
    else:
        console = terminal.console()
        console.print(report.table(rows, args))
        console.print(report.NOTE)
    if args.png is not None:
        report.chart(rows, args)
    return 0
