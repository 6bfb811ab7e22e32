"""Products of matrices, long sums in shares, channels that are no whole vectors."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from test_conv_transpose import DTYPES, LAYOUTS, NAMES, pick, tensors

from fastseg import dispatch
from fastseg import functional as FS
from fastseg.inspect.codegen import record
from fastseg.inspect.traffic import metering
from fastseg.kernels import launch
from fastseg.kernels.convolution import conv_transpose_bwd, conv_transpose_tma, gemm
from fastseg.ops.operator import observing
from fastseg.verification import cases

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="counted in the interpreter")
FC6 = ((16, 4096, 1, 1), 512, 7)  # DeconvNet's


def launched(size, sm, layout):
    """What a call and its gradients would launch on a GPU of sm_<sm>."""
    at = cases.Placement(torch.bfloat16, LAYOUTS[layout], "meta")
    shape, *conv = size
    (case,) = cases.conv_transpose2d(at, shape, cases.ConvTransposeSpec(*conv))
    with dispatch.backend("triton"), launch.targeting(sm), observing(lambda operator, call: None):
        return record(lambda: case.step(case.ours, backward=True)())


@pytest.fixture
def shares(monkeypatch):
    """Any number is worth its partials; gives what was launched, and runs it."""
    found, outer = [], launch.launch
    for module in (conv_transpose_bwd, conv_transpose_tma):
        monkeypatch.setattr(module, "affordable_shares", lambda *tensors: 10**6)

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
        ((1, 40, 3, 5), 19, (3, 4), 2, (1, 2)),  # runs that are no whole blocks, and windows that the edge cuts
        ((1, 8, 3, 4), 70, 3, 1, 1, 0, 1, (1, 2)),  # one tap a run
        ((1, 9, 5, 4), 6, (2, 3), 1, 1, 0, 3),
    ],
)
def test_the_inputs_gradient_in_shares(size, sm, layout, device, triton_backend, assert_right, shares):
    shape, channels, kernel, *geometry = size
    groups = geometry[3] if len(geometry) > 3 else 1
    inputs = tensors(shape, channels // groups, kernel, torch.float16, layout, device)[:2]
    with launch.targeting(sm):
        assert_right(
            lambda *t: FS.conv_transpose2d(*t, None, *geometry),
            lambda *t: F.conv_transpose2d(*t, None, *geometry), inputs, NAMES[:2],
        )  # fmt: skip
    fetched = sm == 90 and channels == 16
    assert (f"conv_transpose2d_bwd_input{'_tma' * fetched}_kernel", True) in shares


def test_shares_with_offsets_of_64_bits(device, triton_backend, assert_right, shares, monkeypatch):
    monkeypatch.setattr(gemm, "INT32_MAX", 0)
    inputs = tensors((2, 5, 3, 4), 19, 3, torch.float32, torch.channels_last, device)
    assert_right(lambda *t: FS.conv_transpose2d(*t, 2), lambda *t: F.conv_transpose2d(*t, 2), inputs, NAMES)
    assert ("conv_transpose2d_bwd_input_kernel", True) in shares


def test_shares_are_added_in_order(device, triton_backend, shares):
    leaves = [t.requires_grad_() for t in tensors((1, 8, 2, 3), 40, 3, torch.float32, torch.channels_last, device)[:2]]
    y = FS.conv_transpose2d(*leaves)
    grad = torch.randn_like(y)
    first, second = (torch.autograd.grad(y, leaves, grad, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second)) and ("conv_transpose2d_bwd_input_kernel", True) in shares


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sm", [80, 90])
def test_products_of_few_rows_fill_a_gpu(sm, layout):
    """DeconvNet's fc6_deconv and its like: a program for each multiprocessor at least, and one pass over the weight."""
    for size in (FC6, ((1, *FC6[0][1:]), *FC6[1:]), ((4, 1024, 4, 4), 512, 4, 4)):
        found = {recorded.name: recorded for recorded in launched(size, sm, layout)}
        products_of = {n: r.programs for n, r in found.items() if "conv" in n and "epilogue" not in n}
        least = 64 if size[0][-1] > 1 else gemm.PROGRAMS  # more would make the partials an eighth of the bytes
        assert len(products_of) == 3 and min(products_of.values()) >= least, products_of


def test_partials_are_a_small_share_of_the_bytes():
    grad_x, grad_y, weight = (
        torch.empty(*shape, dtype=torch.bfloat16, device="meta")
        for shape in ((16, 4096, 1, 1), (16, 512, 7, 7), (4096, 512, 7, 7))
    )
    most = gemm.affordable_shares(grad_x, grad_y, weight)
    read = 2 * (grad_y.numel() + weight.numel())
    assert 8 * most * grad_x.numel() <= read / 8 < 8 * (most + 1) * grad_x.numel()
    _, shares = gemm.split(25088 // 64, tiles=64, most=most)
    assert shares == 4 and 8 * shares * grad_x.numel() <= 0.011 * read
    large = torch.empty(8, 512, 64, 64, device="meta")
    assert gemm.split(72, 8, gemm.affordable_shares(large, large, weight)) == (72, 1)
    assert gemm.split(72, 8, 0) == (72, 1)


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("sm", [80, 90])
def test_gate_one_pixel_moves_each_tensor_once(sm, layout, device, triton_backend):
    """Each product, with the partials of its shares; nothing else touches the weight, which is most of the bytes."""
    x, weight, bias = (t.requires_grad_() for t in tensors((16, 64, 1, 1), 64, 7, torch.float16, layout, device))
    with launch.targeting(sm), metering() as launches:
        y = FS.conv_transpose2d(x, weight, bias)
        y.backward(torch.randn_like(y))
    assert not any(traffic.outside for traffic in launches)
    products_of = {traffic.kernel: traffic.sectors() for traffic in launches if traffic.flops}
    floor = 2 * sum(t.numel() for t in (x, weight, y))
    assert len(products_of) == 3 and max(products_of.values()) <= 1.15 * floor, products_of
    assert sum(traffic.sectors() for traffic in launches) - sum(products_of.values()) <= 0.3 * floor


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("weight_layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("sm", [80, 90])
def test_one_pixel(sm, weight_layout, layout, device, triton_backend, assert_right):
    """In every layout, batch and kind of epilogue, with padding too."""
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
def test_columns_over_phases(draw, device, triton_backend, assert_right):
    """Blocks of columns that begin in one phase and end in another, of each width of access."""
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
    "size, columns, blocks",
    [
        (((1, 24, 16, 16), 21, 16, 8, 4), 64 * 21, 21),  # each phase rounded up to 32 channels: 32
        (((1, 24, 16, 16), 80, 4, 2, 1), 4 * 80, 5),
        (((1, 24, 16, 16), 40, 3, 1, 1), 40, 1),  # each block padded by itself: 3
        (((1, 24, 16, 16), 21, 3, 2, 1, 1), 4 * 21, 4),  # phases of different taps
    ],
)
def test_only_the_last_block_has_columns_that_are_no_channels(size, columns, blocks):
    forward = next(recorded for recorded in launched(size, 80, "channels_last") if "fwd" in recorded.name)
    side = 17 if forward.constants["ALONE"] is False else 16  # cells that begin in the padding
    assert forward.programs == blocks * -(-side * side // forward.constants["BLOCK_M"])
    assert columns <= blocks * forward.constants["BLOCK_N"]


COMPILE = """
import json, sys, torch
sys.path[:0] = ["tests", "tests/convolution"]
from fastseg.inspect.codegen import compile_for, disassemble
from test_conv_transpose_columns import launched
rows = []
for sm in (80, 90, 100):
    found = [r for r in launched(((8, 21, 64, 64), 21, 4, 2, 1), sm, "channels_last") if "conv" in r.name]
    found += [r for r in launched(((8, 21, 64, 64), 21, 16, 8, 4), sm, "channels_last") if "fwd" in r.name]
    kernels = [compile_for(recorded, sm) for recorded in {repr(r): r for r in found}.values()]
    disassemble(kernels)
    rows += [(sm, k.name, k.spills, k.widths("STG")) for k in kernels]
print(json.dumps(rows))
"""


@interpreted
def test_gate_classes_do_not_spill():
    """Accesses of 2 bytes are many, of 21 channels both loads and stores: blocks of 128 x 128 spilled 409 times."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(["tests", *filter(None, [env.get("PYTHONPATH")])])
    run = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)
    assert [row for row in rows if row[2]] == []
    forward = [row for row in rows if row[1] == "conv_transpose2d_fwd_kernel"]
    assert [[*row[3]] for row in forward] == [["2"], ["8"]] * 3
