"""Unpooling, convolution and norms in one kernel: the operator, its bytes and its machine code."""

import json

import pytest
import torch
import torch.nn.functional as F
from support.machine_code import compiled
from support.unpool_conv_common import APART, GEOMETRY, JOINED, entrance, interpreted, launched, norm

import fastseg
from fastseg import autotune
from fastseg import functional as FS
from fastseg.inspect.traffic import metering
from fastseg.ops.convolution import unpool_conv_norm
from fastseg.ops.convolution.unpool_conv_norm import MAX_UNPOOL2D_CONV2D_BATCH_NORM_RELU as OPERATOR
from fastseg.ops.convolution.unpool_conv_norm import NO_NORM


def layers(x, offsets, weight, geometry, behind, before):
    """torch's own functions, one behind the other, a bias added where a layer would add it."""

    def normalised(y, mean, shift, var, weight, bias, eps, relu):
        y = F.batch_norm(y if shift is None else y + shift[:, None, None], mean, var, weight, bias, eps=eps)
        return y.relu() if relu else y

    x = x if before is None else normalised(x, *before)
    indices = FS.offsets_to_indices(offsets, *geometry[:3], width=geometry[3][1])
    return normalised(F.conv2d(F.max_unpool2d(x, indices, *geometry), weight, padding=1), *behind)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "size, channels, outputs, dtype, behind, before",
    [
        ((2, 4, 6), 16, 24, torch.float32, {}, {}),
        ((1, 7, 5), 5, 3, torch.float32, {"relu": False}, None),
        ((1, 3, 4), 72, 8, torch.float16, {"shifted": False}, {"relu": False}),
        ((1, 5, 6), 8, 40, torch.bfloat16, {"affine": False}, {"shifted": False, "affine": False}),
        ((1, 4, 4), 8, 8, torch.float16, {"dtype": torch.float16}, {"dtype": torch.float16}),
    ],
)
def test_output(size, channels, outputs, dtype, behind, before, layout, device, triton_backend, exact):
    x, offsets, weight, geometry = entrance(size, channels, outputs, device, dtype, layout)
    behind = norm(outputs, device, **behind)
    before = None if before is None else norm(channels, device, **before)
    with fastseg.verification.criterion.poisoned():
        ours = OPERATOR(x, offsets, weight, *geometry, *behind, *(before or NO_NORM))

    def in_double(values):
        return tuple(t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in values)

    truth = layers(*in_double((x, offsets, weight)), geometry, in_double(behind), before and in_double(before))
    with fastseg.backend("torch"):
        theirs = OPERATOR(x, offsets, weight, *geometry, *behind, *(before or NO_NORM))
    allowed = fastseg.verification.criterion.relative_error(theirs, truth) + 8 * torch.finfo(dtype).eps
    assert fastseg.verification.criterion.relative_error(ours, truth) <= allowed
    assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, dtype, theirs.stride())


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("before", [False, True])
def test_opcheck(backend, before, device):
    x, offsets, weight, geometry = entrance((2, 5, 6), 4, 3, device)
    with fastseg.backend(backend):
        norms = (*norm(3, device), *(norm(4, device) if before else NO_NORM))
        torch.library.opcheck(OPERATOR.op, (x, offsets, weight, *geometry, *norms))


@interpreted
@pytest.mark.parametrize("before", [False, True])
def test_what_is_timed_is_what_would_run(before, triton_backend, monkeypatch):
    """All of it both ways, the norm in front of the unpooling too, and both give the same."""
    x, offsets, weight, geometry = entrance((2, 6, 8), 8, 8, "cpu", torch.float16)
    norms = (*norm(8, "cpu"), *(norm(8, "cpu") if before else NO_NORM))
    timed = []
    monkeypatch.setattr(
        autotune, "times", lambda key, tensor, calls: timed.extend(map(launched, calls())) or (1.0, 2.0)
    )
    said = "1 ms in one kernel, 2 ms by way of the unpooled map"
    assert OPERATOR.preferred(x, offsets, weight.float(), *geometry, *norms) == ("triton", said)
    (ours, joined), (theirs, apart) = timed
    torch.testing.assert_close(ours, theirs, rtol=5e-3, atol=5e-3)
    assert joined == (JOINED if before else JOINED[1:])
    assert apart == (APART if before else ["max_unpool2d_fwd_kernel", APART[1]])


def test_a_call_is_known_by_all_that_its_time_depends_on(monkeypatch):
    keys = []
    monkeypatch.setattr(autotune, "times", lambda key, *rest: keys.append(key))
    x, offsets, weight, _ = entrance((2, 6, 8), 8, 8, "cpu")

    def ask(x=x, weight=weight, size=(6, 8), before=NO_NORM):
        OPERATOR.preferred(x, offsets, weight, *GEOMETRY, list(size), *norm(8, "cpu"), *before)

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
@pytest.mark.parametrize("before", [False, True])
def test_gate_bytes(before, triton_backend):
    """Sectors both ways, the convolution that the layers take being at its floor: the share that docs state."""
    x, offsets, weight, geometry = entrance((1, 24, 32), 16, 16, "cpu", torch.float16)
    norms = (*norm(16, "cpu"), *(norm(16, "cpu") if before else NO_NORM))
    arguments, moved = (x, offsets, weight, *geometry, *norms), []
    for way in (unpool_conv_norm._joined, unpool_conv_norm._apart):
        with metering() as launches:
            way(*arguments)
        assert all(traffic.outside == 0 for traffic in launches)
        moved.append(sum(traffic.sectors() for traffic in launches))
    pooled, weights = x.numel(), 2 * weight.numel()
    assert moved[0] <= 1.05 * (pooled * (15 if before else 11) + weights)
    apart = moved[1] + pooled * (8 + 8) + weights  # the convolution's own
    assert apart == pytest.approx(pooled * 43 + weights, rel=0.05)


COMPILED = """
import json, sys
sys.path.insert(0, "tests")
import torch
from support.unpool_conv_common import GEOMETRY
from fastseg import dispatch
from fastseg.inspect.codegen import compile_for, disassemble, record
from fastseg.ops.convolution import unpool_conv_norm
from fastseg.ops.convolution.unpool_conv_norm import NO_NORM
def launches(channels, h, w):
    x, offsets = torch.empty(8, channels, h, w, dtype=torch.bfloat16), torch.empty(8, channels, h, w, dtype=torch.uint8)
    weight = torch.empty(channels, channels, 3, 3, dtype=torch.bfloat16)
    images = (t.to(memory_format=torch.channels_last) for t in (x, offsets, weight))
    norms = [*(torch.empty(channels) for _ in range(5)), 1e-5, True, *NO_NORM]
    arguments = (*images, *GEOMETRY, [2 * h, 2 * w], *norms)
    return record(lambda: unpool_conv_norm._joined(*arguments))

with torch.device("meta"), dispatch.backend("triton"):
    found = launches(128, 90, 120) + launches(64, 180, 240)
kernels = [compile_for(launch, 90) for launch in found]
disassemble(kernels)
print(json.dumps([[k.name, k.spills, k.count("HGMMA"), list(k.widths("STG"))] for k in kernels]))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled in a process of their own")
def test_gate_machine_code():
    """At SegNet's widths, with the norm in the epilogue: no spills, tensor cores, stores of 16 bytes."""
    rows = json.loads(compiled("-c", COMPILED))
    assert [row[0] for row in rows] == JOINED[1:] * 2
    for _, spills, products, stores in rows:
        assert spills == 0 and products > 0 and stores == [16]
