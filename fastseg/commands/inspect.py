"""`fastseg inspect`: bytes moved and compiled code, exact on any machine, without a GPU."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import dispatch
from ..inspect.selection import Selection
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
    layouts = (args.layout,) if args.layout else tuple(cases.LAYOUTS)
    selection = Selection(args.dtype, layouts, tuple(args.op or ()))
    return _traffic(args, selection) if args.instrument == "traffic" else _codegen(args, selection)


def _traffic(args: argparse.Namespace, selection: Selection) -> int:
    """Count bytes, and show and draw them."""
    bandwidth = BANDWIDTH if args.bandwidth is None else args.bandwidth
    if not bandwidth > 0:
        raise ValueError(f"--bandwidth must be above 0 TB/s, but is {bandwidth}")
    dispatch.interpret_kernels()
    from ..inspect import traffic_report

    rows = _found(traffic_report.rows(selection, bandwidth, bool(args.compile)), args)
    _show(rows, args, lambda: traffic_report.table(rows, args.dtype, bandwidth), traffic_report.NOTE)
    if args.png is not None:
        traffic_report.chart(rows, args.dtype, args.png)
    return 0


def _codegen(args: argparse.Namespace, selection: Selection) -> int:
    """Compile kernels, and show facts of their machine code or the code of one of them."""
    if dispatch.interpreted():
        raise ValueError("codegen compiles the kernels, so TRITON_INTERPRET must not be set")
    from ..inspect import codegen_report

    for form in ("sass", "ptx"):
        if (kernel := getattr(args, form)) is not None:
            print(codegen_report.source(selection, (args.sm or [90])[0], kernel, form))
            return 0
    rows = _found(codegen_report.rows(selection, args.sm or codegen_report.SMS, bool(args.first)), args)
    _show(rows, args, lambda: codegen_report.table(rows, args.dtype), codegen_report.NOTE)
    return 0


def _found(rows: list[dict[str, Any]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows. Raises ValueError if there are none."""
    if not rows:
        raise ValueError(f"no operator's name starts with {' or '.join(args.op)}")
    return rows


def _show(rows: list[dict[str, Any]], args: argparse.Namespace, table: Callable[[], Any], note: str) -> None:
    """Print the rows as JSON, or as a table with a note."""
    if args.json:
        terminal.print_json({"instrument": args.instrument, "dtype": args.dtype, "rows": rows})
        return
    console = terminal.console()
    console.print(table())
    console.print(note)
