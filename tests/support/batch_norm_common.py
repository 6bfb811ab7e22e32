"""What the tests of batch norm share: a call of it, and of torch's own layers one behind the other."""

import pytest
import torch
import torch.nn.functional as F

from fastseg import functional as FS

LAYOUTS = [torch.contiguous_format, torch.channels_last]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
TAILS = ["plain", "pool", "unpool"]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])


class Problem:
    """Tensors of one call, and the call of ours and of torch's layers on them."""

    def __init__(self, tail, shape, dtype, layout, device, kernel=2, stride=None, padding=0, ceil_mode=False):
        self.tail, self.windows, self.ceil_mode = tail, (kernel, stride, padding), ceil_mode
        accumulated = torch.float64 if dtype == torch.float64 else torch.float32
        channels, self.size = shape[1], shape[2:]
        if tail == "unpool":
            small, indices = F.max_pool2d(torch.randn(shape), *self.windows, ceil_mode=ceil_mode, return_indices=True)
            shape, self.indices = small.shape, indices.to(device)
            self.offsets = FS.indices_to_offsets(self.indices, *self.windows, width=self.size[1])
        # No two values near each other in a window: rounding must not choose another maximum.
        side = max(kernel) if isinstance(kernel, tuple) else kernel
        rows, columns = (torch.arange(size) % side for size in shape[2:])
        values = torch.randn(shape).mul(4).round() / 2 + (rows[:, None] * side + columns) * (0.5 / side**2)
        values += torch.rand(shape) * (0.1 / side**2)  # nor on the ReLU's edge
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
        rest |= dict(zip(("kernel_size", "stride", "padding"), self.windows, strict=True))
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
            return F.max_pool2d(y, *self.windows, ceil_mode=self.ceil_mode)
        return F.max_unpool2d(y, self.indices, *self.windows, self.size) if self.tail == "unpool" else y
