"""cross_entropy in one pass: when it is taken, how exact its gradient is and who owns it; and predictions."""

import pytest
import torch
import torch.nn.functional as F
from support.cross_entropy_common import DTYPES, INF, INTERPRETED, LAYOUTS, NAN, QUIET, make

import fastseg
from fastseg import functional as FS
from fastseg.inspect import traffic

pytestmark = QUIET


def kernels_of(call):
    with traffic.metering() as launches:
        call()
    return [launch.kernel.removeprefix("cross_entropy_") for launch in launches]


@pytest.mark.parametrize(
    "taken, dtype, kwargs",
    [
        (True, torch.bfloat16, {}),
        (True, torch.float32, {"reduction": "sum"}),
        (True, torch.float64, {"label_smoothing": 0.1}),
        (True, torch.float16, {"one_pass": True}),
        (False, torch.float16, {}),
        (False, torch.bfloat16, {"one_pass": False}),
        (False, torch.float32, {"reduction": "none"}),
    ],
)
def test_when_one_pass_is_taken(taken, dtype, kwargs, device, triton_backend):
    x, target = make((1, 5, 1, 8), device, dtype)
    assert ("OnePass" in FS.cross_entropy(x.requires_grad_(), target, **kwargs).grad_fn.name()) == taken
    assert not FS.cross_entropy(x.detach(), target, **kwargs).requires_grad
    with torch.no_grad():
        assert not FS.cross_entropy(x, target, **kwargs).requires_grad


@LAYOUTS
@pytest.mark.parametrize("classes, taken", [(255, True), (256, True), (257, False)])
def test_one_pass_takes_up_to_256_classes(classes, taken, layout, device, triton_backend):
    """From 256 classes on, packed labels take two bytes."""
    x, target = make((1, classes, 1, 5), device, layout=layout, ignore=1000)
    target[0, 0, :2] = torch.tensor([255 % classes, classes - 1], device=device)
    loss = FS.cross_entropy(x.requires_grad_(), target, ignore_index=1000, one_pass=True)
    assert ("OnePass" in loss.grad_fn.name()) == taken
    other = x.detach().requires_grad_()
    want = F.cross_entropy(other, target, ignore_index=1000)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(want, other))


@INTERPRETED
@LAYOUTS
def test_the_backward_moves_nothing_if_the_gradient_of_the_loss_is_one(layout, triton_backend):
    x, target = make((1, 19, 8, 16), dtype=torch.bfloat16, layout=layout, ignore=255)
    loss = FS.cross_entropy(x.requires_grad_(), target, ignore_index=255)
    with traffic.metering() as launches:
        loss.backward()
    assert [launch.sectors() for launch in launches] == [32]  # the read of that gradient
    assert len(kernels_of(lambda: FS.cross_entropy(x, target, ignore_index=255, reduction="sum"))) == 2
    assert kernels_of(lambda: FS.cross_entropy(x, target, ignore_index=255))[:2] == ["labels_kernel", "total_kernel"]


@LAYOUTS
@DTYPES
@pytest.mark.parametrize("scale", [1.0, 0.4, -3.0, 0.0, 65536.0])
def test_gradients_of_scaled_losses_are_rounded_once(scale, dtype, layout, device, triton_backend):
    """In one pass as in two, up to a rounding of the dtype that both compute in."""
    x, target = make((2, 11, 3, 7), device, dtype, layout, ignore=255)
    weight, grads = torch.rand(11, device=device) + 0.5, []
    for one_pass in (True, False):
        leaf = x.clone().requires_grad_()
        loss = FS.cross_entropy(leaf, target, weight, ignore_index=255, one_pass=one_pass)
        (loss * scale).backward()
        grads.append(leaf.grad)
    exact = x.double().requires_grad_()
    (F.cross_entropy(exact, target, weight.double(), ignore_index=255) * scale).backward()
    errors = [(grad.double() - exact.grad).abs().max() for grad in grads]
    unit = torch.finfo(dtype).eps * exact.grad.abs().max()
    assert errors[0] <= errors[1] + 0.01 * unit if dtype.itemsize == 2 else errors[0] <= errors[1] + 4 * unit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("one_pass", [None, True])
def test_a_scaled_mean_of_a_million_pixels_does_not_underflow(one_pass, dtype, device, triton_backend):
    """A GradScaler multiplies by 65536. For 2^20 pixels, the gradient without this factor is too small for float16."""
    x, target = make((1, 2, 1, 64), device, dtype)
    x[:, 1] = x[:, 0] + 7  # softmax 0.0009 and 0.999
    grads = []
    for function, kwargs in ((FS.cross_entropy, {"one_pass": one_pass}), (None, {})):
        leaf = (x if function else x.double()).clone().requires_grad_()
        # the mean over more pixels than the interpreter can process: the sum over 64 of them, divided by 2^20
        loss = (function or F.cross_entropy)(leaf, target, reduction="sum", **kwargs) / 2**20
        (loss * 65536.0).backward()
        grads.append(leaf.grad.double())
    assert grads[0].abs().min() > 0
    torch.testing.assert_close(*grads, rtol=2 * torch.finfo(dtype).eps, atol=0)


@LAYOUTS
def test_references_keep_the_gradient_of_a_million_pixels(layout, device):
    """float16 with a factor of 65536: a gradient computed for a factor of 1 would underflow."""
    x, target = make((1, 3, 1024, 1024), device, torch.float16, layout)
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    (FS.cross_entropy(leaf, target) * 65536.0).backward()
    (F.cross_entropy(exact, target) * 65536.0).backward()
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=2e-3, atol=6e-8)


@LAYOUTS
def test_a_returned_gradient_is_not_overwritten(layout, device, triton_backend):
    x, target = make((2, 5, 3, 4), device, layout=layout)
    loss = FS.cross_entropy(x.requires_grad_(), target)
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    kept = first.clone()
    tripled = torch.autograd.grad(loss, x, torch.tensor(3.0, device=device), retain_graph=True)[0]
    assert torch.equal(first, kept)
    torch.testing.assert_close(tripled, 3 * kept, rtol=1e-5, atol=1e-7)
    first.zero_()
    again = torch.autograd.grad(loss, x)[0]
    assert torch.equal(again, kept)


def test_accumulation_checkpoints_and_hooks(device, triton_backend):
    x, target = make((1, 4, 3, 5), device)
    want = torch.autograd.grad(F.cross_entropy(y := x.clone().requires_grad_(), target), y)[0]
    leaf = x.clone().requires_grad_()
    for _ in range(2):
        FS.cross_entropy(leaf, target).backward()
    torch.testing.assert_close(leaf.grad, 2 * want)
    leaf = x.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(FS.cross_entropy, leaf * 1, target, use_reentrant=False).backward()
    torch.testing.assert_close(leaf.grad, want)
    grad = torch.func.grad(lambda x: FS.cross_entropy(x, target))(x)
    torch.testing.assert_close(grad, want)


# --- predictions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize("shape", [(2, 11, 3, 5), (1, 70, 1, 3), (6, 5), (4,), (2, 3, 7)], ids=str)
def test_predictions(shape, backend, device, dtype):
    x = torch.randn(shape, device=device).mul(2).round().to(dtype)  # with ties
    x = x.contiguous(memory_format=torch.channels_last) if shape == (1, 70, 1, 3) else x
    pixels = (shape[0], *shape[2:]) if len(shape) > 1 else ()
    target = torch.randint(shape[min(1, len(shape) - 1)], pixels, device=device)
    target = torch.where(torch.rand(pixels, device=device) < 0.3, 255, target)
    best = x.argmax(min(1, x.dim() - 1))
    for reduction, kind in (("none", torch.int64), ("mean", torch.uint8)):
        with fastseg.backend(backend):
            leaf = x.clone().requires_grad_()
            got = FS.cross_entropy_with_predictions(leaf, target, ignore_index=255, reduction=reduction, dtype=kind)
        assert got.prediction.dtype == kind and torch.equal(got.prediction.long(), best)
        assert got.correct.item() == ((best == target) & (target != 255)).sum()
        assert got.valid.item() == (target != 255).sum() and got.valid.dtype == torch.int64
        want = FS.cross_entropy(x, target, ignore_index=255, reduction=reduction)
        torch.testing.assert_close(got.loss, want, equal_nan=True)
        got.loss.nan_to_num().sum().backward()
        assert leaf.grad is not None and not got.prediction.requires_grad


@LAYOUTS
@pytest.mark.parametrize("one_pass", [False, True])
def test_predictions_are_torchs_argmax(one_pass, layout, device, triton_backend):
    """The first of equal maxima, NaN before any number, and 0 for a pixel whose logits are all -inf."""
    rows = torch.randn(9, 21, device=device)
    rows[0, 3:9] = 50
    rows[1], rows[2, 17], rows[3, 5], rows[3, 2] = -INF, NAN, NAN, INF
    rows[4, 20], rows[5], rows[6, :20], rows[7] = INF, 0, -INF, NAN
    rows[8, 4], rows[8, 6] = -0.0, 0.0
    x = rows.T.reshape(1, 21, 1, 9).contiguous(memory_format=layout).requires_grad_()
    target = torch.zeros(1, 1, 9, dtype=torch.int64, device=device)
    got = FS.cross_entropy_with_predictions(x, target, one_pass=one_pass)
    assert torch.equal(got.prediction, x.argmax(1))


def test_predictions_need_no_further_read(device, triton_backend):
    if device == "cuda":
        pytest.skip("bytes are counted in the interpreter")
    x, target = make((1, 19, 16, 32), dtype=torch.bfloat16, ignore=255)
    with traffic.metering() as launches:
        FS.cross_entropy_with_predictions(x, target, ignore_index=255, dtype=torch.uint8)
    assert sum(launch.sectors() for launch in launches) <= 1.05 * (2 * 19 + 8 + 4 + 1) * 512


@pytest.mark.parametrize("kwargs, error, message", [
    ({"dtype": torch.int32}, ValueError, "dtype must be torch.int64 or torch.uint8"),
    ({"target": torch.rand(1, 3, 2, 2)}, RuntimeError, "target must be class indices"),
    ({"input": torch.rand(1, 257, 2, 2), "dtype": torch.uint8}, ValueError, "dtype must be torch.int64 for 257"),
    ({"reduction": "none", "one_pass": True}, ValueError, "one_pass must be left out"),
    ({"reduction": "max"}, ValueError, "reduction must"),
    ({"target": torch.full((1, 2, 2), 3)}, IndexError, "Target 3 is out of bounds"),
])  # fmt: skip
@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=pytest.mark.interpreted)])
def test_bad_arguments_of_predictions(kwargs, error, message, backend):
    arguments = {"input": torch.rand(1, 3, 2, 2), "target": torch.zeros(1, 2, 2, dtype=torch.int64)} | kwargs
    with fastseg.backend(backend), pytest.raises(error, match=message):
        FS.cross_entropy_with_predictions(**arguments)
