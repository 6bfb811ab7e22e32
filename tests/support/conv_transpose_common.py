"""What the tests of transposed convolution share: inputs, layouts, and the fused form in torch."""

import torch
import torch.nn.functional as F

import fastseg
from fastseg import functional as FS
from fastseg.inspect.codegen import record
from fastseg.kernels import launch
from fastseg.kernels.convolution.options import ConvTransposeGeometry
from fastseg.ops.operator import observing
from fastseg.verification import cases

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ["input", "weight", "bias"]
STRIDE_2 = ConvTransposeGeometry([2, 2], [0, 0], [0, 0], 1, [1, 1])


def tensors(shape, channels, kernel, dtype, layout, device, weight_layout=None):
    """input, weight and bias of a transposed convolution."""
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    x = torch.randn(shape).to(device, dtype).contiguous(memory_format=layout)
    weight = torch.randn(shape[1], channels, *kernel).to(device, dtype)
    return x, weight.contiguous(memory_format=weight_layout or layout), torch.randn(channels).to(device, dtype)


def on(backend, function=FS.conv_transpose2d):
    """The function under a backend, whatever the backend is at the call."""

    def call(*args, **kwargs):
        with fastseg.backend(backend):
            return function(*args, **kwargs)

    return call


def affine_relu(x, weight, scale, shift, *arguments):
    """The fused form in torch, as under autocast: the sum and each later step are rounded."""
    y = F.conv_transpose2d(x, weight, None, *arguments)
    y = y if scale is None else y * scale.to(y.dtype)[:, None, None]
    return (y if shift is None else y + shift.to(y.dtype)[:, None, None]).relu()


def pick(*choices):
    """One of the choices, at random."""
    return choices[torch.randint(len(choices), ()).item()]


def recorded_step(size, sm, layout):
    """What a call and its gradients would launch on a GPU of sm_<sm>."""
    at = cases.Placement(torch.bfloat16, LAYOUTS[layout], "meta")
    shape, *convolution = size
    (case,) = cases.conv_transpose2d(at, shape, cases.ConvTransposeSpec(*convolution))
    with fastseg.backend("triton"), launch.targeting(sm), observing(lambda operator, call: None):
        return record(lambda: case.step(case.ours, backward=True)())
