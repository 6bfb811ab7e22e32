"""max_unpool2d_conv2d: what the operator means, its torch reference and function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import autotune, dispatch
from ...kernels import convolution as triton_kernels
from ...kernels.pooling.geometry import PoolGeometry
from ..arguments import FLOAT_DTYPES, INT32_MAX, MAX_FLOAT_SIDE, IntOrPair, require_tensor
from ..operator import Implementation, Operator, dense, empty, placed
from ..pooling.geometry import pool_geometry
from ..pooling.unpool import (
    MAX_UNPOOL2D,
    check_unpool,
    max_unpool2d_with_offsets,
    require_positions_inside,
    unpooled_size,
)
from .conv_transpose_operators import layout_of

NAME = "max_unpool2d_conv2d"
UNMEASURED = "no measurement says that one kernel beats unpooling and cuDNN's convolution for this shape"


def empty_output(
    input: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None, kernel: list[int], stride: list[int],
    padding: list[int], size: list[int],
) -> Tensor:  # fmt: skip
    return empty(input, [input.shape[0], weight.shape[0], *size], layout_of(input, weight))


def in_one_kernel(
    input: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None, kernel: list[int], stride: list[int],
    padding: list[int], size: list[int], scale: Tensor | None = None, relu: bool = False,
) -> Tensor:  # fmt: skip
    """relu(convolution * scale + bias), where scale and relu are given."""
    geometry = PoolGeometry(kernel, stride, padding)
    require_positions_inside(offsets, geometry, size)
    output = empty_output(input, offsets, weight, bias, kernel, stride, padding, size)
    layout = layout_of(input, weight)
    triton_kernels.unpool_conv.max_unpool2d_conv2d_fwd(
        *(dense(t, layout) for t in (input, offsets, weight)),
        triton_kernels.geometry.Epilogue(*(t if t is None else t.contiguous() for t in (scale, bias)), relu),
        output,
        geometry,
        layout == torch.channels_last,
    )
    return output


def _two_steps(input: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None, *geometry: list[int]) -> Tensor:
    return F.conv2d(MAX_UNPOOL2D(input, offsets, PoolGeometry(*geometry[:3]), geometry[3]), weight, bias, padding=1)


def _reference(input: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None, *geometry: list[int]) -> Tensor:
    return placed(_two_steps(input, offsets, weight, bias, *geometry), layout_of(input, weight))


def uncovered(input: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> str | None:
    kernel, stride, _, size = geometry
    if input.dtype not in FLOAT_DTYPES:
        return f"dtype {input.dtype}"
    if any(k > s for k, s in zip(kernel, stride, strict=True)):
        return f"overlapping windows (kernel_size {tuple(kernel)}, stride {tuple(stride)})"
    if max(size) > MAX_FLOAT_SIDE:
        return f"maps of more than {MAX_FLOAT_SIDE} rows or columns"
    if size[0] * size[1] > INT32_MAX:
        return f"maps of more than {INT32_MAX} pixels"
    return None


def described(input: Tensor, weight: Tensor, *geometry: Any) -> str:
    """All that the time of a call depends on, but for what stands around the unpooling and the convolution."""
    numbers = torch.backends.cudnn.conv.fp32_precision if input.dtype == torch.float32 else ""
    deterministic = torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic
    words = (input.dtype, tuple(input.shape), tuple(weight.shape), layout_of(input, weight), *map(list, geometry))
    return str((*words, numbers, deterministic))


def _preferred(
    input: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any
) -> dispatch.Preference:
    arguments = (input, offsets, weight, bias, *geometry)
    key = f"{NAME} {described(input, weight, *geometry)} bias={bias is not None}"
    took = autotune.times(key, input, lambda: (lambda: in_one_kernel(*arguments), lambda: _two_steps(*arguments)))
    if took is None:
        return "torch", UNMEASURED
    return "triton" if took[0] < took[1] else "torch", f"{took[0]:.3g} ms in one kernel, {took[1]:.3g} ms in two steps"


MAX_UNPOOL2D_CONV2D = Operator(
    "max_unpool2d_conv2d(Tensor input, Tensor offsets, Tensor weight, Tensor? bias, int[2] kernel_size, "
    "int[2] stride, int[2] padding, SymInt[2] output_size) -> Tensor",
    kernels={
        "triton": Implementation(in_one_kernel, uncovered),
    },
    reference=_reference,
    fake=empty_output,
    preferred=_preferred,
)


def check(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
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
    """conv2d(max_unpool2d_with_offsets(input, offsets, ...), weight, bias, padding=1) without the map between.

    input, offsets: (N, C, H, W) or (C, H, W), as max_unpool2d_with_offsets takes them, with its kernel_size, stride,
    padding and output_size; weight: (K, C, 3, 3); bias: (K,). The result is (N, K) by the output_size, channels_last
    where input or weight is. Sums are in float32, in a fixed order: deterministic.

    Made for evaluation: where a gradient is wanted, for float64 and for windows that overlap, both run one after the
    other, and under backend "auto" as long as no measurement says that one kernel is faster. Under autocast the
    tensors are cast as conv2d's. Raises what both raise; RuntimeError for a weight that is not 3x3.
    """
    check_unpool(NAME, input, offsets, "offsets", torch.uint8)
    windows = pool_geometry(NAME, kernel_size, stride, padding)
    geometry = (*windows[:3], unpooled_size(NAME, input.shape[-2:], windows, output_size))
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, weight, bias))
    device = input.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        low = torch.get_autocast_dtype(device)
        input, weight, bias = (t if t is None else t.to(low) for t in (input, weight, bias))
    check(input, weight, bias)
    images = [t if t.dim() == 4 else t.unsqueeze(0) for t in (input, offsets)]
    if differentiated or MAX_UNPOOL2D_CONV2D.choose(*images, weight, bias, *geometry).backend == "torch":
        return F.conv2d(max_unpool2d_with_offsets(input, offsets, *geometry), weight, bias, padding=1)
    output = MAX_UNPOOL2D_CONV2D(*images, weight, bias, *geometry)
    return output if input.dim() == 4 else output.squeeze(0)
