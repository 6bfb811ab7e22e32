"""cross_entropy against torch in float64: every argument, layout and dtype, and edge cases."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.cross_entropy_common import DTYPES, INF, LAYOUTS, NAN, QUIET, REDUCTIONS, exact, make

import fastseg
from fastseg import functional as FS
from fastseg.kernels.losses.options import LossOptions
from fastseg.ops.losses import cross_entropy as ops

CALLS = 25  # drawn at random
pytestmark = QUIET


@LAYOUTS
@DTYPES
@pytest.mark.parametrize(
    "shape, ignore, weighted, reduction",
    [
        ((2, 19, 6, 8), 255, True, "mean"),
        ((1, 11, 5, 7), -100, False, "mean"),
        ((1, 21, 9, 5), 3, True, "sum"),
        ((1, 150, 3, 5), 255, False, "none"),
        ((1, 65, 3, 7), 255, True, "mean"),
        ((2, 1, 4, 4), 9, True, "mean"),
        ((13, 2, 1, 1), -1, False, "none"),  # with fewer pixels each may be so confident that p - 1 has few digits left
        ((1, 3, 13, 11), 0, False, "sum"),
        ((0, 4, 3, 5), 255, True, "sum"),
    ],
)
def test_errors_are_no_larger_than_torchs(
    shape, ignore, weighted, reduction, dtype, layout, device, triton_backend, assert_right
):
    x, target = make(shape, device, dtype, layout, ignore)
    weight = torch.rand(shape[1], device=device) + 0.5 if weighted else None

    def ours(x, target):
        loss = FS.cross_entropy(x, target, weight, ignore_index=ignore, reduction=reduction)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        return loss

    def theirs(x, target):
        own = None if weight is None else weight.to(x.dtype)
        return F.cross_entropy(x, target, own, ignore_index=ignore, reduction=reduction)

    assert_right(ours, theirs, [x, target], ["logits", "target"])


def truth(x, target, weight, kwargs):
    """The loss by the formulas in the docstring of cross_entropy, from torch's functions; in float64 if x is."""
    kwargs = {name: value for name, value in kwargs.items() if name != "one_pass"}
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, weight = x.to(dtype), None if weight is None else weight.to(dtype)
    normalization, reduction = kwargs.pop("normalization"), kwargs.pop("reduction")
    z_loss, ignore = kwargs.pop("z_loss"), kwargs["ignore_index"]
    probabilities = target.is_floating_point()
    labels = target.to(dtype) if probabilities else target.long()
    loss = F.cross_entropy(x, labels, weight, reduction="none", **kwargs)
    valid = torch.ones_like(loss, dtype=torch.bool) if probabilities else labels != ignore
    squared = z_loss * x.logsumexp(min(1, x.dim() - 1)).square()
    loss = torch.where(valid, loss + squared.view_as(loss), 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    weights = valid.to(dtype) if weight is None or probabilities else weight[labels.where(valid, 0)] * valid
    batch = x.shape[0] if x.dim() > 1 else 1
    return loss.sum() / {
        "weights": weights.sum(), "valid": valid.sum(), "pixels": valid.numel(), "batch": batch
    }[normalization]  # fmt: skip


def draw_call(index, device):
    """One call, drawn at random: logits, target, weight and the keyword arguments."""
    rng = random.Random(torch.initial_seed() + index)
    classes = rng.choice([1, 2, 3, 5, 8, 11, 16, 19, 33])
    shape = rng.choice([(classes,), (7, classes), (2, classes, 6), (2, classes, 3, 5), (1, classes, 2, 3, 4)])
    dtype = rng.choice([torch.float32, torch.float64, torch.float16, torch.bfloat16])
    # If the only pixel is confident, p - 1 has few digits, and the error is large compared to the gradient.
    x = torch.randn(shape, device=device).mul(1 if len(shape) == 1 else 3).to(dtype)
    if rng.random() < 0.5 and len(shape) > 2:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    pixels = (shape[0], *shape[2:]) if len(shape) > 1 else ()
    reduction = rng.choice(["none", "sum", "mean", "mean", "mean"])
    kwargs = {
        "reduction": reduction,
        "normalization": rng.choice(["weights", "valid", "pixels", "batch"]) if reduction == "mean" else "weights",
        "label_smoothing": rng.choice([0, 0, 0.1, 1.0]),
        "z_loss": rng.choice([0, 0, 0.01]),
        "one_pass": rng.choice([None, False, True]) if reduction != "none" else None,
        "ignore_index": -100,
    }
    if rng.random() < 0.35:
        target = torch.rand(shape, device=device).to(
            rng.choice([dtype, torch.float32]) if dtype.itemsize < 8 else dtype
        )
    else:
        kwargs["ignore_index"] = ignore = rng.choice([-100, 255, 0])
        target = torch.randint(classes, pixels, device=device)
        target = torch.where(torch.rand(pixels, device=device) < 0.3, ignore, target)
        target = target.to(rng.choice([torch.int64, torch.int32, torch.int16, *[torch.uint8] * (ignore >= 0)]))
    weight = torch.rand(classes, device=device) + 0.3 if rng.random() < 0.5 else None
    return x, target, weight, kwargs


@pytest.mark.parametrize("index", range(CALLS))
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_random_calls(backend, index, device, assert_right):
    """Of all arguments, ranks, layouts and dtypes. The seed is printed."""
    x, target, weight, kwargs = draw_call(index, device)
    print(tuple(x.shape), x.stride(), x.dtype, target.dtype, target.shape, kwargs)

    def theirs(x):
        return truth(x, target, weight, kwargs)

    with fastseg.backend(backend):
        assert_right(lambda x: FS.cross_entropy(x, target, weight, **kwargs), theirs, [x], ["logits"])
        leaf = x.clone().requires_grad_()
        loss = FS.cross_entropy(leaf, target, weight, **kwargs)
        want = truth(x.double(), target, weight, kwargs)
        assert loss.shape == want.shape
        loss.sum().backward()  # the gradient of the loss is 1: one pass returns what its forward computed
        assert leaf.grad.stride() == x.stride() and leaf.grad.dtype == x.dtype
        other = x.double().requires_grad_()
        truth(other, target, weight, kwargs).sum().backward()
        eps = {8: 1e-12, 4: 1e-5}.get(x.dtype.itemsize, 2 * torch.finfo(x.dtype).eps)
        torch.testing.assert_close(leaf.grad.double(), other.grad, rtol=eps, atol=eps * float(other.grad.abs().max()))


@LAYOUTS
def test_the_gradient_keeps_dtype_and_layout(layout, device, triton_backend):
    for dtype in (torch.float32, torch.bfloat16):
        x, target = make((2, 5, 4, 6), device, dtype, layout)
        FS.cross_entropy(x.requires_grad_(), target).backward()
        assert x.grad.dtype == dtype and x.grad.stride() == x.stride()


@LAYOUTS
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64],
    ids=str,
)
def test_labels_of_every_width(dtype, backend, layout, device):
    x, target = make((2, 7, 3, 5), device, layout=layout, ignore=6)
    with fastseg.backend(backend):
        loss = FS.cross_entropy(x, target.to(dtype), ignore_index=6)
        assert torch.equal(loss, FS.cross_entropy(x, target, ignore_index=6))
    torch.testing.assert_close(loss, F.cross_entropy(x, target, ignore_index=6))


@LAYOUTS
@pytest.mark.parametrize("ignore", [4, 0, -1, 255, -100, 2**31, 2**40, -(2**63), np.int64(200)], ids=str)
def test_any_label_may_be_ignored(ignore, layout, device, triton_backend):
    x, target = make((1, 6, 4, 5), device, layout=layout, ignore=int(ignore))
    loss, gradient = exact(x, target, ignore_index=int(ignore))
    got = FS.cross_entropy(x.requires_grad_(), target, ignore_index=ignore)
    got.backward()
    torch.testing.assert_close(got.double(), loss, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), gradient(torch.ones((), device=device)), rtol=1e-5, atol=1e-6)
    assert torch.equal((x.grad != 0).any(1), target != ignore)


@LAYOUTS
@DTYPES
def test_extreme_logits(dtype, layout, device, triton_backend):
    c = 37  # several steps in every kernel
    ramp, big = torch.linspace(-2, 2, c, dtype=torch.float64), torch.finfo(dtype).max
    rows = [ramp + 1e4, ramp - 1e4, ramp * 1e4]
    rows += [torch.full_like(ramp, value) for value in (1e4, -1e4, big, -big, -INF, INF, NAN)]
    for special in (INF, -INF, NAN):
        for where in (slice(0, 1), slice(0, 20), slice(17, 18), slice(20, c), slice(c - 1, c)):
            rows.append(ramp.clone())
            rows[-1][where] = special
    logits = torch.stack(rows).to(dtype)
    target = torch.tensor([0, 18, c - 1]).repeat_interleave(len(rows))
    x = logits.repeat(3, 1).T.reshape(1, c, 3, len(rows)).to(device).contiguous(memory_format=layout).requires_grad_()
    target = target.view(1, 3, len(rows)).to(device)
    want, gradient = exact(x, target, reduction="none")
    loss = FS.cross_entropy(x, target, reduction="none")
    loss.sum().backward()
    torch.testing.assert_close(loss.double(), want, rtol=2e-6, atol=2e-6, equal_nan=True)
    other = x.detach().requires_grad_()
    FS.cross_entropy(other, target, reduction="sum", one_pass=True).backward()
    # For half-precision logits lse is one float32, which is off by 5e-4 at 1e4: a few of their units in the last place.
    close = {"rtol": 2e-5, "atol": 2e-6} if dtype.itemsize >= 4 else {"rtol": 1.6e-2, "atol": 1e-3}
    ordinary = x.detach().abs().amax(1, keepdim=True) != big  # float64 does not round the largest numbers of dtype
    want = gradient(torch.ones_like(want))
    for got in (x.grad.double(), other.grad.double()):
        torch.testing.assert_close(got.where(ordinary, 0), want.where(ordinary, 0), equal_nan=True, **close)


def test_a_confident_gradient_keeps_its_digits(device, triton_backend):
    """p - 1, for p near 1 and large logits: an lse in one float32 would lose its digits."""
    x = (torch.randn(1, 8, 4, 4, device=device) + 300).requires_grad_()
    target = x.detach().argmax(1)
    _, gradient = exact(x, target, reduction="sum")
    FS.cross_entropy(x, target, reduction="sum").backward()
    torch.testing.assert_close(x.grad.double(), gradient(torch.ones((), device=device)), rtol=1e-5, atol=5e-7)


@LAYOUTS
@REDUCTIONS
@pytest.mark.parametrize("weight", [None, [0.0, 0.0, 0.0]], ids=["ignored", "weightless"])
def test_all_pixels_ignored(weight, reduction, layout, device, triton_backend):
    x, target = make((2, 3, 3, 5), device, layout=layout)
    target = target if weight else torch.full_like(target, 255)
    weight = weight and torch.tensor(weight, device=device)
    results = []
    for function in (FS.cross_entropy, F.cross_entropy):
        leaf = x.clone().requires_grad_()
        loss = function(leaf, target, weight, ignore_index=255, reduction=reduction)
        loss.backward(torch.ones_like(loss))
        results.append((loss.detach(), leaf.grad))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@LAYOUTS
@REDUCTIONS
def test_empty_tensors(reduction, layout, device, triton_backend):
    for shape in ((0, 3, 2, 4), (2, 3, 0, 4)):
        x, target = make(shape, device, layout=layout)
        loss = FS.cross_entropy(x.requires_grad_(), target, reduction=reduction)
        torch.testing.assert_close(loss, F.cross_entropy(x, target, reduction=reduction), equal_nan=True)
        loss.sum().backward()
        assert x.grad.shape == x.shape


@LAYOUTS
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ignored_pixels_may_have_infinite_and_nan_logits(layout, backend, device):
    x, target = make((1, 5, 4, 6), device, layout=layout, ignore=255)
    target[0, 0, :3] = 255
    x[0, :, 0, 0], x[0, 2, 0, 1], x[0, :, 0, 2] = NAN, INF, -INF
    with fastseg.backend(backend):  # the operators, because torch's own function computes NaN * 0 = NaN
        options = LossOptions("weights", 0, 255, 0.0, 0.0)
        loss, lse, denominator, *_ = ops.CROSS_ENTROPY(x, target, None, options, None)
        grad = ops.CROSS_ENTROPY_BACKWARD(torch.ones_like(loss), x, target, None, lse, denominator, options)
    assert loss.isfinite() and grad.isfinite().all()
    assert torch.equal((grad != 0).any(1), target != 255)


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "weights", "valid", "count"])
def test_reference_and_kernels_agree(reduction, probabilities, dtype, layout, device):
    x, target = make((1, 5, 3, 4), device, dtype, layout, ignore=7)
    if probabilities:
        target, reduction = torch.rand_like(x), {"weights": "count", "valid": "count"}.get(reduction, reduction)
    weight = torch.rand(5, device=device)
    options, results = LossOptions(reduction, 10, -100 if probabilities else 7, 0.1, 0.01), []
    predicted = None if probabilities else torch.uint8
    for backend in ("triton", "torch"):
        with fastseg.backend(backend):
            loss, lse, denominator, *rest = ops.CROSS_ENTROPY(x, target, weight, options, predicted)
            grad = ops.CROSS_ENTROPY_BACKWARD(torch.ones_like(loss), x, target, weight, lse, denominator, options)
            results.append((loss, lse, denominator, *rest, grad.double()))
            if reduction != "none":
                made = ops.CROSS_ENTROPY_ONE_PASS(x, target, weight, options, predicted)
                results[-1] += (made[0], made[2], made[3], *made[4:], made[1].double())
    close = {"rtol": 1e-2, "atol": 1e-3} if dtype.itemsize == 2 else {"rtol": 1e-5, "atol": 1e-6}
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, **(close if got.shape == x.shape else {}))
    torch.testing.assert_close(lse[: 1 + (dtype.itemsize >= 4)].sum(0), torch.logsumexp(x.to(lse.dtype), 1))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_half_precision_logits_give_a_float32_loss(backend, device):
    x, target = make((2, 4, 3, 5), device, torch.bfloat16)
    want = F.cross_entropy(x.float(), target, torch.arange(4.0, device=device))
    with fastseg.backend(backend):
        for weight in (torch.arange(4.0, device=device), torch.arange(4.0, device=device).bfloat16()):
            torch.testing.assert_close(FS.cross_entropy(x, target, weight), want)
        with torch.autocast(device, torch.bfloat16):
            torch.testing.assert_close(FS.cross_entropy(x, target, torch.arange(4.0, device=device)), want)
    smooth = FS.cross_entropy(x, target, label_smoothing=0.1)
    torch.testing.assert_close(smooth, F.cross_entropy(x.float(), target, label_smoothing=0.1))
    probabilities = x.softmax(1)
    torch.testing.assert_close(FS.cross_entropy(x, probabilities), F.cross_entropy(x.float(), probabilities))


@pytest.mark.parametrize("kwargs", [{"size_average": False}, {"reduce": False}, {"size_average": True, "reduce": True}])
def test_deprecated_arguments(kwargs, device, triton_backend):
    x, target = make((1, 3, 2, 4), device)
    with pytest.warns(UserWarning, match="reduction="):
        got = FS.cross_entropy(x, target, **kwargs)
    with pytest.warns(UserWarning, match="reduction="):
        torch.testing.assert_close(got, F.cross_entropy(x, target, **kwargs))
    with pytest.warns(UserWarning, match="elementwise_mean"):
        got = FS.cross_entropy(x, target, reduction="elementwise_mean")
    torch.testing.assert_close(got, F.cross_entropy(x, target))


def test_strided_views(device, triton_backend):
    base, labels = torch.randn(2, 8, 9, 20, device=device), torch.randint(4, (2, 9, 20), device=device)
    crop = (slice(None), slice(1, 6), slice(3, 14))
    for x, target in (
        (base[:, ::2], labels),
        (base[:, :4, 1:6, 3:14], labels[crop]),
        (base[:, :4].contiguous(memory_format=torch.channels_last)[:, :, 1:6, 3:14], labels[crop]),
        (base[:, :4].transpose(2, 3), labels.transpose(1, 2)),
        (base[:1, :4].expand(2, -1, -1, -1), labels[:1].expand(2, -1, -1)),
        (base.flatten()[1:721].view(1, 4, 9, 20), labels[1:]),
    ):
        leaf = x.detach().requires_grad_()
        want, gradient = exact(x, target, torch.arange(1.0, 9, 2, device=device), reduction="none")
        loss = FS.cross_entropy(leaf, target, torch.arange(1.0, 9, device=device)[::2], reduction="none")
        grad = torch.randn(loss.shape, device=device)
        loss.backward(grad)
        torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(leaf.grad.double(), gradient(grad), rtol=1e-5, atol=1e-5)
