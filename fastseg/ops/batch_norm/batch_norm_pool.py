"""The operators of batch norm + ReLU + max-pooling in one pass.

Positions are uint8 offsets, and the pooling has cells (PoolGeometry.has_cells). Other poolings run as two operators.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import batch_norm as triton_kernels
from ...kernels.batch_norm.arguments import NormArguments
from ...kernels.cpu import batch_norm as cpu_kernels
from ...kernels.cuda import batch_norm as cuda_kernels
from ...kernels.pooling.geometry import PoolGeometry
from ..operator import Operator, dense, empty, empty_like, for_backends, memory_format, placed
from ..pooling.geometry import pooled_size
from ..pooling.positions import to_indices, to_offsets
from .batch_norm import (
    empty_sums,
    input_gradient,
    normalized,
    sums_of,
    unsupported_input,
    x_hat_and_gradient,
)

# --- forward ---------------------------------------------------------------------------------------------------------


def _empty_pooled(
    input: Tensor, geometry: PoolGeometry, ceil_mode: bool, keep_offsets: bool, *rest: Any
) -> tuple[Tensor, Tensor]:
    layout = memory_format(input)
    output = empty(input, [*input.shape[:-2], *pooled_size(input.shape[-2:], geometry, ceil_mode)], layout)
    if not keep_offsets:
        return output, input.new_empty(0, dtype=torch.uint8)
    return output, empty(input, output.shape, layout, torch.uint8)


def _max_pool2d_kernel(
    kernels: ModuleType, input: Tensor, geometry: PoolGeometry, ceil_mode: bool, keep_offsets: bool, norm: NormArguments
) -> tuple[Tensor, Tensor]:
    layout = memory_format(input)
    output, offsets = _empty_pooled(input, geometry, ceil_mode, keep_offsets)
    kernels.batch_norm_pool.batch_norm_relu_max_pool2d_fwd(
        dense(input, layout),
        norm.contiguous(),
        output,
        offsets if keep_offsets else None,
        geometry,
        layout == torch.channels_last,
    )
    return output, offsets


def _max_pool2d_reference(
    input: Tensor, geometry: PoolGeometry, ceil_mode: bool, keep_offsets: bool, norm: NormArguments
) -> tuple[Tensor, Tensor]:
    layout = memory_format(input)
    output, indices = F.max_pool2d(normalized(input, norm), *geometry, ceil_mode, return_indices=True)
    if not keep_offsets:
        return placed(output, layout), input.new_empty(0, dtype=torch.uint8)
    return placed(output, layout), placed(to_offsets(indices, geometry, input.shape[-1]), layout)


BATCH_NORM_RELU_MAX_POOL2D = Operator(
    "batch_norm_relu_max_pool2d(Tensor input, PoolGeometry geometry, bool ceil_mode, bool keep_offsets, "
    "NormArguments norm) -> (Tensor, Tensor)",
    kernels=for_backends(
        _max_pool2d_kernel, unsupported_input, triton=triton_kernels, cuda=cuda_kernels, cpu=cpu_kernels
    ),
    reference=_max_pool2d_reference,
    fake=_empty_pooled,
)


# --- backward: the sums over the pixels ------------------------------------------------------------------------------


def _unpooled(grad: Tensor, offsets: Tensor, geometry: PoolGeometry, like: Tensor) -> Tensor:
    """The gradient of the pooling's input. Windows do not overlap, so each element gets at most one value."""
    indices = to_indices(offsets, geometry, like.shape[-1]).flatten(-2)
    return grad.new_zeros(like.shape).flatten(-2).scatter(-1, indices, grad.flatten(-2)).view(like.shape)


def unsupported_gradient(grad: Tensor, offsets: Tensor, input: Tensor, *rest: Any) -> str | None:
    """What of a gradient with offsets the kernels do not support."""
    return unsupported_input(input)


def _empty_sums(grad: Tensor, offsets: Tensor, input: Tensor, *rest: Any) -> Tensor:
    return empty_sums(grad, input)


def _sums_kernel(
    kernels: ModuleType, grad: Tensor, offsets: Tensor, input: Tensor, geometry: PoolGeometry, norm: NormArguments
) -> Tensor:
    layout = memory_format(input)
    sums = empty_sums(grad, input)
    kernels.batch_norm_pool.batch_norm_relu_max_pool2d_sums(
        dense(grad, layout),
        dense(offsets, layout),
        dense(input, layout),
        norm.contiguous(),
        sums,
        geometry,
        layout == torch.channels_last,
    )
    return sums


def _sums_reference(
    grad: Tensor, offsets: Tensor, input: Tensor, geometry: PoolGeometry, norm: NormArguments
) -> Tensor:
    return sums_of(*x_hat_and_gradient(_unpooled(grad, offsets, geometry, input), input, norm))


BATCH_NORM_RELU_MAX_POOL2D_SUMS = Operator(
    "batch_norm_relu_max_pool2d_sums(Tensor grad_output, Tensor offsets, Tensor input, PoolGeometry geometry, "
    "NormArguments norm) -> Tensor",
    kernels=for_backends(_sums_kernel, unsupported_gradient, triton=triton_kernels, cuda=cuda_kernels, cpu=cpu_kernels),
    reference=_sums_reference,
    fake=_empty_sums,
    gradient=True,
)


# --- backward: the input's gradient ----------------------------------------------------------------------------------


def _empty_gradient(grad: Tensor, offsets: Tensor, input: Tensor, *rest: Any) -> Tensor:
    return empty_like(input)


def _backward_kernel(
    kernels: ModuleType, grad: Tensor, offsets: Tensor, input: Tensor, means: Tensor | None, geometry: PoolGeometry,
    norm: NormArguments,
) -> Tensor:  # fmt: skip
    layout = memory_format(input)
    grad_input = empty_like(input)
    kernels.batch_norm_pool.batch_norm_relu_max_pool2d_bwd(
        dense(grad, layout),
        dense(offsets, layout),
        dense(input, layout),
        norm.contiguous(),
        None if means is None else means.contiguous(),
        grad_input,
        geometry,
        layout == torch.channels_last,
    )
    return grad_input


def _backward_reference(
    grad: Tensor, offsets: Tensor, input: Tensor, means: Tensor | None, geometry: PoolGeometry, norm: NormArguments
) -> Tensor:
    unpooled = _unpooled(grad, offsets, geometry, input)
    return input_gradient(*x_hat_and_gradient(unpooled, input, norm), means, input, norm)


BATCH_NORM_RELU_MAX_POOL2D_BACKWARD = Operator(
    "batch_norm_relu_max_pool2d_backward(Tensor grad_output, Tensor offsets, Tensor input, Tensor? means, "
    "PoolGeometry geometry, NormArguments norm) -> Tensor",
    kernels=for_backends(
        _backward_kernel, unsupported_gradient, triton=triton_kernels, cuda=cuda_kernels, cpu=cpu_kernels
    ),
    reference=_backward_reference,
    fake=_empty_gradient,
    gradient=True,
)
