import math
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastseg
from fastseg import functional as FS
from fastseg.inspect import traffic
from fastseg.kernels import cross_entropy as kernels
from fastseg.ops import cross_entropy as ops

LAYOUTS = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"]
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="runs kernels on CPU tensors")
REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
NAN, INF = float("nan"), float("inf")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy, where a GPU gives NaN


def make(shape, device="cpu", dtype=torch.float32, layout=torch.contiguous_format, ignore=None):
    """Logits, and labels of which a fifth is `ignore`."""
    x = torch.randn(shape, device=device).mul(3).to(dtype).contiguous(memory_format=layout)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), device=device)
    if ignore is not None:
        target[torch.rand(target.shape, device=device) < 0.2] = ignore
    return x, target


def exact(x, target, weight=None, **kwargs):
    """torch's loss in float64, and its gradient of the logits for `grad`."""
    x = x.detach().double().requires_grad_()
    loss = F.cross_entropy(x, target.long(), None if weight is None else weight.double(), **kwargs)
    return loss, lambda grad: torch.autograd.grad(loss, x, grad.double())[0]


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
        ((3, 2, 1, 1), -1, False, "none"),
        ((1, 3, 13, 11), 0, False, "sum"),
        ((0, 4, 3, 5), 255, True, "sum"),
    ],
)
def test_right(shape, ignore, weighted, reduction, dtype, layout, device, triton_backend, assert_right):
    x, target = make(shape, device, dtype, layout, ignore)
    weight = torch.rand(shape[1], device=device) + 0.5 if weighted else None

    def ours(x, target):
        loss = FS.cross_entropy(x, target, weight, ignore_index=ignore, reduction=reduction)
        assert loss.dtype == torch.float32
        return loss

    def theirs(x, target):
        own = None if weight is None else weight.to(x.dtype)
        return F.cross_entropy(x, target, own, ignore_index=ignore, reduction=reduction)

    assert_right(ours, theirs, [x, target], ["logits", "target"])


@LAYOUTS
def test_the_gradient_keeps_dtype_and_layout(layout, device, triton_backend):
    for dtype in (torch.float32, torch.bfloat16):
        x, target = make((2, 5, 4, 6), device, dtype, layout)
        FS.cross_entropy(x.requires_grad_(), target).backward()
        assert x.grad.dtype == dtype and x.grad.stride() == x.stride()


@LAYOUTS
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
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
    c = 37  # several steps of every kernel
    ramp, big = torch.linspace(-2, 2, c), torch.finfo(dtype).max
    rows = [ramp + 1e4, ramp - 1e4, ramp * 1e4, torch.full((c,), 1e4), torch.full((c,), -1e4), torch.full((c,), big)]
    rows += [torch.full((c,), -big), torch.full((c,), -INF), torch.full((c,), INF), torch.full((c,), NAN)]
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
    # Halves keep lse in one float32, which at 1e4 is 5e-4 off: a few units of their own last digit.
    close = {"rtol": 2e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 1.6e-2, "atol": 1e-3}
    ordinary = x.detach().abs().amax(1, keepdim=True) != big  # torch's float64 sees no rounding at the largest numbers
    got, want = x.grad.double(), gradient(torch.ones_like(want))
    torch.testing.assert_close(got.where(ordinary, 0), want.where(ordinary, 0), equal_nan=True, **close)


def test_a_confident_gradient_keeps_its_digits(device, triton_backend):
    """What an lse of one float32 would lose: p - 1 for p near 1 and large logits."""
    x = (torch.randn(1, 8, 4, 4, device=device) + 300).requires_grad_()
    target = x.detach().argmax(1)
    _, gradient = exact(x, target, reduction="sum")
    FS.cross_entropy(x, target, reduction="sum").backward()
    torch.testing.assert_close(x.grad.double(), gradient(torch.ones((), device=device)), rtol=1e-5, atol=5e-7)


@LAYOUTS
@REDUCTIONS
@pytest.mark.parametrize("weight", [None, [0.0, 0.0, 0.0]], ids=["ignored", "weightless"])
def test_nothing_valid(weight, reduction, layout, device, triton_backend):
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
def test_nothing_at_all(reduction, layout, device, triton_backend):
    for shape in ((0, 3, 2, 4), (2, 3, 0, 4)):
        x, target = make(shape, device, layout=layout)
        loss = FS.cross_entropy(x.requires_grad_(), target, reduction=reduction)
        torch.testing.assert_close(loss, F.cross_entropy(x, target, reduction=reduction), equal_nan=True)
        loss.sum().backward()
        assert x.grad.shape == x.shape


@LAYOUTS
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ignored_logits_may_be_anything(layout, backend, device):
    x, target = make((1, 5, 4, 6), device, layout=layout, ignore=255)
    target[0, 0, :3] = 255
    x[0, :, 0, 0], x[0, 2, 0, 1], x[0, :, 0, 2] = NAN, INF, -INF
    with fastseg.backend(backend):  # the operators: torch's own function gives NaN * 0 = NaN
        loss, lse, denominator = ops.CROSS_ENTROPY(x, target, None, "mean", 255)
        grad = ops.CROSS_ENTROPY_BACKWARD(torch.ones_like(loss), x, target, None, lse, denominator, "mean", 255)
    assert loss.isfinite() and grad.isfinite().all()
    assert torch.equal((grad != 0).any(1), target != 255)


@LAYOUTS
@DTYPES
@REDUCTIONS
def test_the_reference_is_the_kernels(reduction, dtype, layout, device):
    x, target = make((1, 5, 3, 4), device, dtype, layout, ignore=7)
    weight = torch.rand(5, device=device)
    results = []
    for backend in ("triton", "torch"):
        with fastseg.backend(backend):
            loss, lse, denominator = ops.CROSS_ENTROPY(x, target, weight, reduction, 7)
            grad = ops.CROSS_ENTROPY_BACKWARD(torch.ones_like(loss), x, target, weight, lse, denominator, reduction, 7)
            results.append((loss, lse, denominator, grad.float()))
    close = {"rtol": 1e-2, "atol": 1e-3} if dtype.itemsize == 2 else {"rtol": 1e-5, "atol": 1e-6}
    for (got, want), limits in zip(zip(*results, strict=True), (*[{}] * 3, close), strict=True):
        torch.testing.assert_close(got, want, **limits)
    torch.testing.assert_close(lse.sum(0), torch.logsumexp(x.float(), 1))


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
def test_legacy_arguments(kwargs, device, triton_backend):
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


# --- how the work is divided -----------------------------------------------------------------------------------------


def everything(x, target, weight):
    """Loss and gradient, of each pixel and of the mean."""
    results = []
    for reduction in ("none", "mean"):
        leaf = x.clone().requires_grad_()
        loss = FS.cross_entropy(leaf, target, weight, ignore_index=255, reduction=reduction)
        results += [loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]]
    return results


@pytest.mark.parametrize(
    "layout, shape, patch",
    [
        (torch.contiguous_format, (2, 5, 9, 17), {"INT32_MAX": 0}),
        (torch.contiguous_format, (2, 5, 9, 17), {"FEW_PROGRAMS": 0}),
        (torch.contiguous_format, (2, 5, 9, 17), {"TOTAL_BLOCK": 2}),
        (torch.contiguous_format, (1, 6, 8, 20), {"CLASSES": 8, "BACKWARD_CLASSES": 4}),
        (torch.channels_last, (1, 5, 7, 9), {"INT32_MAX": 0}),
        (torch.channels_last, (1, 66, 3, 5), {"INT32_MAX": 0}),
        (torch.channels_last, (1, 5, 7, 9), {"ROWS": 16, "CHUNKS": 16, "TOTAL_BLOCK": 2}),
        (torch.channels_last, (1, 66, 3, 5), {"LONG_ROWS": 4, "CHUNKS": 16}),
    ],
    ids=str,
)
def test_any_division_gives_the_same(layout, shape, patch, monkeypatch, device, triton_backend):
    """64-bit offsets, forced on a small tensor; large and small programs; many partial sums."""
    x, target = make(shape, device, layout=layout, ignore=255)
    weight = torch.rand(shape[1], device=device)
    before = everything(x, target, weight)
    for name, value in patch.items():
        monkeypatch.setattr(kernels, name, value)
    for got, want in zip(everything(x, target, weight), before, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 150])
def test_offsets_are_wide_in_time(classes):
    for pixels, wide in ((2**31 - 2**22 - 2048 * classes, False), (2**31 - 2, True), (2**31 + 2**12, True)):
        x = torch.empty(1, classes, pixels // classes // 2, 2, device="meta")
        assert kernels._constants(x, None, "mean", x)["WIDE"] == wide


@LAYOUTS
def test_deterministic_to_the_bit(layout, device, triton_backend):
    x, target = make((2, 4, 15, 19), device, layout=layout, ignore=255)
    weight = torch.rand(4, device=device)
    for first, second in zip(everything(x, target, weight), everything(x, target, weight), strict=True):
        assert torch.equal(first, second)


@INTERPRETED
@LAYOUTS
@pytest.mark.parametrize("classes, size", [(19, (16, 32)), (11, (15, 21)), (150, (4, 16))])
def test_bytes_moved_are_the_floor(classes, size, layout, triton_backend):
    x, target = make((1, classes, *size), dtype=torch.bfloat16, layout=layout, ignore=255)
    with traffic.metering() as launches:
        FS.cross_entropy(x.requires_grad_(), target, ignore_index=255).backward()
    floor = (6 * classes + 24) * math.prod(size)
    aligned = math.prod(size) % 16 == 0
    assert floor <= sum(launch.sectors() for launch in launches) <= (1.05 if aligned else 1.15) * floor


# --- labels that are no class ----------------------------------------------------------------------------------------


@INTERPRETED
@pytest.mark.parametrize("stray", [5, -1, 255, 2**31, 2**32 + 1, -(2**40)])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_stray_label_is_an_index_error_on_a_cpu(stray, backend):
    x, target = make((2, 5, 3, 4))
    target[1, 2, 3] = stray
    with fastseg.backend(backend), pytest.raises(IndexError, match=f"Target {stray} is out of bounds"):
        FS.cross_entropy(x, target)
    with fastseg.backend(backend), pytest.raises(IndexError, match=r"\(1, 2, 3\)"):
        ops.CROSS_ENTROPY(x, target, None, "mean", -100)
    FS.cross_entropy(x, target, ignore_index=stray)


@INTERPRETED
@LAYOUTS
@pytest.mark.parametrize("classes", [5, 70])
def test_a_stray_label_is_never_an_address(classes, layout, monkeypatch):
    """The kernels themselves, past the check: strays count for nothing, and no byte outside the tensors is touched."""
    touched = []

    def note(meter, access, pointers, mask):
        live = pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)].astype(np.int64)
        touched.append((live.ravel(), pointers.get_element_ty().primitive_bitwidth // 8))

    monkeypatch.setattr(traffic.KernelTraffic, "count", note)
    x, target = make((1, classes, 3, 7), layout=layout)
    strays = torch.tensor([-1, classes, -classes, classes + 1, 255, 2**31, 2**32 + 1, -(2**40)])
    target.view(-1)[:4], target.view(-1)[-4:] = strays[:4], strays[4:]
    valid = (target >= 0) & (target < classes)
    weight, grad_loss, last = torch.rand(classes), torch.rand(1, 3, 7), layout == torch.channels_last
    loss, lse, grad = torch.full((1, 3, 7), NAN), torch.full((2, 1, 3, 7), NAN), torch.full_like(x, NAN)
    with traffic.metering():
        kernels.cross_entropy_fwd(x, target, weight, "none", -100, last, loss, lse, loss)
        kernels.cross_entropy_bwd(grad_loss, x, target, weight, lse, loss, "none", -100, last, grad)
    want, gradient = exact(x, target.where(valid, -100), weight, reduction="none")
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), gradient(grad_loss), rtol=1e-5, atol=1e-5)
    assert not loss[~valid].any() and not grad.permute(0, 2, 3, 1)[~valid].any()
    tensors = (x, target, weight, grad_loss, loss, lse, grad)
    for addresses, size in touched:
        inside = [(addresses >= t.data_ptr()) & (addresses + size <= t.data_ptr() + t.nbytes) for t in tensors]
        assert np.logical_or.reduce(inside).all()


@pytest.mark.gpu
def test_a_stray_label_is_a_device_assertion():
    code = """
        import torch, fastseg
        x, target = torch.randn(1, 5, 8, 8, device="cuda"), torch.zeros(1, 8, 8, dtype=torch.long, device="cuda")
        target[0, 3, 3] = 7
        fastseg.functional.cross_entropy(x, target).item()
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert run.returncode != 0 and "neither a class nor ignore_index" in run.stderr + run.stdout


# --- as torch expects its operators ----------------------------------------------------------------------------------


@LAYOUTS
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype, reduction", [(torch.float32, "mean"), (torch.bfloat16, "none")], ids=str)
def test_opcheck(dtype, reduction, backend, layout, device):
    x, target = make((2, 3, 4, 5), device, dtype, layout, ignore=255)
    weight = torch.rand(3, device=device)
    with fastseg.backend(backend):
        torch.library.opcheck(torch.ops.fastseg.cross_entropy.default, (x, target, weight, reduction, 255))
        loss, lse, denominator = ops.CROSS_ENTROPY(x, target, weight, reduction, 255)
        arguments = (torch.ones_like(loss), x, target, weight, lse, denominator, reduction, 255)
        torch.library.opcheck(torch.ops.fastseg.cross_entropy_backward.default, arguments)


@REDUCTIONS
def test_gradients(reduction, device):
    x, target = make((2, 3, 2, 3), device, torch.float64, torch.channels_last, ignore=7)
    weight = torch.rand(3, device=device)
    loss = lambda x: ops.CrossEntropyFunction.apply(x, target, weight, reduction, 7)[0]  # noqa: E731
    with fastseg.backend("torch"):
        assert torch.autograd.gradcheck(loss, x.requires_grad_())
        assert torch.autograd.gradgradcheck(loss, x)


@REDUCTIONS
def test_second_derivative_through_the_kernels(reduction, device, triton_backend):
    x, target = make((1, 3, 4, 5), device, ignore=255)

    def second(function):
        leaf = x.clone().requires_grad_()
        loss = function(leaf, target, ignore_index=255, reduction=reduction)
        (first,) = torch.autograd.grad((loss**2).sum(), leaf, create_graph=True)
        return torch.autograd.grad((first**2).sum(), leaf)[0]

    got, want = second(FS.cross_entropy), second(F.cross_entropy)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compiles_in_one_graph(backend, dynamic, device):
    x, target = make((2, 4, 5, 6), device, torch.bfloat16, ignore=255)
    weight = torch.rand(4, device=device)

    def function(x, target):
        mean = FS.cross_entropy(x, target.to(torch.uint8), weight, ignore_index=255)
        return mean + FS.cross_entropy(x, target, ignore_index=255, reduction="none").sum() * 2

    with fastseg.backend(backend):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for batch in (2, 1) if dynamic else (2,):
            leaf, labels = x[:batch].clone().requires_grad_(), target[:batch].clone()
            eager, traced = function(leaf, labels), compiled(leaf, labels)
            torch.testing.assert_close(eager, traced)
            torch.testing.assert_close(torch.autograd.grad(eager, leaf), torch.autograd.grad(traced, leaf))


def test_nothing_is_kept_for_a_constant(device, triton_backend):
    x, target = make((1, 3, 2, 4), device)
    assert not FS.cross_entropy(x, target).requires_grad
    loss, lse, denominator = ops.CrossEntropyFunction.apply(x.requires_grad_(), target, None, "sum", -100)
    assert loss.requires_grad and not lse.requires_grad and denominator.numel() == 0
    assert ops.CROSS_ENTROPY(x.detach().half(), target, None, "sum", -100)[1].shape == (1, 1, 2, 4)


# --- arguments -------------------------------------------------------------------------------------------------------

X, TARGET = make((2, 4, 3, 5))


BAD = {
    "input": [[1.0], X.long(), X > 0],
    "target": [
        1, TARGET[:1], TARGET[0], TARGET[:, :2], TARGET[..., None], torch.tensor(1), X.long(), X[..., 1:],
        TARGET.float(), TARGET.bool(), TARGET.to(torch.int8), TARGET.to("meta"),
    ],
    "weight": [
        [1.0] * 4, torch.ones(5), torch.ones(()), torch.ones(4).double(), torch.ones(4).half(),
        torch.ones(4, device="meta"), torch.ones(4, requires_grad=True),
    ],
    "reduction": ["max", None],
    "ignore_index": [1.0, None, True, 2**70],
    "label_smoothing": [1.1, "a"],
}  # fmt: skip


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD.items() for value in values])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_bad_arguments_raise_what_torch_raises(name, value, backend):
    arguments = {"input": X, "target": TARGET, name: value}
    with pytest.raises(Exception) as theirs:
        F.cross_entropy(**arguments)
    with fastseg.backend(backend), pytest.raises(theirs.type, match=f"cross_entropy: {name} must") as ours:
        FS.cross_entropy(**arguments)
    assert type(ours.value) is theirs.type


@pytest.mark.parametrize("smoothing", [-0.1, NAN])
def test_no_smoothing_outside_its_range(smoothing):
    with pytest.raises(RuntimeError, match="label_smoothing must be between"):
        FS.cross_entropy(X, TARGET, label_smoothing=smoothing)


@pytest.mark.parametrize(
    "reason, x, target, kwargs",
    [
        ("label_smoothing 0.1", X, TARGET, {"label_smoothing": 0.1}),
        ("class probabilities", X, X.softmax(1), {}),
        ("float64", X.double(), TARGET, {}),
        ("2-D input", X[:, :, 0, 0], TARGET[:, 0, 0], {}),
        ("3-D input", X[:, :, 0], TARGET[:, 0], {}),
        ("5-D input", X[..., None], TARGET[..., None], {}),
        ("1-D input", X[0, :, 0, 0], TARGET[0, 0, 0], {}),
        ("without classes", X[:0, :0], TARGET[:0], {}),
    ],
)
def test_what_is_not_covered_falls_back_with_a_reason(reason, x, target, kwargs, triton_backend):
    with pytest.raises(NotImplementedError, match=reason):
        FS.cross_entropy(x, target, **kwargs)
    fastseg.set_backend("auto")
    got, want = FS.cross_entropy(x, target, **kwargs), F.cross_entropy(x, target, **kwargs)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_explain(device):
    x, target = X.to(device), TARGET.to(device)
    with fastseg.backend("triton"):
        (choice,) = fastseg.explain(FS.cross_entropy, x, target)
        assert (choice.operator, choice.backend) == ("cross_entropy", "triton")
    with fastseg.backend("torch"):
        (choice,) = fastseg.explain(FS.cross_entropy, x, target)
        assert choice.backend == "torch"


@pytest.mark.parametrize("shape", [(5,), (2, 5), (1, 5, 2, 2)])
def test_a_bad_label_is_named_where_torch_computes_too(shape):
    """Under "auto" a CPU tensor takes torch's function, whose own message does not say where."""
    target = torch.zeros((*shape[:1], *shape[2:]) if len(shape) > 1 else (), dtype=torch.int64)
    target.view(-1)[-1] = 7
    with pytest.raises(IndexError, match="Target 7 is out of bounds at"):
        FS.cross_entropy(torch.randn(shape), target)
