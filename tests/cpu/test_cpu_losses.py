"""The CPU kernels of the other losses against torch in float64: Dice, resized logits, confusion matrices."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from fastseg.kernels.cpu import build
from fastseg.kernels.cpu.losses import confusion, dice_cross_entropy, upsample, upsample_cross_entropy
from fastseg.kernels.losses.options import LossInputs, LossOptions, LossResults, Resizing

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
BOTH_LAYOUTS = pytest.mark.parametrize("layout", LAYOUTS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float64: 1e-14}  # of the maximum
IGNORED = 255
NAN = float("nan")


def computed(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def logits_of(shape, dtype=torch.float32, layout="nchw", scale=3.0):
    return (torch.randn(shape) * scale).to(dtype).contiguous(memory_format=LAYOUTS[layout])


def labels_of(*shape, classes, dtype=torch.int64):
    labels = torch.randint(classes, shape).to(dtype)
    labels[torch.rand(shape) < 0.1] = IGNORED
    labels.view(-1)[:1] = 0
    return labels


def near(found, wanted, tolerance, unit=0.0):
    """To a part of the maximum, and to the rounding of numbers of the size `unit`."""
    error = (found.double() - wanted).abs().max()
    assert error <= tolerance * wanted.abs().max() + tolerance * unit, (error, wanted.abs().max())


# --- Dice ------------------------------------------------------------------------------------------------------------


def dice_kernels(logits, labels, weight, grad_loss, grad_sums, layout):
    inputs, last = LossInputs(logits, labels, weight), layout == "channels_last"
    wide, (n, classes, *_) = computed(logits.dtype), logits.shape
    loss, sums = torch.full((2,), NAN, dtype=wide), torch.full((n, 3, classes), NAN, dtype=wide)
    dice_cross_entropy.dice_cross_entropy_fwd(inputs, IGNORED, last, loss, sums)
    gradient = torch.full_like(logits, NAN)
    grads = (grad_loss.to(wide), grad_sums.to(wide))
    dice_cross_entropy.dice_cross_entropy_bwd(*grads, inputs, IGNORED, last, gradient)
    return loss, sums, gradient


def dice_truth(logits, labels, weight, grad_loss, grad_sums):
    x, labels = logits.double().clone().requires_grad_(), labels.long()
    valid = (labels != IGNORED)[:, None]
    softmax = x.softmax(1) * valid
    hit = F.one_hot(labels.where(valid[:, 0], 0), logits.shape[1]).movedim(-1, 1).double() * valid
    loss = F.cross_entropy(x, labels, weight, ignore_index=IGNORED, reduction="sum")
    weights = (hit * (torch.ones(len(hit[0])) if weight is None else weight).view(-1, 1, 1)).sum()
    sums = torch.stack([t.sum((2, 3)) for t in (softmax * hit, softmax, hit)], 1)
    (loss * grad_loss[0] + (sums * grad_sums).sum()).backward()
    return torch.stack((loss, weights)).detach(), sums.detach(), x.grad


@BOTH_LAYOUTS
@DTYPES
def test_dice_sums_and_gradient(dtype, layout):
    for shape, weighted in (
        ((3, 19, 21, 37), False),
        ((2, 4, 64, 80), True),
        ((1, 1, 3, 3), False),
        ((2, 33, 7, 5), True),
    ):
        logits, labels = logits_of(shape, dtype, layout), labels_of(shape[0], *shape[2:], classes=shape[1])
        weight = torch.rand(shape[1], dtype=torch.float64) + 0.5 if weighted else None
        grads = torch.randn(2).double(), torch.randn(shape[0], 3, shape[1]).double()
        found = dice_kernels(logits, labels, weight, *grads, layout)
        wanted = dice_truth(logits, labels, weight, *grads)
        sums = 1e-13 if dtype == torch.float64 else 2e-6
        near(found[0], wanted[0], sums), near(found[1], wanted[1], sums)
        assert found[2].dtype == dtype and found[2].is_contiguous(memory_format=LAYOUTS[layout])
        near(found[2], wanted[2], TOLERANCE[dtype], unit=2.0)


@BOTH_LAYOUTS
def test_dice_of_ignored_nan_and_bad_labels(layout):
    logits, labels = logits_of((2, 5, 30, 30), layout=layout), labels_of(2, 30, 30, classes=5)
    labels[1, 2, 3] = IGNORED
    grads = torch.ones(2), torch.randn(2, 3, 5)
    clean = dice_kernels(logits, labels, None, *grads, layout)
    logits[1, :, 2, 3] = NAN
    found = dice_kernels(logits, labels, None, *grads, layout)
    for one, two in zip(clean, found, strict=True):
        assert torch.equal(one, two)
    assert (found[2][1, :, 2, 3] == 0).all()
    labels[1, 4, 4] = 5
    with pytest.raises(IndexError, match=r"Target 5 is out of bounds at \(1, 4, 4\)$"):
        dice_kernels(logits, labels, None, *grads, layout)


@BOTH_LAYOUTS
def test_dice_does_not_depend_on_threads(layout):
    logits, labels = logits_of((3, 19, 61, 70), layout=layout), labels_of(3, 61, 70, classes=19)
    grads, results = (torch.ones(2), torch.randn(3, 3, 19)), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(dice_kernels(logits, labels, None, *grads, layout))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


# --- resized logits ---------------------------------------------------------------------------------------------------


RESIZINGS = [
    ((2, 19, 8, 9), (64, 72), Resizing(None, "bilinear", False)),
    ((1, 3, 5, 7), (13, 31), Resizing(None, "bilinear", False)),
    ((1, 3, 5, 7), (13, 31), Resizing(None, "bilinear", True)),
    ((2, 5, 16, 33), (7, 11), Resizing(None, "bilinear", False)),  # smaller
    ((1, 4, 1, 1), (9, 70), Resizing(None, "bilinear", False)),
    ((1, 4, 6, 6), (6, 6), Resizing(None, "bilinear", False)),
    ((1, 4, 3, 10), (3, 13), Resizing((1.3, 1.3), "bilinear", False)),
    ((1, 21, 9, 40), (20, 92), Resizing((2.3, 2.3), "bilinear", False)),
    ((1, 4, 7, 5), (1, 1), Resizing(None, "bilinear", True)),
    ((2, 6, 8, 9), (64, 72), Resizing(None, "nearest", False)),
    ((1, 6, 9, 17), (20, 5), Resizing(None, "nearest", False)),
    ((1, 6, 10, 9), (23, 20), Resizing((2.3, 2.3), "nearest", False)),
]
RESIZED = pytest.mark.parametrize("shape, size, resizing", RESIZINGS)


def resize(x, size, resizing):
    corners = () if resizing.mode == "nearest" else (resizing.align_corners,)
    operator = getattr(torch.ops.aten, f"upsample_{resizing.mode}2d").default
    return operator(x, list(size), *corners, *(resizing.scales or (None, None)))


def options(reduction="weights", count=0, smoothing=0.0, z_loss=0.0):
    return LossOptions(reduction, count, IGNORED, smoothing, z_loss)


def empty_results(low, labels, chosen, lse, predicted=None):
    wide = computed(low.dtype)
    loss = torch.full(labels.shape if chosen.reduction == "none" else (), NAN, dtype=wide)
    terms = ((2 if low.element_size() >= 4 else 1) if lse else 0, *labels.shape)
    denominator = torch.full((), float(chosen.count), dtype=wide)
    prediction = torch.full(labels.shape if predicted else (0,), 77, dtype=predicted or torch.uint8)
    counts = torch.full((2 if predicted else 0,), 77)
    return LossResults(loss, torch.full(terms, NAN, dtype=wide), denominator, prediction, counts)


def two_passes(low, labels, weight, resizing, chosen, grad=None, predicted=None):
    inputs = LossInputs(low, labels, weight)
    results = empty_results(low, labels, chosen, True, predicted)
    upsample_cross_entropy.upsample_cross_entropy_fwd(inputs, resizing, chosen, results)
    gradient = torch.full_like(low, NAN)
    grad = torch.ones_like(results.loss) if grad is None else grad.to(results.loss.dtype)
    upsample_cross_entropy.upsample_cross_entropy_bwd(
        grad, inputs, results.lse, results.denominator, resizing, chosen, gradient
    )
    return results.loss, gradient, results.prediction, results.counts


def one_pass(low, labels, weight, resizing, chosen, grad=None, predicted=None):
    inputs = LossInputs(low, labels, weight)
    results = empty_results(low, labels, chosen, False, predicted)
    gradient = torch.full_like(low, NAN, dtype=results.loss.dtype)
    upsample_cross_entropy.upsample_cross_entropy_fwd(inputs, resizing, chosen, results, gradient)
    divisor = 1.0 if chosen.reduction == "sum" else results.denominator
    scaled = gradient * (1.0 if grad is None else grad) / divisor
    return results.loss, scaled.to(low.dtype), results.prediction, results.counts


def upsample_truth(low, labels, weight, resizing, chosen, grad=None):
    x = low.double().clone().requires_grad_()
    large, labels = resize(x, labels.shape[1:], resizing), labels.long()
    each = F.cross_entropy(
        large, labels, weight, ignore_index=IGNORED, reduction="none", label_smoothing=chosen.label_smoothing
    )
    valid = labels != IGNORED
    each = each + chosen.z_loss * large.logsumexp(1).square() * valid
    factors = valid.double() if weight is None else weight[labels.where(valid, 0)] * valid
    divisors = {"count": chosen.count, "weights": factors.sum(), "valid": valid.sum()}
    loss = each if chosen.reduction == "none" else each.sum() / divisors.get(chosen.reduction, 1)
    loss.backward(torch.ones_like(loss) if grad is None else grad.double())
    return loss.detach(), x.grad


@RESIZED
@BOTH_LAYOUTS
@pytest.mark.parametrize("run", [two_passes, one_pass])
def test_the_loss_of_resized_logits(run, layout, shape, size, resizing):
    low, labels = logits_of(shape, layout=layout), labels_of(shape[0], *size, classes=shape[1])
    found = run(low, labels, None, resizing, options())
    loss, gradient = upsample_truth(low, labels, None, resizing, options())
    torch.testing.assert_close(found[0].double(), loss, rtol=2e-6, atol=2e-6)
    near(found[1], gradient, 2e-6, unit=1.0)


@DTYPES
@pytest.mark.parametrize("run", [two_passes, one_pass])
def test_the_loss_of_resized_logits_in_every_dtype(run, dtype):
    resizing = Resizing(None, "bilinear", False)
    for layout in LAYOUTS:
        low, labels = logits_of((1, 19, 17, 12), dtype, layout), labels_of(1, 68, 96, classes=19, dtype=torch.uint8)
        found = run(low, labels, None, resizing, options("sum"))
        loss, gradient = upsample_truth(low, labels, None, resizing, options("sum"))
        torch.testing.assert_close(found[0].double(), loss, rtol=2e-6, atol=0)
        assert found[1].dtype == dtype
        near(found[1], gradient, TOLERANCE[dtype])


@pytest.mark.parametrize("run", [two_passes, one_pass])
def test_the_arguments_of_the_loss_of_resized_logits(run):
    resizing = Resizing(None, "bilinear", False)
    low, labels = logits_of((2, 7, 6, 5)), labels_of(2, 25, 41, classes=7, dtype=torch.int32)
    for reduction, weighted, smoothing, z_loss in itertools.product(
        ("none", "sum", "count", "weights", "valid"), (False, True), (0.0, 0.1), (0.0, 0.05)
    ):
        if run is one_pass and reduction == "none":
            continue
        weight = torch.rand(7, dtype=torch.float64) + 0.5 if weighted else None
        chosen = options(reduction, 77, smoothing, z_loss)
        grad = torch.randn(labels.shape) if reduction == "none" else torch.tensor(-2.5)
        found = run(low, labels, weight, resizing, chosen, grad)
        loss, gradient = upsample_truth(low, labels, weight, resizing, chosen, grad)
        torch.testing.assert_close(found[0].double(), loss, rtol=5e-6, atol=5e-6)
        near(found[1], gradient, 4e-6)


def test_logits_of_any_strides():
    resizing = Resizing(None, "bilinear", False)
    wide = logits_of((2, 7, 12, 20))
    low, labels = wide[:, ::2, 1::2, ::2], labels_of(2, 30, 33, classes=4)
    assert not low.is_contiguous()
    for run in (two_passes, one_pass):
        found, wanted = (
            run(low, labels, None, resizing, options()),
            upsample_truth(low, labels, None, resizing, options()),
        )
        near(found[1], wanted[1], 2e-6)


@RESIZED
@BOTH_LAYOUTS
def test_labels_and_probabilities_of_resized_logits(layout, shape, size, resizing):
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        low = logits_of(shape, torch.bfloat16 if dtype == torch.int32 else torch.float32, layout)
        large = resize(low.double(), size, resizing)
        labels, probability = torch.full((shape[0], *size), 77, dtype=dtype), torch.full((shape[0], *size), NAN)
        upsample.upsample_argmax(low, labels, probability, resizing)
        top = large.topk(min(2, shape[1]), 1).values
        clear = top[:, 0] - top[:, -1] > 1e-5
        assert torch.equal(labels.long()[clear], large.argmax(1)[clear])
        near(probability, large.softmax(1).amax(1), 2e-6)
        again = torch.full_like(labels, 77)
        upsample.upsample_argmax(low, again, None, resizing)
        assert torch.equal(labels, again)


def test_predictions_of_resized_logits():
    resizing = Resizing(None, "bilinear", False)
    low, labels = logits_of((2, 7, 6, 5)), labels_of(2, 25, 41, classes=7)
    for run, dtype in itertools.product((two_passes, one_pass), (torch.uint8, torch.int64)):
        _, _, prediction, counts = run(low, labels, None, resizing, options(), predicted=dtype)
        wanted = torch.zeros_like(prediction)
        upsample.upsample_argmax(low, wanted, None, resizing)
        assert torch.equal(prediction, wanted)
        valid = labels != IGNORED
        assert counts.tolist() == [int(((wanted == labels) & valid).sum()), int(valid.sum())]


@pytest.mark.parametrize("mode, last", [("nearest", 3), ("bilinear", None)])
def test_logits_that_are_not_finite_stay_where_they_belong(mode, last):
    resizing = Resizing(None, mode, False)
    low, labels = logits_of((1, 5, 8, 8)), labels_of(1, 32, 32, classes=5)
    labels[labels == IGNORED] = 0
    chosen = options("sum")
    clean = {run: run(low, labels, None, resizing, chosen)[1] for run in (two_passes, one_pass)}
    low[0, 2, 4, 4] = NAN
    low[0, 1, 4, 5] = float("-inf")
    labels[0, 16:24, 16:24] = 0
    for run in (two_passes, one_pass):
        loss, gradient, *_ = run(low, labels, None, resizing, chosen)
        assert torch.isnan(loss)
        reach = (4, 4) if mode == "nearest" else (3, 5)
        for i, j in itertools.product(range(8), range(8)):
            near_nan = reach[0] <= i <= reach[1] and reach[0] <= j <= reach[1]
            assert bool(gradient[0, :, i, j].isnan().all()) or not near_nan
            if mode == "nearest" and not near_nan:
                assert gradient[0, :, i, j].isfinite().all()
            if not (2 <= i <= 6 and 2 <= j <= 7):
                assert torch.equal(gradient[0, :, i, j], clean[run][0, :, i, j])
    labels[0, 12:28, 8:28] = IGNORED
    for run in (two_passes, one_pass):
        assert run(low, labels, None, resizing, chosen)[1].isfinite().all(), "ignored pixels add exactly 0"


def test_out_of_range_labels_of_resized_logits():
    torch.set_num_threads(2)
    resizing = Resizing(None, "bilinear", False)
    low, labels = logits_of((2, 7, 6, 5)), labels_of(2, 25, 41, classes=7)
    labels[1, 2, 3] = labels[1, 20, 0] = -5
    for run in (two_passes, one_pass):
        with pytest.raises(IndexError, match=r"Target -5 is out of bounds at \(1, 2, 3\)$"):
            run(low, labels, None, resizing, options())


def test_the_loss_of_resized_logits_does_not_depend_on_threads():
    resizing = Resizing(None, "bilinear", False)
    low, labels = logits_of((2, 19, 16, 17)), labels_of(2, 100, 131, classes=19)
    for run in (two_passes, one_pass):
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(low, labels, None, resizing, options(), predicted=torch.uint8))
        for other in results[1:]:
            assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


# --- confusion matrices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 3, 19, 150, 300])
def test_confusion_matrices(classes):
    dtypes = [torch.int16, torch.int32, torch.int64] + [torch.uint8] * (classes < 256)
    for one, two in itertools.product(dtypes, dtypes):
        pred, target = torch.randint(classes, (2, 101, 90)).to(one), torch.randint(classes, (2, 101, 90)).to(two)
        wanted = torch.bincount(target.flatten().long() * classes + pred.flatten().long(), minlength=classes**2)
        found = confusion.confusion_matrix(pred, target, classes, None)
        assert found.dtype == torch.int64 and torch.equal(found[0], wanted.view(classes, classes))
        target[0, :3] = ignored = 5 if classes > 5 else 100
        pred[0, 0, 0] = -1 if one != torch.uint8 else 255
        kept = target.long() != ignored
        wanted = torch.bincount(target[kept].long() * classes + pred[kept].long(), minlength=classes**2)
        found = confusion.confusion_matrix(pred, target, classes, ignored)
        assert torch.equal(found[0], wanted.view(classes, classes))


def test_confusion_matrices_of_bad_labels_and_of_nothing():
    pred, target = torch.zeros(3, 50, dtype=torch.int64), torch.zeros(3, 50, dtype=torch.int64)
    for labels, name in ((pred, "pred"), (target, "target")):
        for bad in (4, -1, 2**62, -(2**63)):
            labels[1, 7] = bad
            with pytest.raises(ValueError, match=f"{name} must hold labels from 0 to 3"):
                confusion.confusion_matrix(pred, target, 4, None)
            labels[1, 7] = 0
    assert confusion.confusion_matrix(pred[:0], target[:0], 4, None).tolist() == [[[0] * 4] * 4]


def test_confusion_matrices_do_not_depend_on_threads():
    pred, target = torch.randint(19, (2, 300, 301)), torch.randint(19, (2, 300, 301))
    for classes in (19, 400):
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(confusion.confusion_matrix(pred, target, classes, None))
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
