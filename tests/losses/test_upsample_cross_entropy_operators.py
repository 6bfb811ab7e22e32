"""The operators of upsample_cross_entropy in torch: opcheck, gradcheck, compiled graphs, explain, the module."""

import pytest
import torch
from support.cross_entropy_common import BACKENDS, QUIET
from support.upsample_cross_entropy_common import RESIZINGS, composed, make, results

import fastseg
from fastseg import functional as FS
from fastseg import nn
from fastseg.kernels.losses.options import LossOptions, Resizing
from fastseg.ops.losses import upsample_cross_entropy_operators as ops
from fastseg.ops.losses.row_chunks import RowChunks

pytestmark = QUIET


@BACKENDS
@pytest.mark.parametrize("dtype, reduction", [(torch.float32, "weights"), (torch.bfloat16, "none")], ids=str)
def test_opcheck(dtype, reduction, backend, device):
    x, target = make((1, 3, 2, 3), {"size": (4, 5)}, device, dtype, torch.channels_last)
    options = (Resizing([2.0, 5 / 3], "bilinear", False), LossOptions(reduction, 0, 255, 0.1, 0.0))
    flat = [field for group in options for field in group]
    with fastseg.backend(backend):
        tensors = (x, target, torch.rand(3, device=device))
        for predicted in (None, torch.uint8):
            torch.library.opcheck(torch.ops.fastseg.upsample_cross_entropy.default, (*tensors, *flat, predicted))
        loss, lse, denominator, *_ = ops.UPSAMPLE_CROSS_ENTROPY(*tensors, *options, None)
        call = (torch.ones_like(loss), *tensors, lse, denominator, *flat)
        torch.library.opcheck(torch.ops.fastseg.upsample_cross_entropy_backward.default, call)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_gradients_pass_gradcheck(mode, device):
    x, target = make((1, 3, 2, 3), {"size": (3, 5)}, device, torch.float64)
    options = {"mode": mode, "ignore_index": 255, "label_smoothing": 0.1, "z_loss": 0.01}
    loss = lambda x: FS.upsample_cross_entropy(x, target, **options)  # noqa: E731
    for backend in ("auto", "torch"):  # on a CPU with 3 classes: torch's functions, and chunks
        with fastseg.backend(backend):
            assert torch.autograd.gradcheck(loss, x.requires_grad_())
            assert torch.autograd.gradgradcheck(loss, x)


@pytest.mark.parametrize("dynamic", [False, True])
@BACKENDS
def test_compiles_in_one_graph(backend, dynamic, device):
    x, target = make((1, 4, 2, 3), {"size": (4, 5)}, device)

    def function(x, target):
        return FS.upsample_cross_entropy(x, target.to(torch.uint8), ignore_index=255, align_corners=True) * 2

    with fastseg.backend(backend):
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        torch.testing.assert_close(compiled(x, target), function(x, target))  # without a gradient
        for got, want in zip(results(compiled, x, target), results(function, x, target), strict=True):
            torch.testing.assert_close(got, want)


def test_explain(no_cpu_kernels):
    x, target = torch.zeros(1, 3, 4, 4), torch.zeros(1, 8, 8, dtype=torch.long)
    assert [str(choice) for choice in fastseg.explain(FS.upsample_cross_entropy, x, target)] == [
        "upsample_cross_entropy: torch (a CPU tensor)"
    ]


def test_the_module(device):
    weight = torch.rand(3)
    arguments = (weight, None, 255, None, "sum", 0.1)  # in torch's order
    loss = nn.UpsampleCrossEntropyLoss(*arguments, scale_factor=2, align_corners=True).to(device)
    x, target = make((2, 3, 3, 4), {"scale_factor": 2}, device)
    want = composed(x, target, {"scale_factor": 2, "mode": "bilinear", "align_corners": True}, loss.weight,
                    reduction="sum", label_smoothing=0.1)  # fmt: skip
    torch.testing.assert_close(loss(x, target), want)
    assert list(loss.state_dict()) == ["weight"]
    assert repr(loss) == (
        "UpsampleCrossEntropyLoss(scale_factor=2, mode='bilinear', align_corners=True, ignore_index=255, "
        "reduction='sum', label_smoothing=0.1, normalization='weights', z_loss=0.0)"
    )


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
@pytest.mark.parametrize("size_average, reduce", [(True, None), (False, None), (False, True), (None, False)])
def test_the_module_takes_deprecated_arguments(size_average, reduce, device):
    loss, theirs = (
        module(None, size_average, 255, reduce, "mean", 0.1)
        for module in (nn.UpsampleCrossEntropyLoss, torch.nn.CrossEntropyLoss)
    )
    assert (loss.reduction, loss.ignore_index) == (theirs.reduction, 255)
    x, target = torch.randn(2, 3, 4, 5, device=device), torch.randint(3, (2, 4, 5), device=device)
    torch.testing.assert_close(loss(x, target), theirs(x, target))


def test_reach_contains_every_tap_of_a_chunk():
    """`reach` is an estimate that must contain every row of the small map with a weight above 0."""
    for small, way in RESIZINGS:
        x, target = make((1, 2, *small), way)
        scale = way.get("scale_factor") if not way.get("recompute_scale_factor") else None
        scales = None if scale is None else list(scale) if isinstance(scale, tuple) else [scale, scale]
        resizing = Resizing(scales, way["mode"], bool(way.get("align_corners")))
        chunks = RowChunks.of(x, target.shape[1:], resizing)
        for row in range(target.shape[1]):
            start, stop = chunks.reach(slice(row, row + 1))
            used = chunks.taps[:, row][chunks.weights[:, row] != 0]
            assert start <= used.min() and used.max() < stop
