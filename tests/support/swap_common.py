"""Networks for the tests of swap, and comparisons of a swapped model with its plain copy."""

import copy

import torch
from torch import nn

import fastseg

NORM, POOLED = "batch_norm_relu", "batch_norm_relu_max_pool2d"
FUSED = {
    nn.MaxPool2d: fastseg.nn.MaxPool2d,
    nn.MaxUnpool2d: fastseg.nn.MaxUnpool2d,
    nn.ConvTranspose2d: fastseg.nn.ConvTranspose2d,
    nn.CrossEntropyLoss: fastseg.nn.CrossEntropyLoss,
}


class Net(nn.Module):
    """A small network with one of each layer, and its loss."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.pool = nn.MaxPool2d(2, return_indices=True, ceil_mode=True)
        self.unpool = nn.MaxUnpool2d(2)
        self.up = nn.ConvTranspose2d(4, 5, 2, 2)
        self.loss = nn.CrossEntropyLoss(ignore_index=3)

    def forward(self, x, target):
        y = self.conv(x)
        pooled, indices = self.pool(y)
        return self.loss(self.up(self.unpool(pooled, indices, output_size=y.size())), target)


# What EncoderDecoder runs in training after a swap.
ENCODER_DECODER_OPERATORS = [NORM, "max_pool2d", POOLED, "conv_transpose2d", NORM, "max_unpool2d"]


class EncoderDecoder(nn.Module):
    """Encoder and decoder in sequences, with a skip connection and with indices passed between them."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
        self.middle = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
        self.up = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, 2), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        y = self.down(x)
        y, indices = self.pool(y)
        y = y + self.up(self.middle(y))
        return self.head(self.unpool(y, indices))


class MyPool(nn.MaxPool2d):
    """A subclass with its own forward."""

    def forward(self, input):
        return -super().forward(-input)


def block(*more, bias=True, channels=4):
    return nn.Sequential(nn.Conv2d(3, channels, 3, bias=bias), nn.BatchNorm2d(channels), *more)


def deconv(*more, bias=True):
    return nn.Sequential(nn.ConvTranspose2d(3, 4, 2, 2, bias=bias), nn.BatchNorm2d(4), *more)


def twins(model, **options):
    """(plain copy, swapped model, report); the running statistics are random."""
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif name.endswith("running_mean"):
            tensor.normal_()
    plain = copy.deepcopy(model)
    return plain, model, fastseg.swap(model, **options)


def results(model, *inputs):
    """The output, the gradients of inputs and parameters, and the buffers after the call, by name."""
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    model.zero_grad()
    output = model(*inputs)
    generator = torch.Generator().manual_seed(0)
    output.backward(torch.randn(output.shape, generator=generator).to(output))
    found = {"output": output.detach()}
    found |= {f"input {i}": x.grad for i, x in enumerate(inputs) if x.requires_grad}
    found |= {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return found | {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(found, want, exactly=False):
    assert found.keys() == want.keys()
    for name, expected in want.items():
        if exactly or expected is None:
            assert found[name] is expected is None or torch.equal(found[name], expected), name
        else:
            scale = max(1.0, expected.double().abs().max().item()) if expected.numel() else 1.0
            # The gradient of a bias in front of a norm is zero; torch's sums return the rounding error.
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-4 * scale, msg=name)


def operators(model, *inputs):
    return [choice.operator for choice in fastseg.explain(model, *inputs)]


def kinds(model):
    return [type(module) for module in model.modules()]


def reasons(report):
    return {name: layer.reason for layer in report.left for name in layer.names}
