"""The kernels that load through TMA, as on an H100: outputs, gradients, bytes and FLOPs."""

import pytest
import torch
import torch.nn.functional as F
from support.conv_transpose_common import DTYPES, LAYOUTS, NAMES, tensors

from fastseg import functional as FS
from fastseg.inspect.traffic import metering
from fastseg.kernels import launch
from fastseg.kernels.convolution import conv_transpose_bwd_shuffle, gemm
from fastseg.kernels.convolution import conv_transpose_tma as tma

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
with_tma = pytest.mark.skipif(
    torch.cuda.is_available() and launch.capability(torch.empty(1, device="cuda")) < 90, reason="needs a GPU with TMA"
)
FORWARD, INPUT, WEIGHT = (f"conv_transpose2d_{name}_tma_kernel" for name in ("fwd", "bwd_input", "bwd_weight"))

# input, output channels, kernel, stride, padding, output_padding, dilation
GEOMETRIES = [
    ((2, 16, 4, 8), 24, 2, 2, 0, 0, 1),  # rows of windows side by side
    ((1, 40, 4, 4), 16, 4, 4, 0, 0, 1),  # channels that are not a multiple of a block
    ((1, 16, 8, 8), 16, 3, 2, 1, 1, 1),  # phases with different numbers of taps, cells beyond the image
    ((2, 24, 8, 8), 80, 4, 2, 1, 0, 1),
    ((4, 16, 4, 4), 16, 3, 1, 1, 0, 1),  # boxes that span several images
    ((1, 16, 16, 15), 16, 3, 1, (1, 2), 0, (1, 2)),
    ((2, 16, 4, 8), 16, (3, 2), (1, 2), (1, 0), 0, 1),
]


@pytest.fixture(autouse=True)
def not_shuffled(monkeypatch):
    """Gradients with kernel size = stride use TMA too, as they do with many channels."""
    monkeypatch.setattr(conv_transpose_bwd_shuffle, "supported", lambda *arguments: False)


def run(geometry, layout, dtype, device):
    shape, channels, kernel, stride, padding, extra, dilation = geometry
    inputs = tensors(shape, channels, kernel, dtype, layout, device)

    def call(*inputs, function=FS.conv_transpose2d):
        return function(*inputs, stride, padding, extra, 1, dilation)

    return inputs, call, lambda *inputs: call(*inputs, function=F.conv_transpose2d)


def launched(ours, inputs):
    """Names of the TMA kernels that a call and its gradients launch; none is run."""
    names, leaves = set(), [t.detach().requires_grad_() for t in inputs]
    with launch.recording(lambda kernel, *rest: names.add(kernel.__name__)):
        y = ours(*leaves)
        y.backward(torch.empty_like(y))
    return {name for name in names if "tma" in name}


@with_tma
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("case", range(len(GEOMETRIES)))
def test_output_and_gradients(case, layout, device, triton_backend, assert_right, monkeypatch):
    """In channels_last all three GEMMs; in NCHW the input's gradient, for which grad_y has become channels_last."""
    dtype = DTYPES[1 + case % 2]
    inputs, ours, theirs = run(GEOMETRIES[case], layout, dtype, device)
    monkeypatch.setattr(tma, "MOST_COVER", 4)  # the images here are too small for boxes to fit well
    assert launched(ours, inputs) == ({FORWARD, INPUT, WEIGHT} if layout == torch.channels_last else {INPUT})
    assert_right(ours, theirs, inputs, NAMES)


@with_tma
def test_float32(device, triton_backend, assert_right):
    inputs, ours, theirs = run(GEOMETRIES[2], torch.channels_last, torch.float32, device)
    assert launched(ours, inputs) == {FORWARD, INPUT}
    assert_right(ours, theirs, inputs, NAMES)


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_gate_bytes_of_each_gemm(layout, device, triton_backend):
    """At most 1.15 times each tensor read and written once, and nothing out of bounds; in NCHW with the copies.

    The stores of the weight's gradient are not checked: its split-K partials fill a GPU, which is much for such a
    small image.
    """
    inputs, ours, _ = run(((1, 16, 32, 32), 16, 2, 2, 0, 0, 1), layout, torch.float16, device)
    x, weight, bias = (t.requires_grad_() for t in inputs)
    with metering() as launches:
        y = ours(x, weight, bias)
        y.backward(torch.randn_like(y))
    floors = {"fwd": ((x, weight, bias), (y,)), "bwd_input": ((y, weight), (x,)), "bwd_weight": ((y, x), ())}
    seen = set()
    for traffic in launches:
        assert traffic.outside == 0
        for name in [name for name in floors if f"_{name}_" in traffic.kernel]:
            read, written = (2 * sum(t.numel() for t in tensors) for tensors in floors[name])
            assert traffic.sectors("load") <= 1.15 * read, traffic.kernel
            assert not written or traffic.sectors("store") <= 1.15 * written, traffic.kernel
            seen.add(name)
    assert seen == set(floors)


@with_tma
def test_sums_with_split_k(device, triton_backend, assert_right, monkeypatch):
    monkeypatch.setattr(gemm, "LEAST_STEPS", 1)
    inputs, ours, theirs = run(((2, 16, 8, 16), 16, 2, 2, 0, 0, 1), torch.channels_last, torch.float16, device)
    assert gemm.split_k(4, 1)[1] == 4 and WEIGHT in launched(ours, inputs)
    assert_right(ours, theirs, inputs, NAMES)


@with_tma
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_offsets_of_64_bits(layout, device, triton_backend, assert_right, monkeypatch):
    monkeypatch.setattr(gemm, "INT32_MAX", 0)
    inputs, ours, theirs = run(GEOMETRIES[2], layout, torch.float16, device)
    assert_right(ours, theirs, inputs, NAMES)


def kernels_of(device, sm, shape=(1, 16, 8, 8), channels=16, kernel=2, padding=0, groups=1, shift=0):
    """Names of the kernels of both directions in channels_last; x begins `shift` elements after an aligned address."""
    x, weight, _ = tensors(shape, channels, kernel, torch.float16, torch.channels_last, device)
    if shift:
        x = torch.cat([x.new_zeros(shift), x.permute(0, 2, 3, 1).flatten()])[shift:].view(1, 8, 8, 16)
        x = x.permute(0, 3, 1, 2)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    with launch.targeting(sm):
        y = FS.conv_transpose2d(*leaves, None, 2, padding, padding, groups)
        with metering() as launches:
            FS.conv_transpose2d(*leaves, None, 2, padding, padding, groups)
            y.backward(torch.ones_like(y))
    return {traffic.kernel for traffic in launches}


@interpreted
def test_which_calls_use_tma(device, triton_backend):
    """Those on GPUs with TMA, with 16-byte aligned rows, and with images that boxes cover with little excess."""
    every = {FORWARD, INPUT, WEIGHT}
    assert every <= kernels_of(device, 90) and every <= kernels_of(device, 100)
    for no in (
        {"sm": 80},
        {"sm": 90, "shape": (1, 20, 8, 8)},
        {"sm": 90, "channels": 12},
        {"sm": 90, "groups": 2},
        {"sm": 90, "shape": (1, 16, 5, 7)},
    ):
        assert not every & kernels_of(device, **no), no
    assert kernels_of(device, 90, shift=1) & every == {INPUT}  # which does not read x
    assert not {INPUT, WEIGHT} & kernels_of(device, 90, kernel=3)  # grad_y is not whole strides wide


def flops_of(x, weight, geometry, sm):
    """FLOPs executed over FLOPs needed, counted."""
    with launch.targeting(sm), metering() as launches:
        FS.conv_transpose2d(x, weight, None, *geometry)
    return sum(traffic.flops for traffic in launches) / (2 * x.numel() * weight.shape[1:].numel())


@interpreted
@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("geometry", [(2, 2), (3, 2, 1, 1), (4, 2, 1)])
def test_gate_flops_executed_over_flops_needed(geometry, sm, device, triton_backend):
    """At most 1.10 forward with stride 2. Inserted zeros would make it 4; phases padded to equal taps, 1.8 for 3x3."""
    x, weight, _ = tensors((1, 16, 24, 32), 16, geometry[0], torch.float16, torch.channels_last, device)
    assert 1 <= flops_of(x, weight, geometry[1:], sm) <= 1.10


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_gate_padding_cuts_no_cells_of_tiles_with_one_phase(layout, device, triton_backend):
    """Nor of rows in NCHW. If cells began in the padding, there would be 1.25 times as many."""
    for kernel in (3, 4):
        x, weight, _ = tensors((1, 16, 16, 16), 64, kernel, torch.float16, layout, device)
        assert flops_of(x, weight, (2, 1, kernel % 2), 80) == 1


@interpreted
def test_gate_flops_of_the_gradients(device, triton_backend):
    leaves = tensors((1, 16, 16, 32), 16, 3, torch.float16, torch.channels_last, device)[:2]
    y = FS.conv_transpose2d(*(t.requires_grad_() for t in leaves), None, 2, 1, 1)
    with metering() as launches:
        y.backward(torch.ones_like(y))
    needed = 4 * leaves[0].numel() * leaves[1].shape[1:].numel()
    assert 1 <= sum(traffic.flops for traffic in launches) / needed <= 1.10


def test_boxes_cover_the_maps_with_the_least_excess():
    assert tma.best_box(8, 112, 112, 128) == (1, 8, 16) or tma.best_box(8, 112, 112, 128) == (1, 16, 8)
    assert tma.best_box(16, 14, 14, 64).covered(16, 14, 14) == 16 * 14 * 14
    assert tma.best_box(1, 1, 1, 1) == (1, 1, 1)
