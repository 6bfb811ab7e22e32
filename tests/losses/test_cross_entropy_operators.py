"""The operators of cross_entropy in torch: opcheck, gradcheck, compiled graphs, second derivatives."""

import pytest
import torch
import torch.nn.functional as F
from support.cross_entropy_common import LAYOUTS, QUIET, REDUCTIONS, make

import fastseg
from fastseg import functional as FS
from fastseg.kernels.losses.options import LossOptions
from fastseg.ops.losses import cross_entropy as ops

pytestmark = QUIET


@LAYOUTS
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype, reduction", [(torch.float32, "weights"), (torch.bfloat16, "none")], ids=str)
def test_opcheck(dtype, reduction, backend, layout, device):
    x, target = make((2, 3, 4, 5), device, dtype, layout, ignore=255)
    weight, options = torch.rand(3, device=device), LossOptions(reduction, 0, 255, 0.1, 0.01)
    with fastseg.backend(backend):
        inputs = (x, target, weight, *options, torch.uint8)
        torch.library.opcheck(torch.ops.fastseg.cross_entropy.default, inputs)
        loss, lse, denominator, *_ = ops.CROSS_ENTROPY(x, target, weight, options, torch.uint8)
        inputs = (torch.ones_like(loss), x, target, weight, lse, denominator, *options)
        torch.library.opcheck(torch.ops.fastseg.cross_entropy_backward.default, inputs)


@LAYOUTS
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck_of_one_pass(backend, layout, device):
    x = torch.randn(2, 3, 4, 5, device=device).contiguous(memory_format=layout)
    for target, reduction in ((torch.rand_like(x), "count"), (x.argmax(1), "valid")):
        options = LossOptions(reduction, 7, -100, 0.0, 0.0)
        with fastseg.backend(backend):
            inputs = (x, target, None, *options, None)
            torch.library.opcheck(torch.ops.fastseg.cross_entropy_one_pass.default, inputs)
            _, grad, _, denominator, *_ = ops.CROSS_ENTROPY_ONE_PASS(x, target, None, options, None)
            inputs = (grad, torch.tensor(2.0, device=device), x, target, None, denominator, *options)
            torch.library.opcheck(torch.ops.fastseg.cross_entropy_one_pass_backward_.default, inputs)


CALLS = [
    {"reduction": "none"},
    {"reduction": "sum", "label_smoothing": 0.2},
    {"one_pass": False, "z_loss": 0.1},
    {"one_pass": True, "normalization": "valid", "label_smoothing": 0.2, "z_loss": 0.1},
    {"one_pass": True, "normalization": "batch"},
]


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("kwargs", CALLS, ids=str)
def test_gradients_pass_gradcheck(kwargs, probabilities, device):
    """First derivatives of the kernels, second derivatives of torch's formulas."""
    x, target = make((1, 2, 1, 2), device, torch.float64, torch.channels_last)
    weight = torch.rand(2, device=device)
    target = torch.rand_like(x) if probabilities else target

    def loss(x):
        return FS.cross_entropy(x, target, weight, **kwargs)

    x.requires_grad_()
    with fastseg.backend("triton"):
        assert torch.autograd.gradcheck(loss, x, fast_mode=True)
        assert torch.autograd.gradgradcheck(loss, x, fast_mode=True)


def test_gradients_of_probabilities_and_weight_are_torchs(device):
    x = torch.randn(2, 3, 4, device=device)
    target, weight = torch.rand_like(x).requires_grad_(), torch.rand(3, device=device).requires_grad_()
    for leaves in ((target, torch.rand(3, device=device)), (target.detach(), weight)):
        results = [torch.autograd.grad(f(x, *leaves), [y for y in leaves if y.requires_grad])
                   for f in (FS.cross_entropy, F.cross_entropy)]  # fmt: skip
        torch.testing.assert_close(*results)
        with fastseg.backend("triton"), pytest.raises(NotImplementedError, match="a gradient of class prob"):
            FS.cross_entropy(x, *leaves)


@REDUCTIONS
@pytest.mark.parametrize("one_pass", [None, False])
def test_second_derivative_through_the_kernels(one_pass, reduction, device, triton_backend):
    x, target = make((1, 3, 4, 5), device, ignore=255)

    def second(function, **kwargs):
        leaf = x.clone().requires_grad_()
        loss = function(leaf, target, ignore_index=255, reduction=reduction, **kwargs)
        (first,) = torch.autograd.grad((loss**2).sum(), leaf, create_graph=True)
        return torch.autograd.grad((first**2).sum(), leaf)[0]

    got, want = second(FS.cross_entropy, one_pass=one_pass), second(F.cross_entropy)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("backend, dynamic", [("auto", False), ("triton", True)])
def test_compiles_in_one_graph(backend, dynamic, device):
    x, target = make((2, 4, 5, 6), device, torch.bfloat16, ignore=255)
    weight = torch.rand(4, device=device)

    def function(x, target):
        mean = FS.cross_entropy(x, target.to(torch.uint8), weight, ignore_index=255)
        out = FS.cross_entropy_with_predictions(x, target, ignore_index=255, normalization="pixels", z_loss=0.1)
        flat = FS.cross_entropy(x.flatten(2), x.detach().flatten(2).softmax(1), label_smoothing=0.1)
        none = FS.cross_entropy(x, target, ignore_index=255, reduction="none").sum()
        return mean + out.loss + 0.01 * out.correct + flat + none * 2

    with fastseg.backend(backend):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for batch in (2, 1) if dynamic else (2,):
            leaf, labels = x[:batch].clone().requires_grad_(), target[:batch].clone()
            eager, traced = function(leaf, labels), compiled(leaf, labels)
            torch.testing.assert_close(eager, traced)
            torch.testing.assert_close(torch.autograd.grad(eager, leaf), torch.autograd.grad(traced, leaf))
        with torch.no_grad():
            torch.testing.assert_close(function(x, target), compiled(x, target))


def test_a_constant_saves_nothing_for_the_backward(device, triton_backend):
    x, target = make((1, 3, 2, 4), device)
    assert not FS.cross_entropy(x, target).requires_grad
    options = LossOptions("sum", 0, -100, 0.0, 0.0)
    loss, lse, denominator, *_ = ops.CrossEntropyFunction.apply(x.requires_grad_(), target, None, options, None)
    assert loss.requires_grad and not lse.requires_grad and denominator.numel() == 0
    assert ops.CROSS_ENTROPY(x.detach().half(), target, None, options, None)[1].shape == (1, 1, 2, 4)
