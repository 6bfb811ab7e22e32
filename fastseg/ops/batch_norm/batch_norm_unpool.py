"""The operators of batch norm + ReLU + max-unpooling in one pass.

Positions are uint8 offsets, and the unpooling has cells (PoolGeometry.has_cells). Others run as two operators.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...kernels import batch_norm as triton_kernels
from ...kernels.batch_norm.arguments import NormArguments
from ...kernels.cpu import batch_norm as cpu_kernels
from ...kernels.pooling.geometry import PoolGeometry
from ..operator import Operator, dense, empty, empty_like, for_backends, memory_format, placed
from ..pooling.positions import to_indices
from ..pooling.unpool import require_positions_inside
from .batch_norm import (
    empty_sums,
    normalized,
    sums_of,
    unsupported_input,
    x_hat_and_gradient,
)
from .batch_norm_pool import unsupported_gradient

# --- forward ---------------------------------------------------------------------------------------------------------


def _empty_unpooled(input: Tensor, offsets: Tensor, geometry: PoolGeometry, size: list[int], *rest: Any) -> Tensor:
    return empty(input, [*input.shape[:-2], *size], memory_format(input))


def _max_unpool2d_kernel(
    kernels: ModuleType, input: Tensor, offsets: Tensor, geometry: PoolGeometry, size: list[int], norm: NormArguments
) -> Tensor:
    require_positions_inside(offsets, geometry, size)
    layout = memory_format(input)
    output = _empty_unpooled(input, offsets, geometry, size)
    kernels.batch_norm_unpool.batch_norm_relu_max_unpool2d_fwd(
        dense(input, layout),
        dense(offsets, layout),
        norm.contiguous(),
        output,
        geometry,
        layout == torch.channels_last,
    )
    return output


def _max_unpool2d_reference(
    input: Tensor, offsets: Tensor, geometry: PoolGeometry, size: list[int], norm: NormArguments
) -> Tensor:
    require_positions_inside(offsets, geometry, size)
    indices = to_indices(offsets, geometry, size[1]).contiguous()
    activations = normalized(input, norm).contiguous()
    return placed(torch.ops.aten.max_unpool2d(activations, indices, size), memory_format(input))


BATCH_NORM_RELU_MAX_UNPOOL2D = Operator(
    "batch_norm_relu_max_unpool2d(Tensor input, Tensor offsets, PoolGeometry geometry, SymInt[2] output_size, "
    "NormArguments norm) -> Tensor",
    kernels=for_backends(_max_unpool2d_kernel, unsupported_input, triton=triton_kernels, cpu=cpu_kernels),
    reference=_max_unpool2d_reference,
    fake=_empty_unpooled,
)


# --- backward: the gradient of the ReLU's input, and its sums over the pixels ----------------------------------------


def _empty_gathered(grad: Tensor, offsets: Tensor, input: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_like(input), empty_sums(grad, input)


def _sums_kernel(
    kernels: ModuleType, grad: Tensor, offsets: Tensor, input: Tensor, geometry: PoolGeometry, norm: NormArguments
) -> tuple[Tensor, Tensor]:
    layout = memory_format(input)
    gathered, sums = _empty_gathered(grad, offsets, input)
    kernels.batch_norm_unpool.batch_norm_relu_max_unpool2d_sums(
        dense(grad, layout),
        dense(offsets, layout),
        dense(input, layout),
        norm.contiguous(),
        gathered,
        sums,
        geometry,
        layout == torch.channels_last,
    )
    return gathered, sums


def _sums_reference(
    grad: Tensor, offsets: Tensor, input: Tensor, geometry: PoolGeometry, norm: NormArguments
) -> tuple[Tensor, Tensor]:
    indices = to_indices(offsets, geometry, grad.shape[-1])
    pooled = grad.flatten(-2).gather(-1, indices.flatten(-2)).view(input.shape)
    x_hat, gathered = x_hat_and_gradient(pooled, input, norm)
    return placed(gathered.to(input.dtype), memory_format(input)), sums_of(x_hat, gathered)


BATCH_NORM_RELU_MAX_UNPOOL2D_SUMS = Operator(
    "batch_norm_relu_max_unpool2d_sums(Tensor grad_output, Tensor offsets, Tensor input, PoolGeometry geometry, "
    "NormArguments norm) -> (Tensor, Tensor)",
    kernels=for_backends(_sums_kernel, unsupported_gradient, triton=triton_kernels, cpu=cpu_kernels),
    reference=_sums_reference,
    fake=_empty_gathered,
    gradient=True,
)
