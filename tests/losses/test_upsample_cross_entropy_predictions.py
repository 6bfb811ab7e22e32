"""Predictions of upsample_cross_entropy_with_predictions."""

import pytest
import torch
import torch.nn.functional as F
from support.cross_entropy_common import BACKENDS, INF, NAN, QUIET

import fastseg
from fastseg import functional as FS
from fastseg.inspect import traffic

pytestmark = QUIET

WAYS = [  # sizes of the small map and of the large one, and interpolate's other arguments
    ((3, 5), (11, 37), {"mode": "bilinear", "align_corners": True}),
    ((7, 9), (5, 7), {"mode": "bilinear"}),
    ((3, 5), (7, 13), {"mode": "nearest"}),
]


def make(shape, size, device, dtype=torch.float32, layout=torch.contiguous_format):
    torch.manual_seed(0)
    x = torch.randn(shape, device=device).mul(3).to(dtype).contiguous(memory_format=layout)
    target = torch.randint(shape[1], (shape[0], *size), device=device)
    return x, target.masked_fill(torch.rand(target.shape, device=device) < 0.3, 255)


@pytest.mark.parametrize("small, size, way", WAYS, ids=["up", "down", "nearest"])
@pytest.mark.parametrize(
    "classes, dtype, predicted, layout, reduction",
    [
        (3, torch.float32, torch.int64, torch.contiguous_format, "none"),
        (6, torch.bfloat16, torch.uint8, torch.channels_last, "mean"),
    ],
    ids=["nchw", "channels_last"],
)
@BACKENDS
def test_predictions_are_the_argmax(backend, classes, dtype, predicted, layout, reduction, small, size, way, device):
    x, target = make((2, classes, *small), size, device, dtype, layout)
    large = F.interpolate(x.double(), size, **way)
    first, second = large.topk(2, 1).values.unbind(1)
    assert (first - second).min() > 1e-4  # so that float32 must choose the same class
    best, valid = large.argmax(1), target != 255
    target = torch.where(valid & (torch.rand(size, device=device) < 0.4), best, target)  # more right ones
    weight = torch.rand(classes, device=device) if reduction == "mean" else None
    leaf = x.clone().requires_grad_()
    options = {"ignore_index": 255, "reduction": reduction, "label_smoothing": 0.1}
    with fastseg.backend(backend):
        got = FS.upsample_cross_entropy_with_predictions(leaf, target, weight, size, **way, **options, dtype=predicted)
        plain = FS.upsample_cross_entropy(x, target, weight, size, **way, **options)
    assert got.prediction.dtype == predicted and torch.equal(got.prediction.long(), best)
    assert got.correct.dtype == got.valid.dtype == torch.int64
    assert got.correct.item() == ((best == target) & valid).sum() and got.valid.item() == valid.sum()
    assert torch.equal(got.loss, plain) and not got.prediction.requires_grad
    exact = x.double().requires_grad_()
    want = F.cross_entropy(
        F.interpolate(exact, size, **way), target, None if weight is None else weight.double(), **options
    )
    torch.testing.assert_close(got.loss.double(), want, rtol=1e-5, atol=1e-5)
    (ours,), (theirs,) = torch.autograd.grad(got.loss.sum(), leaf), torch.autograd.grad(want.sum(), exact)
    # The interpreter truncates to bfloat16, a GPU rounds.
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-5)


@BACKENDS
@pytest.mark.parametrize("classes", [20, 21])
def test_the_first_of_equal_maxima_and_nan(classes, backend, device):
    """0 for a pixel whose logits are all -inf, and never a class past the last."""
    rows = torch.randn(8, classes, device=device)
    rows[0, 3:9] = 50
    rows[1], rows[2, 17], rows[3, 5], rows[3, 2] = -INF, NAN, NAN, INF
    rows[4, classes - 1], rows[5], rows[6, : classes - 1], rows[7] = INF, 0, -INF, NAN
    x = rows.T.reshape(1, classes, 2, 4)
    target = torch.zeros(1, 4, 8, dtype=torch.int64, device=device)
    want = F.interpolate(x, (4, 8)).argmax(1)
    with fastseg.backend(backend):
        got = FS.upsample_cross_entropy_with_predictions(x, target, mode="nearest", reduction="none")
    assert torch.equal(got.prediction, want)
    assert got.correct.item() == (want == 0).sum() and got.valid.item() == 32


@BACKENDS
def test_all_pixels_ignored_and_empty_batches(backend, device):
    for batch in (1, 0):
        x, target = torch.randn(batch, 3, 2, 3, device=device), torch.full((batch, 5, 7), 255, device=device)
        with fastseg.backend(backend):
            got = FS.upsample_cross_entropy_with_predictions(x, target, ignore_index=255)
        assert got.loss.isnan() and got.correct == 0 and got.valid == 0
        assert torch.equal(got.prediction, FS.upsample_argmax(x, (5, 7), dtype=torch.int64))


def test_predictions_need_no_further_read(device, triton_backend):
    if device == "cuda":
        pytest.skip("bytes are counted in the interpreter")
    x, target = make((1, 6, 4, 16), (16, 64), device)
    moved = []
    for function, options in (
        (FS.upsample_cross_entropy, {}),
        (FS.upsample_cross_entropy_with_predictions, {"dtype": torch.uint8}),
    ):
        with traffic.metering() as launches:
            function(x, target, ignore_index=255, **options)
        moved.append(launches[0].sectors())
    assert moved[0] < moved[1] <= moved[0] + 1.1 * target.numel()  # one byte per pixel, and the counts of the programs


@BACKENDS
def test_compiles_in_one_graph(backend, device):
    x, target = make((1, 5, 2, 3), (5, 7), device)

    def function(x, target):
        return FS.upsample_cross_entropy_with_predictions(x, target, ignore_index=255, dtype=torch.uint8)

    with fastseg.backend(backend):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        grads = []
        for call in (compiled, function):
            leaf = x.clone().requires_grad_()
            out = call(leaf, target)
            grads.append((*out, torch.autograd.grad(out.loss, leaf)[0]))
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want)


def test_second_derivatives(device):
    x, target = make((1, 3, 2, 3), (3, 5), device, torch.float64)

    def loss(x):
        return FS.upsample_cross_entropy_with_predictions(x, target, ignore_index=255, label_smoothing=0.1).loss

    assert torch.autograd.gradcheck(loss, x.requires_grad_()) and torch.autograd.gradgradcheck(loss, x)


def test_explain(no_cpu_kernels):
    x, target = torch.zeros(1, 3, 4, 4), torch.zeros(1, 8, 8, dtype=torch.long)
    assert [str(choice) for choice in fastseg.explain(FS.upsample_cross_entropy_with_predictions, x, target)] == [
        "upsample_cross_entropy: torch (a CPU tensor)"
    ]


@pytest.mark.parametrize("kwargs, error, message", [
    ({"dtype": torch.int32}, ValueError, "_with_predictions: dtype must be torch.int64 or torch.uint8"),
    ({"target": torch.rand(1, 3, 2, 2)}, RuntimeError, "_with_predictions: target must be class indices"),
    ({"input": torch.rand(1, 257, 2, 2), "dtype": torch.uint8}, ValueError, "dtype must be torch.int64 for 257"),
    ({"size": (4, 4)}, RuntimeError, "_with_predictions: target must have shape"),
    ({"target": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, r"_with_predictions: target .* \(N, H, W\)"),
    ({"reduction": "max"}, ValueError, "reduction must"),
    ({"target": torch.full((1, 2, 2), 3)}, IndexError, "Target 3 is out of bounds"),
])  # fmt: skip
@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=pytest.mark.interpreted)])
def test_bad_arguments(kwargs, error, message, backend):
    arguments = {"input": torch.rand(1, 3, 2, 2), "target": torch.zeros(1, 2, 2, dtype=torch.int64)} | kwargs
    with fastseg.backend(backend), pytest.raises(error, match=message):
        FS.upsample_cross_entropy_with_predictions(**arguments)
