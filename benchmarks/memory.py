"""Peak memory and time of a resized cross-entropy on the CPU by number of classes, for torch and fastseg.

    python3 benchmarks/memory.py --out benchmarks/results/memory-cpu.json --png docs/images/memory.png

Forward and backward of logits (2, C, 64, 64) resized to 512 x 512. Both run in this process, alternately. Peak memory
is the maximum that torch's CPU allocator has allocated beyond the memory allocated before the call, measured by
torch.profiler. The time is the minimum of --repeat calls.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import fastseg

CLASSES = (2, 11, 19, 21, 60, 100, 150)
SMALL, LARGE = (64, 64), (512, 512)


def peak(function: Callable[[], None]) -> int:
    """The largest number of bytes that a call has allocated at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def measure(classes: int, repeat: int) -> dict[str, Any]:
    """Peak memory and time of both for one number of classes."""
    logits = torch.randn(2, classes, *SMALL, requires_grad=True)
    target = torch.randint(classes, (2, *LARGE))

    def theirs() -> None:
        F.cross_entropy(F.interpolate(logits, LARGE, mode="bilinear"), target).backward()

    def ours() -> None:
        fastseg.functional.upsample_cross_entropy(logits, target).backward()

    row: dict[str, Any] = {"classes": classes}
    seconds: dict[str, list[float]] = {"torch": [], "fastseg": []}
    for _ in range(repeat + 1):  # the first is warm-up
        for name, function in (("torch", theirs), ("fastseg", ours)):
            logits.grad = None
            started = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - started)
    for name, function in (("torch", theirs), ("fastseg", ours)):
        logits.grad = None
        row[name] = {"peak_bytes": peak(function), "seconds": min(seconds[name][1:])}
    return row


def chart(report: dict[str, Any], path: Path) -> None:
    """Draw peak memory by number of classes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    classes = [row["classes"] for row in report["rows"]]
    for name, label in (("torch", "torch: interpolate, then cross_entropy"), ("fastseg", "upsample_cross_entropy")):
        axes.plot(classes, [row[name]["peak_bytes"] / 1e6 for row in report["rows"]], marker="o", label=label)
    axes.set_yscale("log")
    axes.set_xlabel("classes")
    axes.set_ylabel("peak memory, MB")
    axes.set_title(f"2 x C x 64 x 64 to 512 x 512, float32, forward and backward\n{report['device']}", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results to this file, as JSON")
    parser.add_argument("--png", type=Path, help="write a chart to this file")
    parser.add_argument("--repeat", type=int, default=3, help="timed calls per size (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default: %(default)s)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    report = {
        "device": f"CPU, {platform.machine()}, {args.threads} thread{'s' * (args.threads > 1)}",
        "torch": torch.__version__,
        "fastseg": fastseg.__version__,
        "rows": [measure(classes, args.repeat) for classes in CLASSES],
    }
    for row in report["rows"]:
        (our_peak, our_time), (their_peak, their_time) = (row[name].values() for name in ("fastseg", "torch"))
        print(
            f"{row['classes']:4} classes: peak {our_peak / 1e6:6.1f} MB of torch's {their_peak / 1e6:6.1f}, "
            f"time {our_time:6.3f} s of torch's {their_time:6.3f}"
        )
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    if args.png:
        chart(report, args.png)


if __name__ == "__main__":
    main()
