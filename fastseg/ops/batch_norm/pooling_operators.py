"""Batch norm, ReLU and the max-pooling or max-unpooling behind them: operators and their torch reference.

Positions are uint8 offsets. Windows are `fusible`; the functions compose the other cases from two operators.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import batch_norm as triton_kernels
from ...kernels.cuda import batch_norm as cuda_kernels
from ...kernels.pooling.geometry import PoolGeometry
from ..operator import Implementation, Operator, dense, empty, memory_format, placed
from ..pooling.geometry import pooled_size
from ..pooling.positions import to_indices, to_offsets
from ..pooling.unpool import require_positions_inside
from .operators import (
    NORM,
    empty_sums,
    input_gradient,
    kernel_norm,
    like_input,
    normalised,
    sums_of,
    uncovered,
    x_hat_and_gradient,
)


def fusible(kernel: list[int], stride: list[int]) -> bool:
    """Whether no two windows overlap, and a window with the gap behind it is small: what one pass is written for."""
    return all(k <= s for k, s in zip(kernel, stride, strict=True)) and stride[0] * stride[1] <= 64


# --- with max-pooling ------------------------------------------------------------------------------------------------


def _empty_pooled(
    input: Tensor, geometry: PoolGeometry, ceil_mode: bool, keep: bool, *norm: Any
) -> tuple[Tensor, Tensor]:
    layout = memory_format(input)
    size = pooled_size(input.shape[-2:], geometry, ceil_mode)
    output = empty(input, [*input.shape[:-2], *size], layout)
    offsets = empty(input, output.shape, layout, torch.uint8) if keep else input.new_empty(0, dtype=torch.uint8)
    return output, offsets


def _pool_kernel(
    code: ModuleType, input: Tensor, geometry: PoolGeometry, ceil_mode: bool,
    keep: bool, *norm: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    output, offsets = _empty_pooled(input, geometry, ceil_mode, keep)
    code.batch_norm_pool.bn_relu_max_pool2d_fwd(
        dense(input, memory_format(input)), kernel_norm(*norm, code), output, offsets if keep else None,
        geometry, memory_format(input) == torch.channels_last,
    )  # fmt: skip
    return output, offsets


def _pool_reference(
    input: Tensor, geometry: PoolGeometry, ceil_mode: bool, keep: bool, *norm: Any
) -> tuple[Tensor, Tensor]:
    layout = memory_format(input)
    between = normalised(input, norm)
    output, indices = F.max_pool2d(between, *geometry, ceil_mode, return_indices=True)
    if not keep:
        return placed(output, layout), input.new_empty(0, dtype=torch.uint8)
    offsets = to_offsets(indices, geometry, input.shape[-1])
    return placed(output, layout), placed(offsets, layout)


POOL = Operator(
    f"batch_norm_relu_max_pool2d(Tensor input, PoolGeometry geometry, bool ceil_mode, bool keep_offsets, {NORM}) "
    "-> (Tensor, Tensor)",
    kernels={
        "triton": Implementation(partial(_pool_kernel, triton_kernels), lambda input, *rest: uncovered(input)),
        "cuda": Implementation(partial(_pool_kernel, cuda_kernels), lambda input, *rest: uncovered(input)),
    },
    reference=_pool_reference,
    fake=_empty_pooled,
)


def _unpooled(grad: Tensor, offsets: Tensor, geometry: PoolGeometry, like: Tensor):
    """The gradient of the map between, from that of the pooled one. Windows do not overlap: each place gets one."""
    indices = to_indices(offsets, geometry, like.shape[-1]).flatten(-2)
    return grad.new_zeros(like.shape).flatten(-2).scatter(-1, indices, grad.flatten(-2)).view(like.shape)


def _pool_sums_kernel(
    code: ModuleType, grad: Tensor, offsets: Tensor, input: Tensor, geometry: PoolGeometry, *norm: Any,
) -> Tensor:  # fmt: skip
    layout, sums = memory_format(input), empty_sums(grad, input)
    code.batch_norm_pool.bn_relu_max_pool2d_sums(
        dense(grad, layout), dense(offsets, layout), dense(input, layout), kernel_norm(*norm, code), sums,
        geometry, memory_format(input) == torch.channels_last,
    )  # fmt: skip
    return sums


def _pool_sums_reference(grad: Tensor, offsets: Tensor, input: Tensor, geometry: PoolGeometry, *norm: Any) -> Tensor:
    between = _unpooled(grad, offsets, geometry, input)
    return sums_of(*x_hat_and_gradient(between, input, norm))


POOL_SUMS = Operator(
    "batch_norm_relu_max_pool2d_sums(Tensor grad_output, Tensor offsets, Tensor input, PoolGeometry geometry, "
    f"{NORM}) -> Tensor",
    kernels={
        "triton": Implementation(
            partial(_pool_sums_kernel, triton_kernels), lambda grad, offsets, input, *rest: uncovered(input)
        ),
        "cuda": Implementation(
            partial(_pool_sums_kernel, cuda_kernels), lambda grad, offsets, input, *rest: uncovered(input)
        ),
    },
    reference=_pool_sums_reference,
    fake=lambda grad, offsets, input, *rest: empty_sums(grad, input),
    gradient=True,
)


def _pool_backward_kernel(
    code: ModuleType, grad: Tensor, offsets: Tensor, input: Tensor, means: Tensor | None,
    geometry: PoolGeometry, *norm: Any,
) -> Tensor:  # fmt: skip
    layout, grad_input = memory_format(input), like_input(input)
    code.batch_norm_pool.bn_relu_max_pool2d_bwd(
        dense(grad, layout), dense(offsets, layout), dense(input, layout), kernel_norm(*norm, code),
        None if means is None else means.contiguous(),
        grad_input, geometry, memory_format(input) == torch.channels_last,
    )  # fmt: skip
    return grad_input


def _pool_backward_reference(
    grad: Tensor, offsets: Tensor, input: Tensor, means: Tensor | None,
    geometry: PoolGeometry, *norm: Any,
) -> Tensor:  # fmt: skip
    between = _unpooled(grad, offsets, geometry, input)
    return input_gradient(*x_hat_and_gradient(between, input, norm), means, input, norm)


POOL_BACKWARD = Operator(
    "batch_norm_relu_max_pool2d_backward(Tensor grad_output, Tensor offsets, Tensor input, Tensor? means, "
    f"PoolGeometry geometry, {NORM}) -> Tensor",
    kernels={
        "triton": Implementation(
            partial(_pool_backward_kernel, triton_kernels), lambda grad, offsets, input, *rest: uncovered(input)
        ),
        "cuda": Implementation(
            partial(_pool_backward_kernel, cuda_kernels), lambda grad, offsets, input, *rest: uncovered(input)
        ),
    },
    reference=_pool_backward_reference,
    fake=lambda grad, offsets, input, *rest: like_input(input),
    gradient=True,
)


# --- with max-unpooling ----------------------------------------------------------------------------------------------


def _empty_unpooled(
    input: Tensor,
    offsets: Tensor,
    geometry: PoolGeometry,
    size: list[int],
    *norm: Any,
) -> Tensor:
    return empty(input, [*input.shape[:-2], *size], memory_format(input))


def _unpool_kernel(
    input: Tensor,
    offsets: Tensor,
    geometry: PoolGeometry,
    size: list[int],
    *norm: Any,
) -> Tensor:
    require_positions_inside(offsets, geometry, size)
    layout = memory_format(input)
    output = _empty_unpooled(input, offsets, geometry, size)
    triton_kernels.batch_norm_unpool.bn_relu_max_unpool2d_fwd(
        dense(input, layout), dense(offsets, layout), kernel_norm(*norm), output,
        geometry, memory_format(input) == torch.channels_last,
    )  # fmt: skip
    return output


def _unpool_reference(
    input: Tensor,
    offsets: Tensor,
    geometry: PoolGeometry,
    size: list[int],
    *norm: Any,
) -> Tensor:
    require_positions_inside(offsets, geometry, size)
    indices = to_indices(offsets, geometry, size[1]).contiguous()
    between = normalised(input, norm).contiguous()
    return placed(torch.ops.aten.max_unpool2d(between, indices, size), memory_format(input))


UNPOOL = Operator(
    "batch_norm_relu_max_unpool2d(Tensor input, Tensor offsets, PoolGeometry geometry, SymInt[2] output_size, "
    f"{NORM}) -> Tensor",
    kernels={
        "triton": Implementation(_unpool_kernel, lambda input, *rest: uncovered(input)),
    },
    reference=_unpool_reference,
    fake=_empty_unpooled,
)


def _empty_gathered(grad: Tensor, offsets: Tensor, input: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return like_input(input), empty_sums(grad, input)


def _unpool_sums_kernel(
    grad: Tensor, offsets: Tensor, input: Tensor, geometry: PoolGeometry, *norm: Any
) -> tuple[Tensor, Tensor]:
    layout = memory_format(input)
    gathered, sums = _empty_gathered(grad, offsets, input)
    triton_kernels.batch_norm_unpool.bn_relu_max_unpool2d_sums(
        dense(grad, layout), dense(offsets, layout), dense(input, layout), kernel_norm(*norm), gathered,
        sums, geometry, memory_format(input) == torch.channels_last,
    )  # fmt: skip
    return gathered, sums


def _unpool_sums_reference(
    grad: Tensor, offsets: Tensor, input: Tensor, geometry: PoolGeometry, *norm: Any
) -> tuple[Tensor, Tensor]:
    indices = to_indices(offsets, geometry, grad.shape[-1])
    between = grad.flatten(-2).gather(-1, indices.flatten(-2)).view(input.shape)
    x_hat, behind = x_hat_and_gradient(between, input, norm)
    return placed(behind.to(input.dtype), memory_format(input)), sums_of(x_hat, behind)


UNPOOL_SUMS = Operator(
    "batch_norm_relu_max_unpool2d_sums(Tensor grad_output, Tensor offsets, Tensor input, PoolGeometry geometry, "
    f"{NORM}) -> (Tensor, Tensor)",
    kernels={
        "triton": Implementation(_unpool_sums_kernel, lambda grad, offsets, input, *rest: uncovered(input)),
    },
    reference=_unpool_sums_reference,
    fake=_empty_gathered,
    gradient=True,
)
