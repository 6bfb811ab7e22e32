"""Time and memory of a fully connected CRF on the CPU, beside brute force in torch.

    python3 benchmarks/crf.py --out benchmarks/results/crf-cpu.json

One message of the bilateral kernel (20 pixels, 3 levels) at 360x480 with 21 classes in float32, and mean field in ten
steps. Brute force computes the weights of one row of pixels at a time; it is timed on every 60th row and multiplied by
60. Memory is what the process takes beyond its inputs, from Linux' count of resident pages.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastseg
from fastseg.crf import CRFOptions, dense_crf
from fastseg.functional import mean_field_message

HEIGHT, WIDTH, CLASSES = 360, 480, 21
SIGMA, SIGMA_COLOR = 20.0, 3.0
EVERY = 60


def inputs() -> tuple[Tensor, Tensor]:
    """Random logits, and a picture of smooth colours."""
    torch.manual_seed(0)
    coarse = torch.rand(1, 3, 10, 14) * 255
    image = torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic").clamp(0, 255).to(torch.uint8)
    logits = torch.nn.functional.interpolate(torch.randn(1, CLASSES, 12, 16) * 2, (HEIGHT, WIDTH), mode="bilinear")
    return logits, image


def brute_force(values: Tensor, image: Tensor, radius: float | None) -> None:
    """The messages to every EVERY-th row in torch: a matrix of weights for each row."""
    colours, reach = image[0].float() / SIGMA_COLOR, HEIGHT if radius is None else int(radius * SIGMA)
    columns = torch.arange(WIDTH).float() / SIGMA
    for y in range(EVERY // 2, HEIGHT, EVERY):
        first, last = max(0, y - reach), min(HEIGHT, y + reach + 1)
        down = (torch.arange(first, last).float() - y) / SIGMA
        exponent = (down**2)[None, :, None] + ((columns[:, None] - columns) ** 2)[:, None, :]
        for channel in colours:
            exponent += (channel[y, :, None, None] - channel[first:last]) ** 2
        weight = exponent.mul_(-0.5).exp_().flatten(1)
        values[0, :, first:last].flatten(1) @ weight.T


CALLS: dict[str, tuple[Callable[[Tensor, Tensor], Any], int]] = {
    "brute force, all pixels": (lambda q, image: brute_force(q, image, None), EVERY),
    "brute force, radius 3": (lambda q, image: brute_force(q, image, 3.0), EVERY),
    "fastseg, radius 3": (lambda q, image: mean_field_message(q, image, SIGMA, SIGMA_COLOR), 1),
    "fastseg, sums of weights": (lambda q, image: mean_field_message(q[:, :1], image, SIGMA, SIGMA_COLOR), 1),
    "fastseg, ten steps, sigmas 3 and 20": (lambda q, image: dense_crf(q, image), 1),
    "fastseg, one step, sigmas 3 and 80": (
        lambda q, image: dense_crf(q, image, CRFOptions(bilateral=(10.0, 80.0, 13.0), steps=1)), 1,
    ),
}  # fmt: skip
"""What is measured, and by how many its time is multiplied."""


def resident(field: str) -> int:
    """A number of this process's /proc status in bytes: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(name: str) -> dict[str, Any]:
    """A row of the results."""
    call, factor = CALLS[name]
    logits, image = inputs()
    call(logits[:, :, :, :64].contiguous()[:, :, :64], image[:, :, :64, :64]) if factor == 1 else None  # builds kernels
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident
    started = time.perf_counter()
    call(logits, image)
    seconds = (time.perf_counter() - started) * factor
    return {"what": name, "seconds": round(seconds, 3), "peak_bytes": resident("VmHWM") - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results to this file, as JSON")
    args = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # a fresh process for each row
        rows = []
        for name in CALLS:
            rows.append(pool.apply(measure, (name,)))
            print(f"{rows[-1]['seconds']:9.2f} s  {rows[-1]['peak_bytes'] / 2**20:7.0f} MiB  {name}", flush=True)
    if args.out:
        report = {"device": f"CPU, {platform.machine()}", "threads": torch.get_num_threads(),
                  "torch": torch.__version__, "fastseg": fastseg.__version__}  # fmt: skip
        lines = ",\n".join(json.dumps(row) for row in rows)
        args.out.write_text(f'{json.dumps(report)[:-1]}, "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
