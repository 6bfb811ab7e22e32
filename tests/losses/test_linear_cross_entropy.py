"""linear_cross_entropy against the composition of torch's functions in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from support.cross_entropy_common import BACKENDS, LAYOUTS, QUIET
from torch.profiler import ProfilerActivity, profile

import fastseg
from fastseg import functional as FS
from fastseg import nn
from fastseg.kernels.losses.options import LossOptions
from fastseg.ops.losses import chunked_reference as chunks
from fastseg.ops.losses import linear_cross_entropy as function

NAMES = ["features", "linear_weight", "linear_bias", "target"]
pytestmark = QUIET


def make(shape, classes, device="cpu", dtype=torch.float32, layout=torch.contiguous_format):
    """Features, the classifier, and labels, a fifth of which are 255."""
    x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout)
    weight, bias = (
        torch.randn(classes, shape[1], device=device).to(dtype),
        torch.randn(classes, device=device).to(dtype),
    )
    target = torch.randint(classes, (shape[0], *shape[2:]), device=device)
    target[torch.rand(target.shape, device=device) < 0.2] = 255
    return x, weight, bias, target


def composed(x, weight, bias, target, class_weight=None, **options):
    class_weight = None if class_weight is None else class_weight.to(x.dtype)
    return F.cross_entropy(
        F.conv2d(x, weight[:, :, None, None], bias), target, class_weight, ignore_index=255, **options
    )


@LAYOUTS
@BACKENDS
@pytest.mark.parametrize("chunk", [7, None])
@pytest.mark.parametrize("reduction, smoothing", [("mean", 0.1), ("none", 0.0), ("sum", 0.0)])
def test_errors_are_no_larger_than_torchs(reduction, smoothing, chunk, backend, layout, device, assert_right):
    dtype = torch.bfloat16 if reduction == "mean" else torch.float32
    inputs = make((2, 6, 3, 5), 4, device, dtype, layout)
    class_weight = torch.rand(4, device=device) + 0.5
    options = {"reduction": reduction, "label_smoothing": smoothing}

    def ours(x, weight, bias, target):
        call = {"linear_bias": bias, "weight": class_weight, "ignore_index": 255, "chunk": chunk}
        return FS.linear_cross_entropy(x, weight, target, **call, **options)

    with fastseg.backend(backend):
        assert_right(ours, lambda *call: composed(*call, class_weight, **options), inputs, NAMES)


@LAYOUTS
def test_the_chunk_size_does_not_change_the_result(layout, device):
    x, weight, bias, target = make((2, 5, 4, 6), 7, device, torch.float64, layout)
    leaves = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    want = composed(*leaves, target)
    wanted = torch.autograd.grad(want, leaves)
    for chunk in (1, 5, 24, 1000):
        loss = FS.linear_cross_entropy(x, weight, target, linear_bias=bias, ignore_index=255, chunk=chunk)
        torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
        for got, other in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
            torch.testing.assert_close(got, other, rtol=1e-10, atol=1e-14)


def test_one_and_two_dimensional_inputs_as_in_torch(device):
    weight, bias = torch.randn(5, 3, device=device), torch.randn(5, device=device)
    for x, target in (
        (torch.randn(3, device=device), torch.tensor(4, device=device)),
        (torch.randn(6, 3, device=device), torch.tensor([0, 1, 4, 3, 2, 2], device=device)),
    ):
        for reduction in ("none", "mean"):
            want = F.cross_entropy(F.linear(x, weight, bias), target, reduction=reduction)
            got = FS.linear_cross_entropy(x, weight, target, linear_bias=bias, reduction=reduction)
            torch.testing.assert_close(got, want)
    x, target = torch.randn(2, 3, 4, 5, device=device), torch.rand(2, 5, 4, 5, device=device)
    want = F.cross_entropy(F.conv2d(x, weight[:, :, None, None], bias), target)
    torch.testing.assert_close(FS.linear_cross_entropy(x, weight[:, :, None, None], target, linear_bias=bias), want)


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the CPU's allocator")
@LAYOUTS
def test_memory_is_bounded_by_the_chunk(layout):
    x, weight, bias, target = make((1, 4, 64, 64), 50, layout=layout)

    def peak(chunk):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            FS.linear_cross_entropy(leaf, weight, target, linear_bias=bias, ignore_index=255, chunk=chunk).backward()
        events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
        return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))

    logits = target.numel() * 50 * 4
    assert peak(128) < logits / 4 < logits < peak(64 * 64)


def test_autocast_and_no_bias(device):
    x, weight, _, target = make((1, 4, 3, 5), 6, device)
    with torch.autocast(device, torch.bfloat16):
        got = FS.linear_cross_entropy(x, weight, target, ignore_index=255)
    want = composed(x.bfloat16().double(), weight.bfloat16().double(), None, target)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_only_needed_gradients_are_computed(device):
    x, weight, bias, target = make((1, 4, 3, 5), 6, device)
    FS.linear_cross_entropy(x, weight.requires_grad_(), target, linear_bias=bias, ignore_index=255).backward()
    assert weight.grad is not None and x.grad is None and bias.grad is None


@BACKENDS
def test_opcheck(backend, device):
    x, weight, bias, target = make((1, 3, 2, 4), 5, device, layout=torch.channels_last)
    tensors, options = (x, weight, bias, target, None), LossOptions("weights", 0, 255, 0.0, 0.0)
    with fastseg.backend(backend):
        torch.library.opcheck(torch.ops.fastseg.linear_cross_entropy.default, (*tensors, *options, 3))
        loss, lse, denominator = function.LINEAR_CROSS_ENTROPY(*tensors, options, 3)
        call = (torch.ones_like(loss), *tensors, lse, denominator, *options, 3, [True, True, False])
        torch.library.opcheck(torch.ops.fastseg.linear_cross_entropy_backward.default, call)


def test_gradients_pass_gradcheck(device):
    x, weight, bias, target = make((1, 3, 2, 3), 4, device, torch.float64)
    loss = lambda *call: FS.linear_cross_entropy(  # noqa: E731
        call[0], call[1], target, linear_bias=call[2], ignore_index=255, z_loss=0.01, chunk=4
    )
    leaves = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(dynamic, device):
    x, weight, bias, target = make((1, 3, 4, 5), 4, device)

    def function(x, weight):
        return FS.linear_cross_entropy(x, weight, target, linear_bias=bias, ignore_index=255) * 2

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), function(x, weight))
    x.requires_grad_()
    got, want = (torch.autograd.grad(f(x, weight), x)[0] for f in (compiled, function))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"linear_weight": torch.zeros(5, 4)}, RuntimeError, r"linear_weight must have shape \(C, 3\)"),
        ({"linear_weight": torch.zeros(5, 3, 3, 3)}, RuntimeError, "linear_weight must have shape"),
        ({"linear_bias": torch.zeros(4)}, RuntimeError, r"linear_bias must have shape \(5,\)"),
        ({"linear_weight": torch.zeros(5, 3).double()}, RuntimeError, "linear_weight must be of input's dtype"),
        ({"linear_weight": None}, TypeError, "linear_weight must be a Tensor"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1"),
        ({"target": torch.full((2, 4, 4), 5)}, IndexError, "linear_cross_entropy: Target 5"),
        ({"target": torch.zeros(2, 4, 5, dtype=torch.long)}, RuntimeError, "target must have shape"),
        ({"weight": torch.ones(3)}, RuntimeError, "5 classes"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_bad_arguments(change, error, words):
    good = {"input": torch.zeros(2, 3, 4, 4), "linear_weight": torch.zeros(5, 3)}
    good["target"] = torch.zeros(2, 4, 4, dtype=torch.long)
    with pytest.raises(error, match=words):
        FS.linear_cross_entropy(**good | change)


def test_the_module(device):
    loss = nn.LinearCrossEntropyLoss(3, 5, bias=True, ignore_index=255, weight=torch.rand(5), chunk=7).to(device)
    assert set(loss.state_dict()) == {"weight", "linear.weight", "linear.bias"}
    assert loss.extra_repr() == (
        "ignore_index=255, reduction='mean', label_smoothing=0.0, normalization='weights', z_loss=0.0, chunk=7"
    )
    x, _, _, target = make((2, 3, 3, 4), 5, device)
    want = composed(x, loss.linear.weight, loss.linear.bias, target, loss.weight)
    torch.testing.assert_close(loss(x, target), want)


@pytest.mark.skipif(torch.cuda.is_available(), reason="one pass of the CPU")
@LAYOUTS
@pytest.mark.parametrize(
    "options", [{"label_smoothing": 0.2}, {"z_loss": 0.1, "normalization": "valid"}, {"reduction": "sum"}], ids=str
)
def test_one_pass_computes_the_gradients_in_the_forward(options, layout, monkeypatch):
    """With many classes on a CPU: the backward computes no further matrix product."""
    monkeypatch.setattr(chunks, "ELEMENTS", 100)  # several chunks
    calls = []
    monkeypatch.setattr(function, "LINEAR_CROSS_ENTROPY_BACKWARD", lambda *tensors: calls.append(tensors))
    x, weight, bias, target = make((2, 6, 3, 5), 7, layout=layout)
    class_weight = torch.rand(7) + 0.5
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def loss_of(leaves, class_weight):
        call = {"linear_bias": leaves[2], "weight": class_weight, "ignore_index": 255}
        return FS.linear_cross_entropy(*leaves[:2], target, **call, **options)

    def want_of(leaves, class_weight):
        z_loss, normalization = options.get("z_loss", 0.0), options.get("normalization")
        plain = {name: value for name, value in options.items() if name in ("label_smoothing", "reduction")}
        if normalization is None:
            return composed(*leaves, target, class_weight, **plain)
        logits = F.conv2d(leaves[0], leaves[1][:, :, None, None], leaves[2])
        squared = (z_loss * logits.logsumexp(1).square() * (target != 255)).sum()
        return (composed(*leaves, target, class_weight, reduction="sum") + squared) / (target != 255).sum()

    loss = loss_of(leaves, class_weight)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    want = want_of(exact, class_weight.double())
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    for factor in (1.0, -3.0):  # two backwards of one graph
        got = torch.autograd.grad(factor * loss, leaves, retain_graph=True)
        for ours, theirs in zip(got, torch.autograd.grad(factor * want, exact, retain_graph=True), strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    (some,) = torch.autograd.grad(loss_of([x.detach(), weight, bias.detach()], class_weight), [weight])
    torch.testing.assert_close(some, torch.autograd.grad(loss, weight, retain_graph=True)[0])
    (second,) = torch.autograd.grad(torch.autograd.grad(loss, weight, create_graph=True)[0].square().sum(), x)
    twice = torch.autograd.grad(want, exact[1], create_graph=True)[0].square().sum()
    torch.testing.assert_close(second.double(), torch.autograd.grad(twice, exact[0])[0], rtol=1e-4, atol=1e-5)
    assert not calls


@pytest.mark.parametrize("chunk", [None, 7])
def test_all_pixels_ignored(chunk, device):
    x, weight, bias, target = make((1, 3, 4, 5), 6, device)
    target.fill_(255)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    loss = FS.linear_cross_entropy(x, weight, target, linear_bias=bias, ignore_index=255, chunk=chunk)
    assert loss.isnan() and not any(grad.any() for grad in torch.autograd.grad(loss, leaves))
