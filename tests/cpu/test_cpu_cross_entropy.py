"""The CPU kernels of cross-entropy against torch in float64: layouts, dtypes, sizes, arguments, bad input, threads."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from fastseg.kernels.cpu import build
from fastseg.kernels.cpu.losses import cross_entropy, cross_entropy_bwd, cross_entropy_one_pass
from fastseg.kernels.losses.options import LossInputs, LossOptions, LossResults, OnePassResults

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
BOTH_LAYOUTS = pytest.mark.parametrize("layout", LAYOUTS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float64: 1e-14}  # of the maximum
IGNORED = 255


def computed(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def poisoned(*shape, dtype, layout=torch.contiguous_format):
    out = torch.empty(shape, dtype=dtype, memory_format=layout)
    return out.fill_(float("nan")) if dtype.is_floating_point else out.fill_(77)


def options(reduction="weights", count=0, ignore_index=IGNORED, smoothing=0.0, z_loss=0.0):
    return LossOptions(reduction, count, ignore_index, smoothing, z_loss)


def case(shape, dtype=torch.float32, layout="nchw", label_dtype=torch.int64, scale=3.0):
    n, classes, h, w = shape
    logits = (torch.randn(shape) * scale).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    labels = torch.randint(classes, (n, h, w)).to(label_dtype)
    labels[torch.rand(n, h, w) < 0.1] = IGNORED
    return logits, labels


def empties(logits, targets, chosen, predicted):
    n, _, h, w = logits.shape
    wide = computed(logits.dtype)
    loss = poisoned(*((n, h, w) if chosen.reduction == "none" else ()), dtype=wide)
    denominator = poisoned(dtype=wide)
    if chosen.reduction == "count":
        denominator.fill_(chosen.count)
    prediction = poisoned(n, h, w, dtype=predicted) if predicted else torch.empty(0, dtype=torch.uint8)
    return loss, denominator, prediction, torch.full((2 if predicted else 0,), 77)


def two_passes(logits, targets, weight, chosen, grad=None, predicted=None, layout="nchw"):
    """(loss, gradient, prediction, counts) of the kernels."""
    inputs, last = LossInputs(logits, targets, weight), layout == "channels_last"
    loss, denominator, prediction, counts = empties(logits, targets, chosen, predicted)
    terms = (2 if logits.element_size() >= 4 else 1) + targets.is_floating_point()
    n, _, h, w = logits.shape
    lse = poisoned(terms, n, h, w, dtype=loss.dtype)
    results = LossResults(loss, lse, denominator, prediction, counts)
    cross_entropy.cross_entropy_fwd(inputs, chosen, last, results)
    gradient = poisoned(*logits.shape, dtype=logits.dtype, layout=LAYOUTS[layout])
    grad = torch.ones_like(loss) if grad is None else grad
    cross_entropy_bwd.cross_entropy_bwd(grad, inputs, lse, denominator, chosen, last, gradient)
    return loss, gradient, prediction, counts


def one_pass(logits, targets, weight, chosen, grad=None, predicted=None, layout="nchw"):
    inputs, last = LossInputs(logits, targets, weight), layout == "channels_last"
    loss, denominator, prediction, counts = empties(logits, targets, chosen, predicted)
    gradient = poisoned(*logits.shape, dtype=logits.dtype, layout=LAYOUTS[layout])
    packed_dtype = torch.uint8 if logits.shape[1] < 256 else torch.int16
    packed = poisoned(*(targets.shape if chosen.sums_denominator else (0,)), dtype=packed_dtype)
    results = OnePassResults(loss, gradient, packed, denominator, prediction, counts)
    cross_entropy_one_pass.cross_entropy_one_pass(inputs, chosen, last, results)
    if grad is not None:
        if chosen.sums_denominator:
            inputs = inputs._replace(targets=packed)
            chosen = chosen._replace(ignore_index=255 if packed_dtype == torch.uint8 else -1)
        cross_entropy_one_pass.cross_entropy_one_pass_bwd(grad, inputs, denominator, chosen, last, gradient)
    return loss, gradient, prediction, counts


def truth(logits, targets, weight, chosen, grad=None):
    """(loss, gradient, the gradient of a pixel's loss at most) in float64 by torch."""
    x = logits.double().clone().requires_grad_()
    probabilities = targets.is_floating_point()
    wanted = targets.double() if probabilities else targets.long()
    weight = None if weight is None else weight.double()
    ignore = {} if probabilities else {"ignore_index": chosen.ignore_index}
    each = F.cross_entropy(x, wanted, weight, reduction="none", label_smoothing=chosen.label_smoothing, **ignore)
    valid = torch.ones_like(each, dtype=torch.bool) if probabilities else wanted != chosen.ignore_index
    each = each + chosen.z_loss * x.logsumexp(1).square().where(valid, 0.0)
    factors = valid.double()
    if weight is not None and not probabilities and chosen.reduction == "weights":
        factors = weight[wanted.where(valid, 0)].where(valid, 0.0)
    divisor = {"none": 1, "sum": 1, "count": chosen.count}.get(chosen.reduction, factors.sum())
    loss = each if chosen.reduction == "none" else each.sum() / divisor
    grad = torch.ones_like(loss) if grad is None else grad.double()
    loss.backward(grad)
    weighted = factors.max() if weight is None or probabilities else weight.max()
    return loss.detach(), x.grad, (grad.abs().max() * weighted / divisor)


def check(found, wanted, dtype, slack=1.0):
    loss, gradient = found[:2]
    wide = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(loss.double(), wanted[0], rtol=wide, atol=wide * slack)
    assert gradient.dtype == dtype
    error = (gradient.double() - wanted[1]).abs().max()
    rounding = 2e-16 if dtype == torch.float64 else 1e-7  # of p, in a pixel's p - 1
    assert error <= slack * (TOLERANCE[dtype] * wanted[1].abs().max() + rounding * wanted[2]), error


SIZES = [(2, 19, 24, 33), (1, 3, 1, 1), (3, 1, 5, 7), (1, 2, 64, 16), (2, 16, 9, 15), (1, 150, 8, 40), (1, 21, 33, 65)]


@BOTH_LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("run", [two_passes, one_pass])
def test_loss_and_gradient_of_odd_sizes(run, dtype, layout):
    for shape in SIZES:
        logits, labels = case(shape, dtype, layout)
        labels[0, 0, 0] = 0  # one at least counts
        check(run(logits, labels, None, options(), layout=layout), truth(logits, labels, None, options()), dtype)


@BOTH_LAYOUTS
@pytest.mark.parametrize("run", [two_passes, one_pass])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_reduction_weight_smoothing_and_z_loss(run, dtype, layout):
    logits, labels = case((2, 7, 13, 21), dtype, layout)
    for reduction, weighted, smoothing, z_loss in itertools.product(
        ("none", "sum", "count", "weights", "valid"), (False, True), (0.0, 0.1), (0.0, 0.05)
    ):
        if run is one_pass and reduction == "none":
            continue
        weight = torch.rand(7) + 0.5 if weighted else None
        chosen = options(reduction, 77, smoothing=smoothing, z_loss=z_loss)
        grad = torch.randn(2, 13, 21) if reduction == "none" else torch.tensor(-2.5)
        found = run(logits, labels, weight, chosen, grad, layout=layout)
        check(found, truth(logits, labels, weight, chosen, grad), dtype, slack=3)


@BOTH_LAYOUTS
@pytest.mark.parametrize("run", [two_passes, one_pass])
@pytest.mark.parametrize(
    "dtype, target_dtype",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float64, torch.float64),
    ],
)
def test_class_probabilities(run, dtype, target_dtype, layout):
    for shape in ((2, 5, 11, 13), (1, 19, 8, 8)):
        logits, _ = case(shape, dtype, layout)
        targets = torch.rand(shape).softmax(1).to(target_dtype).contiguous(memory_format=LAYOUTS[layout])
        count = shape[0] * shape[2] * shape[3]
        for weight, smoothing in ((None, 0.0), (torch.rand(shape[1]).to(computed(dtype)), 0.2)):
            chosen = options("count", count, -100, smoothing)
            found = run(logits, targets, weight, chosen, layout=layout)
            check(found, truth(logits, targets, weight, chosen), dtype, slack=3)


@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("run", [two_passes, one_pass])
@pytest.mark.parametrize("reduction", ["weights", "sum"])
def test_every_dtype_of_labels(run, reduction, label_dtype):
    logits, labels = case((2, 11, 17, 19), label_dtype=label_dtype)
    check(run(logits, labels, None, options(reduction)), truth(logits, labels, None, options(reduction)), torch.float32)


def test_more_than_256_classes():
    logits, labels = case((1, 300, 9, 11))
    labels[labels == IGNORED] = -100
    chosen = options(ignore_index=-100)
    for run in (two_passes, one_pass):
        grad = torch.tensor(3.0)
        found, wanted = run(logits, labels, None, chosen, grad), truth(logits, labels, None, chosen, grad)
        check(found, wanted, torch.float32)


@BOTH_LAYOUTS
@pytest.mark.parametrize("run", [two_passes, one_pass])
@pytest.mark.parametrize("predicted", [torch.uint8, torch.int64])
def test_predictions_and_counts(run, predicted, layout):
    logits, labels = case((2, 6, 15, 17), layout=layout)
    logits.round_()  # ties
    logits[0, 3, 2, 2] = logits[0, 5, 2, 2] = logits[1, 0, 4, 4] = math.nan
    _, _, prediction, counts = run(logits, labels, None, options(), predicted=predicted, layout=layout)
    valid = labels != IGNORED
    assert torch.equal(prediction.long(), logits.argmax(1))
    assert counts.tolist() == [int(((logits.argmax(1) == labels) & valid).sum()), int(valid.sum())]


@BOTH_LAYOUTS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_are_right_on_large_images(dtype, layout):
    logits, labels = case((1, 19, 512, 512), dtype, layout)
    wanted = truth(logits, labels, None, options())
    for run in (two_passes, one_pass):
        loss, gradient, *_ = run(logits, labels, None, options(), torch.tensor(2.0**16), layout=layout)
        assert abs(loss.item() / wanted[0].item() - 1) < 1e-6
        assert (gradient.double() / 2**16 - wanted[1]).abs().max() <= TOLERANCE[dtype] * wanted[1].abs().max()


@BOTH_LAYOUTS
@pytest.mark.parametrize("run", [two_passes, one_pass])
def test_nan_and_infinity_stay_in_their_pixels(run, layout):
    logits, labels = case((1, 5, 6, 20), layout=layout)
    labels[labels == IGNORED] = 0
    clean = run(logits, labels, None, options("sum"), layout=layout)[1]
    bad = {(0, 1): (2, math.nan), (2, 2): (1, math.inf), (3, 3): (4, -math.inf), (4, 5): (0, math.nan)}
    for (h, w), (c, value) in bad.items():
        logits[0, c, h, w] = value
    logits[0, :, 5, 6] = -math.inf
    labels[0, 3, 3], labels[0, 4, 5] = 0, IGNORED
    loss, gradient, *_ = run(logits, labels, None, options("sum"), layout=layout)
    wanted = torch.zeros(6, 20, dtype=torch.bool)
    for h, w in ((0, 1), (2, 2), (5, 6)):
        wanted[h, w] = True
    assert torch.isnan(loss) and torch.equal(gradient[0].isnan().all(0), wanted)
    assert torch.equal(gradient[0].isnan().any(0), wanted)
    assert (gradient[0, :, 4, 5] == 0).all() and gradient[0, 4, 3, 3] == 0, "ignored pixels add exactly 0"
    for h, w in [*bad, (5, 6)]:
        clean[0, :, h, w] = gradient[0, :, h, w] = 0
    assert torch.equal(gradient, clean)


@pytest.mark.parametrize("run", [two_passes, one_pass])
def test_large_and_confident_logits(run):
    logits, labels = case((1, 4, 8, 32), scale=40.0)
    logits[0, :, 0] += 1e4
    logits[0, :, 1] -= 1e4
    check(run(logits, labels, None, options()), truth(logits, labels, None, options()), torch.float32)
    logits = torch.zeros(1, 2, 8, 8)
    logits[:, 1] = 10.0  # the loss is 4.5e-5, of which float32 has 1 + 4.5e-5
    labels = torch.ones(1, 8, 8, dtype=torch.long)
    loss, *_ = run(logits, labels, None, options("sum"))
    wanted = truth(logits, labels, None, options("sum"))
    torch.testing.assert_close(loss.double(), wanted[0], rtol=1.5e-3, atol=0)


@pytest.mark.parametrize("run", [two_passes, one_pass])
def test_nothing_valid_is_nan_with_a_zero_gradient(run):
    logits, labels = case((2, 3, 5, 9))
    labels.fill_(IGNORED)
    for reduction, wanted in (("weights", math.nan), ("valid", math.nan), ("sum", 0.0)):
        loss, gradient, *_ = run(logits, labels, None, options(reduction))
        torch.testing.assert_close(loss, torch.tensor(wanted), equal_nan=True)
        assert (gradient == 0).all()


@pytest.mark.parametrize("run", [two_passes, one_pass])
def test_an_empty_batch(run):
    logits, labels = torch.empty(0, 3, 4, 4), torch.empty(0, 4, 4, dtype=torch.long)
    loss, gradient, *_ = run(logits, labels, None, options("sum"))
    assert loss == 0 and gradient.numel() == 0
    assert torch.isnan(run(logits, labels, None, options())[0])


@BOTH_LAYOUTS
@pytest.mark.parametrize("run", [two_passes, one_pass])
@pytest.mark.parametrize("reduction", ["weights", "sum"])
@pytest.mark.parametrize("bad, label_dtype", [(19, torch.uint8), (-1, torch.int64), (2**40, torch.int64),
                                              (-(2**63), torch.int64), (2**15 - 1, torch.int16)])  # fmt: skip
def test_out_of_range_labels_raise_and_name_the_first(run, reduction, bad, label_dtype, layout):
    torch.set_num_threads(2)
    logits, labels = case((2, 19, 40, 40), layout=layout, label_dtype=label_dtype)
    labels[1, 3, 5] = labels[1, 20, 5] = bad
    with pytest.raises(IndexError, match=rf"Target {bad} is out of bounds at \(1, 3, 5\)$"):
        run(logits, labels, None, options(reduction), layout=layout)


@BOTH_LAYOUTS
@pytest.mark.parametrize("run", [two_passes, one_pass])
def test_the_bits_do_not_depend_on_threads(run, layout):
    logits, labels = case((3, 19, 111, 130), layout=layout)
    weight = torch.rand(19)
    results = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        results.append(run(logits, labels, weight, options(smoothing=0.1), predicted=torch.uint8, layout=layout))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)
