"""Bytes of torch.compile's GPU kernels, counted without a GPU, against bytes computed by hand."""

import json

import pytest
import torch
import torch.nn.functional as F

from fastseg.commands import cli
from fastseg.inspect import inductor, traffic_report
from fastseg.verification import cases

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")


def counted(function, *inputs):
    """The result of a call, and its only graph."""
    torch.compiler.reset()
    compiled, graphs = inductor.compiled(function)
    result = compiled(*inputs)
    (graph,) = graphs
    return result, graph


def test_a_chain_of_pointwise_operators_reads_and_writes_once():
    x, y = torch.randn(3, 8, 16, 32), torch.randn(3, 8, 16, 32)  # blocks of up to 4096 elements, without masks
    result, graph = counted(lambda x, y: (x * 2 + y).relu().square(), x, y)
    assert torch.equal(result, (x * 2 + y).relu().square())
    (kernel,) = graph.kernels
    assert (kernel.sectors("load"), kernel.sectors("store")) == (2 * x.nbytes, x.nbytes)
    assert graph.moved == (3 * x.nbytes,) * 2
    assert graph.operators.sectors.total() == 0


def test_operators_left_to_torch_are_counted_like_eager():
    """A matmul that writes to a given tensor, and a kernel that reads and writes its result."""
    a, b = torch.randn(32, 64), torch.randn(64, 48)
    result, graph = counted(lambda a, b: (a @ b).sigmoid(), a, b)
    torch.testing.assert_close(result, (a @ b).sigmoid())
    (kernel,) = graph.kernels
    assert graph.operators.sectors.total() == a.nbytes + b.nbytes + result.nbytes
    assert kernel.sectors() == 2 * result.nbytes


def test_atomics_read_and_write():
    places, values = torch.randint(64, (256,)), torch.randn(256)
    result, graph = counted(lambda i, v: torch.zeros(64).index_add(0, i, v), places, values)
    torch.testing.assert_close(result, torch.zeros(64).index_add(0, places, values))
    assert sum(kernel.sectors("atomic") for kernel in graph.kernels) == 64 * 4
    assert graph.moved[0] == 64 * 4 + places.nbytes + values.nbytes + 2 * 64 * 4


def test_the_last_run_counts():
    compiled, graphs = inductor.compiled(lambda x: x + 1)
    for _ in range(2):
        compiled(torch.zeros(1024))
    assert graphs[0].moved[0] == 2 * 4096


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_a_transposed_convolution_and_its_bias(layout):
    """In the input's memory format. The bias takes a pass over the result, and in the backward over the gradient."""
    at = cases.Placement(torch.bfloat16, cases.LAYOUTS[layout], "cpu")
    (case,) = cases.conv_transpose2d(at, (1, 64, 16, 16), cases.ConvTransposeSpec(32, kernel=2, stride=2))
    x, weight, y = 64 * 256 * 2, 64 * 32 * 4 * 2, 32 * 1024 * 2
    torch.compiler.reset()
    function, graphs = inductor.compiled(case.theirs)
    case.step(function, backward=True)()
    forward, backward = graphs
    assert forward.moved[0] == pytest.approx(x + weight + y + 2 * y, rel=0.005)
    assert backward.moved[0] == pytest.approx(2 * (x + weight) + y + y, rel=0.03)
    assert "bias of a convolution" not in backward.operators.least, "Inductor's kernel sums the bias"


@pytest.mark.parametrize("channels", [8, 16])
def test_few_channels_are_resized_into_nchw(channels):
    """torch decomposes the resizing so only on a GPU."""
    x = torch.randn(1, channels, 8, 8).contiguous(memory_format=torch.channels_last)
    result, _ = counted(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), x)
    torch.testing.assert_close(result, F.interpolate(x, scale_factor=2, mode="bilinear"))
    assert result.is_contiguous() == (channels < 16)


def test_channels_last_is_unpooled_into_nchw():
    """torch decomposes it so only on a GPU: since torch 2.14 a CPU's result is copied into channels_last."""
    x, indices = F.max_pool2d(torch.randn(2, 8, 8, 16), 2, return_indices=True)
    x, indices = (t.contiguous(memory_format=torch.channels_last) for t in (x, indices))
    result, graph = counted(lambda x, indices: F.max_unpool2d(x, indices, 2), x, indices)
    assert torch.equal(result, F.max_unpool2d(x, indices, 2)) and result.is_contiguous()
    planes = torch.arange(2 * 8).view(2, 8, 1, 1) * (8 * 16)
    scattered = ((planes + indices) // 8).unique().numel() * 32  # sectors of eight elements
    assert graph.moved[1] == x.nbytes + indices.nbytes + result.nbytes + scattered


# Bytes per element of the large image, forward and backward, with torch 2.13's decompositions: pooling scatters its
# gradient into float32 by atomics, most of which reach a separate sector, and casts it. In torch 2.11 each element of
# the image checks whether it was the largest of its windows.
SCATTERS = not torch.__version__.startswith("2.11.")
BY_HAND = {
    "max_pool2d": ((2 + 2 / 4 + 8 / 4,), (4 + (2 + 8) / 4 + 2 * 4 + 4 + 2 if SCATTERS else (2 + 8) / 4 + 2,)),
    "max_unpool2d": ((2 + (2 + 8) / 4 + 2,), (2 + (2 + 8) / 4,)),
    "batch_norm_relu": ((2 + 2 + 1,), (2 + 2 + 1 + 2,)),
}


@pytest.mark.parametrize("operator", BY_HAND)
def test_bytes_by_hand(operator):
    at, shape = cases.Placement(torch.bfloat16, torch.contiguous_format, "cpu"), (2, 16, 32, 64)
    case = next(getattr(cases, operator)(at, shape))
    moved = traffic_report.compiled_bytes(case, backward=True)
    for mode, (an_element,) in zip(("forward", "backward"), BY_HAND[operator], strict=True):
        assert moved[mode][1] / (2 * 16 * 32 * 64) == pytest.approx(an_element, rel=0.04), mode


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize(
    "make, size",
    [
        (cases.batch_norm_relu, ((1, 24, 19, 27),)),
        (cases.max_pool2d, ((1, 8, 9, 13), cases.PoolSpec(kernel=3, stride=2, padding=1))),
        (cases.cross_entropy, ((1, 150, 8, 9),)),
        (cases.upsample_cross_entropy, ((1, 11, 4, 8), cases.ResizeSpec((16, 32)))),
    ],
)
def test_the_interpreted_program_computes_torchs_results(make, size, layout):
    """Results and gradients agree, so the whole program ran and accessed only its tensors."""
    at = cases.Placement(torch.float32, cases.LAYOUTS[layout], "cpu")
    case = next(make(at, *size))
    torch.compiler.reset()
    function, graphs = inductor.compiled(case.theirs)
    leaves = [x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
              for x in case.inputs.values()]  # fmt: skip
    wanted = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad][:3]
    results = []
    for call in (function, case.theirs):
        out = call(*leaves)
        out = out[0] if isinstance(out, tuple) else out
        gradient = torch.linspace(-1, 1, out.numel()).view(out.shape)
        results.append([out, *torch.autograd.grad(out, wanted, gradient)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.detach().abs().max()) + 1e-7)
    assert [graph.backward for graph in graphs] == [False, True]


def test_the_compile_columns(tmp_path, capsys):
    png = tmp_path / "traffic.png"
    arguments = ["inspect", "traffic", "--op", "upsample_argmax", "--layout", "nchw", "--compile"]
    assert cli.main([*arguments, "--json", "--png", str(png)]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["compiled least"] == row["compiled sectors"] > row["floor"] and "not counted" not in row
    assert png.read_bytes().startswith(b"\x89PNG")


def test_failures_to_count_are_reported(monkeypatch, tmp_path, capsys):
    def renamed(function):
        raise AttributeError("torch of another version\nhas it elsewhere")

    monkeypatch.setattr(traffic_report, "compiled", renamed)
    arguments = ["inspect", "traffic", "--op", "upsample_argmax", "--layout", "nchw", "--compile"]
    assert cli.main([*arguments, "--png", str(tmp_path / "traffic.png")]) == 0
    assert "not counted: AttributeError: torch of another version" in " ".join(capsys.readouterr().out.split())
    assert cli.main([*arguments, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["compiled least"] is None and row["eager least"] > 0
