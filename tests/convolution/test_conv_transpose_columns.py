"""Plain GEMMs, split-K of long sums, and numbers of channels that are not a multiple of a vector."""

import json

import pytest
import torch
import torch.nn.functional as F
from support.conv_transpose_common import DTYPES, LAYOUTS, NAMES, pick, recorded_step, tensors
from support.machine_code import compiled

from fastseg import functional as FS
from fastseg.inspect.traffic import metering
from fastseg.kernels import launch
from fastseg.kernels.convolution import conv_transpose_bwd, conv_transpose_tma, gemm

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
FC6 = ((16, 4096, 1, 1), 512, 7)  # DeconvNet's fc6_deconv


@pytest.fixture
def split_launches(monkeypatch):
    """Every reduction is split as often as possible; gives (kernel, whether split) of each launch, which runs."""
    found, outer = [], launch.launch
    for module in (conv_transpose_bwd, conv_transpose_tma):
        monkeypatch.setattr(module, "affordable_splits", lambda *tensors: 10**6)

        def note(kernel, programs, *args, **meta):
            found.append((kernel.__name__, meta.get("SPLIT")))
            outer(kernel, programs, *args, **meta)

        monkeypatch.setattr(module, "launch", note)
    monkeypatch.setattr(gemm, "LEAST_STEPS", 1)
    return found


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize(
    "size",
    [
        ((2, 16, 4, 8), 16, (3, 5), 1, (1, 2)),
        ((16, 32, 1, 1), 16, 4),
        ((1, 40, 3, 5), 19, (3, 4), 2, (1, 2)),  # runs that are not a multiple of a block, and windows cut by the edge
        ((1, 8, 3, 4), 70, 3, 1, 1, 0, 1, (1, 2)),  # one tap per run
        ((1, 9, 5, 4), 6, (2, 3), 1, 1, 0, 3),
    ],
)
def test_the_inputs_gradient_with_split_k(size, sm, layout, device, triton_backend, assert_right, split_launches):
    shape, channels, kernel, *geometry = size
    groups = geometry[3] if len(geometry) > 3 else 1
    inputs = tensors(shape, channels // groups, kernel, torch.float16, layout, device)[:2]
    with launch.targeting(sm):
        assert_right(
            lambda *t: FS.conv_transpose2d(*t, None, *geometry),
            lambda *t: F.conv_transpose2d(*t, None, *geometry), inputs, NAMES[:2],
        )  # fmt: skip
    tma = sm == 90 and channels == 16
    assert (f"conv_transpose2d_bwd_input{'_tma' * tma}_kernel", True) in split_launches


def test_split_k_with_offsets_of_64_bits(device, triton_backend, assert_right, split_launches, monkeypatch):
    monkeypatch.setattr(gemm, "INT32_MAX", 0)
    inputs = tensors((2, 5, 3, 4), 19, 3, torch.float32, torch.channels_last, device)
    assert_right(lambda *t: FS.conv_transpose2d(*t, 2), lambda *t: F.conv_transpose2d(*t, 2), inputs, NAMES)
    assert ("conv_transpose2d_bwd_input_kernel", True) in split_launches


def test_partials_are_added_in_order(device, triton_backend, split_launches):
    leaves = [t.requires_grad_() for t in tensors((1, 8, 2, 3), 40, 3, torch.float32, torch.channels_last, device)[:2]]
    y = FS.conv_transpose2d(*leaves)
    grad = torch.randn_like(y)
    first, second = (torch.autograd.grad(y, leaves, grad, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second)) and ("conv_transpose2d_bwd_input_kernel", True) in split_launches


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sm", [80, 90])
def test_gemms_of_few_rows_fill_a_gpu(sm, layout):
    """DeconvNet's fc6_deconv and similar: at least one program per multiprocessor, and one pass over the weight."""
    for size in (FC6, ((1, *FC6[0][1:]), *FC6[1:]), ((4, 1024, 4, 4), 512, 4, 4)):
        found = {recorded.name: recorded for recorded in recorded_step(size, sm, layout)}
        programs = {n: r.programs for n, r in found.items() if "conv" in n and "epilogue" not in n}
        least = 64 if size[0][-1] > 1 else gemm.MULTIPROCESSORS  # more would make the partials an eighth of the bytes
        assert len(programs) == 3 and min(programs.values()) >= least, programs


def test_partials_are_a_small_part_of_the_bytes():
    grad_x, grad_y, weight = (
        torch.empty(*shape, dtype=torch.bfloat16, device="meta")
        for shape in ((16, 4096, 1, 1), (16, 512, 7, 7), (4096, 512, 7, 7))
    )
    most = gemm.affordable_splits(grad_x, grad_y, weight)
    read = 2 * (grad_y.numel() + weight.numel())
    assert 8 * most * grad_x.numel() <= read / 8 < 8 * (most + 1) * grad_x.numel()
    _, splits = gemm.split_k(25088 // 64, tiles=64, most=most)
    assert splits == 4 and 8 * splits * grad_x.numel() <= 0.011 * read
    large = torch.empty(8, 512, 64, 64, device="meta")
    assert gemm.split_k(72, 8, gemm.affordable_splits(large, large, weight)) == (72, 1)
    assert gemm.split_k(72, 8, 0) == (72, 1)


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("sm", [80, 90])
def test_gate_one_pixel_moves_each_tensor_once(sm, layout, device, triton_backend):
    """Each GEMM, with its split-K partials; nothing else touches the weight, which is most of the bytes."""
    x, weight, bias = (t.requires_grad_() for t in tensors((16, 64, 1, 1), 64, 7, torch.float16, layout, device))
    with launch.targeting(sm), metering() as launches:
        y = FS.conv_transpose2d(x, weight, bias)
        y.backward(torch.randn_like(y))
    assert not any(traffic.outside for traffic in launches)
    gemms = {traffic.kernel: traffic.sectors() for traffic in launches if traffic.flops}
    floor = 2 * sum(t.numel() for t in (x, weight, y))
    assert len(gemms) == 3 and max(gemms.values()) <= 1.15 * floor, gemms
    assert sum(traffic.sectors() for traffic in launches) - sum(gemms.values()) <= 0.3 * floor


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("weight_layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("sm", [80, 90])
def test_one_pixel(sm, weight_layout, layout, device, triton_backend, assert_right):
    """In every layout, with several batch sizes and epilogues, and with padding."""
    for n, c, k, kernel, padding in ((16, 24, 8, (3, 2), 0), (2, 19, 5, 4, 0), (3, 8, 1, 3, 0), (2, 8, 16, 4, 1)):
        inputs = tensors((n, c, 1, 1), k, kernel, pick(*DTYPES), layout, device, weight_layout)
        with launch.targeting(sm):
            assert_right(
                lambda *t: FS.conv_transpose2d(*t, padding=padding),  # noqa: B023
                lambda *t: F.conv_transpose2d(*t, padding=padding), inputs, NAMES,  # noqa: B023
            )  # fmt: skip
    scale = torch.randn(k, device=device)
    with launch.targeting(sm):
        y = FS.conv_transpose2d_affine_relu(*inputs[:2], scale, inputs[2].float())
    want = F.conv_transpose2d(*(t.double() for t in inputs[:2])) * scale[:, None, None] + inputs[2][:, None, None]
    torch.testing.assert_close(y.double(), want.relu(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("draw", range(12))
def test_columns_across_phases(draw, device, triton_backend, assert_right):
    """Tiles whose columns begin in one phase and end in another, with each access width."""
    stride, channels = (pick(1, 2, 3), pick(2, 4)), pick(5, 6, 11, 19, 20, 21, 38)
    kernel = tuple(s * pick(1, 2) + pick(0, 0, 1) for s in stride)
    padding = tuple(pick(*range(min(k, s + 1))) for k, s in zip(kernel, stride, strict=True))
    inputs = tensors((1, pick(3, 8, 21), 3, 4), channels, kernel, pick(*DTYPES), torch.channels_last, device)
    print(stride, channels, kernel, padding, inputs[0].shape, inputs[0].dtype)
    with launch.targeting(80):
        assert_right(
            lambda *t: FS.conv_transpose2d(*t, stride, padding), lambda *t: F.conv_transpose2d(*t, stride, padding),
            inputs, NAMES,
        )  # fmt: skip


@pytest.mark.parametrize(
    "size, columns, tiles",
    [
        (((1, 24, 16, 16), 21, 16, 8, 4), 64 * 21, 21),  # 32 if each phase were rounded up to 32 channels
        (((1, 24, 16, 16), 80, 4, 2, 1), 4 * 80, 5),
        (((1, 24, 16, 16), 40, 3, 1, 1), 40, 1),  # 3 if each tile were padded by itself
        (((1, 24, 16, 16), 21, 3, 2, 1, 1), 4 * 21, 4),  # phases with different numbers of taps
    ],
)
def test_only_the_last_tile_is_padded(size, columns, tiles):
    forward = next(recorded for recorded in recorded_step(size, 80, "channels_last") if "fwd" in recorded.name)
    side = 17 if forward.constants["ALONE"] is False else 16  # cells begin in the padding
    assert forward.programs == tiles * -(-side * side // forward.constants["BLOCK_M"])
    assert columns <= tiles * forward.constants["BLOCK_N"]


COMPILE = """
import json, sys
sys.path.insert(0, "tests")
from fastseg.inspect.codegen import compile_for, disassemble
from support.conv_transpose_common import recorded_step
rows = []
for sm in (80, 90, 100):
    found = [r for r in recorded_step(((8, 21, 64, 64), 21, 4, 2, 1), sm, "channels_last") if "conv" in r.name]
    found += [r for r in recorded_step(((8, 21, 64, 64), 21, 16, 8, 4), sm, "channels_last") if "fwd" in r.name]
    kernels = [compile_for(recorded, sm) for recorded in {repr(r): r for r in found}.values()]
    disassemble(kernels)
    rows += [(sm, k.name, k.spills, k.widths("STG")) for k in kernels]
print(json.dumps(rows))
"""


@interpreted
def test_gate_odd_numbers_of_channels_do_not_spill():
    """With 21 channels loads and stores are 2 bytes wide, and there are many: 128 x 128 tiles spilled 409 times."""
    rows = json.loads(compiled("-c", COMPILE))
    assert [row for row in rows if row[2]] == []
    forward = [row for row in rows if row[1] == "conv_transpose2d_fwd_kernel"]
    assert [[*row[3]] for row in forward] == [["2"], ["8"]] * 3
