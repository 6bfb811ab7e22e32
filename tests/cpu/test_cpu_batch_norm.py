"""The CPU kernels of batch norm + ReLU, alone and with pooling or unpooling, against torch and float64."""

import pytest
import torch
from support.batch_norm_common import TAILS, Problem, layouts

import fastseg
from fastseg.kernels.cpu import build

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))
# Each dtype and memory format is compiled on its own: `fastseg verify --backend cpu` runs float16 and float64 too.
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
NAMES = ["weight", "bias", "input_bias"]


@layouts
@DTYPES
@pytest.mark.parametrize("tail", TAILS)
def test_is_as_accurate_as_torch(tail, dtype, layout, assert_right):
    """Outputs, gradients and running statistics; an odd size, so that the last vector and the last window are cut."""
    problem = Problem(tail, (3, 5, 7, 19), dtype, layout, "cpu", ceil_mode=True)

    def call(function, training, x, *vectors):
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        running = [t.to(wide, copy=True) for t in problem.running]
        return function(x, *vectors, training=training, running=running), *running

    for training in (True, False):
        ours, theirs = (lambda *a, f=f, t=training: call(f, t, *a) for f in (problem.ours, problem.theirs))
        # A bias before batch norm in training has the gradient zero; torch's is rounding noise.
        names = NAMES[:2] if training else NAMES
        with fastseg.backend("cpu"):
            assert_right(ours, theirs, problem.inputs(*names))


@layouts
@pytest.mark.parametrize("tail", TAILS)
def test_the_kernels_run_where_they_are_asked_for_and_not_under_auto(tail, layout):
    problem = Problem(tail, (2, 4, 6, 8), torch.float32, layout, "cpu")
    for backend, taken in (("cpu", "cpu"), ("auto", "torch")):
        with fastseg.backend(backend):
            assert fastseg.explain(problem.ours, problem.x)[0].backend == taken


@layouts
@pytest.mark.parametrize("tail", TAILS)
def test_results_do_not_depend_on_the_number_of_threads(tail, layout):
    problem = Problem(tail, (4, 24, 32, 40), torch.float32, layout, "cpu")
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            inputs = [t.detach().clone().requires_grad_() for t in problem.inputs("weight", "bias")]
            with fastseg.backend("cpu"):
                y = problem.ours(*inputs)
                results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
