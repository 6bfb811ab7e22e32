"""Compiles random calls of every operator: python tests/support/compile_sweep.py --seconds 300

It draws calls, records their launches, and compiles each new kernel for one generation of GPUs in a separate process,
since a failing compiler may end its process. A kernel fails if it does not compile or if it needs more shared memory
than the GPU has. Kernels that spill are reported. The exit code is 1 if a kernel failed.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastseg import dispatch
from fastseg.inspect.codegen import MULTIPROCESSORS, Launch, compile_for, record
from fastseg.kernels.launch import targeting
from fastseg.ops.operator import observing
from fastseg.verification import cases
from fastseg.verification.cases import Case, ConvTransposeSpec, LossSpec, Placement, PoolSpec, ResizeSpec

SIDES = [1, 2, 3, 5, 7, 8, 9, 16, 23, 24, 30, 32, 40, 45, 60, 61, 64, 90, 120, 128, 180, 240, 360]
CHANNELS = [1, 2, 3, 5, 7, 8, 11, 13, 16, 19, 21, 24, 32, 37, 40, 48, 64, 72, 96, 100, 128, 150, 200, 256, 512]
CLASSES = [1, 2, 3, 4, 7, 11, 19, 21, 59, 150, 171, 256]

Made = Iterator[Case]


def shuffled(draw: random.Random, at: Placement, n: int, h: int, w: int) -> Made:
    """Transposed convolution with kernel = stride."""
    stride = draw.choice([(1, 1), (2, 2), (2, 2), (4, 4), (1, 2), (2, 1), (1, 16), (8, 8), (16, 16), (4, 2), (3, 3)])
    make = draw.choice([cases.conv_transpose2d, cases.conv_transpose2d_affine_relu])
    return make(at, (n, draw.choice(CHANNELS), h, w), ConvTransposeSpec(draw.choice(CHANNELS), stride, stride))


def convolved(draw: random.Random, at: Placement, n: int, h: int, w: int) -> Made:
    """Any other transposed convolution."""
    c, k = draw.choice(CHANNELS), draw.choice(CHANNELS)
    kernel, stride = draw.choice([1, 2, 3, 4, 5, 7, 16]), draw.choice([1, 2, 2, 3, 4, 8])
    groups = draw.choice([g for g in (1, 1, 1, 2, c) if c % g == 0])
    if draw.random() < 0.2:
        h = w = 1
    extra, dilation = draw.randrange(min(stride, 2)), 1 if stride > 1 or kernel == 1 else draw.choice([1, 1, 2])
    widest = ((min(h, w) - 1) * stride + dilation * (kernel - 1)) // 2  # the largest padding with an output
    padding = min(draw.choice([0, 0, 1, 2]), kernel - 1, widest)
    make = draw.choice([cases.conv_transpose2d, cases.conv_transpose2d_affine_relu])
    conv = ConvTransposeSpec(max(1, k // groups) * groups, kernel, stride, padding, extra, groups, dilation)
    return make(at, (n, c, h, w), conv)


def pooled(draw: random.Random, at: Placement, n: int, h: int, w: int) -> Made:
    """Pooling, unpooling, batch norm with both, and unpooling with a convolution."""
    shape, ceil_mode = (n, draw.choice(CHANNELS), max(h, 6), max(w, 6)), draw.choice([True, False])
    kernel, stride = draw.choice([2, 2, 3, 4, 5]), draw.choice([None, 1, 2])
    padding, channels, bias = draw.choice([0, kernel // 2]), draw.choice(CHANNELS), draw.choice([True, False])
    return draw.choice([
        lambda: cases.max_pool2d(at, shape, PoolSpec(kernel, stride or kernel, padding, ceil_mode)),
        lambda: cases.max_unpool2d(at, shape, PoolSpec(kernel, kernel, 0, ceil_mode)),
        lambda: cases.batch_norm_relu(at, shape, min(kernel, 3), ceil_mode, bias),
        lambda: cases.max_unpool2d_conv2d(at, shape, channels, min(kernel, 3)),
    ])()  # fmt: skip


def losses(draw: random.Random, at: Placement, n: int, h: int, w: int) -> Made:
    """Losses, predictions and confusion matrices."""
    shape, classes = (n, draw.choice(CLASSES), max(h, 2), max(w, 2)), draw.choice(CLASSES)
    large = (draw.choice([2, 3, 4]) * shape[2], draw.choice([2, 4]) * shape[3])
    weighted, smoothed, probabilities = (draw.choice([True, False]) for _ in range(3))
    reduction, one_pass = draw.choice(["mean", "none"]), draw.choice([None, False])
    loss = LossSpec(-100 if probabilities else 255, weighted, reduction, 0.1 * smoothed, probabilities, one_pass)
    return draw.choice([
        lambda: cases.cross_entropy(at, shape, loss),
        lambda: cases.upsample_cross_entropy(at, shape, ResizeSpec(large, draw.choice(["bilinear", "nearest"]))),
        lambda: cases.linear_cross_entropy(at, shape, classes),
        lambda: cases.dice_cross_entropy(at, shape, 255),
        lambda: cases.upsample_argmax(at, shape, large),
        lambda: cases.confusion_matrix(at, (n, h, w), classes),
    ])()  # fmt: skip


FAMILIES: dict[str, Callable[..., Made]] = {
    "shuffled": shuffled, "convolved": convolved, "pooled": pooled, "losses": losses
}  # fmt: skip


def launched(draw: random.Random, family: str, sm: int) -> Iterator[tuple[str, Launch]]:
    """(the call, one of its launches) for each launch of a random call."""
    dtype = draw.choice(["bfloat16", "bfloat16", "float16", "float32"])
    layout = draw.choice(list(cases.LAYOUTS))
    at = Placement(cases.DTYPES[dtype], cases.LAYOUTS[layout], "meta")
    for case in FAMILIES[family](draw, at, draw.choice([1, 2, 8]), draw.choice(SIDES), draw.choice(SIDES)):
        with dispatch.backend("triton"), targeting(sm), observing(lambda operator, call: None):
            found = record(lambda case=case: case.step(case.ours, backward=True)())
        for launch in found:
            yield f"{case.operator} {case.size} {dtype} {layout} sm_{sm}", launch


def compiled(launch: Launch, sm: int) -> dict[str, Any]:
    """Compile a launch in a separate process: registers, spills and shared memory, or {"failed": ...}."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a failing compiler prints the whole module
        try:
            kernel = compile_for(launch, sm)
            facts = {"registers": kernel.resources["REG"], "spills": kernel.spills, "shared": kernel.shared}
        except Exception as error:
            facts = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        os.write(write, json.dumps(facts).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    facts = json.loads(said) if said else {"failed": "the compiler ended its process"}
    if facts.get("shared", 0) >= MULTIPROCESSORS[sm][0] * 1024:
        facts["failed"] = f"{facts['shared']} bytes of shared memory"
    return facts


def sweep(
    draw: random.Random, families: list[str], calls: int | None, deadline: float
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(call, kernel, result) of each new kernel."""
    seen = set()
    while (calls is None or calls > 0) and time.monotonic() < deadline:
        calls = None if calls is None else calls - 1
        sm = draw.choice([80, 89, 90, 90, 100, 120])
        for call, launch in launched(draw, draw.choice(families), sm):
            key = repr((launch.name, launch.signature, launch.constants, launch.divisible, launch.options, sm))
            if key not in seen:
                seen.add(key)
                yield call, launch.name, compiled(launch, sm)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=300.0, help="start no call later (default: %(default)s)")
    parser.add_argument("--calls", type=int, help="the most calls")
    parser.add_argument("--seed", type=int, default=random.randrange(2**31), help="default: random, printed")
    parser.add_argument("--family", action="append", choices=list(FAMILIES), help="may be repeated (default: all)")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    torch.manual_seed(args.seed)
    kernels = failed = spilled = 0
    found = sweep(random.Random(args.seed), args.family or list(FAMILIES), args.calls, time.monotonic() + args.seconds)
    for call, kernel, facts in found:
        kernels += 1
        failed += "failed" in facts
        spilled += facts.get("spills", 0) > 0
        if "failed" in facts or facts["spills"]:
            print("FAILED" if "failed" in facts else "spills", kernel, "of", call, facts, flush=True)
    print(f"{kernels} kernels, {failed} failed, {spilled} spill")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
