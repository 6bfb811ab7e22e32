"""What the tests of unpooling + convolution in one kernel share: inputs, batch norms, and the names of launches."""

import pytest
import torch

from fastseg import functional as FS
from fastseg.inspect.traffic import metering
from fastseg.kernels.batch_norm.arguments import NormArguments
from fastseg.kernels.pooling.geometry import PoolGeometry

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="counts launches in the interpreter")
GEOMETRY = PoolGeometry([2, 2], [2, 2], [0, 0])
ONE_KERNEL = ["batch_norm_relu_fwd_kernel", "max_unpool2d_conv2d_fwd_kernel"]
LAYER_BY_LAYER = ["batch_norm_relu_max_unpool2d_fwd_kernel", "batch_norm_relu_fwd_kernel"]


def norm(channels, device, shifted=True, affine=True, relu=True, dtype=torch.float32):
    """A batch norm in evaluation whose statistics and parameters are not those of a new layer."""
    vectors = [torch.randn(channels, device=device) * 0.3 for _ in range(5)]
    mean, shift, var, weight, bias = (v.to(dtype) for v in vectors)
    var, weight = var.abs() + 0.5, weight + 1
    parameters = (weight, bias) if affine else (None, None)
    return NormArguments(mean, shift if shifted else None, var, *parameters, 1e-3, relu)


def stage_inputs(size, channels, outputs, device, dtype=torch.float32, layout=torch.channels_last):
    """(pooled map, offsets, weight, geometry, size) of an unpooling to `size` (N, H, W) and a convolution."""
    image = torch.randn(size[0], channels, *size[1:]).to(device, dtype).contiguous(memory_format=layout)
    x, offsets = FS.max_pool2d_with_offsets(image, 2, ceil_mode=True)
    weight = (torch.randn(outputs, channels, 3, 3, device=device) / (3 * channels**0.5)).to(dtype)
    return x, offsets, weight.contiguous(memory_format=layout), GEOMETRY, list(size[1:])


def launched(call):
    """(its result, the names of the kernels that it launches)."""
    with metering() as launches:
        result = call()
    return result, [traffic.kernel for traffic in launches]
