"""The results of the CUDA C++ kernels against torch's, on a machine without a GPU: see support/cuda_host.py."""

import numpy as np
import pytest
import torch
from support import cuda_host

from fastseg.inspect.cuda_codegen import record
from fastseg.kernels.cuda import launch
from fastseg.verification import cases, operators

OPERATORS = ("max_pool2d", "max_unpool2d", "cross_entropy", "batch_norm_relu")
# How many cases of verify they do not support: class probabilities, batch norm with unpooling.
UNSUPPORTED = {"cross_entropy": 3, "batch_norm_relu": 4}
pytestmark = pytest.mark.skipif(cuda_host.COMPILER is None, reason="no C++ compiler (g++, clang++ or $CXX)")


@pytest.fixture(scope="session")
def host():
    """Every template instance that the cases run, compiled in one go."""
    library = cuda_host.library()
    library.add(
        request
        for dtype in (*cases.DTYPES.values(), torch.float64)
        for layout in cases.LAYOUTS.values()
        for operator in OPERATORS
        for make in operators.SIZES[operator]
        for case in made(make, cases.Placement(dtype, layout, "meta"))
        for request in record(lambda case=case: case.step(case.ours, backward=True)())
    )
    return library


def made(make, at):
    return [] if make.func is cases.max_unpool2d_anywhere and at.device == "meta" else make(at)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", [*cases.DTYPES, "float64"])
def test_the_cases_of_verify_pass(host, operator, layout, dtype, assert_right):
    at, unsupported = cases.Placement(getattr(torch, dtype), cases.LAYOUTS[layout], "cpu"), 0
    for make in operators.SIZES[operator]:
        for case in make(at):
            try:
                with host.backend():
                    assert_right(case.ours, case.theirs, list(case.inputs.values()), list(case.inputs))
            except NotImplementedError:
                unsupported += 1
    assert unsupported == UNSUPPORTED.get(operator, 0)


# --- races -----------------------------------------------------------------------------------------------------------

RACE = """
__global__ void shared_sum(const float* x, float* y, int pairs) {
    if (thread_number() < 2 * pairs) y[thread_number() / 2] = x[thread_number()];
}
"""


def both_ways(call):
    """The results of a call with the threads run from first to last, and from last to first."""
    for reverse in (False, True):
        with cuda_host.library().backend(reverse):
            yield call()


def results(case):
    """Outputs and gradients, for the same output gradients each time."""
    leaves = [
        x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in case.inputs.values()
    ]
    outputs = case.ours(*leaves)
    outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    wanted = [y for y in outputs if y.requires_grad]
    gradients = [torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape) for y in wanted]
    return [
        *outputs,
        *torch.autograd.grad(wanted, [x for x in leaves if getattr(x, "requires_grad", False)], gradients),
    ]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_the_order_of_threads_changes_nothing(host, operator, layout):
    """Threads share no memory except the tensors, so a harmful race makes a result depend on their order."""
    at, unsupported = cases.Placement(torch.float16, cases.LAYOUTS[layout], "cpu"), 0
    for make in operators.SIZES[operator]:
        for case in make(at):
            try:
                for one, other in zip(*both_ways(lambda case=case: results(case)), strict=True):
                    assert torch.equal(one, other), f"{case.operator} {case.size}"
            except NotImplementedError:
                unsupported += 1
    assert unsupported == UNSUPPORTED.get(operator, 0)


def test_a_race_is_found(monkeypatch):
    text = launch.source("pooling/pool") + RACE
    monkeypatch.setattr(launch, "source", lambda file: text)
    library = cuda_host.Library(cuda_host.library().folder)
    x, found = torch.arange(6.0), []
    request = launch.Launch("pooling/pool", "shared_sum", 6, (x, torch.zeros(3), np.int32(3)))
    for reverse in (False, True):
        request.args[1].zero_()
        library.run(request, reverse)
        found.append(request.args[1].tolist())
    assert found == [[1, 3, 5], [0, 2, 4]]
