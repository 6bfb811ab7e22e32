"""conv_transpose2d and its fused form: outputs and gradients against torch, layouts, and determinism."""

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from support.conv_transpose_common import DTYPES, LAYOUTS, NAMES, affine_relu, on, pick, tensors

import fastseg
from fastseg import functional as FS
from fastseg import kernels
from fastseg.ops.convolution.conv_transpose_operators import CONV_TRANSPOSE2D
from fastseg.ops.convolution.options import NO_EPILOGUE, ConvTransposeGeometry
from fastseg.verification import criterion

STRIDE_1 = ConvTransposeGeometry([1, 1], [0, 0], [0, 0], 1, [1, 1])

# input, output channels, kernel, stride, padding, output_padding
GEOMETRIES = [
    ((2, 16, 5, 8), 8, 2, 2, 0, 0),  # kernel size = stride: shuffled in NCHW
    ((1, 5, 3, 5), 3, (4, 2), (4, 2), 0, 0),
    ((2, 24, 6, 5), 20, 4, 2, 1, 0),  # phases with equal taps
    ((1, 5, 7, 9), 3, 3, 2, 1, 1),  # phases with different taps
    ((1, 70, 2, 4), 40, 3, 1, 1, 0),  # several blocks of channels
    ((1, 4, 3, 4), 4, (4, 5), (2, 3), (1, 0), (1, 2)),
    ((1, 3, 4, 3), 5, (1, 2), 3, 0, 2),  # phases without taps
    ((2, 3, 3, 3), 5, 5, 2, 4, 1),  # padding larger than a cell
    ((3, 9, 1, 1), 33, 7, 1, 0, 0),  # one pixel becomes an image
    ((2, 8, 1, 5), 6, (3, 2), (1, 2), (0, 1), 0),
    ((1, 2, 10, 33), 4, 3, 2, 1, 1),  # several splits of the pixels
    ((1, 1, 1, 1), 1, 1, 1, 0, 0),
]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("case", range(len(GEOMETRIES)))
def test_output_and_gradients(case, layout, device, triton_backend, assert_right):
    shape, channels, kernel, *geometry = GEOMETRIES[case]
    dtype = DTYPES[(case + (layout == torch.channels_last)) % 3]
    inputs = tensors(shape, channels, kernel, dtype, layout, device)
    assert_right(
        lambda *t: FS.conv_transpose2d(*t, *geometry), lambda *t: F.conv_transpose2d(*t, *geometry), inputs, NAMES
    )


def drawn(device):
    """Random inputs and arguments that the kernels support: (input, weight, bias or None), arguments.

    Kernels of one tap are not dilated, because torch's gradients then crash on a CPU in half precision.
    """
    groups = pick(1, 1, 2, 3)
    shape = (pick(1, 2, 3), groups * pick(1, 3, 8, 17), pick(1, 2, 3, 5), pick(1, 2, 4, 7))
    kernel, stride = (pick(1, 2, 3, 4, 5), pick(1, 2, 3, 4)), (pick(1, 2, 3, 4), pick(1, 2, 3))
    dilation = tuple(pick(1, 2, 3) if s == 1 < k else 1 for s, k in zip(stride, kernel, strict=True))
    extra = tuple(torch.randint(max(s, d), ()).item() for s, d in zip(stride, dilation, strict=True))
    padding = tuple(
        min(pick(0, 1, 2, 3), ((size - 1) * s + d * (k - 1) + e) // 2)
        for size, s, k, e, d in zip(shape[2:], stride, kernel, extra, dilation, strict=True)
    )
    layout, weight_layout = pick(*LAYOUTS.values()), pick(*LAYOUTS.values())
    x, weight, _ = tensors(shape, pick(1, 4, 8, 19), kernel, pick(*DTYPES), layout, device, weight_layout)
    bias = torch.randn(weight.shape[1] * groups).to(device, x.dtype)
    arguments = (stride, padding, extra, groups, dilation)
    print(shape, weight.shape, arguments, x.dtype, layout, weight_layout)
    return (x[0] if pick(True, False) and len(x) == 1 else x, weight, pick(bias, None)), arguments


@pytest.mark.parametrize("draw", range(32))
def test_any_arguments(draw, device, triton_backend, assert_right):
    """As on GPUs with TMA and as on GPUs without."""
    inputs, arguments = drawn(device)
    with kernels.launch.targeting(80) if draw % 2 else contextlib.nullcontext():
        assert_right(
            lambda *t: FS.conv_transpose2d(*t, *arguments), lambda *t: F.conv_transpose2d(*t, *arguments), inputs, NAMES
        )


@pytest.mark.parametrize("draw", range(16))
def test_affine_relu(draw, device, triton_backend, assert_right):
    """The output and four gradients, with negative and zero scales too."""
    (x, weight, _), arguments = drawn(device)
    channels = weight.shape[1] * arguments[3]
    scale = torch.randn(channels, device=device)
    scale[0] = 0
    inputs = (x, weight, pick(scale, None), pick(torch.randn(channels, device=device), None))
    assert_right(
        lambda *t: FS.conv_transpose2d_affine_relu(*t, *arguments), lambda *t: affine_relu(*t, *arguments), inputs,
        ["input", "weight", "scale", "shift"],
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_affine_relu_on_torch(dtype, device):
    """Under "auto" on a CPU, and for what the kernels do not support; images without a batch too."""
    x, weight, _ = tensors((1, 4, 3, 5), 6, 3, dtype, torch.contiguous_format, device)
    scale, shift = torch.randn(6, device=device), torch.randn(6, device=device)
    for some in ((scale, shift), (scale, None), (None, shift), (None, shift.to(dtype)), (None, None)):
        with fastseg.backend("auto"):
            y = FS.conv_transpose2d_affine_relu(x, weight, *some, 2, 1)
            assert torch.equal(FS.conv_transpose2d_affine_relu(x[0], weight, *some, 2, 1), y[0])
        want = affine_relu(x.double(), weight.double(), *some, 2, 1)
        assert y.dtype == dtype and criterion.relative_error(y, want) <= 8 * torch.finfo(dtype).eps + 1e-7


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("name", ["scale", "shift"])
@pytest.mark.parametrize("value", [torch.zeros(3), torch.zeros(1, 2), torch.zeros(2).double(), torch.zeros(2).half()])
def test_bad_scales_and_shifts(value, name, backend):
    x, weight = torch.zeros(1, 4, 3, 3), torch.zeros(4, 2, 3, 3)
    with fastseg.backend(backend), pytest.raises(RuntimeError, match=f"conv_transpose2d_affine_relu: {name} must"):
        FS.conv_transpose2d_affine_relu(x, weight, **{name: value})
    with pytest.raises(RuntimeError, match=f"{name} must be on input's device cpu, but is on meta"):
        FS.conv_transpose2d_affine_relu(x, weight, **{name: torch.zeros(2, device="meta")})


def test_relu_keeps_nan(device, triton_backend):
    x, weight, bias = tensors((1, 4, 3, 3), 2, 2, torch.float32, torch.contiguous_format, device)
    x[0, 0, 1, 1] = torch.nan
    y = FS.conv_transpose2d_affine_relu(x, weight, None, bias, 2)
    assert torch.equal(y.isnan(), F.conv_transpose2d(x, weight, bias, 2).isnan()) and y.isnan().any()


@pytest.mark.parametrize("x_layout, weight_layout", list(itertools.product(LAYOUTS, LAYOUTS)))
def test_layouts_are_torchs(x_layout, weight_layout, device):
    """The layouts of the result and the input's gradient. The weight's gradient has the weight's layout."""
    x, weight, bias = tensors((2, 8, 5, 6), 4, 3, torch.float32, LAYOUTS[x_layout], device, LAYOUTS[weight_layout])
    slices = (x[:, :, :4], x[..., 1:], x[:, :1], x[:1, :, :1, :1], x[:, :1, :1, :1].contiguous())
    for source in (x, torch.cat([x, x], 1)[:, :8], x.transpose(2, 3), *slices):
        for w in (weight, weight[:, :1], weight[:, :, :1, :1], weight[..., 1:]):
            w = w[: source.shape[1]]
            want = F.conv_transpose2d(source, w)
            got = CONV_TRANSPOSE2D.fake(source, w, STRIDE_1, NO_EPILOGUE)
            assert got.shape == want.shape and got.stride() == want.stride(), (source.stride(), w.stride())
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = on("triton")(*leaves, 2)
    grad_x, grad_weight, _ = torch.autograd.grad(y, leaves, torch.randn_like(y).contiguous())
    either = torch.channels_last if "channels_last" in (x_layout, weight_layout) else torch.contiguous_format
    assert y.is_contiguous(memory_format=either) and grad_x.is_contiguous(memory_format=either)
    assert grad_weight.is_contiguous(memory_format=LAYOUTS[weight_layout])


def test_inputs_that_are_not_dense(device, triton_backend, assert_right):
    inputs = tensors((2, 8, 5, 6), 4, 3, torch.float32, torch.channels_last, device)

    def strided(function):
        def call(x, weight, bias):
            y = function(x[:, ::2, 1:].transpose(2, 3), weight[1::2], bias.expand(2, 4)[1], 2, 1)
            return y.sum((2, 3), keepdim=True).expand_as(y) + y[:1, :1]  # the gradient of y has strides of 0

        return call

    assert_right(strided(FS.conv_transpose2d), strided(F.conv_transpose2d), inputs, NAMES)


def test_unbatched(device, triton_backend, assert_right):
    x, weight, bias = tensors((1, 5, 4, 3), 6, 3, torch.float32, torch.contiguous_format, device)
    inputs = (x[0], weight, bias)
    assert_right(lambda *t: FS.conv_transpose2d(*t, 2), lambda *t: F.conv_transpose2d(*t, 2), inputs, NAMES)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_empty_batch(layout, device, triton_backend, poison):
    leaves = [t.requires_grad_() for t in tensors((0, 4, 3, 3), 5, 3, torch.float32, layout, device)]
    y = FS.conv_transpose2d(*leaves, 2)
    assert y.shape == (0, 5, 7, 7)
    y.sum().backward()
    assert leaves[0].grad.shape == (0, 4, 3, 3)
    assert not leaves[1].grad.any() and not leaves[2].grad.any()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_sums_with_any_number_of_splits(layout, device, triton_backend, assert_right, monkeypatch):
    """One split is summed in place; the partials of more are added in order."""
    inputs = tensors((2, 4, 6, 12), 3, 2, torch.float32, layout, device)
    counts = []
    for least in (1, 3, 10**6):
        monkeypatch.setattr(kernels.convolution.gemm, "LEAST_STEPS", least)
        counts.append(kernels.convolution.gemm.split_k(steps=30, tiles=2)[1])
        assert_right(lambda *t: FS.conv_transpose2d(*t, 2), lambda *t: F.conv_transpose2d(*t, 2), inputs, NAMES)
    assert counts == [30, 10, 1]


def test_two_runs_are_equal_to_the_bit(device, triton_backend, monkeypatch):
    monkeypatch.setattr(kernels.convolution.gemm, "LEAST_STEPS", 1)
    leaves = [t.requires_grad_() for t in tensors((2, 4, 6, 12), 6, 3, torch.float32, torch.channels_last, device)]

    def run():
        y = FS.conv_transpose2d(*leaves, 2)
        return y, *torch.autograd.grad(y, leaves, torch.ones_like(y))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("geometry", [(2, 2), (3, 2, 1, 1), (4, 3)])
def test_offsets_of_64_bits(geometry, layout, device, triton_backend, assert_right, monkeypatch):
    monkeypatch.setattr(kernels.convolution.gemm, "INT32_MAX", 0)
    assert kernels.convolution.gemm.needs_int64_offsets(torch.empty(1))
    kernel, *rest = geometry
    inputs = tensors((2, 8, 3, 4), 5, kernel, torch.float32, layout, device)
    assert_right(lambda *t: FS.conv_transpose2d(*t, *rest), lambda *t: F.conv_transpose2d(*t, *rest), inputs, NAMES)


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3)))
def test_only_what_is_needed_is_computed(needed, device, triton_backend):
    inputs = tensors((1, 4, 3, 4), 3, 2, torch.float32, torch.channels_last, device)
    for t, need in zip(inputs, needed, strict=True):
        t.requires_grad_(need)
    y = FS.conv_transpose2d(*inputs, 2)
    assert y.requires_grad == any(needed)
    if not any(needed):
        return
    launched = []
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, [t for t in inputs if t.requires_grad], grad, retain_graph=True)
    want = torch.autograd.grad(F.conv_transpose2d(*inputs, 2), [t for t in inputs if t.requires_grad], grad)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)
    with kernels.launch.recording(lambda kernel, *rest: launched.append(kernel.fn.__name__)):
        y.backward(grad)
    parts = ["bwd_input" in str(launched), "bwd_weight" in str(launched), "bwd_epilogue" in str(launched)]
    assert parts == list(needed)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_element_is_written(layout, device, triton_backend):
    """With phases without taps, output_padding, and cells that the padding cuts; new tensors are full of NaN."""
    with criterion.poisoned():
        assert torch.empty(4, device=device).isnan().all()
    for shape, channels, kernel, stride, padding, extra in GEOMETRIES[5:8]:
        x, weight, _ = tensors(shape, channels, kernel, torch.float16, layout, device)
        with criterion.poisoned():
            assert FS.conv_transpose2d(x, weight, None, stride, padding, extra).isfinite().all()
