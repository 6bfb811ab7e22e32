"""What the tests of batch norm share: a call of fastseg and of torch's layers, and a network of each."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastseg import functional as FS
from fastseg import nn as fused

LAYOUTS = [torch.contiguous_format, torch.channels_last]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
TAILS = ["plain", "pool", "unpool"]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])


class Problem:
    """The tensors of one call, and that call by fastseg (`ours`) and by torch's layers in sequence (`theirs`)."""

    def __init__(self, tail, shape, dtype, layout, device, kernel=2, stride=None, padding=0, ceil_mode=False):
        self.tail, self.window, self.ceil_mode = tail, (kernel, stride, padding), ceil_mode
        accumulated = torch.float64 if dtype == torch.float64 else torch.float32
        channels, self.size = shape[1], shape[2:]
        if tail == "unpool":
            small, indices = F.max_pool2d(torch.randn(shape), *self.window, ceil_mode=ceil_mode, return_indices=True)
            shape, self.indices = small.shape, indices.to(device)
            self.offsets = FS.indices_to_offsets(self.indices, *self.window, width=self.size[1])
        # Values of a window differ enough that rounding does not choose another maximum, or another side of the ReLU.
        side = max(kernel) if isinstance(kernel, tuple) else kernel
        rows, columns = (torch.arange(size) % side for size in shape[2:])
        values = torch.randn(shape).mul(4).round() / 2 + (rows[:, None] * side + columns) * (0.5 / side**2)
        values += torch.rand(shape) * (0.1 / side**2)
        self.x = values.to(device, dtype).contiguous(memory_format=layout)
        draw = lambda: torch.rand(channels).add(0.5).to(device, accumulated)  # noqa: E731
        self.weight, self.bias, self.input_bias = draw(), draw() - 1, draw()
        self.running = draw() - 1, draw()

    def inputs(self, *names):
        return [self.x, *(getattr(self, name) for name in names)]

    def ours(self, x, weight=None, bias=None, input_bias=None, training=True, relu=True, running=None, **rest):
        norm = (*(running or [t.clone() for t in self.running]), weight, bias, training)
        rest |= {"relu": relu, "input_bias": input_bias}
        if self.tail == "plain":
            return FS.batch_norm_relu(x, *norm, **rest)
        rest |= dict(zip(("kernel_size", "stride", "padding"), self.window, strict=True))
        if self.tail == "pool":
            return FS.batch_norm_relu_max_pool2d(x, *norm, ceil_mode=self.ceil_mode, **rest)
        return FS.batch_norm_relu_max_unpool2d(x, self.offsets, *norm, output_size=self.size, **rest)

    def theirs(self, x, weight=None, bias=None, input_bias=None, training=True, relu=True, running=None):
        like = x.dtype if x.dtype == torch.float64 else None
        running = [t.to(like or t.dtype) for t in running or [t.clone() for t in self.running]]
        y = x if input_bias is None else x + input_bias.to(x.dtype).view(1, -1, 1, 1)
        y = F.batch_norm(y, *running, weight, bias, training)
        y = F.relu(y) if relu else y
        if self.tail == "pool":
            return F.max_pool2d(y, *self.window, ceil_mode=self.ceil_mode)
        return F.max_unpool2d(y, self.indices, *self.window, self.size) if self.tail == "unpool" else y


class DownAndUp(nn.Module):
    """A pooling and its unpooling in fastseg's modules, with a convolution in front of each batch norm."""

    def __init__(self, channels, **norm):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(
            [
                fused.BatchNormReLU2d(channels, **norm),
                fused.BatchNormReLUMaxPool2d(channels, **norm, return_offsets=True),
                fused.BatchNormReLUMaxUnpool2d(channels, **norm),
            ]
        )

    def convolve_without_bias(self, number, x):
        return F.conv2d(x, self.convs[number].weight, None, padding=1)

    def forward(self, x):
        biases = [conv.bias for conv in self.convs]
        x = self.norms[0](self.convolve_without_bias(0, x), input_bias=biases[0])
        size = x.shape[-2:]
        x, offsets = self.norms[1](self.convolve_without_bias(1, x), biases[1])
        return self.norms[2](self.convolve_without_bias(2, x), offsets, size, biases[2])


class PlainDownAndUp(nn.Module):
    """The same network in torch's modules."""

    def __init__(self, channels, **norm):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels, **norm) for _ in range(3))

    def forward(self, x):
        first, second, third = (
            lambda x, c=conv, n=norm: F.relu(n(c(x))) for conv, norm in zip(self.convs, self.norms, strict=True)
        )
        full = second(first(x))
        x, indices = F.max_pool2d(full, 2, return_indices=True)
        return F.max_unpool2d(third(x), indices, 2, output_size=full.shape[-2:])
