"""pytest-benchmark suite on the cases of `fastseg bench`: python -m pytest benchmarks"""

import pytest
import torch

from fastseg.bench.shapes import sizes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = list(sizes(DEVICE, "bfloat16" if DEVICE == "cuda" else "float32", "channels_last"))


@pytest.mark.parametrize("provider", ["theirs", "ours"], ids=["torch", "fastseg"])
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operator} {case.size}")
def test_operator(benchmark, case, mode, provider):
    call = case.step(getattr(case, provider), mode != "forward")

    def timed():
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case.operator} {case.size} {mode}"
    benchmark(timed)
