"""Depthwise transposed convolution, and dense weights that mix no channels, such as FCN's bilinear interpolation."""

import pytest
import torch
import torch.nn.functional as F
from support.conv_transpose_common import DTYPES, LAYOUTS, NAMES, affine_relu, on

import fastseg
from fastseg import functional as FS
from fastseg.inspect.traffic import metering

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="counts launches in the interpreter")

GEOMETRIES = [  # input, kernel, stride, padding, output_padding, dilation
    ((2, 8, 5, 8), 2, 2, 0, 0, 1),
    ((1, 21, 3, 4), 4, 2, 1, 0, 1),
    ((2, 16, 4, 3), 3, 2, 1, 1, 1),
    ((1, 5, 6, 4), (5, 3), 1, (2, 3), 0, (1, 2)),
    ((3, 24, 1, 1), 7, 3, 0, (1, 2), 1),
    ((1, 2, 10, 33), (1, 4), (3, 2), 0, 1, 1),
]


def tensors(shape, kernel, dtype, layout, device):
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    x = torch.randn(shape).to(device, dtype).contiguous(memory_format=layout)
    return x, torch.randn(shape[1], 1, *kernel).to(device, dtype), torch.randn(shape[1]).to(device, dtype)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("case", range(len(GEOMETRIES)))
def test_output_and_gradients(case, layout, device, triton_backend, assert_right):
    shape, kernel, stride, padding, extra, dilation = GEOMETRIES[case]
    inputs = tensors(shape, kernel, DTYPES[case % 3], layout, device)
    geometry = (stride, padding, extra, shape[1], dilation)
    assert_right(
        lambda *t: FS.conv_transpose2d(*t, *geometry), lambda *t: F.conv_transpose2d(*t, *geometry), inputs, NAMES
    )


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_affine_relu(layout, device, triton_backend, assert_right):
    x, weight, shift = tensors((2, 8, 3, 5), 3, torch.float32, layout, device)
    inputs = (x, weight, torch.randn_like(shift), shift)
    assert_right(
        lambda *t: FS.conv_transpose2d_affine_relu(*t, 2, 1, 1, 8), lambda *t: affine_relu(*t, 2, 1, 1, 8), inputs
    )


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_offsets_of_64_bits(layout, device, triton_backend, assert_right, monkeypatch):
    monkeypatch.setattr(fastseg.kernels.convolution.gemm, "INT32_MAX", 0)
    inputs = tensors((2, 8, 3, 4), 3, torch.float32, layout, device)
    assert_right(lambda *t: FS.conv_transpose2d(*t, 2, 1, 1, 8), lambda *t: F.conv_transpose2d(*t, 2, 1, 1, 8), inputs)


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_bytes_are_at_the_floor(layout, device, triton_backend):
    x, weight, _ = tensors((1, 64, 16, 16), 2, torch.float16, layout, device)
    with metering() as launches:
        y = FS.conv_transpose2d(x, weight, None, 2, 0, 0, 64)
    moved = sum(traffic.sectors() for traffic in launches)
    assert moved <= 1.05 * 2 * sum(t.numel() for t in (x, y, weight))
    assert not any(traffic.outside or traffic.flops for traffic in launches)


# --- the module ------------------------------------------------------------------------------------------------------


def bilinear(channels, size):
    """FCN's weights: interpolation of each channel by itself."""
    factor = (size + 1) // 2
    ramp = 1 - (torch.arange(size) - (factor - 1 if size % 2 else factor - 0.5)).abs() / factor
    weight = torch.zeros(channels, channels, size, size)
    weight[range(channels), range(channels)] = ramp[:, None] * ramp[None, :]
    return weight


def module(device, channels=5, size=4, stride=2):
    made = fastseg.nn.ConvTranspose2d(channels, channels, size, stride, stride // 2, bias=False).to(device)
    with torch.no_grad():
        made.weight.copy_(bilinear(channels, size))
    return made.requires_grad_(False)


def kernels_of(layer, x):
    with fastseg.backend("triton"), metering() as launches:
        layer(x)
    return str([traffic.kernel for traffic in launches])


@pytest.mark.parametrize("size, stride", [(4, 2), (16, 8), (64, 32)])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_bilinear_upsampling_equals_torchs_dense_convolution(size, stride, layout, device, triton_backend):
    layer = module(device, 3, size, stride)
    x = torch.randn(1, 3, 2, 3, device=device).contiguous(memory_format=layout).requires_grad_()
    ours, theirs = layer(x), F.conv_transpose2d(x, layer.weight, None, stride, stride // 2)
    torch.testing.assert_close(ours, theirs)
    if size == 64:
        return  # 4096 taps per pixel take the interpreter too long
    grad = torch.randn_like(theirs)
    for a, b in zip(*(torch.autograd.grad(y, x, grad) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@interpreted
def test_which_weights_run_depthwise(device):
    layer, x = module(device), torch.randn(1, 5, 3, 4, device=device)
    assert "depthwise" in kernels_of(layer, x)
    layer.requires_grad_()  # the gradient of the weight has entries off the diagonal
    assert "depthwise" not in kernels_of(layer, x)
    with torch.no_grad():
        assert "depthwise" in kernels_of(layer, x)
    layer.requires_grad_(False).groups = 5
    assert "depthwise" not in kernels_of(layer, x)


@interpreted
def test_a_changed_weight_is_checked_again(device):
    layer, x = module(device), torch.randn(1, 5, 3, 4, device=device)

    def right():
        torch.testing.assert_close(on("triton", layer)(x), F.conv_transpose2d(x, layer.weight, None, 2, 1))
        return "depthwise" in kernels_of(layer, x)

    assert right()
    layer.weight[0, 1] = 1  # in place
    assert not right()
    layer.weight[0, 1] = 0
    assert right()
    layer.weight.data[2, 2] = 3  # on the diagonal: right although torch does not count this write
    assert right()
    layer.load_state_dict({"weight": torch.randn_like(layer.weight)})
    assert not right()
    layer.weight = torch.nn.Parameter(bilinear(5, 4).to(device), requires_grad=False)
    assert right()
    layer.weight.data = torch.randn_like(layer.weight)
    assert not right()


def test_another_weight_in_the_same_memory_is_checked(device, triton_backend):
    """Even with the same version counter: the check is kept for each parameter object."""
    layer, x = module(device), torch.randn(1, 5, 3, 4, device=device)
    memory = layer.weight.detach().clone()
    layer.weight = torch.nn.Parameter(memory[:], requires_grad=False)
    layer(x)
    version, layer.weight = layer.weight._version, None
    memory.data.copy_(torch.randn_like(memory))
    layer.weight = torch.nn.Parameter(memory[:], requires_grad=False)
    assert layer.weight._version == version
    torch.testing.assert_close(layer(x), F.conv_transpose2d(x, memory, None, 2, 1), rtol=1e-4, atol=1e-5)


def test_the_weight_is_checked_once(device, monkeypatch, triton_backend):
    layer, x, counted = module(device), torch.randn(1, 5, 3, 4, device=device), []
    count = torch.Tensor.count_nonzero
    monkeypatch.setattr(torch.Tensor, "count_nonzero", lambda self: counted.append(self) or count(self))
    for _ in range(3):
        layer(x)
    assert len(counted) == 2  # the weight and its diagonal


def test_a_weight_made_in_inference_mode_is_not_checked(device, triton_backend):
    """Such a tensor has no version counter."""
    with torch.inference_mode():
        layer, x = module(device), torch.randn(1, 5, 3, 4, device=device)
        torch.testing.assert_close(layer(x), F.conv_transpose2d(x, layer.weight, None, 2, 1), rtol=1e-4, atol=1e-5)


def test_a_frozen_weight_compiles_in_one_graph(device, triton_backend):
    layer, x = module(device), torch.randn(1, 5, 3, 4, device=device)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), F.conv_transpose2d(x, layer.weight, None, 2, 1), rtol=1e-4, atol=1e-5)


def test_a_trained_weight_keeps_its_whole_gradient(device, triton_backend):
    layer, x = module(device).requires_grad_(), torch.randn(1, 5, 3, 4, device=device)
    layer(x).sum().backward()
    assert layer.weight.grad[0, 1].any()
