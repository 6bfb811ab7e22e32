"""The timing core: medians with quantiles, of cold caches on a GPU, of wall time on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

L2_BYTES = 256 * 2**20  # more than any GPU's L2: written between runs, so that none finds its inputs there


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call (20th, 50th and 80th percentile) and, on a GPU, peak bytes beyond what stood before."""

    p20: float
    p50: float
    p80: float
    peak_bytes: int | None


def measure(function: Callable[[], object], device: str, seconds: float = 0.3, warmup: int = 3) -> Timing:
    """Time `function`, which takes no arguments, for about `seconds` and at least five calls."""
    for _ in range(warmup):
        function()
    times, peak = (_gpu_times if device == "cuda" else _cpu_times)(function, seconds)
    p20, p50, p80 = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    return Timing(p20, p50, p80, peak)


def _cpu_times(function: Callable[[], object], seconds: float) -> tuple[list[float], None]:
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        times.append((time.perf_counter() - start) * 1e3)
    return times, None


def _gpu_times(function: Callable[[], object], seconds: float) -> tuple[list[float], int]:
    flush = torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    standing = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        flush.zero_()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return times, torch.cuda.max_memory_allocated() - standing
