"""max_unpool2d_conv2d: its operator, torch reference and function."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import autotune, dispatch
from ...kernels import convolution as triton_kernels
from ...kernels.pooling.geometry import PoolGeometry
from ..arguments import IntOrPair, require_tensor
from ..operator import Implementation, Operator, dense, empty, placed
from ..pooling.geometry import pool_geometry
from ..pooling.unpool import (
    MAX_UNPOOL2D,
    check_unpool,
    max_unpool2d_with_offsets,
    require_positions_inside,
    unpooled_size,
)
from .options import Epilogue, layout_of, unsupported_map

NAME = "max_unpool2d_conv2d"
UNMEASURED = "no measurement says that one kernel beats unpooling and cuDNN's convolution for this shape"


def empty_output(input: Tensor, weight: Tensor, size: list[int]) -> Tensor:
    """The output of the convolution of a map that is unpooled to `size`."""
    return empty(input, [input.shape[0], weight.shape[0], *size], layout_of(input, weight))


def run_one_kernel(
    input: Tensor, offsets: Tensor, weight: Tensor, geometry: PoolGeometry, size: list[int], epilogue: Epilogue
) -> Tensor:
    """Unpooling, convolution and epilogue in one kernel."""
    require_positions_inside(offsets, geometry, size)
    output = empty_output(input, weight, size)
    layout = layout_of(input, weight)
    triton_kernels.unpool_conv.max_unpool2d_conv2d_fwd(
        *(dense(t, layout) for t in (input, offsets, weight)),
        output,
        geometry,
        epilogue.contiguous(),
        layout == torch.channels_last,
    )
    return output


def _kernel(
    input: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None, geometry: PoolGeometry, size: list[int]
) -> Tensor:
    return run_one_kernel(input, offsets, weight, geometry, size, Epilogue(bias))


def _two_steps(
    input: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None, geometry: PoolGeometry, size: list[int]
) -> Tensor:
    return F.conv2d(MAX_UNPOOL2D(input, offsets, geometry, size), weight, bias, padding=1)


def _reference(
    input: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None, geometry: PoolGeometry, size: list[int]
) -> Tensor:
    return placed(_two_steps(input, offsets, weight, bias, geometry, size), layout_of(input, weight))


def _fake(
    input: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None, geometry: PoolGeometry, size: list[int]
) -> Tensor:
    return empty_output(input, weight, size)


def unsupported(input: Tensor, geometry: PoolGeometry, size: list[int]) -> str | None:
    """What of a call the kernel does not support, in words, or None."""
    if missing := unsupported_map(input, size):
        return missing
    if tuple(geometry.dilation) != (1, 1):
        return "dilation"
    if geometry.overlaps:
        kernel, stride = tuple(geometry.kernel_size), tuple(geometry.stride)
        return f"overlapping windows (kernel_size {kernel}, stride {stride})"
    return None


def _unsupported(
    input: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None, geometry: PoolGeometry, size: list[int]
) -> str | None:
    return unsupported(input, geometry, size)


def call_key(input: Tensor, weight: Tensor, geometry: PoolGeometry, size: list[int]) -> str:
    """All that the time of unpooling and convolution depends on."""
    numbers = torch.backends.cudnn.conv.fp32_precision if input.dtype == torch.float32 else ""
    deterministic = torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic
    windows = list(geometry.kernel_size), list(geometry.stride), list(geometry.padding), list(size)
    words = (input.dtype, tuple(input.shape), tuple(weight.shape), layout_of(input, weight), *windows)
    return str((*words, numbers, deterministic))


def _preferred(
    input: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None, geometry: PoolGeometry, size: list[int]
) -> dispatch.Preference:
    arguments = (input, offsets, weight, bias, geometry, size)
    key = f"{NAME} {call_key(input, weight, geometry, size)} bias={bias is not None}"
    took = autotune.times(key, input, lambda: (lambda: _kernel(*arguments), lambda: _two_steps(*arguments)))
    if took is None:
        return "torch", UNMEASURED
    return "triton" if took[0] < took[1] else "torch", f"{took[0]:.3g} ms in one kernel, {took[1]:.3g} ms in two steps"


MAX_UNPOOL2D_CONV2D = Operator(
    "max_unpool2d_conv2d(Tensor input, Tensor offsets, Tensor weight, Tensor? bias, PoolGeometry geometry, "
    "SymInt[2] output_size) -> Tensor",
    kernels={"triton": Implementation(_kernel, _unsupported)},
    reference=_reference,
    fake=_fake,
    preferred=_preferred,
)


def _check_convolution(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    require_tensor(NAME, "weight", weight)
    if weight.dim() != 4 or weight.shape[2:] != (3, 3) or weight.shape[0] == 0:
        raise RuntimeError(f"{NAME}: weight must be (K, C, 3, 3), but has shape {tuple(weight.shape)}")
    if weight.shape[1] != input.shape[-3]:
        raise RuntimeError(
            f"{NAME}: weight must have input's {input.shape[-3]} channels, but has shape {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RuntimeError(f"{NAME}: bias must have shape ({weight.shape[0]},), but has {tuple(bias.shape)}")
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and other.dtype != input.dtype:
            raise RuntimeError(f"{NAME}: {name} must be of input's dtype {input.dtype}, but is of {other.dtype}")
        if other is not None and other.device != input.device:
            raise RuntimeError(f"{NAME}: {name} must be on input's device {input.device}, but is on {other.device}")


def max_unpool2d_conv2d(
    input: Tensor,
    offsets: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    kernel_size: IntOrPair = 2,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """Max-unpooling and a 3x3 convolution of the unpooled map, which the fused kernel never stores.

        output = conv2d(max_unpool2d_with_offsets(input, offsets, ...), weight, bias, padding=1)

    Made for evaluation. If a gradient is needed, the two functions run one after the other.

    Args:
        input, offsets, kernel_size, stride, padding, output_size: as in max_unpool2d_with_offsets.
        weight, bias: as in torch.nn.functional.conv2d, of the input's dtype. `bias` may be None.

    Shape:
        - input, offsets: (N, C, H, W) or (C, H, W).
        - weight: (K, C, 3, 3). bias: (K,).
        - output: ``(N, K, *output_size)`` or ``(K, *output_size)``. It is channels_last if the input or the weight is.

    Returns:
        The convolved map, in the input's dtype; under autocast in autocast's dtype, as from conv2d.

    Raises:
        TypeError, RuntimeError, ValueError: as max_unpool2d_with_offsets and conv2d; RuntimeError also for a weight
            that is not 3x3.
        NotImplementedError: if the kernels are requested for what they do not support: float64, overlapping windows,
            or maps of more than 2^20 rows or columns or 2^31 - 1 pixels.

    Note:
        Deterministic: sums are in float32, in a fixed order. Under backend "auto" the fused kernel runs only if a
        measurement says that it is faster than the two functions.

    Example:
        >>> import torch, fastseg.functional as FS
        >>> pooled, offsets = FS.max_pool2d_with_offsets(torch.tensor([[[[1.0, 2.0], [4.0, 3.0]]]]), 2)
        >>> FS.max_unpool2d_conv2d(pooled, offsets, torch.arange(9.0).view(1, 1, 3, 3))
        tensor([[[[28., 24.],
                  [16., 12.]]]])

    Source:
        torch.nn.functional.max_unpool2d and conv2d.
    """
    check_unpool(NAME, input, offsets, "offsets", torch.uint8)
    geometry = pool_geometry(NAME, kernel_size, stride, padding)
    size = unpooled_size(NAME, input.shape[-2:], geometry, output_size)
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, weight, bias))
    device = input.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        low = torch.get_autocast_dtype(device)
        input, weight, bias = (t if t is None else t.to(low) for t in (input, weight, bias))
    _check_convolution(input, weight, bias)
    images = [t if t.dim() == 4 else t.unsqueeze(0) for t in (input, offsets)]
    if differentiated or MAX_UNPOOL2D_CONV2D.choose(*images, weight, bias, geometry, size).backend == "torch":
        kernel_size, stride, padding, _ = geometry
        unpooled = max_unpool2d_with_offsets(input, offsets, kernel_size, stride, padding, size)
        return F.conv2d(unpooled, weight, bias, padding=1)
    output = MAX_UNPOOL2D_CONV2D(*images, weight, bias, geometry, size)
    return output if input.dim() == 4 else output.squeeze(0)
