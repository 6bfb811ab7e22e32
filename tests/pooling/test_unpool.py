"""max_unpool2d: bit-identical to torch, arbitrary and invalid indices, gradients, and invalid arguments."""

import pytest
import torch
import torch.nn.functional as F
from support.pool_common import GEOMETRIES, LAYOUTS

import fastseg
from fastseg import functional as FS
from fastseg.kernels.pooling.geometry import PoolGeometry
from fastseg.ops.pooling import unpool


def pooled_from(shape, geometry, ceil_mode, dtype, layout, device):
    """(values of the pooled shape, indices) as from a pool of this geometry."""
    y, indices = F.max_pool2d(torch.randn(shape, device=device), *geometry, ceil_mode=ceil_mode, return_indices=True)
    return (t.contiguous(memory_format=layout) for t in (torch.randn_like(y).to(dtype), indices))


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape, kernel, stride, padding, ceil_mode", GEOMETRIES)
def test_equals_torch_to_the_bit(shape, kernel, stride, padding, ceil_mode, dtype, layout, device, triton_backend):
    geometry, size = (kernel, stride, padding), shape[-2:]
    x, indices = pooled_from(shape, geometry, ceil_mode, dtype, layout, device)
    offsets = FS.indices_to_offsets(indices, *geometry, width=size[1])
    ours, theirs, offset = (x.clone().requires_grad_() for _ in range(3))
    with fastseg.verification.criterion.poisoned():
        y = FS.max_unpool2d(ours, indices, *geometry, output_size=size)
        z = FS.max_unpool2d_with_offsets(offset, offsets, *geometry, output_size=size)
    want = F.max_unpool2d(theirs, indices, *geometry, output_size=size)
    assert torch.equal(y, want) and torch.equal(z, want)
    if x.numel():
        assert y.is_contiguous(memory_format=layout) and z.stride() == y.stride()
    grad = torch.randn_like(want)
    with fastseg.verification.criterion.poisoned():
        y.backward(grad)
        z.backward(grad)
    want.backward(grad)
    assert torch.equal(ours.grad, theirs.grad) and torch.equal(offset.grad, theirs.grad)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("repeated", [False, True])
def test_arbitrary_indices(repeated, layout, device, triton_backend):
    """Anywhere in the plane. If they repeat, the last in row-major order stays, and each receives the gradient."""
    n, c, h, w, size = 2, 3, 9, 10, (18, 20)
    plane = torch.arange(360)
    draw = (lambda: torch.randint(0, 360, (90,))) if repeated else (lambda: plane[torch.randperm(360)[:90]])
    indices = torch.stack([draw() for _ in range(n * c)]).view(n, c, h, w).contiguous(memory_format=layout).to(device)
    x = torch.randn(n, c, h, w, device=device).contiguous(memory_format=layout).requires_grad_()
    want = torch.zeros(n * c, 360)
    values, places = (t.cpu().reshape(n * c, -1).tolist() for t in (x, indices))
    for plane, row, where in zip(want, values, places, strict=True):
        for value, index in zip(row, where, strict=True):
            plane[index] = value
    y = FS.max_unpool2d(x, indices, 2)
    torch.testing.assert_close(y.cpu(), want.view(n, c, *size), rtol=0, atol=0)
    grad = torch.randn_like(y)
    gathered = grad.reshape(n, c, -1).gather(2, indices.reshape(n, c, -1)).view_as(x)
    assert torch.equal(torch.autograd.grad(y, x, grad)[0], gathered)
    again = FS.max_unpool2d(x, indices, 2)
    assert torch.equal(y, again)


@pytest.mark.parametrize("output_size", [(9, 10), (2, 3, 9, 10), [7, 9], (7, 8), (9,), None])
@pytest.mark.parametrize("kernel, stride", [(2, 2), (3, 2), (2, 3)])
def test_output_size(output_size, kernel, stride, device):
    x = torch.randn(2, 3, 4, 4, device=device)
    index = torch.arange(16, device=device).view(1, 1, 4, 4).expand(2, 3, 4, 4).contiguous()

    def outcome(function):
        try:
            return function(x, index, kernel, stride, output_size=output_size)
        except ValueError as error:
            return type(error), "output_size" in str(error)

    theirs, ours = outcome(F.max_unpool2d), outcome(FS.max_unpool2d)
    assert torch.equal(ours, theirs) if isinstance(theirs, torch.Tensor) else ours == (ValueError, True)
    if isinstance(theirs, torch.Tensor):
        with fastseg.backend("triton"):
            assert torch.equal(outcome(FS.max_unpool2d), theirs)


def test_output_size_of_an_unbatched_map(device):
    """Three entries for a (C, H, W) map: torch refuses them; here the last two are used."""
    x, index = torch.randn(3, 4, 4, device=device), torch.arange(16, device=device).view(1, 4, 4).repeat(3, 1, 1)
    assert torch.equal(
        FS.max_unpool2d(x, index, 2, output_size=(3, 9, 7)), F.max_unpool2d(x, index, 2, None, 0, (9, 7))
    )


@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=pytest.mark.interpreted)])
@pytest.mark.parametrize("bad", [-1, 64, 2**32 + 3])
def test_an_index_outside_the_plane_raises(bad, backend):
    """2^32 + 3 would become 3 in 32 bits."""
    x, indices = torch.randn(1, 2, 4, 4), torch.zeros(1, 2, 4, 4, dtype=torch.int64)
    indices[0, 1, 2, 3] = bad
    with fastseg.backend(backend), pytest.raises(RuntimeError, match=r"invalid max index: -?\d+ at \(0, 1, 2, 3\)"):
        FS.max_unpool2d(x, indices, 2)


@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=pytest.mark.interpreted)])
def test_an_offset_outside_its_window_raises(backend):
    x, offsets = torch.randn(1, 2, 4, 4), torch.zeros(1, 2, 4, 4, dtype=torch.uint8)
    with fastseg.backend(backend):
        FS.max_unpool2d_with_offsets(x, offsets, 2)
        offsets[0, 1, 2, 3] = 4
        with pytest.raises(RuntimeError, match="invalid max offset: 4"):
            FS.max_unpool2d_with_offsets(x, offsets, 2)
        offsets[0, 1, 2, 3] = 1  # column 7 of a plane of width 7
        with pytest.raises(RuntimeError, match="invalid max offset: 1"):
            FS.max_unpool2d_with_offsets(x, offsets, 2, output_size=(8, 7))
        offsets[:] = 3
        FS.max_unpool2d_with_offsets(x, offsets, 2, padding=1, output_size=(7, 7))
        offsets[0, 0, 1, 0] = 2  # row 2, column -1: as an index it would be the last element of row 1
        with pytest.raises(RuntimeError, match="invalid max offset: 2"):
            FS.max_unpool2d_with_offsets(x, offsets, 2, padding=1, output_size=(7, 7))


@pytest.mark.interpreted
def test_nothing_is_written_outside_the_tensors(triton_backend):
    """The kernel itself, without the check for CPU tensors: values at out-of-range indices are not written."""
    from fastseg import kernels

    guard = torch.full((3, 1, 1, 8, 8), 7.0)
    indices = torch.tensor([0, -70, 2**32 + 3, 200], dtype=torch.int64).repeat(4).view(1, 1, 4, 4)
    windows = kernels.pooling.tiling.Tiling(PoolGeometry([2, 2], [2, 2], [0, 0]), False)
    kernels.pooling.unpool.max_unpool2d_fwd(torch.ones(1, 1, 4, 4), indices, guard[1], *windows, trusted=False)
    assert (guard[0] == 7).all() and (guard[2] == 7).all()
    assert guard[1].sum() == 1 and guard[1, 0, 0, 0, 0] == 1
    grad = torch.full((1, 1, 4, 4), float("nan"))
    kernels.pooling.unpool.max_unpool2d_bwd(torch.ones(1, 1, 8, 8), indices, grad, *windows)
    assert torch.equal(grad, (indices == 0).float())


def test_offsets_of_64_bits(monkeypatch, device, triton_backend):
    from fastseg.kernels.pooling import tiling

    monkeypatch.setattr(tiling, "INT32_MAX", 0)
    for layout in LAYOUTS:
        x, indices = pooled_from((2, 8, 6, 10), (2,), False, torch.float32, layout, device)
        x.requires_grad_()
        y, want = FS.max_unpool2d(x, indices, 2), F.max_unpool2d(x, indices, 2)
        assert torch.equal(y, want)
        grad = torch.randn_like(y)
        assert torch.equal(*(torch.autograd.grad(v, x, grad)[0] for v in (y, want)))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("kind", ["indices", "offsets"])
def test_opcheck(kind, layout, backend, device):
    x, positions = pooled_from((2, 3, 7, 8), (2,), True, torch.float32, layout, device)
    geometry = ([2, 2], [2, 2], [0, 0])
    if kind == "offsets":
        positions = FS.indices_to_offsets(positions, 2, 2, 0, width=8)
    with fastseg.backend(backend):
        torch.library.opcheck(torch.ops.fastseg.max_unpool2d.default, (x, positions, *geometry, [1, 1], [7, 8]))
        grad = torch.randn(2, 3, 7, 8, device=device).contiguous(memory_format=layout)
        torch.library.opcheck(torch.ops.fastseg.max_unpool2d_backward.default, (grad, positions, *geometry, [1, 1]))


def test_gradients(device):
    x, indices = pooled_from((1, 2, 6, 8), (2, 3, 1), False, torch.float64, LAYOUTS[0], device)
    x.requires_grad_()
    geometry = PoolGeometry([2, 2], [3, 3], [1, 1], [1, 1])
    unpooled = lambda x: unpool.MaxUnpool2dFunction.apply(x, indices, geometry, [6, 8])  # noqa: E731
    with fastseg.backend("torch"):
        assert torch.autograd.gradcheck(unpooled, x)
        assert torch.autograd.gradgradcheck(unpooled, x)


def test_second_derivative_through_the_kernels(device, triton_backend):
    x, indices = pooled_from((1, 2, 6, 8), (2,), False, torch.float32, LAYOUTS[0], device)
    x.requires_grad_()

    def second(function):
        (first,) = torch.autograd.grad((function(x, indices, 2) ** 3).sum(), x, create_graph=True)
        return torch.autograd.grad((first**2).sum(), x)[0]

    torch.testing.assert_close(second(FS.max_unpool2d), second(F.max_unpool2d))


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compiles_in_one_graph(backend, device):
    x = torch.randn(2, 4, 7, 10, device=device, requires_grad=True)

    def function(x):
        y, indices = FS.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
        z, offsets = FS.max_pool2d_with_offsets(x, 2, ceil_mode=True)
        return FS.max_unpool2d(y, indices, 2, output_size=x.shape) + FS.max_unpool2d_with_offsets(
            z * 2, offsets, 2, output_size=x.shape[-2:]
        )

    with fastseg.backend(backend):
        eager, compiled = function(x), torch.compile(function, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(eager, compiled)
        grad = torch.randn_like(eager)
        torch.testing.assert_close(*(torch.autograd.grad(y, x, grad)[0] for y in (eager, compiled)))


def bad_calls():
    x, indices = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4, dtype=torch.int64)
    yield "indices", (x, indices.int(), 2), {}
    yield "indices", (x, indices[:, :, :3], 2), {}
    yield "input", (x[0, 0], indices[0, 0], 2), {}
    yield "output_size", (x, indices, 2), {"output_size": (8,)}
    yield "output_size", (x, indices, 2), {"output_size": (10, 8)}
    yield "output_size", (x, indices, 2), {"output_size": (6, 8)}


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("name, arguments, keywords", list(bad_calls()))
def test_bad_arguments_raise_what_torch_raises(name, arguments, keywords, backend):
    with pytest.raises(Exception) as theirs:
        F.max_unpool2d(*arguments, **keywords)
    with fastseg.backend(backend), pytest.raises(theirs.type, match=name):
        FS.max_unpool2d(*arguments, **keywords)


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [-1, 64, 2**32 + 3])
def test_an_index_outside_the_plane_fails_an_assertion_on_a_gpu(bad):
    """A device-side assertion ends the process's CUDA context, so it runs in a process of its own."""
    import subprocess
    import sys

    code = (
        "import torch, fastseg; x = torch.ones(1, 1, 4, 4, device='cuda');"
        f"i = torch.full((1, 1, 4, 4), {bad}, device='cuda');"
        "fastseg.functional.max_unpool2d(x, i, 2); torch.cuda.synchronize()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode != 0 and "invalid max index" in run.stderr + run.stdout
