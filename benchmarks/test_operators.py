"""pytest-benchmark suite on the cases of `fastseg bench`: python -m pytest benchmarks"""

import pytest
import torch

from fastseg.bench.cases import cases, step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
CASES = list(cases(DEVICE, DTYPE, torch.channels_last))


@pytest.mark.parametrize("provider", ["theirs", "ours"], ids=["torch", "fastseg"])
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.operator)
def test_operator(benchmark, case, mode, provider):
    call = step(getattr(case, provider), case.inputs, mode != "forward")

    def timed():
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case.operator} {mode}"
    benchmark(timed)
