"""The instrument that counts traffic, and gates on the bytes that every kernel moves."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from support import bad_kernels, plain_networks

from fastseg import dispatch, functional, models
from fastseg.commands import cli
from fastseg.inspect import traffic_report
from fastseg.inspect.eager import ByteCounter
from fastseg.inspect.traffic import metering
from fastseg.kernels.launch import launch
from fastseg.verification import cases, operators

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")

MEMORY_BOUND = ("max_pool2d", "max_unpool2d", "cross_entropy", "upsample_cross_entropy")
NORM, POOL, UNPOOL = "batch_norm_relu", "batch_norm_relu_max_pool2d", "batch_norm_relu_max_unpool2d"
NORMS = {"batch_norm_stats", UNPOOL, f"{UNPOOL}_sums"}
NORMS |= {f"{name}{suffix}" for name in (NORM, POOL) for suffix in ("", "_sums", "_backward")}


def moved(kernel, *tensors, n):
    with metering() as launches:
        launch(kernel, n // 256, *tensors, n, BLOCK=256)
    return launches[0]


def test_sectors_are_counted_once_and_requests_each_time():
    x, y = torch.zeros(2048), torch.zeros(1024)
    wasteful = moved(bad_kernels.padded_copy_kernel, x, y, n=1024)
    assert wasteful.requested == {"load": 4096, "store": 4096, "atomic": 0}
    assert (wasteful.sectors("load"), wasteful.sectors("store")) == (8192, 4096)
    atomics = moved(bad_kernels.atomic_sum_kernel, x, y, n=1024)
    assert atomics.requested["atomic"] == 4096 and atomics.sectors("atomic") == 32


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_gate_every_memory_bound_operator_is_at_its_floor(layout):
    """At most 1.05 times the floor for sizes that the blocks divide, 1.15 times for odd sizes."""
    at = cases.Placement(torch.bfloat16, cases.LAYOUTS[layout], "cpu")
    seen = set()
    for case in traffic_report.sized_cases(at):
        if case.operator.startswith((*MEMORY_BOUND, NORM)):
            odd = any(odd in case.size for odd in ("38x54", "23x37", "9x13"))
            for traffic in traffic_report.operator_traffic(case):
                seen.add(traffic.operator)
                assert traffic.ratio <= (1.15 if odd else 1.05), f"{traffic.operator} {case.size}: {traffic.ratio:.3f}"
    one_pass = {"cross_entropy_one_pass", "cross_entropy_one_pass_backward_"}
    pairs = {f"{name}{suffix}" for name in MEMORY_BOUND for suffix in ("", "_backward")}
    assert seen == pairs | one_pass | NORMS


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_gate_float32_is_at_its_floor(layout):
    at, shape = cases.Placement(torch.float32, cases.LAYOUTS[layout], "cpu"), (1, 16, 64, 32)
    for make in (cases.max_pool2d, cases.max_unpool2d, cases.batch_norm_relu):
        for case in make(at, shape):
            for traffic in traffic_report.operator_traffic(case):
                assert traffic.ratio <= 1.05, f"{traffic.operator}: {traffic.ratio:.3f}"


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_gate_batch_norm_against_eager(layout):
    """Forward and backward, with and without the bias of the convolution in front, which eager adds separately."""
    places = [cases.Placement(torch.bfloat16, cases.LAYOUTS[layout], d) for d in ("cpu", "meta")]
    for biased, most in ((False, (0.63, 0.36)), (True, (0.52, 0.31))):
        both = (list(cases.batch_norm_relu(at, (1, 32, 32, 32), conv_bias=biased)) for at in places)
        for case, bare, share in zip(*(found[:2] for found in both), most, strict=True):
            ours = sum(t.moved for t in traffic_report.operator_traffic(case))
            eager = sum(least for least, _ in traffic_report.eager_bytes(bare).values())
            assert ours <= share * eager, f"{case.operator} {biased}: {ours / eager:.3f}"


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_gate_pools_against_eager(layout):
    """Fewer sectors than torch's operators: pooling backward, unpooling forward and backward."""
    shape, places = (1, 64, 8, 32), [cases.Placement(torch.bfloat16, cases.LAYOUTS[layout], d) for d in ("cpu", "meta")]

    def moved(make):
        for case, bare in zip(*(make(at, shape) for at in places), strict=True):
            eager = {mode: sectors for mode, (_, sectors) in traffic_report.eager_bytes(bare).items()}
            yield case.operator, [t.moved for t in traffic_report.operator_traffic(case)], eager

    for operator, (_, backward), eager in moved(cases.max_pool2d):
        assert backward <= 0.55 * eager["backward"], operator
    for operator, ours, eager in moved(cases.max_unpool2d):
        if operator == "max_unpool2d_with_offsets" and layout == "channels_last":
            assert sum(ours) <= 0.30 * sum(eager.values())


def plain_segnet():
    """SegNet of plain_networks at full width."""
    down = [[64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3]
    up = [[512] * 3, [512, 512, 256], [256, 256, 128], [128, 64], [64]]
    ends = [3, *(row[-1] for row in [*down, *up])]
    rows = [
        [plain_networks.conv(i, o) for i, o in pairwise([first, *row])]
        for first, row in zip(ends, [*down, *up], strict=False)
    ]
    return plain_networks.Plain(rows[:5], rows[5:], torch.nn.Conv2d(64, 11, 3, padding=1))


def test_gate_a_training_step_of_segnet_outside_its_convolutions():
    """8x3x360x480 in bfloat16 and channels_last, on the meta device: floors of all operators against eager's bytes."""

    def step(model, loss):
        model.bfloat16().to(memory_format=torch.channels_last)
        x = torch.empty(8, 3, 360, 480, dtype=torch.bfloat16, device="meta").contiguous(
            memory_format=torch.channels_last
        )
        with ByteCounter() as counter:
            loss(model(x), torch.empty(8, 360, 480, dtype=torch.int64, device="meta")).backward()
        return sum(v for name, v in counter.least.items() if not name.startswith("aten::convolution"))

    with torch.device("meta"):
        plain, fused = plain_segnet(), models.SegNet()
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in fused.parameters())
    with dispatch.backend("triton"):
        ours = step(fused, functional.cross_entropy)
    assert ours <= 0.45 * step(plain, F.cross_entropy)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("operator", operators.SIZES)
def test_gate_no_kernel_accesses_memory_outside_its_tensors(operator, layout):
    at = cases.Placement(torch.float16, cases.LAYOUTS[layout], "cpu")
    for make in operators.SIZES[operator]:
        for case in make(at):
            for traffic in traffic_report.operator_traffic(case):
                for kernel in traffic.kernels:
                    assert kernel.outside == 0, f"{kernel.kernel} in {case.operator} {case.size}"


def test_an_access_outside_a_tensor_is_counted():
    x, y = torch.zeros(2047), torch.zeros(1024)
    assert moved(bad_kernels.padded_copy_kernel, x, y, n=1024).outside == 0
    assert moved(bad_kernels.padded_copy_kernel, x[:2046], y, n=1024).outside == 1


def test_the_floors_are_the_published_ones():
    """Bytes in bfloat16 per element of the input (pooling), of the pooled map (unpooling), and per pixel (losses)."""
    at = cases.Placement(torch.bfloat16, torch.channels_last, "cpu")
    elements, pixels = 2 * 64 * 16 * 32, 2 * 16 * 32
    makers = [*cases.max_pool2d(at, (2, 64, 16, 32)), *cases.max_unpool2d(at, (2, 64, 16, 32))]
    floors = [[t.floor for t in traffic_report.operator_traffic(case)] for case in makers]
    assert floors == [
        [4.5 * elements, 4.5 * elements],
        [2.75 * elements, 2.75 * elements],
        [18 * elements / 4, 18 * elements / 4],
        [11 * elements / 4, 11 * elements / 4],
    ]
    norms = [
        traffic_report.by_mode(traffic_report.operator_traffic(c)) for c in cases.batch_norm_relu(at, (2, 64, 16, 32))
    ]
    floors = [[t.floor / elements for t in modes.values()] for modes in norms]
    assert floors[0] == pytest.approx([6, 10], rel=0.01) and floors[1] == pytest.approx([4.75, 7.5], rel=0.01)
    assert floors[2][0] == pytest.approx(13 / 4, rel=0.02)
    (dice,) = cases.dice_cross_entropy(at, (2, 4, 16, 32), 255)
    modes = traffic_report.by_mode(traffic_report.operator_traffic(dice))
    assert [t.floor / pixels for t in modes.values()] == pytest.approx([2 * 4 + 8, 4 * 4 + 8], rel=0.01)
    (case,) = cases.cross_entropy(at, (2, 19, 16, 32), cases.LossSpec(one_pass=False))
    assert sum(t.floor for t in traffic_report.operator_traffic(case)) == pytest.approx(
        (6 * 19 + 24) * pixels, rel=1e-3
    )
    (case,) = cases.cross_entropy(at, (2, 19, 16, 32))
    forward, backward = traffic_report.operator_traffic(case)
    assert forward.floor == pytest.approx((4 * 19 + 9) * pixels, rel=1e-3) and backward.moved == 32


def test_bytes_per_element_do_not_depend_on_the_size():
    at = cases.Placement(torch.bfloat16, torch.contiguous_format, "cpu")

    def an_element(height):
        cases_ = [*cases.max_pool2d(at, (1, 16, height, 64))]
        cases_ += cases.cross_entropy(at, (1, 19, height, 64), cases.LossSpec(one_pass=False))
        return [t.moved / height for case in cases_ for t in traffic_report.operator_traffic(case)]

    assert an_element(32) == pytest.approx(an_element(96), rel=0.01)


def test_eager_bytes_by_hand():
    """Max-unpooling in channels_last: two copies to NCHW, zero-fill, read, scatter, and a copy back."""
    at = cases.Placement(torch.bfloat16, torch.channels_last, "meta")
    case = next(cases.max_unpool2d(at, (1, 64, 32, 64)))
    pooled = 64 * 16 * 32
    copies, zero_fill, read, back = 4 + 16, 8, 10, 16
    least, sectors = traffic_report.eager_bytes(case)["forward"]
    assert least == (copies + zero_fill + read + 2 + back) * pooled
    assert sectors == (copies + zero_fill + read + 8 + back) * pooled


def test_views_move_nothing_and_copies_move_twice():
    x = torch.empty(8, 16, device="meta")
    with ByteCounter() as counter:
        x.view(128).unsqueeze(0).detach()
        assert counter.least.total() == 0
        x.t().contiguous()
        assert counter.least.total() == 2 * 512
        F.relu_(x)
        torch.mm(x, x.t(), out=torch.empty(8, 8, device="meta"))
    assert counter.least["aten::relu_"] > 0
    assert counter.least["aten::mm"] == 2 * 512 + 256


def test_the_traffic_command(tmp_path, capsys):
    png = tmp_path / "traffic.png"
    arguments = ["inspect", "traffic", "--op", "max_unpool2d_with", "--layout", "nchw", "--bandwidth", "2"]
    assert cli.main([*arguments, "--json", "--png", str(png)]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == 8 and png.read_bytes().startswith(b"\x89PNG")
    for row in rows:
        lone = "k3" in row["size"] and row["mode"] == "backward"  # reads only the elements at the positions
        assert row["moved"] >= row["floor"] * (0.9 if lone else 1) and row["model us"] == row["moved"] / 2e6
    assert cli.main(arguments) == 0
    assert "max_unpool2d_with_offsets" in capsys.readouterr().out
    assert cli.main(["inspect", "traffic", "--op", "nothing"]) == 2
    assert cli.main(["inspect", "traffic", "--bandwidth", "0"]) == 2


def test_a_row_is_the_same_in_every_run_and_selection(monkeypatch):
    """Which sectors are touched depends on positions and labels, which are drawn at random."""

    def few_cases(at):
        yield from cases.cross_entropy(at, (1, 40, 5, 9), cases.LossSpec(one_pass=False))
        yield from cases.max_unpool2d(at, (1, 8, 10, 12), traffic_report.RESNET_STEM)

    monkeypatch.setattr(traffic_report, "sized_cases", few_cases)
    both = traffic_report.Selection(layouts=("channels_last",))
    torch.manual_seed(1)
    first = traffic_report.rows(both, 1.0)
    drawn = torch.rand(1)
    torch.manual_seed(2)
    assert traffic_report.rows(both, 1.0) == first
    unpooling = traffic_report.rows(replace(both, operators=("max_unpool2d",)), 1.0)
    assert unpooling == [row for row in first if row["operator"].startswith("max_unpool2d")] != []
    torch.manual_seed(1)
    assert torch.rand(1) == drawn  # the caller's own random numbers go on as if nothing had been drawn


@pytest.mark.parametrize(
    "words",
    ["traffic --sm 90", "traffic --sass k", "codegen --png a.png", "codegen --bandwidth 2", "codegen --compile"],
)
def test_an_option_of_the_other_instrument_raises(words, capsys):
    assert cli.main(["inspect", *words.split()]) == 2
    assert words.split()[1] in capsys.readouterr().err
