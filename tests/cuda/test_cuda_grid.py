"""The CUDA C++ kernels on the host, with arguments that `fastseg verify` has no case for."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from support import cuda_host

import fastseg
from fastseg import functional as FS
from fastseg.kernels.cuda import launch
from fastseg.kernels.pooling.geometry import PoolGeometry
from fastseg.ops.batch_norm.batch_norm import BATCH_NORM_STATS

pytestmark = pytest.mark.skipif(cuda_host.COMPILER is None, reason="no C++ compiler (g++, clang++ or $CXX)")
LAYOUTS = [torch.contiguous_format, torch.channels_last]
INF, NAN = float("inf"), float("nan")
# shape, kernel, stride, padding, dilation, ceil_mode
POOLS = [
    ((2, 8, 6, 32), 2, 2, 0, 1, False),
    ((1, 3, 7, 9), 2, 2, 0, 1, True),
    ((1, 16, 9, 13), 3, 2, 1, 1, True),
    ((2, 5, 8, 9), (2, 3), (1, 2), (1, 0), (2, 1), False),
    ((1, 8, 9, 16), (3, 2), (3, 2), (1, 0), 1, True),  # whole rows, padding above
    ((1, 2, 11, 12), 5, 3, 2, 1, False),
    ((1, 4, 12, 10), (1, 2), (2, 3), 0, 1, False),  # gaps between the windows
    ((2, 3, 5, 5), 5, 5, 0, 1, False),  # 25 taps run in a loop
]
special = pytest.mark.parametrize("values", ["random", "ties", "special"])


@pytest.fixture(autouse=True)
def host(poison):
    with cuda_host.library().backend():
        yield


def image(shape, layout, values="random", dtype=torch.float32):
    x = torch.randn(shape)
    if values == "ties":
        x = x.round().clamp(-1, 1)
    if values == "special":
        choice = torch.randint(4, shape)
        x = torch.where(choice == 0, torch.tensor(-INF), torch.where(choice == 1, torch.tensor(NAN), x))
    return x.to(dtype).contiguous(memory_format=layout)


def same(ours, theirs):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert torch.equal(ours.nan_to_num(nan=12345.0), theirs.nan_to_num(nan=12345.0))


@special
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape, kernel, stride, padding, dilation, ceil", POOLS)
def test_pooling_matches_torch(shape, kernel, stride, padding, dilation, ceil, layout, values):
    x = image(shape, layout, values).requires_grad_()
    geometry = (kernel, stride, padding, dilation, ceil)
    want, indices = F.max_pool2d(x, *geometry, return_indices=True)
    grad = torch.randn_like(want)
    torch.use_deterministic_algorithms(False)
    (want_grad,) = torch.autograd.grad(want, x, grad)
    torch.use_deterministic_algorithms(True)
    got, kept = FS.max_pool2d(x, *geometry, return_indices=True)
    same(got, want)
    assert torch.equal(kept, indices) and got.stride() == want.stride()
    (from_indices,) = torch.autograd.grad(got, x, grad)
    got, offsets = FS.max_pool2d_with_offsets(x, *geometry)
    assert torch.equal(FS.offsets_to_indices(offsets, kernel, stride, padding, shape[-1], dilation), indices)
    (from_offsets,) = torch.autograd.grad(got, x, grad)
    for found in (from_indices, from_offsets):
        torch.testing.assert_close(found, want_grad, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        same(FS.max_pool2d(x, *geometry), want.detach())  # stores no positions


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pooling_of_three_dimensions_and_of_an_empty_batch(layout):
    x = torch.randn(3, 6, 8)
    same(FS.max_pool2d(x, 2), F.max_pool2d(x, 2))
    assert FS.max_pool2d(torch.randn(0, 4, 6, 6).contiguous(memory_format=layout), 2).shape == (0, 4, 3, 3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", [1, 2, 3])
def test_unaligned_tensors(start, dtype, layout):
    """A slice of a larger tensor: no access may be wider than its address allows. Only the sanitizer finds others."""
    whole = torch.randn(2 * 16 * 8 * 32 + 8).to(dtype)
    x = whole[start : start + 2 * 16 * 8 * 32].view(2, 16, 8, 32)
    x = x if layout == torch.contiguous_format else x.view(2, 8, 32, 16).permute(0, 3, 1, 2)
    y, indices = FS.max_pool2d(x, 2, return_indices=True)
    same(y, F.max_pool2d(x, 2))
    with fastseg.backend("torch"):
        want = FS.max_unpool2d(y, indices, 2)
    same(FS.max_unpool2d(y, indices, 2), want)
    labels = torch.randint(16, (2, *x.shape[2:]))
    torch.testing.assert_close(FS.cross_entropy(x, labels), F.cross_entropy(x.float(), labels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape, kernel, stride, padding, dilation, ceil", [p for p in POOLS if p[4] == 1])
def test_unpooling_from_arbitrary_indices(shape, kernel, stride, padding, dilation, ceil, layout):
    """Indices of a pool, and any others in the plane; of repeated ones the last in row-major order stays."""
    plane = image(shape, layout)
    y, indices = F.max_pool2d(plane, kernel, stride, padding, 1, ceil, return_indices=True)
    x = image(y.shape, layout).requires_grad_()
    anywhere = torch.randint(shape[2] * shape[3], y.shape).contiguous(memory_format=layout)
    few = torch.where(torch.rand(y.shape) < 0.2, anywhere, indices)
    for positions in (indices, anywhere, few):
        got = FS.max_unpool2d(x, positions, kernel, stride, padding, shape[-2:])
        flat = torch.zeros(*shape[:2], shape[2] * shape[3])
        for n, c, o in itertools.product(*map(range, (*shape[:2], y[0, 0].numel()))):
            flat[n, c, positions[n, c].flatten()[o]] = x[n, c].flatten()[o].detach()
        same(got.detach(), flat.view(shape))
        grad = torch.randn_like(got)
        (found,) = torch.autograd.grad(got, x, grad)
        same(found, grad.flatten(2).gather(2, positions.flatten(2)).view(y.shape))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel, stride", [(2, 2), (3, 2)])
@pytest.mark.parametrize("bad", [-1, 64, 2**32 + 3, -(2**62)])
def test_an_index_outside_the_plane_is_never_accessed(bad, kernel, stride, layout):
    """On a CPU the operator raises already. The kernels assert, and neither read nor write at such an index."""
    from fastseg.kernels.cuda.pooling import tiling, unpool

    x = torch.ones(1, 8, 4, 4).contiguous(memory_format=layout)
    indices = torch.zeros(1, 8, 4, 4, dtype=torch.int64).contiguous(memory_format=layout)
    indices[0, 3, 2, 1] = bad
    y, gradient = torch.zeros(1, 8, 8, 8).contiguous(memory_format=layout), torch.full_like(x, 7.0)
    geometry = tiling.Tiling(PoolGeometry([kernel] * 2, [stride] * 2, [0, 0]), layout == torch.channels_last)
    with pytest.raises(RuntimeError, match="found an invalid max index"):
        unpool.max_unpool2d_fwd(x, indices, y, *geometry, trusted=False)
    unpool.max_unpool2d_bwd(torch.ones_like(y), indices, gradient, *geometry)
    assert gradient[0, 3, 2, 1] == 0 and gradient.sum() == 127


@pytest.mark.parametrize("kernel, stride", [(2, 2), (3, 2)])
@pytest.mark.parametrize("bad", [4, 200])
def test_an_offset_outside_its_window_is_never_accessed(bad, kernel, stride):
    from fastseg.kernels.cuda.pooling import tiling, unpool

    x, offsets = torch.ones(1, 8, 4, 4), torch.zeros(1, 8, 4, 4, dtype=torch.uint8)
    offsets[0, 3, 3, 3] = bad if kernel == 2 else 8  # the last tap of the last window is outside the plane
    y, gradient = torch.zeros(1, 8, 8, 8), torch.full_like(x, 7.0)
    geometry = tiling.Tiling(PoolGeometry([kernel] * 2, [stride] * 2, [0, 0]), False)
    with pytest.raises(RuntimeError, match="offset outside its window"):
        unpool.max_unpool2d_fwd(x, offsets, y, *geometry, trusted=False)
    unpool.max_unpool2d_bwd(torch.ones_like(y), offsets, gradient, *geometry)
    assert gradient[0, 3, 3, 3] == 0 and gradient.sum() == 127


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [
    {}, {"reduction": "none"}, {"reduction": "sum", "label_smoothing": 0.2}, {"normalization": "valid"},
    {"normalization": "pixels", "z_loss": 0.01}, {"normalization": "batch"}, {"z_loss": 0.1, "reduction": "none"},
])  # fmt: skip
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape, dtype", [((2, 5, 3, 8), torch.int64), ((1, 21, 5, 7), torch.uint8),
                                          ((2, 16, 4, 4), torch.int16), ((3, 2, 2, 12), torch.int32)])  # fmt: skip
def test_cross_entropy_matches_torch(shape, dtype, weighted, options, layout, assert_right):
    logits = torch.randn(shape).contiguous(memory_format=layout)
    labels = torch.randint(shape[1], (shape[0], *shape[2:])).masked_fill(torch.rand(shape[0], *shape[2:]) < 0.3, 255)
    weight = torch.rand(shape[1]) + 0.5 if weighted else None
    labels = labels.to(dtype)

    def ours(x):
        return FS.cross_entropy(x, labels, weight, ignore_index=255, **options)

    def theirs(x):
        with fastseg.backend("torch"):
            return FS.cross_entropy(
                x, labels, None if weight is None else weight.to(x.dtype), ignore_index=255, **options
            )

    assert_right(ours, theirs, [logits])


def test_cross_entropy_of_ignored_pixels_and_of_nan_and_infinite_logits():
    logits = torch.randn(1, 4, 1, 6)
    logits[0, :, 0, 0], logits[0, 2, 0, 1], logits[0, 1, 0, 2], logits[0, 3, 0, 3] = NAN, -INF, -INF, INF
    labels = torch.tensor([[[255, 1, 1, 3, 0, 2]]])
    x = logits.clone().requires_grad_()
    loss = FS.cross_entropy(x, labels, ignore_index=255, reduction="none")
    same(loss.detach().isfinite(), torch.tensor([[[True, True, False, False, True, True]]]))
    assert loss[0, 0, 0] == 0 and loss[0, 0, 2] == INF
    loss.backward(torch.ones_like(loss))
    assert torch.equal(x.grad[0, :, 0, 0], torch.zeros(4)) and x.grad[0, 2, 0, 1] == 0
    nothing = torch.full((1, 1, 6), 255)
    assert FS.cross_entropy(logits, nothing, ignore_index=255).isnan()
    assert FS.cross_entropy(logits, nothing, ignore_index=255, reduction="sum") == 0


def test_cross_entropy_of_many_pixels_sums_in_several_steps():
    """More partial sums than one step can add up."""
    logits, labels = torch.randn(1, 2, 101, 103), torch.randint(2, (1, 101, 103))
    torch.testing.assert_close(FS.cross_entropy(logits, labels), F.cross_entropy(logits.double(), labels).float())


@pytest.mark.parametrize("label", [-1, 4, 2**32])
def test_an_out_of_range_label_is_never_accessed(label):
    from fastseg.kernels.cuda.losses import cross_entropy
    from fastseg.kernels.losses.options import LossInputs, LossOptions, LossResults

    logits, labels = torch.randn(1, 4, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64)
    labels[0, 1, 1] = label
    loss, lse, nothing = torch.empty(()), torch.empty(2, 1, 2, 2), torch.empty(0)
    with pytest.raises(RuntimeError, match="neither a class nor ignore_index"):
        cross_entropy.cross_entropy_fwd(
            LossInputs(logits, labels, None),
            LossOptions("sum", 0, 255, 0.0, 0.0),
            False,
            LossResults(loss, lse, nothing, nothing, nothing),
        )


def test_unsupported_calls_raise_and_name_the_reason():
    x = torch.randn(1, 4, 6, 6)
    for call in (
        lambda: FS.conv_transpose2d(x, torch.randn(4, 2, 2, 2), stride=2),
        lambda: FS.cross_entropy(x, x.softmax(1)),
        lambda: FS.cross_entropy_with_predictions(x, torch.zeros(1, 6, 6, dtype=torch.int64)),
        lambda: FS.confusion_matrix(torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), 2),
        lambda: FS.batch_norm_relu_max_unpool2d(
            x, torch.zeros(1, 4, 6, 6, dtype=torch.uint8), None, None, training=True
        ),
    ):
        with pytest.raises(NotImplementedError, match=r"CUDA C\+\+ kernels do not support"):
            call()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("windows", [
    None, (2, None, 0, False), (2, 2, 1, True), ((3, 2), (3, 2), (1, 0), True), ((1, 2), (2, 3), 0, False),
    (1, 1, 0, False),
])  # fmt: skip
@pytest.mark.parametrize("relu, parameters", [(True, "all"), (False, "all"), (True, "none"), (True, "bias")])
def test_batch_norm_matches_torch(windows, training, layout, relu, parameters, assert_right):
    shape = (2, 8, 7, 12)
    x = 3 + 2 * torch.randn(shape).contiguous(memory_format=layout)
    weight = torch.rand(8) - 0.3 if parameters == "all" else None  # some negative
    bias = torch.randn(8) if parameters != "none" else None
    added = torch.randn(8) if parameters == "all" else None
    mean, var = torch.randn(8), torch.rand(8) + 0.5

    def call(backend):
        def function(x, weight, bias, added):
            vectors = [None if t is None else t.to(x.dtype) for t in (weight, bias, added)]
            moved = [t.to(x.dtype) for t in (mean.clone(), var.clone())]
            with fastseg.backend(backend):
                arguments = (x, *moved, *vectors[:2], training, 0.3, 1e-3)
                if windows is None:
                    y = FS.batch_norm_relu(*arguments, relu=relu, input_bias=vectors[2])
                else:
                    y = FS.batch_norm_relu_max_pool2d(*arguments, *windows, relu=relu, input_bias=vectors[2])
            return y, *(t.detach() for t in moved)

        return function

    assert_right(call("cuda"), call("torch"), [x, weight, bias, added])


def test_statistics_of_a_mean_far_from_zero_and_half_precision_parameters(assert_right):
    x = (1000 + torch.randn(4, 6, 5, 8)).requires_grad_()
    want = torch.var_mean(x.detach().double(), (0, 2, 3), correction=0)
    mean, shift, var = BATCH_NORM_STATS(x.detach(), None, None)
    assert ((mean.double() - shift.double() - want[1]).abs() < 1e-6).all() and torch.allclose(var, want[0].float())
    moved = [torch.zeros(6, dtype=torch.bfloat16), torch.ones(6, dtype=torch.bfloat16)]
    halves = [torch.ones(6, dtype=torch.bfloat16), torch.zeros(6, dtype=torch.bfloat16)]
    y = FS.batch_norm_relu(x.detach().bfloat16(), *moved, *halves, training=True, momentum=0.5)
    assert y.dtype == torch.bfloat16 and torch.allclose(moved[0].float(), 0.5 * want[1].float(), rtol=1e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_offsets_of_64_bits(layout, monkeypatch):
    monkeypatch.setattr(launch, "INT32_MAX", 0)
    found = []
    run = cuda_host.library().run
    with launch.recording(lambda request: (found.append(request.instance), run(request))):
        test_pooling_matches_torch(*POOLS[2], layout, "random")
        test_pooling_matches_torch(*POOLS[0], layout, "random")
        test_unpooling_from_arbitrary_indices(*POOLS[0], layout)
        x = image((2, 8, 6, 8), layout, "random").requires_grad_()
        labels = torch.randint(8, (2, 6, 8))
        loss = FS.cross_entropy(x, labels)
        (got,) = torch.autograd.grad(loss, x)
        torch.testing.assert_close(got, torch.autograd.grad(F.cross_entropy(x, labels), x)[0])
        y = FS.batch_norm_relu_max_pool2d(x, None, None, training=True)
        torch.testing.assert_close(y, F.max_pool2d(F.relu(F.batch_norm(x, None, None, training=True)), 2))
    typed = [name for name in found if name.split("<")[0] in ("max_pool2d_fwd", "window_gather", "cross_entropy_bwd")]
    assert typed and not [name for name in typed if " int," in name]
