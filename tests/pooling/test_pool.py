"""max_pool2d: bit-identical to torch, addresses, gradients, compilation, and invalid arguments."""

import pytest
import torch
import torch.nn.functional as F
from support.pool_common import GEOMETRIES, LAYOUTS

import fastseg
from fastseg import functional as FS
from fastseg.kernels.pooling.geometry import PoolGeometry
from fastseg.ops.pooling import pool
from fastseg.ops.pooling.geometry import pooled_size


def image_with_special_values(shape, dtype, layout, device):
    """An image with ties, NaN, and windows of NaN only and of -inf only."""
    x = torch.randn(shape, device=device).mul(2).round().to(dtype)
    if x.numel() > 20:
        x.view(-1)[:3] = float("nan")
        x[0, -1, :3, :3] = float("nan")
        x[..., -3:, :] = -float("inf")
    return x.contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape, kernel, stride, padding, ceil_mode", GEOMETRIES)
def test_equals_torch_to_the_bit(shape, kernel, stride, padding, ceil_mode, dtype, layout, device, triton_backend):
    x = image_with_special_values(shape, dtype, layout, device)
    ours, theirs, offset = (x.clone().requires_grad_() for _ in range(3))
    geometry = (kernel, stride, padding)
    y, indices = FS.max_pool2d(ours, *geometry, ceil_mode=ceil_mode, return_indices=True)
    want, want_indices = F.max_pool2d(theirs, *geometry, ceil_mode=ceil_mode, return_indices=True)
    torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(indices, want_indices)
    if x.numel():
        assert y.stride() == want.stride() and indices.stride() == want.stride()
    z, offsets = FS.max_pool2d_with_offsets(offset, *geometry, ceil_mode=ceil_mode)
    torch.testing.assert_close(z, want, rtol=0, atol=0, equal_nan=True)
    assert offsets.dtype == torch.uint8
    assert torch.equal(FS.offsets_to_indices(offsets, *geometry, width=shape[-1]), want_indices)
    assert torch.equal(FS.indices_to_offsets(want_indices, *geometry, width=shape[-1]), offsets)
    grad = torch.randn_like(want)
    with fastseg.verification.criterion.poisoned():
        y.backward(grad)
        z.backward(grad)
    want.backward(grad)
    assert torch.equal(ours.grad, theirs.grad) and torch.equal(offset.grad, theirs.grad)
    assert torch.equal(FS.max_pool2d(x, *geometry, ceil_mode=ceil_mode).nan_to_num(), want.nan_to_num())


def test_offsets_of_64_bits(monkeypatch, device, triton_backend):
    """The addresses for tensors of more than 2^31 elements, forced for a small one."""
    from fastseg.kernels.pooling import tiling

    x = torch.randn(2, 8, 6, 10, device=device, requires_grad=True)
    want, want_indices = F.max_pool2d(x, 2, return_indices=True)
    monkeypatch.setattr(tiling, "INT32_MAX", 0)
    assert tiling.Tiling(PoolGeometry([2, 2], [2, 2], [0, 0]), False).constants(x, want, 4)["WIDE"]
    y, indices = FS.max_pool2d(x, 2, return_indices=True)
    assert torch.equal(y, want) and torch.equal(indices, want_indices)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(want.sum(), x)[0])


def test_64_bits_are_used_where_32_would_overflow():
    from fastseg.kernels.pooling.tiling import Tiling

    windows = Tiling(PoolGeometry([2, 2], [2, 2], [0, 0]), True)
    for batch, wide in ((7, False), (8, True)):
        image = torch.empty(batch, 64, 2048, 2048, device="meta")
        pooled = torch.empty(batch, 64, 1024, 1024, device="meta")
        assert windows.constants(image, pooled, 8)["WIDE"] == wide


@pytest.mark.parametrize("trial", range(8))
def test_the_reference_supports_every_argument(trial, device):
    """With overlap, dilation and ceil_mode the operators' reference equals torch in float64, backward too."""
    draw = lambda low, high: int(torch.randint(low, high + 1, ()))  # noqa: E731
    kernel, stride, dilation = [draw(1, 4), draw(1, 4)], [draw(1, 3), draw(1, 3)], [draw(1, 2), draw(1, 2)]
    padding, ceil_mode = [draw(0, k // 2) for k in kernel], bool(draw(0, 1))
    x = torch.randn(2, 3, draw(9, 14), draw(9, 14), dtype=torch.float64, device=device, requires_grad=True)
    geometry = PoolGeometry(kernel, stride, padding, dilation)
    with fastseg.backend("torch"):
        y, offsets = pool.MaxPool2dFunction.apply(x, geometry, ceil_mode, "offsets")
        want, indices = F.max_pool2d(x, *geometry, ceil_mode, return_indices=True)
        assert list(y.shape[-2:]) == pooled_size(x.shape[-2:], geometry, ceil_mode)
        assert torch.equal(y, want)
        assert torch.equal(FS.offsets_to_indices(offsets, kernel, stride, padding, x.shape[-1], dilation), indices)
        grad = torch.randn_like(y)
        torch.testing.assert_close(*(torch.autograd.grad(v, x, grad)[0] for v in (y, want)))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("positions", ["none", "offsets", "indices"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
def test_opcheck(backend, positions, layout, device):
    x = torch.randn(2, 3, 7, 8, device=device).contiguous(memory_format=layout)
    geometry = ([2, 2], [2, 2], [0, 0], [1, 1])
    with fastseg.backend(backend):
        torch.library.opcheck(torch.ops.fastseg.max_pool2d.default, (x, *geometry, True, positions))
        if positions != "none":
            y, kept = pool.MAX_POOL2D(x, PoolGeometry(*geometry), True, positions)
            torch.library.opcheck(torch.ops.fastseg.max_pool2d_backward.default, (y, kept, *geometry, [7, 8]))


def test_gradients(device):
    x = torch.randperm(120, dtype=torch.float64, device=device).view(1, 3, 5, 8).requires_grad_()
    geometry = PoolGeometry([3, 2], [2, 2], [1, 0], [1, 1])
    pooled = lambda x: pool.MaxPool2dFunction.apply(x, geometry, False, "offsets")[0]  # noqa: E731
    with fastseg.backend("torch"):
        assert torch.autograd.gradcheck(pooled, x)
        assert torch.autograd.gradgradcheck(pooled, x)


def test_second_derivative_through_the_kernels(device, triton_backend):
    x = torch.randn(1, 2, 4, 6, device=device, requires_grad=True)

    def second(function):
        (first,) = torch.autograd.grad((function(x, 2) ** 3).sum(), x, create_graph=True)
        return torch.autograd.grad((first**2).sum(), x)[0]

    torch.testing.assert_close(second(FS.max_pool2d), second(F.max_pool2d))


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compiles_in_one_graph(backend, device):
    x = torch.randn(2, 4, 7, 10, device=device, requires_grad=True)

    def function(x):
        y, indices = FS.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
        z, offsets = FS.max_pool2d_with_offsets(x, 2)
        return y.sum() + (z * 2).sum() + FS.max_pool2d(x, 3).sum() * 3, indices, offsets

    with fastseg.backend(backend):
        eager, compiled = function(x), torch.compile(function, fullgraph=True, backend="aot_eager")(x)
        for a, b in zip(eager, compiled, strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(torch.autograd.grad(eager[0], x)[0], torch.autograd.grad(compiled[0], x)[0])


@pytest.mark.parametrize(
    "change",
    [
        {"kernel_size": 0},
        {"kernel_size": (2, 2, 2)},
        {"kernel_size": 2.0},
        {"kernel_size": "22"},
        {"input": [1.0]},
        {"stride": 0},
        {"padding": 2},
        {"padding": -1},
        {"dilation": 0},
        {"kernel_size": 20},
        {"input": torch.zeros(4, 4)},
        {"input": torch.zeros(1, 0, 4, 4)},
        {"input": torch.zeros(1, 3, 0, 4)},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_bad_arguments_raise_what_torch_raises(change, backend):
    arguments = {"input": torch.zeros(1, 3, 8, 8), "kernel_size": 2} | change
    with pytest.raises(Exception) as theirs:
        F.max_pool2d(**arguments)
    name = next(iter(change))
    with fastseg.backend(backend), pytest.raises(theirs.type, match=name):
        FS.max_pool2d(**arguments)


def test_an_unsupported_dtype_falls_back_to_torch_or_raises_with_a_reason(triton_backend):
    x = torch.randint(9, (1, 2, 8, 8))
    with pytest.raises(NotImplementedError, match=r"dtype torch\.int64"):
        FS.max_pool2d(x, 2)
    fastseg.set_backend("auto")
    assert torch.equal(FS.max_pool2d(x, 2), F.max_pool2d(x, 2))


def test_offsets_of_large_windows_raise():
    with pytest.raises(RuntimeError, match="kernel_size"):
        FS.max_pool2d_with_offsets(torch.zeros(1, 1, 40, 40), 17)
    with pytest.raises(RuntimeError, match="kernel_size"):
        FS.max_unpool2d_with_offsets(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.uint8), 17)


def test_strided_views_give_the_same_results(device, triton_backend):
    base = torch.randn(2, 6, 9, 20, device=device)
    for x in (base[:, ::2], base[:, :, 1:, 3:], base.transpose(2, 3), base.permute(0, 2, 3, 1)):
        want, want_indices = F.max_pool2d(x, 2, return_indices=True)
        y, indices = FS.max_pool2d(x, 2, return_indices=True)
        assert torch.equal(y, want) and torch.equal(indices, want_indices)
