"""What the tests of SegNet's decoder in one kernel a stage share: its inputs, and what is launched for them."""

import pytest
import torch

from fastseg import functional as FS
from fastseg.inspect.traffic import metering

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="counts what is launched where it is interpreted")
GEOMETRY = ([2, 2], [2, 2], [0, 0])
JOINED = ["batch_norm_relu_fwd_kernel", "max_unpool2d_conv2d_fwd_kernel"]
APART = ["batch_norm_relu_max_unpool2d_fwd_kernel", "batch_norm_relu_fwd_kernel"]


def norm(channels, device, shifted=True, affine=True, relu=True, dtype=torch.float32):
    """mean, shift, var, weight, bias, eps, relu: away from where they start."""
    vectors = [torch.randn(channels, device=device) * 0.3 for _ in range(5)]
    mean, shift, var, weight, bias = (v.to(dtype) for v in vectors)
    var, weight = var.abs() + 0.5, weight + 1
    pair = (weight, bias) if affine else (None, None)
    return mean, shift if shifted else None, var, *pair, 1e-3, relu


def entrance(size, channels, outputs, device, dtype=torch.float32, layout=torch.channels_last):
    """(pooled map, offsets, weight, geometry) of an unpooling to `size` and a convolution."""
    image = torch.randn(size[0], channels, *size[1:]).to(device, dtype).contiguous(memory_format=layout)
    x, offsets = FS.max_pool2d_with_offsets(image, 2, ceil_mode=True)
    weight = (torch.randn(outputs, channels, 3, 3, device=device) / (3 * channels**0.5)).to(dtype)
    return x, offsets, weight.contiguous(memory_format=layout), (*GEOMETRY, list(size[1:]))


def launched(call):
    with metering() as launches:
        result = call()
    return result, [traffic.kernel for traffic in launches]
