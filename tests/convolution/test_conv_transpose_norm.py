"""ConvTransposeBatchNormReLU2d against torch's three layers, in training and folded."""

import copy

import pytest
import torch
from torch import nn

import fastseg
from fastseg.inspect.traffic import metering


def twins(*arguments, device, **geometry):
    """(torch's three layers, ours with their state), with statistics of some life behind them."""
    conv = nn.ConvTranspose2d(*arguments, **geometry)
    theirs = nn.Sequential(conv, nn.BatchNorm2d(arguments[1]), nn.ReLU()).to(device)
    with torch.no_grad():
        for tensor in (theirs[1].weight, theirs[1].bias, theirs[1].running_mean):
            tensor.copy_(torch.randn_like(tensor))
        theirs[1].running_var.uniform_(0.5, 2)
    ours = fastseg.nn.ConvTransposeBatchNormReLU2d(*arguments, **geometry).to(device)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def gradients(module, x):
    leaves = [x.clone().requires_grad_(), *module.parameters()]
    y = module(leaves[0])
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(y.shape, generator=generator).to(y.device, y.dtype)
    return [y, *torch.autograd.grad(y, leaves, grad)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "arguments, geometry", [((5, 8, 3), {"padding": 1}), ((8, 4, 4, 2, 1), {"groups": 2}), ((4, 8, 2, 2), {})]
)
def test_output_gradients_and_statistics(arguments, geometry, backend, training, device):
    theirs, ours = twins(*arguments, device=device, **geometry)
    x = torch.randn(2, arguments[0], 4, 5, device=device)
    theirs.train(training)
    ours.train(training)
    with fastseg.backend(backend):
        found = gradients(ours, x)
    want = gradients(theirs, x)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * max(1.0, b.abs().max().item()))
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what is launched where it is interpreted")
def test_evaluation_is_one_kernel(device, triton_backend):
    _, ours = twins(16, 16, 2, 2, device=device)
    x = torch.randn(1, 16, 4, 4, device=device).contiguous(memory_format=torch.channels_last)
    ours = ours.to(memory_format=torch.channels_last).eval()
    with torch.no_grad(), metering() as launches:
        ours(x)
    assert [traffic.kernel for traffic in launches] == ["conv_transpose2d_fwd_tma_kernel"]


def test_half_precision_folds_in_float32(device, triton_backend):
    """The error against float64 is that of one rounding of the output and of the weights, not of scale and shift."""
    theirs, ours = twins(8, 8, 3, 2, device=device)
    exact = copy.deepcopy(theirs).half().double().eval()
    x = torch.randn(1, 8, 4, 4, device=device).half()
    with torch.no_grad():
        want = exact(x.double())
        got = ours.half().eval()(x)
    assert got.dtype == torch.float16
    assert fastseg.verification.criterion.relative_error(got, want) <= 2**-10


def test_without_relu_or_statistics_nothing_is_folded(device, triton_backend):
    theirs, ours = twins(4, 4, 2, device=device)
    x = torch.randn(2, 4, 3, 3, device=device)
    ours.eval()[1].relu = False
    torch.testing.assert_close(ours(x), theirs.eval()[:2](x), rtol=1e-4, atol=1e-4)


def test_where_torch_runs_nothing_is_folded(device):
    _, ours = twins(4, 4, 2, device=device)
    with fastseg.backend("torch"):
        called = fastseg.explain(ours.eval(), torch.randn(2, 4, 3, 3, device=device))
    assert [choice.operator for choice in called] == ["conv_transpose2d", "batch_norm_relu"]


def test_deconvnet_has_it_where_no_unpooling_follows():
    model = fastseg.models.DeconvNet(4, width=0.125)
    found = [type(block) is fastseg.nn.ConvTransposeBatchNormReLU2d for stage in model.decoder for block in stage]
    assert found == [True, True, False] * 3 + [True, False] + [True, True]


@pytest.mark.parametrize("training", [False, True])
def test_hooks_on_either_layer_see_what_passes(training, device, triton_backend):
    module = fastseg.nn.ConvTransposeBatchNormReLU2d(4, 3, 2, 2).to(device).train(training)
    seen = []
    x = torch.randn(2, 4, 3, 3, device=device)
    want = module(x)
    for layer in module:
        layer.register_forward_hook(lambda layer, _, y: seen.append(tuple(y.shape)))
    module.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x), want)
    assert seen == [(2, 3, 6, 6)] * 2


def test_backward_pre_hooks_run_in_evaluation(device, triton_backend):
    """The layers then run one by one: the fused kernel has no gradient of the tensor between them."""
    module = fastseg.nn.ConvTransposeBatchNormReLU2d(4, 3, 2, 2).to(device).eval()
    seen = []
    for layer in module:
        layer.register_full_backward_pre_hook(lambda layer, grads: seen.append(type(layer).__name__))
    module(torch.randn(2, 4, 3, 3, device=device, requires_grad=True)).sum().backward()
    assert seen == ["BatchNormReLU2d", "ConvTranspose2dBeforeNorm"]
