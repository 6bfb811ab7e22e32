"""Time of every function on the CPU under backend "auto", next to the same in PyTorch.

    python3 benchmarks/cpu.py --out benchmarks/results/cpu.json

Forward and backward in float32. Both run in this process, alternately; the time is the minimum of --repeat calls.
Compare the ratios, since other programs on the machine slow both. Without --op everything is timed.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastseg
from fastseg import functional as ours
from fastseg.models import SegNet
from fastseg.models.plain_segnet import PlainSegNet
from fastseg.verification import cases
from fastseg.verification.cases import Case, ConvTransposeSpec, Placement, PoolSpec

SIZES = [
    ((1, 64, 64), (512, 512)),
    ((2, 33, 41), (263, 321)),
]  # (N, H, W) of the logits, size of the labels
CLASSES = (1, 2, 4, 6, 8, 11, 14, 19, 24, 64)
MAPS = [(4, 32, 90, 120), (2, 64, 45, 61)]
CEIL = PoolSpec(ceil_mode=True)
BY_2 = ConvTransposeSpec(32, kernel=2, stride=2)
ODD = ConvTransposeSpec(32, kernel=3, stride=2, padding=1, output_padding=1)


class Pair(NamedTuple):
    """The same computation in fastseg and in torch."""

    name: str
    what: str
    fastseg: Callable[[], object]
    torch: Callable[[], object]


def _labels(classes: int, *shape: int, ignored: bool) -> Tensor:
    labels = torch.randint(classes, shape)
    return labels.masked_fill(torch.rand(shape) < 0.1, 255) if ignored else labels


def _both(name: str, what: str, mine: Callable[..., Any], theirs: Callable[..., Any], *inputs: Any) -> Pair:
    return _of_case(Case(name, what, mine, theirs, dict(enumerate(inputs))))


def _of_case(case: Case) -> Pair:
    return Pair(case.operator, case.size, case.step(case.ours, True), case.step(case.theirs, True))


def upsampled() -> Iterator[Pair]:
    """The loss of resized logits, and their argmax."""
    for (n, *small), large in SIZES:
        size = f"{small[0]}x{small[1]} to {large[0]}x{large[1]}"
        for mode in ("bilinear", "nearest"):
            for classes in CLASSES:
                for ignored in (False, True):
                    labels = _labels(classes, n, *large, ignored=ignored)

                    def theirs(x: Tensor, mode: str = mode, labels: Tensor = labels) -> Tensor:
                        return F.cross_entropy(F.interpolate(x, labels.shape[1:], mode=mode), labels, ignore_index=255)

                    def mine(x: Tensor, mode: str = mode, labels: Tensor = labels) -> Tensor:
                        return ours.upsample_cross_entropy(x, labels, mode=mode, ignore_index=255)

                    what = f"{n}x{classes}x{size} {mode}{' ignored' * ignored}"
                    yield _both("upsample_cross_entropy", what, mine, theirs, torch.randn(n, classes, *small))
        for classes in (2, 19, 64):
            yield _both(
                "upsample_argmax", f"{n}x{classes}x{size}", lambda x, large=large: ours.upsample_argmax(x, large),
                lambda x, large=large: F.interpolate(x, large, mode="bilinear").argmax(1).to(torch.uint8),
                torch.randn(n, classes, *small),
            )  # fmt: skip


def losses() -> Iterator[Pair]:
    """The other losses, and the confusion matrix."""
    at = Placement(torch.float32, torch.contiguous_format, "cpu")
    for classes in (2, 11, 19):
        for shape in ((2, classes, 180, 240), (3, classes, 61, 83)):
            logits, labels = torch.randn(shape), _labels(classes, shape[0], *shape[2:], ignored=True)
            yield from map(_of_case, cases.cross_entropy(at, shape))
            yield from map(_of_case, cases.dice_cross_entropy(at, shape))
            yield from map(_of_case, cases.linear_cross_entropy(at, (shape[0], 64, *shape[2:]), classes))
            yield from map(_of_case, cases.confusion_matrix(at, labels.shape, classes))

            def valid(x: Tensor, labels: Tensor) -> Tensor:
                return F.cross_entropy(x, labels, ignore_index=255, reduction="sum") / (labels != 255).sum()

            def squared(x: Tensor, labels: Tensor) -> Tensor:
                some = labels != 255
                loss = F.cross_entropy(x, labels, ignore_index=255, reduction="sum")
                return (loss + 1e-4 * (x.logsumexp(1).square() * some).sum()) / some.sum()

            for option, composed in (({"normalization": "valid"}, valid), ({"z_loss": 1e-4}, squared)):
                mine = lambda x, labels, option=option: ours.cross_entropy(x, labels, ignore_index=255, **option)  # noqa: E731
                words = " ".join([*map(str, shape), *option])
                yield _both("cross_entropy", words, mine, composed, logits, labels)


def layers() -> Iterator[Pair]:
    """Pooling, unpooling, batch norm and transposed convolutions."""
    for layout in cases.LAYOUTS.values():
        at = Placement(torch.float32, layout, "cpu")
        for shape in MAPS:
            for case in (
                *cases.max_pool2d(at, shape, CEIL), *cases.max_unpool2d(at, shape, CEIL),
                *cases.batch_norm_relu(at, shape), *cases.conv_transpose2d(at, shape, BY_2),
                *cases.conv_transpose2d(at, shape, ODD),
                *cases.conv_transpose2d_affine_relu(at, shape, BY_2),
            ):  # fmt: skip
                words = f"{case.size}{' channels_last' * (layout == torch.channels_last)}"
                theirs = case.eager if case.operator == "max_pool2d_with_offsets" else case.theirs
                yield Pair(case.operator, words, case.step(case.ours, True), case.step(theirs, True))


def _plain_segnet(network: SegNet, x: Tensor) -> Tensor:
    """SegNet's forward in torch's functions."""

    def blocks(x: Tensor, stage: torch.nn.Module) -> Tensor:
        for conv, norm in stage:
            x = F.conv2d(x, conv.weight, conv.bias, padding=1)
            running = (norm.running_mean, norm.running_var)
            x = F.relu(F.batch_norm(x, *running, norm.weight, norm.bias, True, norm.momentum, norm.eps), inplace=True)
        return x

    kept = []
    for stage in network.encoder:
        x = blocks(x, stage)
        size = x.shape[-2:]
        x, indices = F.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
        kept.append((indices, size))
    for stage in network.decoder:
        indices, size = kept.pop()
        x = blocks(F.max_unpool2d(x, indices, 2, output_size=size), stage)
    return network.classifier(x)


def networks() -> Iterator[Pair]:
    """Training steps of a network with torch's layers, and with fastseg's."""
    for size in ((180, 240), (90, 121)):
        x, labels = torch.randn(2, 3, *size), _labels(11, 2, *size, ignored=True)

        def step(network: Callable[[Tensor], Tensor], x: Tensor = x, labels: Tensor = labels) -> Callable[[], None]:
            return lambda: F.cross_entropy(network(x), labels, ignore_index=255).backward()

        plain = PlainSegNet()
        swapped = copy.deepcopy(plain)
        fastseg.swap(swapped)
        words = f"2x3x{size[0]}x{size[1]}"
        yield Pair("PlainSegNet, swapped", words, step(swapped), step(plain))
        segnet = SegNet(width=0.25)
        yield Pair("SegNet, width 0.25", words, step(segnet), step(partial(_plain_segnet, segnet)))


def timed(pair: Pair, repeat: int) -> dict[str, Any]:
    """A row of the results."""
    seconds: dict[str, list[float]] = {"fastseg": [], "torch": []}
    for turn in range(repeat + 1):
        for name in ("fastseg", "torch"):
            started = time.perf_counter()
            getattr(pair, name)()
            if turn:  # the first turn is warm-up
                seconds[name].append(time.perf_counter() - started)
    return {"function": pair.name, "case": pair.what} | {
        f"{name} ms": round(1e3 * min(took), 3) for name, took in seconds.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results to this file, as JSON")
    parser.add_argument("--op", action="append", help="only functions whose name starts with this (may be repeated)")
    parser.add_argument("--repeat", type=int, default=12, help="timed calls per function (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=[1, 2], nargs="+", help="torch's threads (default: 1, then 2)")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for group in (upsampled, losses, layers, networks):
            for pair in group():
                if args.op and not pair.name.startswith(tuple(args.op)):
                    continue
                row = {"threads": threads} | timed(pair, args.repeat)
                rows.append(row)
                ratio = row["fastseg ms"] / row["torch ms"]
                print(f"{ratio:5.2f} of {row['torch ms']:8.2f} ms  {threads}  {pair.name}  {pair.what}", flush=True)
    if args.out:
        report = {"device": f"CPU, {platform.machine()}", "torch": torch.__version__, "fastseg": fastseg.__version__}
        lines = ",\n".join(json.dumps(row) for row in rows)  # one row per line
        args.out.write_text(f'{json.dumps(report)[:-1]}, "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
