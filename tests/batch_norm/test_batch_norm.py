"""Batch norm + ReLU, alone and with pooling or unpooling, against torch's own layers in sequence."""

import itertools

import pytest
import torch
from support.batch_norm_common import DTYPES, LAYOUTS, TAILS, Problem, layouts

import fastseg
from fastseg import functional as FS
from fastseg.verification.criterion import compare_to_torch, poisoned, relative_error

SHAPES = [  # shape, kernel, stride, padding, ceil_mode
    ((2, 8, 6, 16), 2, None, 0, False),
    ((3, 5, 7, 9), 2, None, 0, True),
    ((1, 12, 9, 11), 3, None, 1, False),
    ((2, 3, 8, 7), (1, 2), (3, 2), (0, 1), False),
]


@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tail, size", [*((t, s) for t in TAILS[1:] for s in SHAPES), ("plain", SHAPES[0])])
def test_is_as_accurate_as_torch(tail, size, dtype, layout, device, triton_backend, assert_right):
    shape, kernel, stride, padding, ceil_mode = size
    problem = Problem(tail, shape, dtype, layout, device, kernel, stride, padding, ceil_mode)
    for training in (True, False):
        assert_right(
            lambda *a, t=training: problem.ours(*a, training=t),
            lambda *a, t=training: problem.theirs(*a, training=t),
            problem.inputs("weight", "bias"),
        )
    with poisoned():
        assert problem.ours(problem.x).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("backend", ["triton", "auto", "torch"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tail", TAILS)
def test_every_combination_of_arguments(tail, training, backend, device):
    """With and without weight, bias, the ReLU and a convolution's bias."""
    problem = Problem(tail, (2, 4, 5, 8), torch.float32, LAYOUTS[training], device)
    for weight, bias, input_bias, relu in itertools.product([0, 1], repeat=4):
        names = [n for n, on in zip(("weight", "bias", "input_bias"), (weight, bias, input_bias), strict=True) if on]

        def call(function, x, *vectors, names=names, relu=relu):
            running = [t.clone().to(torch.float64 if x.dtype == torch.float64 else t.dtype) for t in problem.running]
            y = function(
                x, **dict(zip(names, vectors, strict=True)), training=training, relu=bool(relu), running=running
            )
            return y, *running

        ours, theirs = (lambda *a, f=f: call(f, *a) for f in (problem.ours, problem.theirs))
        with fastseg.backend(backend):
            found = compare_to_torch(ours, theirs, problem.inputs(*names), ["x", *names], poison=backend == "triton")
        for c in found:
            rounding = (
                training and c.tensor == "grad input_bias"
            )  # fastseg's is exactly zero, torch's is rounding noise
            assert c.passed or rounding, f"{names} relu={relu} {c}"
    x, bias = problem.x, problem.input_bias.requires_grad_()
    with fastseg.backend(backend):
        (grad,) = torch.autograd.grad(problem.ours(x, input_bias=bias, training=training).square().sum(), bias)
    assert (grad.count_nonzero() == 0) == training


@layouts
def test_a_mean_far_from_zero_loses_no_digits(layout, device, triton_backend):
    problem = Problem("plain", (2, 6, 8, 12), torch.float32, layout, device)
    x = (torch.randn(2, 6, 8, 12, device=device) + 1e4).contiguous(memory_format=layout)
    x[0, 3, 0, 0] = -1e4  # the pivot of the statistics
    # Without the ReLU, which could let another element pass because of rounding.
    ours, theirs = (lambda *a, f=f: f(*a, relu=False) for f in (problem.ours, problem.theirs))
    for c in compare_to_torch(ours, theirs, [x, problem.weight, problem.bias]):
        assert c.error < 5e-5 and c.passed, c


@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tail", TAILS[1:])
def test_one_pass_equals_two_operators_bit_for_bit(tail, dtype, layout, device, triton_backend):
    """Values are rounded before they are compared, as if the ReLU's output had been stored."""
    problem = Problem(tail, (2, 8, 7, 12), dtype, layout, device, ceil_mode=True)
    for training in (True, False):
        rest = (problem.weight, problem.bias, training)
        activations = FS.batch_norm_relu(problem.x, *[t.clone() for t in problem.running], *rest)
        if tail == "pool":
            got = problem.ours(problem.x, *rest[:2], training=training, return_offsets=True)
            want = FS.max_pool2d_with_offsets(activations, 2, ceil_mode=True)
            assert torch.equal(got[1], want[1])
        else:
            got = (problem.ours(problem.x, *rest[:2], training=training),)
            want = (FS.max_unpool2d_with_offsets(activations, problem.offsets, 2, output_size=problem.size),)
        assert torch.equal(got[0], want[0])


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("tail", TAILS[1:])
def test_overlapping_windows_run_as_two_operators(tail, backend, device):
    problem = Problem(tail, (2, 4, 9, 9), torch.float32, LAYOUTS[1], device, 3, 2, 1)
    with fastseg.backend(backend):
        for c in compare_to_torch(
            problem.ours, problem.theirs, problem.inputs("weight", "bias"), poison=tail == "pool"
        ):
            assert c.passed, c


@pytest.mark.parametrize("tail", TAILS)
def test_results_are_deterministic_and_do_not_depend_on_strides(tail, device, triton_backend):
    problem = Problem(tail, (2, 8, 10, 12), torch.float32, LAYOUTS[0], device)
    x = problem.x.repeat_interleave(2, 3)[..., ::2].requires_grad_()
    assert not x.is_contiguous()

    def run(x):
        y = problem.ours(x, problem.weight, problem.bias)
        return y, *torch.autograd.grad(y.square().sum(), x)

    first, again, dense = run(x), run(x), run(problem.x.requires_grad_())
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, again, dense, strict=True))


@pytest.mark.parametrize("tail", TAILS)
def test_nan_and_infinity_propagate_as_in_torch(tail, device, triton_backend):
    problem = Problem(tail, (2, 4, 4, 6), torch.float32, LAYOUTS[1], device)
    for training, value in itertools.product((True, False), (torch.nan, torch.inf)):
        x = problem.x.clone()
        x[0, 1, 1, 1] = value
        results = [
            function(x, problem.weight, problem.bias, training=training) for function in (problem.ours, problem.theirs)
        ]
        torch.testing.assert_close(*results, equal_nan=True)


@pytest.mark.parametrize("tail", TAILS)
def test_the_input_is_the_only_tensor_of_full_size_that_is_saved(tail, device, triton_backend):
    problem = Problem(tail, (2, 8, 8, 16), torch.float32, LAYOUTS[0], device)
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        problem.ours(problem.x.requires_grad_(), problem.weight.requires_grad_(), problem.bias.requires_grad_())
    large = [t for t in saved.values() if t.numel() > 8]
    offsets = {"plain": 0, "pool": problem.x.numel() // 4, "unpool": problem.x.numel()}[tail]
    assert sum(t.numel() * t.element_size() for t in large) == 4 * problem.x.numel() + offsets


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tail", TAILS)
def test_half_precision_parameters(tail, training, device, triton_backend):
    """Parameters, running statistics and gradients stay in half precision, as in a model that is all float16."""
    problem = Problem(tail, (2, 8, 4, 6), torch.float16, LAYOUTS[1], device)
    halves = [t.half() for t in (problem.weight, problem.bias)]
    problem.running = [t.half() for t in problem.running]
    results = {}
    for name, function in (("ours", problem.ours), ("theirs", problem.theirs)):
        leaves = [t.clone().requires_grad_() for t in halves]
        running = [t.clone() for t in problem.running]
        y = function(problem.x, *leaves, training=training, running=running)
        grads = torch.autograd.grad(y.sum(), leaves)
        assert [t.dtype for t in (y, *grads, *running)] == [torch.float16] * 5
        results[name] = [y, *grads, *running]
    for got, want in zip(results["ours"], results["theirs"], strict=True):
        assert relative_error(got, want) < 4e-3


def test_offsets_of_64_bits(monkeypatch, device, triton_backend):
    from fastseg.kernels.batch_norm import common

    monkeypatch.setattr(common, "INT32_MAX", 0)
    for tail, layout in itertools.product(TAILS, LAYOUTS):
        problem = Problem(tail, (2, 4, 6, 8), torch.float32, layout, device)
        assert all(c.passed for c in compare_to_torch(problem.ours, problem.theirs, problem.inputs("weight", "bias")))


def strided(values):
    """The same values with a stride of 2; the elements between them are 7."""
    return torch.stack([values, torch.full_like(values, 7.0)], 1)[:, 0]


@pytest.mark.parametrize("tail", TAILS)
def test_vectors_of_any_stride(tail, device, triton_backend):
    """They are read and written in place, and no element between theirs changes."""
    problem = Problem(tail, (2, 4, 6, 8), torch.float32, LAYOUTS[0], device)

    def results(copy):
        weight, bias, input_bias = (
            copy(t.detach()).requires_grad_() for t in (problem.weight, problem.bias, problem.bias)
        )
        running = [copy(t) for t in problem.running]
        y = problem.ours(problem.x, weight, bias, input_bias, running=running)
        grads = torch.autograd.grad(y.square().sum(), (weight, bias))
        y = problem.ours(problem.x, weight, bias, input_bias, training=False, running=running)
        return running, [y, *grads, *running, *torch.autograd.grad(y.sum(), (weight, bias, input_bias))]

    (running, got), (_, want) = results(strided), results(torch.clone)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for buffer in running:
        assert (buffer.as_strided((4,), (2,), 1) == 7).all()
    flat = problem.ours(problem.x, bias=torch.ones(1, device=device).expand(4))
    assert torch.equal(flat, problem.ours(problem.x, bias=torch.ones(4, device=device)))


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_dead_channel_in_half_precision(backend, device):
    """A constant channel of variance 0. An eps of 1e-9 would round to 0 in float16."""
    x, zeros, ones = (
        torch.ones(1, 2, 2, 2, device=device).half(),
        *torch.tensor([[0.0] * 2, [1.0] * 2]).half().to(device),
    )
    with fastseg.backend(backend):
        y = FS.batch_norm_relu(x * 0, zeros, zeros, ones * 1e-4, zeros, eps=1e-9, input_bias=ones)
    torch.testing.assert_close(y, torch.full_like(x, 3.1621), rtol=2e-3, atol=0)


def launches_on_meta(tail, layout, shape):
    from support.addresses import recorded

    from fastseg.ops.operator import observing

    x = torch.empty(shape, device="meta", dtype=torch.float16).contiguous(memory_format=layout).requires_grad_()
    vectors = [torch.empty(shape[1], device="meta") for _ in range(2)]
    offsets = torch.empty(shape, device="meta", dtype=torch.uint8).contiguous(memory_format=layout)

    def step():
        norm = (*vectors, None, None, True)
        if tail == "plain":
            y = FS.batch_norm_relu(x, *norm)
        elif tail == "pool":
            y = FS.batch_norm_relu_max_pool2d(x, *norm)
        else:
            y = FS.batch_norm_relu_max_unpool2d(x, offsets, *norm)
        torch.autograd.grad(y, x, torch.empty_like(y))

    with fastseg.backend("triton"), observing(lambda *call: None):
        return recorded(step)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU kernels are compiled, not interpreted")
@layouts
def test_the_last_program_of_5_billion_elements(layout):
    """Its offsets stay inside the tensor, also those of each channel's first element, the pivot of the statistics."""
    from support.addresses import addresses

    shape = (1, 64, 8192, 9600)  # more than 2^32 elements
    size = torch.Size(shape).numel()
    stats, merge, forward = launches_on_meta("plain", layout, shape)[:3]
    for launch, kind in ((stats, "load"), (merge, "load"), (forward, "store")):
        touched = addresses(launch, launch[1] - 1)[kind, torch.float16]
        assert min(touched) >= 0 and max(touched) < size
        assert max(touched) == size - 1 or launch is merge
    channel = 1 if layout == torch.channels_last else shape[2] * shape[3]
    assert max(addresses(merge, merge[1] - 1)["load", torch.float16]) == 63 * channel
