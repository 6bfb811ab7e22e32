"""The CUDA C++ kernels' numbers, beside torch's, on a machine without a GPU: see cuda_host.py."""

import cuda_host
import pytest
import torch

from fastseg import cases, verify
from fastseg.inspect.cuda_codegen import record

OPERATORS = ("max_pool2d", "max_unpool2d", "cross_entropy", "batch_norm_relu")
# Of the cases of verify: class probabilities, batch norm with unpooling.
UNCOVERED = {"cross_entropy": 2, "batch_norm_relu": 4}
pytestmark = pytest.mark.skipif(cuda_host.COMPILER is None, reason="no C++ compiler (g++, clang++ or $CXX)")


@pytest.fixture(scope="session")
def host():
    """Every instance of a template that the cases run, compiled together."""
    library = cuda_host.library()
    library.add(
        request
        for dtype in (*cases.DTYPES.values(), torch.float64)
        for layout in cases.LAYOUTS.values()
        for operator in OPERATORS
        for make, size in verify.SIZES[operator]
        for case in made(make, cases.Placement(dtype, layout, "meta"), size)
        for request in record(lambda case=case: case.step(case.ours, backward=True)())
    )
    return library


def made(make, at, size):
    return [] if make is cases.max_unpool2d_anywhere and at.device == "meta" else make(at, *size)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", [*cases.DTYPES, "float64"])
def test_the_cases_of_verify(host, operator, layout, dtype, assert_right):
    at, uncovered = cases.Placement(getattr(torch, dtype), cases.LAYOUTS[layout], "cpu"), 0
    for make, size in verify.SIZES[operator]:
        for case in make(at, *size):
            try:
                with host.backend():
                    assert_right(case.ours, case.theirs, list(case.inputs.values()), list(case.inputs))
            except NotImplementedError:
                uncovered += 1
    assert uncovered == UNCOVERED.get(operator, 0)
