"""The CPU kernels of pooling and unpooling against torch and float64: every geometry, memory format and dtype."""

import shutil
import subprocess

import pytest
import torch
import torch.nn.functional as F

import fastseg
from fastseg import functional as FS
from fastseg.kernels.cpu import build
from fastseg.kernels.cpu.pooling import pool, unpool
from fastseg.kernels.pooling.geometry import PoolGeometry

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
BOTH_LAYOUTS = pytest.mark.parametrize("layout", LAYOUTS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
BOTH_POSITIONS = pytest.mark.parametrize("positions", [torch.uint8, torch.int64], ids=["offsets", "indices"])
CELLS = PoolGeometry([2, 2], [2, 2], [0, 0])
# Tolerances of a sum of few numbers of size 1, added in float32 (float64) and rounded to the dtype.
SUM_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float64: 1e-14}


def draw(low, high):
    return int(torch.randint(low, high + 1, ()))


def random_geometry():
    kernel = [draw(1, 5), draw(1, 5)]
    return PoolGeometry(
        kernel, [draw(1, 4), draw(1, 4)], [draw(0, k // 2) for k in kernel], [draw(1, 3), draw(1, 3)]
    )  # fmt: skip


def random_image(geometry, dtype, layout, most=40):
    """An image that a window fits in, of few values, so that maxima tie, some of them NaN or infinite."""
    kernel, _, padding, dilation = geometry
    size = [max((k - 1) * d + 1 - 2 * p, d) + draw(0, most) for k, p, d in zip(kernel, padding, dilation, strict=True)]
    x = torch.randn(draw(1, 2), draw(1, 37), *size).mul(2).round()
    for value in (float("nan"), float("inf"), -float("inf")):
        x[torch.rand_like(x) < 0.03] = value
    return x.to(dtype).contiguous(memory_format=LAYOUTS[layout])


def unwritten(shape, dtype, layout):
    """An output full of a value that no result has."""
    return torch.full(shape, 77, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])


def pooled(x, geometry, layout, ceil_mode=False):
    """torch's maxima and indices, and the offsets that the indices mean."""
    want, indices = F.max_pool2d(x, *geometry, ceil_mode, return_indices=True)
    kernel, stride, padding, dilation = geometry
    rows = torch.arange(want.shape[2])[:, None] * stride[0] - padding[0]
    columns = torch.arange(want.shape[3]) * stride[1] - padding[1]
    down, across = (indices // x.shape[3] - rows) // dilation[0], (indices % x.shape[3] - columns) // dilation[1]
    offsets = (down * kernel[1] + across).to(torch.uint8)
    return tuple(t.contiguous(memory_format=LAYOUTS[layout]) for t in (want, indices, offsets))


def same(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(3e4), b.nan_to_num(3e4))


def scattered(values, indices, size):
    """Unpooling in order, so that of several values for one pixel the last stays."""
    planes = values.new_zeros(*values.shape[:2], size[0] * size[1])
    return planes.scatter_(-1, indices.flatten(2).contiguous(), values.flatten(2).contiguous()).unflatten(-1, size)


def summed(values, indices, size):
    planes = values.new_zeros(*values.shape[:2], size[0] * size[1], dtype=torch.float64)
    return planes.scatter_add(-1, indices.flatten(2), values.flatten(2).double()).unflatten(-1, size)


@BOTH_LAYOUTS
@DTYPES
def test_pools_of_random_windows_are_those_of_torch_to_the_bit(dtype, layout):
    last = layout == "channels_last"
    for trial in range(24):
        geometry = CELLS if trial % 3 == 0 else random_geometry()
        x, ceil_mode = random_image(geometry, dtype, layout), bool(draw(0, 1))
        print(tuple(x.shape), geometry, ceil_mode)
        want, indices, offsets = pooled(x, geometry, layout, ceil_mode)
        for positions in (None, indices, offsets):
            y = unwritten(want.shape, dtype, layout)
            found = None if positions is None else unwritten(want.shape, positions.dtype, layout)
            pool.max_pool2d_fwd(x, y, found, geometry, last)
            assert same(y, want)
            assert positions is None or torch.equal(found, positions)
        grad = torch.randn(want.shape).to(dtype).contiguous(memory_format=LAYOUTS[layout])
        truth = summed(grad, indices, x.shape[2:])
        for positions in (indices, offsets):
            grad_x = unwritten(x.shape, dtype, layout)
            pool.max_pool2d_bwd(grad, positions, grad_x, geometry, last)
            assert (grad_x - truth).abs().max() <= SUM_TOLERANCE[dtype] * truth.abs().max().clamp_min(1)
            assert geometry.overlaps or torch.equal(grad_x, truth.to(dtype)), "one value for each pixel"


@BOTH_LAYOUTS
@DTYPES
def test_unpools_of_random_windows_are_those_of_torch_to_the_bit(dtype, layout):
    last = layout == "channels_last"
    for trial in range(24):
        geometry = (CELLS if trial % 3 == 0 else random_geometry())._replace(dilation=[1, 1])
        plane = random_image(geometry, torch.float32, layout)
        print(tuple(plane.shape), geometry)
        _, indices, offsets = pooled(plane, geometry, layout, bool(draw(0, 1)))
        x = torch.randn(indices.shape).to(dtype).contiguous(memory_format=LAYOUTS[layout])
        grad = torch.randn(plane.shape).to(dtype).contiguous(memory_format=LAYOUTS[layout])
        anywhere = torch.randint(plane.shape[2] * plane.shape[3], indices.shape)
        for positions, where in (
            (indices, indices),
            (offsets, indices),
            (anywhere.contiguous(memory_format=LAYOUTS[layout]), anywhere),
        ):
            y, grad_x = unwritten(plane.shape, dtype, layout), unwritten(x.shape, dtype, layout)
            unpool.max_unpool2d_fwd(x, positions, y, geometry, last, trusted=False)
            assert torch.equal(y, scattered(x, where, y.shape[2:]))
            unpool.max_unpool2d_bwd(grad, positions, grad_x, geometry, last)
            assert torch.equal(grad_x, grad.flatten(2).gather(-1, where.flatten(2)).view(x.shape))


@BOTH_LAYOUTS
@BOTH_POSITIONS
@pytest.mark.parametrize("geometry", [CELLS, PoolGeometry([3, 2], [2, 3], [1, 0])], ids=["cells", "overlapping"])
def test_positions_outside_are_refused_and_never_used_as_addresses(geometry, positions, layout):
    last = layout == "channels_last"
    plane = torch.randn(2, 5, 9, 12).contiguous(memory_format=LAYOUTS[layout])
    _, indices, offsets = pooled(plane, geometry, layout)
    x = torch.randn_like(indices, dtype=torch.float32)
    valid = offsets if positions == torch.uint8 else indices
    # At (0, 0) the first offset of a padded window is outside the image.
    bad = [geometry.taps, 255] if positions == torch.uint8 else [-1, 9 * 12, 2**40, -(2**62)]
    if positions == torch.uint8 and geometry.padding[0]:
        bad.append(0)
    for value in bad:
        wrong = valid.clone(memory_format=LAYOUTS[layout])
        wrong[1, 3, 0, 0] = value
        y, grad_x = torch.zeros_like(plane), torch.full_like(x, 77)
        with pytest.raises(RuntimeError, match="invalid max"):
            unpool.max_unpool2d_fwd(x, wrong, y, geometry, last, trusted=False)
        unpool.max_unpool2d_bwd(plane, wrong, grad_x, geometry, last)
        assert grad_x[1, 3, 0, 0] == 0
        pool.max_pool2d_bwd(x, wrong, y, geometry, last)
        assert torch.isfinite(y).all()


@BOTH_LAYOUTS
def test_windows_of_minus_infinity_and_of_nan(layout):
    for value, last_wins in ((-float("inf"), False), (float("nan"), True)):
        for geometry in (CELLS, PoolGeometry([3, 3], [1, 1], [1, 1], [2, 2])):
            x = torch.full((1, 20, 9, 10), value).contiguous(memory_format=LAYOUTS[layout])
            want, _, offsets = pooled(x, geometry, layout)
            y, found = unwritten(want.shape, x.dtype, layout), unwritten(want.shape, torch.uint8, layout)
            pool.max_pool2d_fwd(x, y, found, geometry, layout == "channels_last")
            assert same(y, want) and torch.equal(found, offsets)
            assert geometry is not CELLS or bool((found == (3 if last_wins else 0)).all())


@BOTH_LAYOUTS
@pytest.mark.parametrize("size", [(2, 2), (3, 5), (2, 33), (41, 2), (6, 34), (5, 66)])
@pytest.mark.parametrize("channels", [1, 3, 5, 16, 21])
def test_cells_of_every_remainder(channels, size, layout):
    """Widths and channels that end in a block of 16, of 4 or of 1 lanes, rows and columns in no window."""
    x = torch.randn(2, channels, *size).contiguous(memory_format=LAYOUTS[layout])
    with fastseg.backend("cpu"):
        y, offsets = FS.max_pool2d_with_offsets(x.requires_grad_(), 2)
        FS.max_unpool2d_with_offsets(y, offsets, 2, output_size=size).square().sum().backward()
    truth = x.detach().double().requires_grad_()
    want, indices = F.max_pool2d(truth, 2, return_indices=True)
    F.max_unpool2d(want, indices, 2, output_size=size).square().sum().backward()
    assert torch.equal(y.double(), want) and y.is_contiguous(memory_format=LAYOUTS[layout])
    assert torch.equal(x.grad.double(), truth.grad.float().double())


@BOTH_LAYOUTS
@DTYPES
def test_results_do_not_depend_on_the_number_of_threads(dtype, layout):
    for geometry in (CELLS, PoolGeometry([3, 3], [2, 2], [1, 1]), PoolGeometry([5, 5], [1, 1], [2, 2])):
        x = torch.randn(3, 40, 50, 70).to(dtype).contiguous(memory_format=LAYOUTS[layout])
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            with fastseg.backend("cpu"):
                y, offsets = FS.max_pool2d_with_offsets(leaf, *geometry)
                z = FS.max_unpool2d_with_offsets(y, offsets, *geometry[:3], output_size=x.shape[2:])
                z.sin().sum().backward()
            results.append((y, offsets, z, leaf.grad))
        torch.set_num_threads(1)
        assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@BOTH_LAYOUTS
@DTYPES
def test_functions_under_backend_cpu(dtype, layout, poison, assert_right):
    """Through autograd, into memory full of NaN; indices and offsets, overlapping windows and ceil_mode."""
    for arguments in ((2,), (3, 2, 1), (2, 2, 1, 1, True), (3, 3, 0, 2)):
        x = torch.randn(2, 19, 23, 30).to(dtype).contiguous(memory_format=LAYOUTS[layout])
        with fastseg.backend("cpu"):
            assert [c.backend for c in fastseg.explain(FS.max_pool2d, x, *arguments)] == ["cpu"]
            assert_right(lambda x, a=arguments: FS.max_pool2d(x, *a), lambda x, a=arguments: F.max_pool2d(x, *a), [x])
            y, indices = FS.max_pool2d(x, *arguments, return_indices=True)
            assert y.is_contiguous(memory_format=LAYOUTS[layout])
            if len(arguments) < 4:
                for c, want in (
                    (FS.max_unpool2d(y, indices, *arguments, output_size=x.shape[2:]), y),
                    (FS.max_unpool2d_with_offsets(y, FS.max_pool2d_with_offsets(x, *arguments)[1], *arguments,
                                                  output_size=x.shape[2:]), y),
                ):  # fmt: skip
                    assert torch.equal(c.double(), scattered(want.double(), indices, x.shape[2:]))


@BOTH_LAYOUTS
def test_an_invalid_position_is_reported_with_its_place(layout):
    x = torch.randn(1, 3, 4, 4).contiguous(memory_format=LAYOUTS[layout])
    with fastseg.backend("cpu"):
        y, offsets = FS.max_pool2d_with_offsets(x, 2)
        offsets[0, 1, 1, 0] = 4
        with pytest.raises(RuntimeError, match=r"max_unpool2d_with_offsets: found an invalid max offset: 4 at \(0, 1"):
            FS.max_unpool2d_with_offsets(y, offsets, 2)
        indices = FS.max_pool2d(x, 2, return_indices=True)[1]
        indices[0, 2, 0, 1] = 16
        with pytest.raises(RuntimeError, match=r"max_unpool2d: found an invalid max index: 16 at \(0, 2, 0, 1\)"):
            FS.max_unpool2d(y, indices, 2)


@BOTH_LAYOUTS
def test_an_empty_batch_and_images_without_one(layout):
    with fastseg.backend("cpu"):
        empty = torch.empty(0, 3, 8, 8).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
        y, indices = FS.max_pool2d(empty, 2, return_indices=True)
        FS.max_unpool2d(y, indices, 2).sum().backward()
        assert y.shape == (0, 3, 4, 4) and empty.grad.shape == empty.shape
        image = torch.randn(3, 6, 7)
        assert torch.equal(FS.max_pool2d(image, 2), F.max_pool2d(image, 2))
        one = torch.randn(2, 3, 1, 1)
        assert torch.equal(FS.max_pool2d(one, 1), one) and torch.equal(FS.max_pool2d(one, 3, 1, 1), one)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
@pytest.mark.parametrize("last", [False, True], ids=LAYOUTS)
def test_the_machine_code_computes_in_vectors(last):
    library = build.library("pooling/pool", {"DTYPE": torch.float32, "CHANNELS_LAST": last})
    code = subprocess.run(["objdump", "-d", library._name], capture_output=True, text=True, check=True).stdout
    if "ymm" not in code and "zmm" not in code:
        pytest.skip("the processor has no AVX")
    wide = [line for line in code.splitlines() if "ymm" in line or "zmm" in line]
    assert sum("cmp" in line for line in wide) >= 6, "maxima are compared in vectors"
