"""Pooling and unpooling with random arguments, conversion of positions, transforms, autocast and determinism."""

import pytest
import torch
import torch.nn.functional as F

import fastseg
from fastseg import functional as FS
from fastseg import kernels
from fastseg.kernels.launch import recording
from fastseg.kernels.pooling.geometry import PoolGeometry
from fastseg.kernels.pooling.tiling import Tiling
from fastseg.ops.operator import memory_format, observing
from fastseg.ops.pooling.geometry import pooled_size
from fastseg.verification import criterion

LAYOUTS = ("nchw", "channels_last", "unbatched")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def draw(low, high):
    return int(torch.randint(low, high + 1, ()))


def geometry(most=5):
    """Random (kernel_size, stride, padding, dilation, ceil_mode)."""
    kernel = [draw(1, most), draw(1, most)]
    return (
        kernel,
        [draw(1, 4), draw(1, 4)],
        [draw(0, k // 2) for k in kernel],
        [draw(1, 3), draw(1, 3)],
        bool(draw(0, 1)),
    )


def image(geometry, dtype, layout):
    """An image that at least one window fits into, with few different values, so that maxima tie."""
    kernel, _, padding, dilation, _ = geometry
    size = [
        max((k - 1) * d + 1 - 2 * p, d) + draw(0, 7) for k, p, d in zip(kernel, padding, dilation, strict=True)
    ]  # fmt: skip
    shape = (draw(1, 9), *size) if layout == "unbatched" else (draw(0, 2), draw(1, 9), *size)
    x = torch.randn(shape).mul(2).round().to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def assert_pools(x, arguments):
    """Values, indices and offsets are bit-identical to torch's; gradients are as exact as torch's."""
    print(tuple(x.shape), *arguments)
    kernel, stride, padding, dilation, _ = arguments
    y, indices = FS.max_pool2d(x, *arguments, return_indices=True)
    want, want_indices = F.max_pool2d(x, *arguments, return_indices=True)
    assert torch.equal(y, want) and torch.equal(indices, want_indices)
    assert list(y.shape[-2:]) == pooled_size(x.shape[-2:], PoolGeometry(*arguments[:-1]), arguments[-1])
    assert x.numel() == 0 or (y.stride() == want.stride() and indices.stride() == want.stride())
    offsets = FS.max_pool2d_with_offsets(x, *arguments)[1]
    windows = (kernel, stride, padding, x.shape[-1], dilation)
    assert torch.equal(FS.offsets_to_indices(offsets, *windows), want_indices)
    assert torch.equal(FS.indices_to_offsets(want_indices, *windows), offsets)
    for keep_indices in (False, True):

        def ours(x, keep_indices=keep_indices):
            y = FS.max_pool2d(x, *arguments, return_indices=keep_indices)
            return y[0] if keep_indices else y

        for c in criterion.compare_to_torch(ours, lambda x: F.max_pool2d(x, *arguments), [x]):
            assert c.passed, c


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trial", range(3))
def test_pools_of_random_arguments(trial, dtype, layout, device, triton_backend):
    arguments = geometry()
    assert_pools(image(arguments, dtype, layout).to(device), arguments)


@pytest.mark.parametrize("dilation", [1, 2, (3, 2)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_tap_inside_an_image_of_minus_infinity(layout, dilation, device, triton_backend):
    """With a dilation the first tap inside the image is not the first pixel."""
    x = torch.full((2, 9, 10) if layout == "unbatched" else (1, 2, 9, 10), -float("inf"), device=device)
    x = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x
    (y, ours), (want, theirs) = (f.max_pool2d(x, 3, 1, 1, dilation, return_indices=True) for f in (FS, F))
    assert torch.equal(y, want) and torch.equal(ours, theirs)


@pytest.mark.parametrize("kernel, padding", [(3, 1), (4, 1), (5, 2), (1, 0), ((3, 2), (0, 0)), ((1, 6), (0, 2))])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_rows_of_whole_runs(dtype, kernel, padding, device, triton_backend):
    """With stride 2 and two pixels of a row per window, whole runs are loaded and split, for windows of any size."""
    kernel, padding = ([n, n] if isinstance(n, int) else list(n) for n in (kernel, padding))
    assert_pools(
        torch.randn(2, 2, 7, 24, device=device).mul(2).round().to(dtype), (kernel, [2, 2], padding, [1, 1], False)
    )


def in_order(x, indices, *geometry):
    """torch's unpooling on a CPU in NCHW, where it goes through each plane in order."""
    return F.max_unpool2d(x.cpu().contiguous(), indices.cpu().contiguous(), *geometry).to(x.device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trial", range(4))
def test_unpools_of_random_arguments(trial, dtype, layout, device, triton_backend):
    """Windows that overlap or leave gaps, padding, and any output_size that they allow."""
    kernel, stride, padding, _, _ = arguments = geometry(4)
    plane = image((kernel, stride, padding, [1, 1], False), torch.float64, layout)
    _, indices = F.max_pool2d(plane, kernel, stride, padding, 1, arguments[4], return_indices=True)
    smallest = [(o - 1) * s - 2 * p + k for o, s, p, k in zip(indices.shape[-2:], stride, padding, kernel, strict=True)]
    size = [draw(max(least - s + 1, 1), least + s - 1) for least, s in zip(smallest, stride, strict=True)]
    # The pool's positions, clamped into the new plane if that is smaller; some are then outside their windows.
    rows, columns = indices // plane.shape[-1], indices % plane.shape[-1]
    indices = (rows.clamp(max=size[0] - 1) * size[1] + columns.clamp(max=size[1] - 1)).to(device)
    x = torch.randn(indices.shape).to(dtype).to(device)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    print(tuple(x.shape), *arguments, size)

    for c in criterion.compare_to_torch(
        lambda x: FS.max_unpool2d(x, indices, kernel, stride, padding, size),
        lambda x: in_order(x, indices, kernel, stride, padding, size),
        [x],
    ):
        assert c.error == 0, c
    y = FS.max_unpool2d(x, indices, kernel, stride, padding, size)
    assert x.numel() == 0 or y.is_contiguous(memory_format=memory_format(x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "kernel, stride, padding", [(3, 2, 1), (3, 1, 1), ((2, 4), (1, 3), (1, 2)), (5, (1, 2), 2), (9, 9, 0)]
)
def test_unpools_from_offsets_of_any_window(kernel, stride, padding, layout, device, triton_backend):
    """Offsets from a pool. If windows share a maximum, the value of the last window in row-major order stays."""
    x = torch.randn((3, 12, 20) if layout == "unbatched" else (2, 3, 12, 20), device=device)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    pooled, offsets = FS.max_pool2d_with_offsets(x, kernel, stride, padding)
    _, indices = F.max_pool2d(x, kernel, stride, padding, return_indices=True)
    values, size = torch.randn_like(pooled), x.shape[-2:]
    for c in criterion.compare_to_torch(
        lambda v: FS.max_unpool2d_with_offsets(v, offsets, kernel, stride, padding, size),
        lambda v: in_order(v, indices, kernel, stride, padding, size),
        [values],
    ):
        assert c.error == 0, c


@pytest.mark.parametrize("kernel, stride, shape", [((18, 15), 15, (1, 2, 18, 15)), (9, 1, (2, 12, 13))])
def test_large_windows_run_in_a_loop(kernel, stride, shape, device, triton_backend):
    """More than 256 elements need int64 indices; 81 elements, and 81 windows per pixel, are not unrolled."""
    ours, theirs = (torch.randn(shape, device=device).round().requires_grad_() for _ in range(2))
    theirs.data.copy_(ours)
    y, want = FS.max_pool2d(ours, kernel, stride), F.max_pool2d(theirs, kernel, stride)
    assert torch.equal(y, want)
    assert y.grad_fn.saved_tensors[0].dtype == (torch.uint8 if kernel == 9 else torch.int64)
    grad = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(v, x, grad)[0] for v, x in ((y, ours), (want, theirs))))


@pytest.mark.interpreted
def test_values_at_out_of_range_positions_are_not_written():
    """The kernels themselves, without the check for CPU tensors, for overlapping windows."""
    guard = torch.full((3, 1, 1, 8, 8), 7.0)
    indices = torch.tensor([0, -70, 2**32 + 3, 200], dtype=torch.int64).repeat(4).view(1, 1, 4, 4)
    windows = Tiling(PoolGeometry([3, 3], [2, 2], [1, 1]), False)
    kernels.pooling.unpool.max_unpool2d_fwd(torch.ones(1, 1, 4, 4), indices, guard[1], *windows, trusted=False)
    assert (guard[0] == 7).all() and (guard[2] == 7).all()
    assert guard[1].sum() == 1 and guard[1, 0, 0, 0, 0] == 1
    offsets = torch.tensor([[4, 9, 255, 8], [0, 4, 4, 4], [4, 4, 4, 4], [4, 4, 4, 4]]).byte().view(1, 1, 4, 4)
    inside = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]).view(1, 1, 4, 4)
    for positions, valid in ((indices, indices == 0), (offsets, inside)):
        grad = torch.full((1, 1, 4, 4), float("nan"))
        kernels.pooling.unpool.max_unpool2d_bwd(torch.ones(1, 1, 8, 8), positions, grad, *windows)
        assert torch.equal(grad, valid.float())


@pytest.mark.parametrize("shape", [(2, 3, 7, 8), (3, 7, 8)])
@pytest.mark.parametrize("positions", ["offsets", "indices"])
def test_opcheck(positions, shape, device, triton_backend):
    x, windows = torch.randn(shape, device=device), ([3, 2], [2, 1], [1, 1])
    torch.library.opcheck(torch.ops.fastseg.max_pool2d.default, (x, *windows, [2, 1], True, positions))
    y, kept = torch.ops.fastseg.max_pool2d(x, *windows, [2, 1], True, positions)
    torch.library.opcheck(torch.ops.fastseg.max_pool2d_backward.default, (y, kept, *windows, [2, 1], [7, 8]))
    y, kept = torch.ops.fastseg.max_pool2d(x, *windows, [1, 1], False, positions)
    torch.library.opcheck(torch.ops.fastseg.max_unpool2d.default, (y, kept, *windows, [1, 1], [7, 8]))
    torch.library.opcheck(torch.ops.fastseg.max_unpool2d_backward.default, (x, kept, *windows, [1, 1]))


def test_positions_that_cannot_be_converted_raise():
    offsets, indices = torch.zeros(1, 1, 4, 4, dtype=torch.uint8), torch.zeros(1, 1, 4, 4, dtype=torch.int64)
    for convert, positions in ((FS.offsets_to_indices, offsets), (FS.indices_to_offsets, indices)):
        with pytest.raises(RuntimeError, match="more than 256"):
            convert(positions, 17, None, 0, width=68)
        with pytest.raises(RuntimeError, match="dilation"):
            convert(positions, 2, (), 0, width=8, dilation=0)


# --- transforms, autocast, determinism -------------------------------------------------------------------------------


def pools(x, F_):
    y, indices = F_.max_pool2d(x, 3, 2, 1, return_indices=True)
    unpool = in_order if F_ is F else F_.max_unpool2d
    return unpool(y * y, indices, 3, 2, 1, x.shape[-2:]) + F_.max_pool2d(x, 3, 1, 1)


@pytest.mark.parametrize("shape", [(3, 2, 2, 6, 7), (3, 2, 6, 7)])
@pytest.mark.parametrize("dim", [0, 1])
def test_vmap_equals_a_loop(shape, dim, device, triton_backend):
    x = torch.randn(shape, device=device)
    if dim == 1:
        x = x.transpose(0, 1).contiguous()
    mapped = torch.func.vmap(lambda x: pools(x, FS), in_dims=dim)(x)
    torch.testing.assert_close(mapped, torch.stack([pools(image, F) for image in x.unbind(dim)]), rtol=0, atol=0)
    offsets = torch.func.vmap(lambda x: FS.max_pool2d_with_offsets(x, 2)[1], in_dims=dim)(x)
    assert offsets.dtype == torch.uint8 and offsets.shape[0] == x.shape[dim]


def test_vmap_over_one_of_two_arguments(device, triton_backend):
    """Values mapped and indices shared, and the other way round."""
    values, indices = F.max_pool2d(torch.randn(4, 2, 6, 6, device=device), 2, return_indices=True)
    for in_dims, arguments in (((0, None), (values, indices[0])), ((None, 0), (values[0], indices))):
        both = zip(*(a.expand_as(values) for a in arguments), strict=True)
        mapped = torch.func.vmap(lambda v, i: FS.max_unpool2d(v, i, 2), in_dims)(*arguments)
        assert torch.equal(mapped, torch.stack([F.max_unpool2d(v, i, 2) for v, i in both]))


def test_gradients_by_transforms(device, triton_backend):
    """grad, grad of grad, vmap of grad and grad of vmap."""
    x = torch.randn(3, 2, 6, 7, dtype=torch.float64, device=device)
    from torch.func import grad, vmap

    def loss(F_):
        return lambda x: (pools(x, F_) ** 3).sum()

    def nested(F_):
        return {
            "grad": grad(loss(F_))(x),
            "grad of grad": grad(lambda x: (grad(loss(F_))(x) ** 2).sum())(x),
            "vmap of grad": vmap(grad(loss(F_)))(x),
            "grad of vmap": grad(lambda x: vmap(loss(F_))(x).sum())(x),
        }

    ours, theirs = nested(FS), nested(F)
    for name, want in theirs.items():
        torch.testing.assert_close(ours[name], want, msg=name)


def test_forward_mode_raises_not_implemented(device, triton_backend):
    x = torch.randn(1, 2, 4, 4, device=device)
    indices = torch.arange(16, device=device).view(1, 1, 4, 4).repeat(1, 2, 1, 1)
    for function in (
        lambda x: FS.max_pool2d(x, 2),
        lambda x: FS.max_pool2d_with_offsets(x, 2)[0],
        lambda x: FS.max_unpool2d(x, indices, 2),
    ):
        with pytest.raises(NotImplementedError, match="jvp"):
            torch.func.jvp(function, (x,), (x,))


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_gradients_of_overlapping_windows(backend, device):
    """First and second derivatives against finite differences in float64."""
    x = torch.randperm(30, dtype=torch.float64, device=device).view(1, 1, 5, 6).div(3).requires_grad_()
    indices = torch.randperm(30, device=device)[:6].view(1, 1, 2, 3)
    v = torch.randn(1, 1, 2, 3, dtype=torch.float64, device=device, requires_grad=True)
    with fastseg.backend(backend):
        for function, at in (
            (lambda x: FS.max_pool2d(x, 3, 2, 1, 1) ** 2, x),
            (lambda x: FS.max_pool2d(x, 2, 1, 0, 2, return_indices=True)[0] ** 2, x),
            (lambda x: FS.max_pool2d_with_offsets(x, 3, 1)[0] ** 2, x),
            (lambda v: FS.max_unpool2d(v, indices, 3, 2, output_size=(5, 6)) ** 2, v),
        ):
            assert torch.autograd.gradcheck(function, at, fast_mode=True)
            assert torch.autograd.gradgradcheck(function, at, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast_passes_the_dtype_through(dtype, device):
    """As in torch on a GPU. On a CPU torch unpools in float32, and so does "auto"."""
    x = torch.randn(1, 2, 6, 6, dtype=dtype, device=device, requires_grad=True)

    def run(F_):
        y, indices = F_.max_pool2d(x, 3, 2, 1, return_indices=True)
        z = F_.max_unpool2d(y, indices, 3, 2, 1, output_size=(6, 6))
        return y.dtype, z.dtype, torch.autograd.grad(z.sum(), x)[0].dtype

    with torch.autocast(device, torch.bfloat16):
        assert run(FS) == run(F)
        with fastseg.backend("triton"):
            assert run(FS) == (dtype, dtype, dtype)


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_deterministic_algorithms_are_supported(backend, poison, device):
    """torch's own unpooling raises. If indices repeat, the last stays, on every backend."""
    x = torch.randn(2, 2, 3, 4, device=device, requires_grad=True)
    indices = torch.randint(0, 5, x.shape, device=device)
    with pytest.raises(RuntimeError, match="deterministic"):
        F.max_unpool2d(x, indices, 2)
    want = torch.zeros(4, 48)
    for plane, (values, places) in enumerate(zip(x.reshape(4, 12).tolist(), indices.reshape(4, 12).tolist())):  # noqa: B905
        for value, place in zip(values, places, strict=True):
            want[plane, place] = value
    with fastseg.backend(backend):
        y = FS.max_unpool2d(x, indices, 2)
        assert torch.equal(y.cpu(), want.view(2, 2, 6, 8))
        y.sum().backward()
        assert torch.equal(x.grad, torch.ones_like(x))
        FS.max_pool2d(x, 3, 1, 1).sum().backward()


@pytest.mark.parametrize("shape", [(2, 8, 12, 12), (8, 12, 12)])
def test_there_is_no_host_sync(shape):
    """On meta tensors any read of a value on the host would raise. So CUDA graphs can capture these calls."""
    x = torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True)
    launches = []
    with fastseg.backend("triton"), observing(lambda *call: None), recording(lambda *call: launches.append(call[0])):
        y, indices = FS.max_pool2d(x, 3, 2, 1, return_indices=True)
        z, offsets = FS.max_pool2d_with_offsets(x, 3, 1, 1, 2)
        u = FS.max_unpool2d(y, indices, 3, 2, 1).sum() + FS.max_unpool2d_with_offsets(z, offsets, 3, 1).sum()
        torch.autograd.grad(u, x)
    assert len(launches) == 2 + 3 + 4


@pytest.mark.gpu
def test_a_cuda_graph_replays_pools():
    x = torch.randn(2, 8, 12, 12, device="cuda", requires_grad=True)
    torch.autograd.grad(pools(x, FS).sum(), x)  # compiles the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = pools(x, FS)
        (gradient,) = torch.autograd.grad(y.sum(), x)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    want = pools(x, FS)
    assert torch.equal(y, want) and torch.equal(gradient, torch.autograd.grad(want.sum(), x)[0])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_conversions_keep_the_layout(layout):
    x = torch.randn(1, 8, 6, 7).contiguous(memory_format=layout)
    indices = F.max_pool2d(x, 3, 2, 1, return_indices=True)[1]
    offsets = FS.indices_to_offsets(indices, 3, 2, 1, width=7)
    assert offsets.stride() == indices.stride()
    back = FS.offsets_to_indices(offsets, 3, 2, 1, width=7)
    assert back.stride() == indices.stride() and torch.equal(back, indices)
