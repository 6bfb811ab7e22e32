"""Sequences with batch norms: fused where nothing needs the tensors between the layers, unchanged elsewhere."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.swap_common import NORM, POOLED, assert_same, block, deconv, operators, results, twins
from torch import nn

import fastseg
from fastseg.inspect.traffic import metering


class Conv(nn.Conv2d):
    """A user's class with torch's forward."""


class Own(nn.BatchNorm2d):
    def forward(self, input):
        return -super().forward(-input)


POOL, UP = "max_pool2d", "conv_transpose2d"
SEQUENCES = {  # the sequence, the children that run fused, the operators in training, and those in evaluation
    "conv bn relu": (block(nn.ReLU()), ["0 + 1 + 2"], [NORM], [NORM]),
    "conv bn": (block(), ["0 + 1"], [NORM], [NORM]),
    "conv bn relu pool": (block(nn.ReLU(True), nn.MaxPool2d(2)), ["0 + 1 + 2 + 3"], [POOLED], [POOLED]),
    "conv bn pool": (block(nn.MaxPool2d(2, ceil_mode=True)), ["0 + 1 + 2"], [POOLED], [POOLED]),
    "no bias": (block(nn.ReLU(), bias=False), ["1 + 2"], [NORM], [NORM]),
    "bn relu": (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), ["0 + 1"], [NORM], [NORM]),
    "overlapping pool": (block(nn.ReLU(), nn.MaxPool2d(3, 2, 1)), ["0 + 1 + 2"], [NORM, POOL], [NORM, POOL]),
    "dilated pool": (block(nn.ReLU(), nn.MaxPool2d(2, 2, dilation=2)), ["0 + 1 + 2"], [NORM, POOL], [NORM, POOL]),
    "deconv bn relu": (deconv(nn.ReLU()), ["0 + 1 + 2"], [UP, NORM], [UP]),
    "deconv bn relu, no bias": (deconv(nn.ReLU(), bias=False), ["0 + 1 + 2"], [UP, NORM], [UP]),
    "deconv bn": (deconv(), ["0 + 1"], [UP, NORM], [UP, NORM]),
    "deconv bn relu pool": (deconv(nn.ReLU(), nn.MaxPool2d(2)), ["0 + 1 + 2 + 3"], [UP, POOLED], [UP, POOLED]),
    "deconv bn pool, no bias": (deconv(nn.MaxPool2d(2), bias=False), ["1 + 2"], [UP, POOLED], [UP, POOLED]),
    "two": (
        nn.Sequential(*block(nn.ReLU(), nn.Dropout(0.0)), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3)),
        ["0 + 1 + 2", "4 + 5"], [NORM, NORM], [NORM, NORM],
    ),
    "subclass": (nn.Sequential(Conv(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()), ["0 + 1 + 2"], [NORM], [NORM]),
    "spectral norm": (
        nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 1)).eval(), nn.BatchNorm2d(4)),
        ["0 + 1"], [NORM], [NORM],
    ),
    "momentum None": (nn.Sequential(nn.BatchNorm2d(3, momentum=None), nn.ReLU()), ["0 + 1"], [NORM], [NORM]),
    "no statistics": (
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        ["0 + 1"], [NORM], [NORM],
    ),
    "deconv, no statistics": (
        nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()),
        ["0 + 1 + 2"], [UP, NORM], [UP, NORM],
    ),
    "not affine": (nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.ReLU()), ["0 + 1"], [NORM], [NORM]),
}  # fmt: skip


@pytest.mark.parametrize("name", SEQUENCES)
def test_each_group_runs_fused_with_the_same_results(name, device, triton_backend):
    """Twice in training, in evaluation, and after undo: outputs, gradients, buffers and state_dict."""
    sequence, together, training, evaluation = SEQUENCES[name]
    plain, model, report = twins(copy.deepcopy(sequence).to(device))
    keys = list(plain.state_dict())
    layer = report.candidates[0]
    assert layer.names == ("(the model)",) and layer.op == "batch_norm_relu" and layer.swapped
    assert [" + ".join(names) for names in layer.together] == together
    assert f"yes: {', '.join(together)}" in str(report)
    swapped_alone = (nn.MaxPool2d, nn.ConvTranspose2d)
    assert [type(m) for m in model if not isinstance(m, swapped_alone)] == [
        type(m) for m in plain if not isinstance(m, swapped_alone)
    ]
    x = torch.randn(2, 3, 7, 8, device=device)
    for mode, ran in ((True, training), (True, training), (False, evaluation)):
        for each in (plain, model):
            each.train(mode)
        if name != "momentum None" or not mode:  # its momentum is read from a tensor, and fake tensors have no values
            assert operators(model, x) == ran
        assert_same(results(model, x), results(plain, x))
    assert list(model.state_dict()) == keys
    plain.load_state_dict(model.state_dict(), strict=True)
    report.undo()
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert_same(results(model, x), results(plain, x), exactly=True)


class Scaled(nn.Conv2d):
    """Scales the bias with the rest."""

    def _conv_forward(self, input, weight, bias):
        return 3 * super()._conv_forward(input, weight, bias)


class WithOwnBias(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return F.conv2d(input, weight, self.bias)


@pytest.mark.parametrize("conv", [Scaled(3, 4, 3), WithOwnBias(3, 4, 3), nn.Conv2d(3, 4, 3)], ids=str)
def test_a_convolution_with_its_own_conv_forward_keeps_its_bias(conv, device, triton_backend):
    plain, model, report = twins(nn.Sequential(copy.deepcopy(conv), nn.BatchNorm2d(4), nn.ReLU()).to(device))
    if type(conv) is nn.Conv2d:  # set on the instance
        assert report.swapped[0].together == (("0", "1", "2"),)
        for each in (plain, model):
            each[0]._conv_forward = lambda input, weight, bias, bound=each[0].bias: 2 * F.conv2d(input, weight, bound)
    else:
        assert report.swapped[0].together == (("1", "2"),)
    x = torch.randn(2, 3, 5, 5, device=device)
    assert operators(model, x) == [NORM]
    assert_same(results(model, x), results(plain, x))


class Counting(nn.Module):
    """A parametrization that returns another value at each call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, value):
        self.calls += 1
        return value * self.calls


@pytest.mark.parametrize("make", [block, deconv], ids=["conv", "deconv"])
@pytest.mark.parametrize("at, name", [(0, "weight"), (0, "bias"), (1, "weight"), (1, "bias")])
def test_a_parametrization_is_called_once(at, name, make, device, triton_backend):
    model = make(nn.ReLU()).to(device)
    nn.utils.parametrize.register_parametrization(model[at], name, Counting(), unsafe=True)
    plain, model, _ = twins(model)
    for _ in range(2):
        found, want = (results(each, torch.ones(2, 3, 5, 5, device=device).tril()) for each in (model, plain))
        names = [key for key in want if key == "output" or key.startswith("buffer")]
        assert_same(*({key: values[key] for key in names} for values in (found, want)))


class Loud(nn.ReLU):
    def __call__(self, input):
        return super().__call__(input) + 1


@pytest.mark.parametrize(
    "sequence",
    [
        nn.Sequential(nn.BatchNorm2d(3), Loud()),
        block(bias=False),
        nn.Sequential(nn.BatchNorm2d(3)),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(3, 4, 1), Own(4), nn.ReLU()),
        nn.Sequential(nn.SyncBatchNorm(3), nn.ReLU()),
        nn.Sequential(nn.BatchNorm2d(3), nn.ReLU6()),
        nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(), nn.ReLU()),
        nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()),
        nn.Sequential(),
    ],
    ids=str,
)
def test_a_sequence_without_a_group_is_not_a_candidate(sequence):
    assert fastseg.swap(sequence).candidates == []
    assert type(sequence) is nn.Sequential


@pytest.mark.parametrize("training", [True, False])
def test_layers_are_called_one_by_one_where_the_kernels_do_not_run(training, device):
    """Under "torch", and on a CPU under "auto": results are bitwise the same, and each layer is called."""
    plain, model, _ = twins(nn.Sequential(*block(nn.ReLU(), nn.MaxPool2d(2)), *deconv(nn.ReLU())[1:]).to(device))
    x = torch.randn(2, 3, 6, 8, device=device)
    called = []
    for layer in model:
        forward = type(layer).forward
        layer.forward = lambda *args, layer=layer, forward=forward: (
            called.append(type(layer).__name__) or forward(layer, *args)
        )
    for backend in {"torch", "auto" if device == "cpu" else "torch"}:
        with fastseg.backend(backend):
            for each in (plain, model):
                each.train(training)
            assert_same(results(model, x), results(plain, x), exactly=True)
    for layer in model:
        del layer.forward
    with fastseg.backend("torch"):
        assert NORM not in operators(model, x)
        assert_same(results(model, x), results(plain, x), exactly=True)
    assert called[: len(model)] == [type(layer).__name__ for layer in plain]


def test_a_convolution_bias_in_front_of_a_norm_has_a_gradient(device, triton_backend):
    """It is zero in training, where the mean cancels the bias, and not None, for which DDP would wait."""
    for make in (block, deconv):
        _, model, _ = twins(make(nn.ReLU()).to(device))
        found = results(model, torch.randn(2, 3, 5, 5, device=device))
        assert torch.equal(found["0.bias"], torch.zeros_like(model[0].bias))
        assert all(value is not None for value in found.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the launches of the interpreter")
def test_a_transposed_convolution_in_evaluation_is_one_kernel(triton_backend):
    _, model, _ = twins(nn.Sequential(nn.ConvTranspose2d(16, 16, 2, 2), nn.BatchNorm2d(16), nn.ReLU()))
    x = torch.randn(1, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last).eval()
    with torch.no_grad(), metering() as launches:
        y = model(x)
    assert len(launches) == 1 and y.is_contiguous(memory_format=torch.channels_last)
