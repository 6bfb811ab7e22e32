"""A max-unpooling and the 3x3 convolution after it, with the batch norms in front of and after them, in evaluation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import autotune, dispatch
from ...kernels.batch_norm.arguments import NormArguments
from ...kernels.pooling.geometry import PoolGeometry
from ..batch_norm.batch_norm import BATCH_NORM_RELU, unsupported_input
from ..batch_norm.batch_norm_unpool import BATCH_NORM_RELU_MAX_UNPOOL2D
from ..operator import Implementation, Operator, placed
from ..pooling.unpool import MAX_UNPOOL2D
from . import unpool_conv
from .conv_transpose_norm import folded_norm
from .options import layout_of

NAME = "max_unpool2d_conv2d_batch_norm_relu"
UNMEASURED = "no measurement says that one kernel beats cuDNN's convolution of the unpooled map for this shape"


def _one_kernel(
    input: Tensor,
    offsets: Tensor,
    weight: Tensor,
    geometry: PoolGeometry,
    size: list[int],
    norm: NormArguments,
    input_norm: NormArguments | None,
) -> Tensor:
    """input_norm is applied to the small map; everything else is one kernel, with `norm` in its epilogue."""
    if input_norm is not None:
        input = BATCH_NORM_RELU.implementations["triton"](input, input_norm)
    return unpool_conv.run_one_kernel(input, offsets, weight, geometry, size, folded_norm(norm))


def _layer_by_layer(
    input: Tensor,
    offsets: Tensor,
    weight: Tensor,
    geometry: PoolGeometry,
    size: list[int],
    norm: NormArguments,
    input_norm: NormArguments | None,
) -> Tensor:
    """The layers as they run otherwise: unpooling (with input_norm in the same pass), convolution, norm."""
    if input_norm is None:
        unpooled = MAX_UNPOOL2D(input, offsets, geometry, size)
    else:
        unpooled = BATCH_NORM_RELU_MAX_UNPOOL2D(input, offsets, geometry, size, input_norm)
    return BATCH_NORM_RELU(F.conv2d(unpooled, weight, padding=1), norm)


def _reference(input: Tensor, offsets: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return placed(_layer_by_layer(input, offsets, weight, *rest), layout_of(input, weight))


def _fake(
    input: Tensor, offsets: Tensor, weight: Tensor, geometry: PoolGeometry, size: list[int], *norms: Any
) -> Tensor:
    return unpool_conv.empty_output(input, weight, size)


def _unsupported(
    input: Tensor, offsets: Tensor, weight: Tensor, geometry: PoolGeometry, size: list[int], *norms: Any
) -> str | None:
    return unpool_conv.unsupported(input, geometry, size) or unsupported_input(input)


def _preferred(
    input: Tensor,
    offsets: Tensor,
    weight: Tensor,
    geometry: PoolGeometry,
    size: list[int],
    norm: NormArguments,
    input_norm: NormArguments | None,
) -> dispatch.Preference:
    """The faster of both ways, each timed with all that it needs."""
    entry = "no norm" if input_norm is None else f"a norm, relu={input_norm.relu}"
    key = f"{NAME} {unpool_conv.call_key(input, weight, geometry, size)} after {entry}"

    def calls() -> tuple[Any, Any]:
        arguments = (input, offsets, weight.to(input.dtype), geometry, size, norm, input_norm)
        return lambda: _one_kernel(*arguments), lambda: _layer_by_layer(*arguments)

    took = autotune.times(key, input, calls)
    if took is None:
        return "torch", UNMEASURED
    backend = "triton" if took[0] < took[1] else "torch"
    return backend, f"{took[0]:.3g} ms in one kernel, {took[1]:.3g} ms by way of the unpooled map"


MAX_UNPOOL2D_CONV2D_BATCH_NORM_RELU = Operator(
    f"{NAME}(Tensor input, Tensor offsets, Tensor weight, PoolGeometry geometry, SymInt[2] output_size, "
    "NormArguments norm, NormArguments? input_norm) -> Tensor",
    kernels={"triton": Implementation(_one_kernel, _unsupported)},
    reference=_reference,
    fake=_fake,
    preferred=_preferred,
)


def max_unpool2d_conv2d_batch_norm_relu(
    input: Tensor,
    offsets: Tensor,
    weight: Tensor,
    geometry: PoolGeometry,
    size: list[int],
    norm: NormArguments,
    input_norm: NormArguments | None,
) -> Tensor | None:
    """Batch norm, max-unpooling, a 3x3 convolution and batch norm in one kernel, or None if that is not to be done.

        norm(conv2d(max_unpool2d_with_offsets(input_norm(input), offsets, ...), weight, padding=1))

    None for calls that the kernels do not support or torch refuses, and under backend "auto" unless a measurement says
    that this is faster than the layers one by one. No gradients.

    Args:
        input, offsets: (N, C, H, W), from a pooling of this geometry.
        weight: (K, C, 3, 3).
        geometry, size: of the unpooling.
        norm: the batch norm after the convolution, in evaluation; its shift is the bias of the convolution.
        input_norm: the batch norm in front of the unpooling, or None; its shift is the bias of the convolution before.
    """
    if input.dim() != 4 or offsets.shape != input.shape or weight.shape[1:] != (input.shape[1], 3, 3):
        return None
    device = input.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if input.dtype != (torch.get_autocast_dtype(device) if autocast else weight.dtype):
        return None
    if not _fits(norm, weight.shape[:1]) or (input_norm is not None and not _fits(input_norm, input.shape[1:2])):
        return None
    rest = (geometry, size, norm, input_norm)
    if dispatch.get_backend() == "triton" and _unsupported(input, offsets, weight, *rest) is not None:
        return None
    if MAX_UNPOOL2D_CONV2D_BATCH_NORM_RELU.choose(input, offsets, weight, *rest).backend != "triton":
        return None
    return MAX_UNPOOL2D_CONV2D_BATCH_NORM_RELU(input, offsets, weight.to(input.dtype), *rest)


def _fits(norm: NormArguments, shape: torch.Size) -> bool:
    """Whether there are statistics, and every vector has one value per channel."""
    if norm.mean is None or norm.var is None:
        return False
    return all(t is None or t.shape == shape for t in (norm.mean, norm.shift, norm.var, norm.weight, norm.bias))
