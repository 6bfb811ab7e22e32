"""A max-unpooling and the 3x3 convolution behind it, between the batch norms that a network in evaluation has there."""

from __future__ import annotations

from collections.abc import Sequence
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
from .conv_transpose_operators import layout_of

NAME = "max_unpool2d_conv2d_batch_norm_relu"
UNMEASURED = "no measurement says that one kernel beats cuDNN's convolution of the unpooled map for this shape"
NO_NORM = (None, None, None, None, None, 0.0, False)


def _norms(arguments: Sequence[Any]) -> tuple[NormArguments, NormArguments | None]:
    """(behind the convolution, in front of the unpooling) of the operator's arguments from the geometry on."""
    behind, before = NormArguments(*arguments[4:11]), NormArguments(*arguments[11:])
    return behind, None if before.mean is None else before


def _joined(input: Tensor, offsets: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """The norm in front on the small map, the one behind in the convolution's epilogue."""
    behind, before = _norms(rest)
    if before is not None:
        input = BATCH_NORM_RELU.implementations["triton"](input, before)
    mean, input_bias, var, gamma, beta, eps, relu = behind
    scale, shift = folded_norm(mean, var, gamma, beta, eps, input_bias)
    return unpool_conv.in_one_kernel(input, offsets, weight, shift, *rest[:4], scale, relu)


def _apart(input: Tensor, offsets: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """As the layers run otherwise: [norm and] unpooling, convolution, norm, each on what it is chosen to."""
    behind, before = _norms(rest)
    unpool, norm = (MAX_UNPOOL2D, ()) if before is None else (BATCH_NORM_RELU_MAX_UNPOOL2D, (before,))
    unpooled = unpool(input, offsets, PoolGeometry(*rest[:3]), rest[3], *norm)
    return BATCH_NORM_RELU(F.conv2d(unpooled, weight, padding=1), behind)


def _uncovered(input: Tensor, offsets: Tensor, weight: Tensor, *rest: Any) -> str | None:
    return unpool_conv.uncovered(input, offsets, weight, None, *rest[:4]) or unsupported_input(input)


def _preferred(input: Tensor, offsets: Tensor, weight: Tensor, *rest: Any) -> dispatch.Preference:
    """By the time that all of it takes both ways."""
    before = _norms(rest)[1]
    key = f"{NAME} {unpool_conv.described(input, weight, *rest[:4])} behind {before and f'a norm, relu={before.relu}'}"

    def calls() -> tuple[Any, Any]:
        arguments = (input, offsets, weight.to(input.dtype), *rest)
        return lambda: _joined(*arguments), lambda: _apart(*arguments)

    took = autotune.times(key, input, calls)
    if took is None:
        return "torch", UNMEASURED
    backend = "triton" if took[0] < took[1] else "torch"
    return backend, f"{took[0]:.3g} ms in one kernel, {took[1]:.3g} ms by way of the unpooled map"


MAX_UNPOOL2D_CONV2D_BATCH_NORM_RELU = Operator(
    f"{NAME}(Tensor input, Tensor offsets, Tensor weight, int[2] kernel_size, int[2] stride, int[2] padding, "
    "SymInt[2] output_size, Tensor mean, Tensor? shift, Tensor var, Tensor? gamma, Tensor? beta, float eps, bool relu, "
    "Tensor? before_mean, Tensor? before_shift, Tensor? before_var, Tensor? before_gamma, Tensor? before_beta, "
    "float before_eps, bool before_relu) -> Tensor",
    kernels={
        "triton": Implementation(_joined, _uncovered),
    },
    reference=lambda *arguments: placed(_apart(*arguments), layout_of(arguments[0], arguments[2])),
    fake=lambda input, offsets, weight, *rest: unpool_conv.empty_output(input, offsets, weight, None, *rest[:4]),
    preferred=_preferred,
)


def max_unpool2d_conv2d_batch_norm_relu(
    input: Tensor,
    offsets: Tensor,
    weight: Tensor,
    geometry: Sequence[list[int]],
    behind: NormArguments,
    before: NormArguments | None,
) -> Tensor | None:
    """behind(conv2d(max_unpool2d_with_offsets(before(input), offsets, ...), weight, padding=1)), or None.

    geometry: kernel_size, stride, padding and output_size, of a pooling that made the offsets. behind, before: a batch
    norm in evaluation, with relu its ReLU too; before may be missing. A shift is the bias of the convolution in front
    of the norm. None where the unpooled map is to be made: for what the kernels do not cover or torch refuses, and
    under backend "auto" as long as no measurement of both ways says that this one is faster. Nothing is differentiated.
    """
    if input.dim() != 4 or offsets.shape != input.shape or weight.shape[1:] != (input.shape[1], 3, 3):
        return None
    device = input.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if input.dtype != (torch.get_autocast_dtype(device) if autocast else weight.dtype):
        return None
    if not _fits(behind, weight.shape[:1]) or (before is not None and not _fits(before, input.shape[1:2])):
        return None
    arguments = (*geometry, *behind, *(before or NO_NORM))
    if dispatch.get_backend() == "triton" and _uncovered(input, offsets, weight, *arguments) is not None:
        return None
    if MAX_UNPOOL2D_CONV2D_BATCH_NORM_RELU.choose(input, offsets, weight, *arguments).backend != "triton":
        return None
    return MAX_UNPOOL2D_CONV2D_BATCH_NORM_RELU(input, offsets, weight.to(input.dtype), *arguments)


def _fits(norm: NormArguments, shape: torch.Size) -> bool:
    """Whether there are statistics, and all vectors are of the channels' shape."""
    mean, shift, var, gamma, beta, *_ = norm
    if mean is None or var is None:
        return False
    return all(t is None or t.shape == shape for t in (mean, shift, var, gamma, beta))
