"""Timing: medians and quantiles, with cold caches on a GPU and by wall time on a CPU; peak rates of a device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

L2_BYTES = 256 * 2**20  # larger than any GPU's L2 cache; written before each run to evict its inputs
QUANTILES = (0.2, 0.5, 0.8)
LEAST_CALLS = 5


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call (20th, 50th, 80th percentile) and, on a GPU, peak bytes beyond those allocated before."""

    p20: float
    p50: float
    p80: float
    peak_bytes: int | None


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile, with linear interpolation."""
    return tuple(torch.tensor(values, dtype=torch.float64).quantile(torch.tensor(QUANTILES).double()).tolist())


def measure(function: Callable[[], object], device: str, seconds: float = 0.3, warmup: int = 3) -> Timing:
    """Time `function`, which takes no arguments, for about `seconds` and at least five calls."""
    for _ in range(warmup):
        function()
    times, peak = (_gpu_times if device == "cuda" else _cpu_times)(function, seconds)
    return Timing(*quantiles(times), peak)


def _cpu_times(function: Callable[[], object], seconds: float) -> tuple[list[float], None]:
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < LEAST_CALLS or time.perf_counter() < end:
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
    while len(times) < LEAST_CALLS or time.perf_counter() < end:
        flush.zero_()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return times, torch.cuda.max_memory_allocated() - standing


def captured(function: Callable[[], Any]) -> Callable[[], None]:
    """A function that replays the GPU work of `function` from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # torch's notes on CUDA graphs require warm-up on a side stream
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = function()

    def replay(kept: Any = kept) -> None:  # keeps the results alive, which the graph writes to
        graph.replay()

    return replay


def host_overhead(
    function: Callable[[], object], device: str, batches: int = 30, calls: int = 20
) -> tuple[float, float, float]:
    """Microseconds of host time per call, as quantiles over batches of calls. Does not wait for the GPU."""
    for _ in range(calls):
        function()
    values = []
    for _ in range(batches):
        if device == "cuda":
            torch.cuda.synchronize()  # empty the queue, so that no call waits for room in it
        start = time.perf_counter()
        for _ in range(calls):
            function()
        values.append((time.perf_counter() - start) * 1e6 / calls)
    if device == "cuda":
        torch.cuda.synchronize()
    return quantiles(values)


Rates = tuple[float, float, float]  # p20, p50, p80


def copy_rates(device: str) -> Rates:
    """GB/s of a copy of 1 GiB (16 MiB on a CPU), read and written bytes together."""
    size = 2**30 if device == "cuda" else 2**24
    source = torch.randint(127, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _rates(measure(lambda: target.copy_(source), device), 2 * size / 1e6)


def matmul_rates(device: str, dtype: torch.dtype) -> Rates:
    """TFLOP/s of the product of random 8192 x 8192 matrices (512 x 512 on a CPU)."""
    side = 8192 if device == "cuda" else 512
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return _rates(measure(lambda: torch.mm(a, b, out=out), device), 2 * side**3 / 1e9)


def _rates(timing: Timing, amount: float) -> Rates:
    return amount / timing.p80, amount / timing.p50, amount / timing.p20
