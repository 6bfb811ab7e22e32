"""Unpooling, convolution and batch norms in one kernel: the operator, its bytes and its machine code."""

import json

import pytest
import torch
import torch.nn.functional as F
from support.machine_code import compiled
from support.unpool_conv_common import LAYER_BY_LAYER, ONE_KERNEL, interpreted, launched, norm, stage_inputs

import fastseg
from fastseg import autotune
from fastseg import functional as FS
from fastseg.inspect.traffic import metering
from fastseg.ops.convolution import unpool_conv_norm
from fastseg.ops.convolution.unpool_conv_norm import MAX_UNPOOL2D_CONV2D_BATCH_NORM_RELU as OPERATOR


def in_torch(x, offsets, weight, geometry, size, after, input_norm):
    """torch's own functions, one after the other; a bias is added where a layer would add it."""

    def normalized(y, mean, shift, var, weight, bias, eps, relu):
        y = F.batch_norm(y if shift is None else y + shift[:, None, None], mean, var, weight, bias, eps=eps)
        return y.relu() if relu else y

    x = x if input_norm is None else normalized(x, *input_norm)
    kernel_size, stride, padding, _ = geometry
    indices = FS.offsets_to_indices(offsets, kernel_size, stride, padding, width=size[1])
    unpooled = F.max_unpool2d(x, indices, kernel_size, stride, padding, size)
    return normalized(F.conv2d(unpooled, weight, padding=1), *after)


def in_double(values):
    return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in values]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "size, channels, outputs, dtype, after, input_norm",
    [
        ((2, 4, 6), 16, 24, torch.float32, {}, {}),
        ((1, 7, 5), 5, 3, torch.float32, {"relu": False}, None),
        ((1, 3, 4), 72, 8, torch.float16, {"shifted": False}, {"relu": False}),
        ((1, 5, 6), 8, 40, torch.bfloat16, {"affine": False}, {"shifted": False, "affine": False}),
        ((1, 4, 4), 8, 8, torch.float16, {"dtype": torch.float16}, {"dtype": torch.float16}),
    ],
)
def test_output(size, channels, outputs, dtype, after, input_norm, layout, device, triton_backend):
    inputs = stage_inputs(size, channels, outputs, device, dtype, layout)
    after = norm(outputs, device, **after)
    input_norm = None if input_norm is None else norm(channels, device, **input_norm)
    with fastseg.verification.criterion.poisoned():
        ours = OPERATOR(*inputs, after, input_norm)
    truth = in_torch(*in_double(inputs), in_double(after), input_norm and in_double(input_norm))
    with fastseg.backend("torch"):
        theirs = OPERATOR(*inputs, after, input_norm)
    allowed = fastseg.verification.criterion.relative_error(theirs, truth) + 8 * torch.finfo(dtype).eps
    assert fastseg.verification.criterion.relative_error(ours, truth) <= allowed
    assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, dtype, theirs.stride())


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("with_input_norm", [False, True])
def test_opcheck(backend, with_input_norm, device):
    inputs = stage_inputs((2, 5, 6), 4, 3, device)
    with fastseg.backend(backend):
        call = (*inputs, norm(3, device), norm(4, device) if with_input_norm else None)
        torch.library.opcheck(OPERATOR.op, tuple(OPERATOR.flatten(call)))


@interpreted
@pytest.mark.parametrize("with_input_norm", [False, True])
def test_what_is_timed_is_what_would_run(with_input_norm, triton_backend, monkeypatch):
    """Both ways are timed whole, the norm in front of the unpooling included, and give the same result."""
    x, offsets, weight, *windows = stage_inputs((2, 6, 8), 8, 8, "cpu", torch.float16)
    norms = (norm(8, "cpu"), norm(8, "cpu") if with_input_norm else None)
    timed = []
    monkeypatch.setattr(
        autotune, "times", lambda key, tensor, calls: timed.extend(map(launched, calls())) or (1.0, 2.0)
    )
    reason = "1 ms in one kernel, 2 ms by way of the unpooled map"
    assert OPERATOR.preferred(x, offsets, weight.float(), *windows, *norms) == ("triton", reason)
    (ours, one_kernel), (theirs, layers) = timed
    torch.testing.assert_close(ours, theirs, rtol=5e-3, atol=5e-3)
    assert one_kernel == (ONE_KERNEL if with_input_norm else ONE_KERNEL[1:])
    assert layers == (LAYER_BY_LAYER if with_input_norm else ["max_unpool2d_fwd_kernel", LAYER_BY_LAYER[1]])


def test_a_call_is_identified_by_all_that_its_time_depends_on(monkeypatch):
    keys = []
    monkeypatch.setattr(autotune, "times", lambda key, *rest: keys.append(key))
    x, offsets, weight, geometry, _ = stage_inputs((2, 6, 8), 8, 8, "cpu")

    def ask(x=x, weight=weight, size=(6, 8), input_norm=None):
        OPERATOR.preferred(x, offsets, weight, geometry, list(size), norm(8, "cpu"), input_norm)

    ask()
    ask(x[:1])
    ask(x.half())
    ask(x.contiguous(), weight.contiguous())
    ask(x, weight[:4])
    ask(x, weight, (5, 8))
    ask(x, weight, (6, 8), norm(8, "cpu"))
    ask(x, weight, (6, 8), norm(8, "cpu", relu=False))
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    ask()
    assert len(set(keys)) == len(keys) == 9


@interpreted
@pytest.mark.parametrize("with_input_norm", [False, True])
def test_gate_bytes(with_input_norm, triton_backend):
    """Sectors of both ways, with the layers' convolution counted at its floor: the ratio that the documents state."""
    x, offsets, weight, *windows = stage_inputs((1, 24, 32), 16, 16, "cpu", torch.float16)
    norms = (norm(16, "cpu"), norm(16, "cpu") if with_input_norm else None)
    moved = []
    for way in (unpool_conv_norm._one_kernel, unpool_conv_norm._layer_by_layer):
        with metering() as launches:
            way(x, offsets, weight, *windows, *norms)
        assert all(traffic.outside == 0 for traffic in launches)
        moved.append(sum(traffic.sectors() for traffic in launches))
    pooled, weights = x.numel(), 2 * weight.numel()
    assert moved[0] <= 1.05 * (pooled * (15 if with_input_norm else 11) + weights)
    layers = moved[1] + pooled * (8 + 8) + weights  # the bytes of the convolution itself
    assert layers == pytest.approx(pooled * 43 + weights, rel=0.05)


COMPILED = """
import json, sys
sys.path.insert(0, "tests")
import torch
from support.unpool_conv_common import GEOMETRY
from fastseg import dispatch
from fastseg.inspect.codegen import compile_for, disassemble, record
from fastseg.kernels.batch_norm.arguments import NormArguments
from fastseg.ops.convolution import unpool_conv_norm
def launches(channels, h, w):
    x, offsets = torch.empty(8, channels, h, w, dtype=torch.bfloat16), torch.empty(8, channels, h, w, dtype=torch.uint8)
    weight = torch.empty(channels, channels, 3, 3, dtype=torch.bfloat16)
    images = [t.to(memory_format=torch.channels_last) for t in (x, offsets, weight)]
    norm = NormArguments(*(torch.empty(channels) for _ in range(5)), 1e-5, True)
    return record(lambda: unpool_conv_norm._one_kernel(*images, GEOMETRY, [2 * h, 2 * w], norm, None))

with torch.device("meta"), dispatch.backend("triton"):
    found = launches(128, 90, 120) + launches(64, 180, 240)
kernels = [compile_for(launch, 90) for launch in found]
disassemble(kernels)
print(json.dumps([[k.name, k.spills, k.count("HGMMA"), list(k.widths("STG"))] for k in kernels]))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiles in a process without a GPU")
def test_gate_machine_code():
    """At SegNet's widths, with the norm in the epilogue: no spills, tensor cores, stores of 16 bytes."""
    rows = json.loads(compiled("-c", COMPILED))
    assert [row[0] for row in rows] == ONE_KERNEL[1:] * 2
    for _, spills, tensor_core, stores in rows:
        assert spills == 0 and tensor_core > 0 and stores == [16]
