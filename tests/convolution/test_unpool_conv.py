"""max_unpool2d_conv2d: the output, its bytes, the operator, autocast, and invalid arguments."""

import pytest
import torch
import torch.nn.functional as F

import fastseg
from fastseg import autotune
from fastseg import functional as FS
from fastseg.inspect.traffic import metering
from fastseg.ops.convolution.unpool_conv import MAX_UNPOOL2D_CONV2D
from fastseg.ops.pooling.geometry import PoolGeometry

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}

GEOMETRIES = [  # image that was pooled, output channels, kernel, stride, padding, ceil_mode
    ((2, 16, 8, 12), 24, 2, 2, 0, False),
    ((1, 5, 7, 9), 3, 2, 2, 0, True),
    ((1, 70, 4, 6), 40, 2, 2, 0, False),
    ((2, 3, 9, 7), 8, (3, 2), (3, 3), (1, 0), False),
    ((1, 8, 1, 4), 1, (1, 2), (1, 2), 0, False),
]


def pooled(shape, kernel, stride, padding, ceil_mode, dtype, layout, device):
    image = torch.randn(shape).to(device, dtype).contiguous(memory_format=layout)
    return FS.max_pool2d_with_offsets(image, kernel, stride, padding, ceil_mode=ceil_mode)


def two_steps(x, offsets, weight, bias, *geometry):
    indices = FS.offsets_to_indices(offsets, *geometry[:3], width=geometry[3][1])
    return F.conv2d(F.max_unpool2d(x, indices, *geometry), weight, bias, padding=1)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("case", range(len(GEOMETRIES)))
def test_output(case, layout, device, triton_backend):
    shape, channels, *windows = GEOMETRIES[case]
    dtype = (torch.float32, torch.float16, torch.bfloat16)[(case + (layout == torch.channels_last)) % 3]
    x, offsets = pooled(shape, *windows, dtype, layout, device)
    weight, bias = torch.randn(channels, shape[1], 3, 3, device=device), torch.randn(channels, device=device)
    weight = (weight / (3 * shape[1] ** 0.5)).to(dtype)
    geometry = (*windows[:3], shape[2:])
    with fastseg.verification.criterion.poisoned():
        ours = FS.max_unpool2d_conv2d(x, offsets, weight, bias.to(dtype), *geometry)
    arguments = (x, offsets, weight, bias.to(dtype))
    truth = two_steps(*(t.double() if t.is_floating_point() else t for t in arguments), *geometry)
    theirs = two_steps(*arguments, *geometry)
    allowed = fastseg.verification.criterion.relative_error(theirs, truth) + 8 * torch.finfo(dtype).eps
    assert fastseg.verification.criterion.relative_error(ours, truth) <= allowed
    assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_offsets_of_64_bits(layout, device, triton_backend, monkeypatch):
    monkeypatch.setattr(fastseg.kernels.convolution.gemm, "INT32_MAX", 0)
    x, offsets = pooled((1, 8, 4, 6), 2, 2, 0, False, torch.float32, layout, device)
    weight = torch.randn(8, 8, 3, 3, device=device)
    want = two_steps(x, offsets, weight, None, 2, 2, 0, (4, 6))
    torch.testing.assert_close(FS.max_unpool2d_conv2d(x, offsets, weight), want)


def test_unbatched_empty_and_without_bias(device, triton_backend):
    x, offsets = pooled((2, 8, 4, 6), 2, 2, 0, False, torch.float32, torch.contiguous_format, device)
    weight = torch.randn(4, 8, 3, 3, device=device)
    whole = FS.max_unpool2d_conv2d(x, offsets, weight)
    torch.testing.assert_close(FS.max_unpool2d_conv2d(x[1], offsets[1], weight), whole[1])
    assert FS.max_unpool2d_conv2d(x[:0], offsets[:0], weight).shape == (0, 4, 4, 6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts launches in the interpreter")
def test_the_unpooled_map_is_never_stored(device, triton_backend):
    x, offsets = pooled((1, 16, 16, 16), 2, 2, 0, False, torch.float16, torch.channels_last, device)
    weight = torch.randn(16, 16, 3, 3, device=device).half().contiguous(memory_format=torch.channels_last)
    with metering() as launches:
        y = FS.max_unpool2d_conv2d(x, offsets, weight)
    (traffic,) = launches
    floor = 2 * (x.numel() + weight.numel() + y.numel()) + offsets.numel()
    assert traffic.outside == 0 and traffic.sectors() <= 1.05 * floor


def test_gradients_are_those_of_two_steps(device, triton_backend):
    x, offsets = pooled((1, 4, 4, 6), 2, 2, 0, False, torch.float32, torch.channels_last, device)
    leaves = [x.requires_grad_(), torch.randn(3, 4, 3, 3, device=device, requires_grad=True)]
    y = FS.max_unpool2d_conv2d(leaves[0], offsets, leaves[1])
    want = two_steps(leaves[0], offsets, leaves[1], None, 2, 2, 0, (4, 6))
    grad = torch.randn_like(y)
    for a, b in zip(*(torch.autograd.grad(z, leaves, grad) for z in (y, want)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck(backend, device):
    x, offsets = pooled((2, 4, 5, 6), 2, 2, 0, True, torch.float32, torch.channels_last, device)
    weight, bias = torch.randn(3, 4, 3, 3, device=device), torch.randn(3, device=device)
    with fastseg.backend(backend):
        arguments = (x, offsets, weight, bias, PoolGeometry([2, 2], [2, 2], [0, 0]), [5, 6])
        torch.library.opcheck(MAX_UNPOOL2D_CONV2D.op, tuple(MAX_UNPOOL2D_CONV2D.flatten(arguments)))


def test_autocast(device):
    x, offsets = pooled((1, 4, 4, 6), 2, 2, 0, False, torch.float32, torch.channels_last, device)
    weight = torch.randn(3, 4, 3, 3, device=device)
    for backend in ("torch", "triton"):
        with fastseg.backend(backend), torch.autocast(device, torch.bfloat16):
            y = FS.max_unpool2d_conv2d(x, offsets, weight)
        assert y.dtype == torch.bfloat16
        want = two_steps(x, offsets, weight, None, 2, 2, 0, (4, 6))
        torch.testing.assert_close(y.float(), want, rtol=0.05, atol=0.1)


def test_what_runs_and_why(device, monkeypatch):
    x, offsets = pooled((1, 4, 4, 6), 2, 2, 0, False, torch.float32, torch.channels_last, device)
    weight = torch.randn(3, 4, 3, 3, device=device)
    arguments = (x, offsets, weight, None, PoolGeometry([2, 2], [2, 2], [0, 0]), [4, 6])
    for took, backend in (((1.0, 2.0), "triton"), ((2.0, 1.0), "torch"), (None, "torch")):
        monkeypatch.setattr(autotune, "times", lambda *rest, took=took: took)
        assert MAX_UNPOOL2D_CONV2D.preferred(*arguments)[0] == backend
    with fastseg.backend("triton"), pytest.raises(NotImplementedError, match="float64"):
        FS.max_unpool2d_conv2d(x.double(), offsets, weight.double())


def bad_calls():
    x, offsets = torch.zeros(1, 4, 2, 3), torch.zeros(1, 4, 2, 3, dtype=torch.uint8)
    weight = torch.zeros(3, 4, 3, 3)
    yield "weight", (x, offsets, weight[..., :2])
    yield "weight", (x, offsets, weight[0])
    yield "weight", (x, offsets, weight[:, :2])
    yield "weight", (x, offsets, weight.half())
    yield "bias", (x, offsets, weight, torch.zeros(4))
    yield "bias", (x, offsets, weight, torch.zeros(3).double())
    yield "offsets", (x, offsets.long(), weight)
    yield "offsets", (x, offsets[:, :2], weight)
    yield "offset", (x, offsets + 4, weight)


@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=pytest.mark.interpreted)])
@pytest.mark.parametrize("name, arguments", list(bad_calls()))
def test_bad_arguments(name, arguments, backend):
    with fastseg.backend(backend), pytest.raises(RuntimeError, match=f"max_unpool2d.*{name}"):
        FS.max_unpool2d_conv2d(*arguments)
