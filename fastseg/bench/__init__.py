"""`fastseg bench`: time the operators beside torch's, on the GPU if there is one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

import torch

from .. import cases, dispatch, terminal, verify
from .timing import measure

__all__ = ["configure", "main"]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Time each operator, forward and forward with backward, beside torch's own. A GPU is needed for times of the "
        "kernels; without one, what is timed is the path that fastseg takes on a CPU, which is torch."
    )
    parser.epilog = "examples:\n  fastseg bench\n  fastseg bench --dtype float32 --layout nchw --json"
    parser.add_argument("--dtype", choices=list(cases.DTYPES), help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--layout", choices=list(cases.LAYOUTS), default="channels_last")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


def sizes(device: str, dtype: str, layout: str) -> Iterator[cases.Case]:
    """The operators at sizes of SegNet and a U-Net: batch 8 at 360x480 on a GPU, one image at a quarter on a CPU."""
    n, h, w = (8, 360, 480) if device == "cuda" else (1, 90, 120)
    at = cases.Placement(cases.DTYPES[dtype], cases.LAYOUTS[layout], device)
    yield from cases.max_pool2d(at, (n, 64, h, w))
    yield from cases.max_unpool2d(at, (n, 64, h, w))
    yield from cases.conv_transpose2d(at, (n, 64, h // 2, w // 2), 32, 2, 2)
    yield from cases.cross_entropy(at, (n, 11, h, w))


def rows(device: str, dtype: str, layout: str) -> list[dict[str, Any]]:
    """Times of every case; a case whose result is wrong gets none, and says so."""
    found = []
    for case in sizes(device, dtype, layout):
        inputs = list(case.inputs.values())
        comparisons = verify.compare(case.ours, case.theirs, inputs, poison=device == "cuda")
        right = all(c.passed for c in comparisons)
        for mode in ("forward", "forward+backward") if right else ("forward",):
            row: dict[str, Any] = {"operator": case.operator, "size": case.size, "mode": mode, "right": right}
            if right:
                for provider, function in (("torch", case.theirs), ("fastseg", case.ours)):
                    timing = measure(case.step(function, mode != "forward"), device)
                    row[provider] = {"p20": timing.p20, "p50": timing.p50, "p80": timing.p80, "peak": timing.peak_bytes}
            found.append(row)
    return found


def main(args: argparse.Namespace) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = args.dtype or ("bfloat16" if device == "cuda" else "float32")
    torch.backends.cudnn.benchmark = True
    found = rows(device, dtype, args.layout)
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    if args.json:
        print(json.dumps({"device": where, "dtype": dtype, "layout": args.layout, "rows": found}))
        return 0 if all(row["right"] for row in found) else 1
    from rich.table import Table

    table = Table(title=f"milliseconds, median (20 % to 80 %), {where}, {dtype}, {args.layout}")
    for column in ("operator", "size", "mode", "torch", "fastseg", "speed-up"):
        table.add_column(column, justify="left" if column in ("operator", "size", "mode") else "right")
    for row in found:
        if row["right"]:
            cells = [f"{row[p]['p50']:.3f} ({row[p]['p20']:.3f} to {row[p]['p80']:.3f})" for p in ("torch", "fastseg")]
            cells.append(f"{row['torch']['p50'] / row['fastseg']['p50']:.2f}")
        else:
            cells = ["", "[red]WRONG RESULT", ""]
        table.add_row(row["operator"], row["size"], row["mode"], *cells)
    console = terminal.console()
    console.print(table)
    if device == "cpu":
        console.print(
            "Times of the kernels need a GPU: not measured here. Above, fastseg on a CPU takes torch's own functions "
            f"(backend {dispatch.get_backend()!r}); the offsets go through the torch reference."
        )
    return 0 if all(row["right"] for row in found) else 1
