"""Backward with kernel size = stride: all gradients from one read, and without a copy to channels_last."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from support.conv_transpose_common import LAYOUTS, NAMES, affine_relu, tensors
from support.machine_code import compiled

import fastseg
from fastseg import functional as FS
from fastseg import kernels
from fastseg.inspect import traffic_report
from fastseg.inspect.traffic import metering
from fastseg.verification import cases

SEPARATE = ["conv_transpose2d_bwd_input_shuffle_kernel", "conv_transpose2d_bwd_shuffle_kernel"]
TOGETHER = SEPARATE[1:]

# input, output channels, kernel size = stride, and the kernels that launch in NCHW and in channels_last
GEOMETRIES = [
    ((2, 16, 5, 8), 12, 2, TOGETHER, TOGETHER),
    (
        (1, 70, 3, 16),
        20,
        2,
        TOGETHER,
        [],
    ),  # two tiles of channels; in channels_last rows are not 16-byte multiples
    ((1, 72, 3, 5), 20, 2, [], TOGETHER),  # rows that are not a multiple of 16 bytes
    ((1, 8, 4, 8), 6, (4, 2), TOGETHER, []),
    ((3, 6, 2, 8), 5, (1, 8), TOGETHER, []),
    ((2, 24, 3, 8), 80, 2, SEPARATE, []),  # more columns than one kernel holds
    ((1, 130, 2, 8), 72, 2, SEPARATE, []),
    ((1, 40, 7, 8), 33, 1, TOGETHER, []),  # 1x1: a plain GEMM
    ((1, 40, 7, 5), 40, 1, [], TOGETHER),
    ((1, 3, 12, 32), 20, (2, 1), TOGETHER, []),  # several splits of the pixels
    ((1, 8, 2, 8), 2, 16, [], []),  # a rectangle larger than a tile
    ((1, 8, 2, 8), 8, 3, [], []),  # not a power of two
    ((1, 16, 3, 8), 8, 2, [], []),  # few columns
]
ids = [f"{shape}-{k}-{kernel}".replace(" ", "") for shape, k, kernel, *_ in GEOMETRIES]


def launched(function, *inputs):
    """The kernels that the backward of function(*inputs) launches, in order."""
    y = function(*(t.detach().requires_grad_() for t in inputs))
    names = []
    with kernels.launch.recording(lambda kernel, *rest: names.append(kernel.fn.__name__)):
        y.backward(torch.randn_like(y))
    return names


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=ids)
def test_gradients(geometry, layout, device, triton_backend, assert_right):
    shape, channels, kernel, *expected = geometry
    dtype = torch.float16 if sum(shape) % 2 else torch.bfloat16
    inputs = tensors(shape, channels, kernel, dtype, layout, device)
    assert_right(
        lambda *t: FS.conv_transpose2d(*t, kernel), lambda *t: F.conv_transpose2d(*t, kernel), inputs,
        NAMES,
    )  # fmt: skip
    names = launched(lambda *t: FS.conv_transpose2d(*t, kernel), *inputs)
    found = [name for name in names if "shuffle" in name]
    assert found == expected[layout == torch.channels_last]
    assert not found or not {"transpose_kernel", "conv_transpose2d_bwd_epilogue_kernel"} & set(names)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("geometry", GEOMETRIES[:6], ids=ids[:6])
def test_gradients_with_relu(geometry, layout, device, triton_backend, assert_right):
    """ReLU's mask is applied to each rectangle when it is read."""
    shape, channels, kernel, *_ = geometry
    x, weight, _ = tensors(shape, channels, kernel, torch.bfloat16, layout, device)
    inputs = (x, weight, torch.randn(channels, device=device), torch.randn(channels, device=device))

    assert_right(
        lambda *t: FS.conv_transpose2d_affine_relu(*t, kernel), lambda *t: affine_relu(*t, kernel), inputs,
        ["input", "weight", "scale", "shift"],
    )  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("channels", [12, 80])
@pytest.mark.parametrize("needed", [n for n in itertools.product([False, True], repeat=3) if any(n)])
def test_only_what_is_needed_is_computed(needed, channels, layout, device, triton_backend):
    inputs = tensors((1, 24, 3, 8), channels, 2, torch.bfloat16, layout, device)
    wanted = [t.requires_grad_(need) for t, need in zip(inputs, needed, strict=True) if need]
    grad = torch.randn(1, channels, 6, 16, device=device).to(torch.bfloat16).contiguous(memory_format=layout)
    found = torch.autograd.grad(FS.conv_transpose2d(*inputs, 2), wanted, grad)
    for a, b in zip(found, torch.autograd.grad(F.conv_transpose2d(*inputs, 2), wanted, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.05)


def test_offsets_of_64_bits(device, triton_backend, assert_right, monkeypatch):
    monkeypatch.setattr(kernels.convolution.gemm, "INT32_MAX", 0)
    for layout, channels in itertools.product(LAYOUTS.values(), (12, 72)):
        inputs = tensors((2, 24, 3, 8), channels, 2, torch.bfloat16, layout, device)
        assert_right(lambda *t: FS.conv_transpose2d(*t, 2), lambda *t: F.conv_transpose2d(*t, 2), inputs)


def test_grad_output_in_another_layout(device, triton_backend):
    """grad_output may be in either memory format, whatever the input's is."""
    for layout, other in itertools.product(LAYOUTS.values(), repeat=2):
        for channels in (12, 72):
            inputs = [t.requires_grad_() for t in tensors((2, 16, 3, 8), channels, 2, torch.bfloat16, layout, device)]
            grad = torch.randn(2, channels, 6, 16, device=device).to(torch.bfloat16).contiguous(memory_format=other)
            found = torch.autograd.grad(FS.conv_transpose2d(*inputs, 2), inputs, grad)
            want = torch.autograd.grad(F.conv_transpose2d(*inputs, 2), inputs, grad)
            for a, b, t in zip(found, want, inputs, strict=True):
                torch.testing.assert_close(a, b, rtol=0.02, atol=0.05)
                assert a.stride() == t.stride()


def test_two_runs_are_equal_to_the_bit(device, triton_backend):
    inputs = [t.requires_grad_() for t in tensors((2, 40, 9, 16), 24, 2, torch.bfloat16, LAYOUTS["nchw"], device)]
    y = FS.conv_transpose2d(*inputs, 2)
    grad = torch.randn_like(y)
    once, again = (torch.autograd.grad(y, inputs, grad, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("kernel", [(1, 128), (2, 256), (128, 1)])
def test_rows_longer_than_a_tile(kernel, device, triton_backend, assert_right):
    """Such rows are not shuffled, forward or backward."""
    inputs = tensors((1, 4, 2, 3), 2, kernel, torch.float16, torch.contiguous_format, device)
    assert_right(lambda *t: FS.conv_transpose2d(*t, kernel), lambda *t: F.conv_transpose2d(*t, kernel), inputs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts bytes in the interpreter")
@pytest.mark.parametrize("make", [cases.conv_transpose2d, cases.conv_transpose2d_affine_relu])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gate_each_tensor_is_read_once(layout, make, monkeypatch):
    """At most 1.15 times the floor, split-K partials included, whose number does not grow with the maps on a GPU."""
    monkeypatch.setattr(kernels.convolution.gemm, "MULTIPROCESSORS", 2)
    at = cases.Placement(torch.bfloat16, cases.LAYOUTS[layout], "cpu")
    (case,) = make(at, (1, 32, 32, 64), cases.ConvTransposeSpec(16, kernel=2, stride=2))
    (backward,) = [t for t in traffic_report.operator_traffic(case) if t.backward]
    assert backward.ratio <= 1.15


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts bytes in the interpreter")
def test_nchw_is_not_copied(monkeypatch):
    """Two kernels read grad_y twice and x once: half of the bytes of a copy to channels_last and its readers."""
    monkeypatch.setattr(kernels.convolution.gemm, "MULTIPROCESSORS", 1)
    inputs = tensors((1, 16, 16, 32), 80, 2, torch.bfloat16, torch.contiguous_format, "cpu")
    with fastseg.backend("triton"):
        y = FS.conv_transpose2d(*(t.requires_grad_() for t in inputs), 2)
        with metering() as launches:
            y.backward(torch.randn_like(y))
    x, grad = (t.numel() * t.element_size() for t in (inputs[0], y))
    assert 2 * grad + 2 * x <= sum(t.sectors("load") + t.sectors("store") for t in launches) <= 1.1 * (2 * grad + 2 * x)


COMPILE = """
from fastseg import dispatch
from fastseg.inspect.codegen import compile_for, disassemble, record
from fastseg.kernels.launch import targeting
from fastseg.ops.operator import observing
from fastseg.verification import cases
import torch
at = cases.Placement(torch.bfloat16, torch.contiguous_format, "meta")
for shape, channels, stride in (((1, 150, 45, 24), 40, 1), ((1, 48, 90, 40), 17, (2, 1)), ((2, 200, 5, 8), 9, 2)):
    (case,) = cases.conv_transpose2d(at, shape, cases.ConvTransposeSpec(channels, stride, stride))
    for sm in (90, 100):
        with dispatch.backend("triton"), targeting(sm), observing(lambda operator, call: None):
            found = record(lambda: case.step(case.ours, backward=True)())
        (launch,) = [launch for launch in found if launch.name == "conv_transpose2d_bwd_shuffle_kernel"]
        kernel = compile_for(launch, sm)
        disassemble([kernel])
        assert not kernel.spills, (shape, channels, stride, sm, kernel.spills)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiles in a process without a GPU")
def test_gate_the_fewest_rows_and_columns_compile_without_spills():
    """Triton's compiler fails on fewer columns, and on a shuffle of rows of one column."""
    compiled("-c", COMPILE)
