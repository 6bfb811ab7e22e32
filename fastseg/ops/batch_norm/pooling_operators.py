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
from ..operator import Operator, dense, empty, memory_format, placed
from ..pooling import positions
from ..pooling.unpool import refuse_strays
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

GEOMETRY = "int[2] kernel_size, int[2] stride, int[2] padding"


def fusible(kernel: list[int], stride: list[int]) -> bool:
    """Whether no two windows overlap, and a window with the gap behind it is small: what one pass is written for."""
    return all(k <= s for k, s in zip(kernel, stride, strict=True)) and stride[0] * stride[1] <= 64


def _windows(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], code: ModuleType = triton_kernels
) -> Any:
    return code.batch_norm_pool.Windows(kernel, stride, padding, memory_format(x) == torch.channels_last)


# --- with max-pooling ------------------------------------------------------------------------------------------------


def _empty_pooled(
    input: Tensor, kernel: list[int], stride: list[int], padding: list[int], ceil_mode: bool, keep: bool, *norm: Any
) -> tuple[Tensor, Tensor]:
    layout = memory_format(input)
    size = positions.pooled_size(input.shape[-2:], kernel, stride, padding, [1, 1], ceil_mode)
    output = empty(input, [*input.shape[:-2], *size], layout)
    offsets = empty(input, output.shape, layout, torch.uint8) if keep else input.new_empty(0, dtype=torch.uint8)
    return output, offsets


def _pool_kernel(
    code: ModuleType, input: Tensor, kernel: list[int], stride: list[int], padding: list[int], ceil_mode: bool,
    keep: bool, *norm: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    output, offsets = _empty_pooled(input, kernel, stride, padding, ceil_mode, keep)
    code.batch_norm_pool.bn_relu_max_pool2d_fwd(
        dense(input, memory_format(input)), kernel_norm(*norm, code), output, offsets if keep else None,
        _windows(input, kernel, stride, padding, code),
    )  # fmt: skip
    return output, offsets


def _pool_reference(
    input: Tensor, kernel: list[int], stride: list[int], padding: list[int], ceil_mode: bool, keep: bool, *norm: Any
) -> tuple[Tensor, Tensor]:
    layout = memory_format(input)
    between = normalised(input, norm)
    output, indices = F.max_pool2d(between, kernel, stride, padding, 1, ceil_mode, return_indices=True)
    if not keep:
        return placed(output, layout), input.new_empty(0, dtype=torch.uint8)
    offsets = positions.indices_to_offsets(indices, kernel, stride, padding, input.shape[-1])
    return placed(output, layout), placed(offsets, layout)


POOL = Operator(
    f"batch_norm_relu_max_pool2d(Tensor input, {GEOMETRY}, bool ceil_mode, bool keep_offsets, {NORM}) "
    "-> (Tensor, Tensor)",
    kernel=partial(_pool_kernel, triton_kernels),
    cuda=partial(_pool_kernel, cuda_kernels),
    reference=_pool_reference,
    fake=_empty_pooled,
    uncovered=lambda input, *rest: uncovered(input),
)


def _unpooled(grad: Tensor, offsets: Tensor, kernel: list[int], stride: list[int], padding: list[int], like: Tensor):
    """The gradient of the map between, from that of the pooled one. Windows do not overlap: each place gets one."""
    indices = positions.offsets_to_indices(offsets, kernel, stride, padding, like.shape[-1]).flatten(-2)
    return grad.new_zeros(like.shape).flatten(-2).scatter(-1, indices, grad.flatten(-2)).view(like.shape)


def _pool_sums_kernel(
    code: ModuleType, grad: Tensor, offsets: Tensor, input: Tensor, kernel: list[int], stride: list[int],
    padding: list[int], *norm: Any,
) -> Tensor:  # fmt: skip
    layout, sums = memory_format(input), empty_sums(grad, input)
    code.batch_norm_pool.bn_relu_max_pool2d_sums(
        dense(grad, layout), dense(offsets, layout), dense(input, layout), kernel_norm(*norm, code), sums,
        _windows(input, kernel, stride, padding, code),
    )  # fmt: skip
    return sums


def _pool_sums_reference(
    grad: Tensor, offsets: Tensor, input: Tensor, kernel: list[int], stride: list[int], padding: list[int], *norm: Any
) -> Tensor:
    between = _unpooled(grad, offsets, kernel, stride, padding, input)
    return sums_of(*x_hat_and_gradient(between, input, norm))


POOL_SUMS = Operator(
    f"batch_norm_relu_max_pool2d_sums(Tensor grad_output, Tensor offsets, Tensor input, {GEOMETRY}, {NORM}) -> Tensor",
    kernel=partial(_pool_sums_kernel, triton_kernels),
    cuda=partial(_pool_sums_kernel, cuda_kernels),
    reference=_pool_sums_reference,
    fake=lambda grad, offsets, input, *rest: empty_sums(grad, input),
    uncovered=lambda grad, offsets, input, *rest: uncovered(input),
)


def _pool_backward_kernel(
    code: ModuleType, grad: Tensor, offsets: Tensor, input: Tensor, means: Tensor | None, kernel: list[int],
    stride: list[int], padding: list[int], *norm: Any,
) -> Tensor:  # fmt: skip
    layout, grad_input = memory_format(input), like_input(input)
    code.batch_norm_pool.bn_relu_max_pool2d_bwd(
        dense(grad, layout), dense(offsets, layout), dense(input, layout), kernel_norm(*norm, code),
        None if means is None else means.contiguous(),
        grad_input, _windows(input, kernel, stride, padding, code),
    )  # fmt: skip
    return grad_input


def _pool_backward_reference(
    grad: Tensor, offsets: Tensor, input: Tensor, means: Tensor | None, kernel: list[int], stride: list[int],
    padding: list[int], *norm: Any,
) -> Tensor:  # fmt: skip
    between = _unpooled(grad, offsets, kernel, stride, padding, input)
    return input_gradient(*x_hat_and_gradient(between, input, norm), means, input, norm)


POOL_BACKWARD = Operator(
    f"batch_norm_relu_max_pool2d_backward(Tensor grad_output, Tensor offsets, Tensor input, Tensor? means, {GEOMETRY}, "
    f"{NORM}) -> Tensor",
    kernel=partial(_pool_backward_kernel, triton_kernels),
    cuda=partial(_pool_backward_kernel, cuda_kernels),
    reference=_pool_backward_reference,
    fake=lambda grad, offsets, input, *rest: like_input(input),
    uncovered=lambda grad, offsets, input, *rest: uncovered(input),
)


# --- with max-unpooling ----------------------------------------------------------------------------------------------


def _empty_unpooled(
    input: Tensor,
    offsets: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    size: list[int],
    *norm: Any,
) -> Tensor:
    return empty(input, [*input.shape[:-2], *size], memory_format(input))


def _unpool_kernel(
    input: Tensor,
    offsets: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    size: list[int],
    *norm: Any,
) -> Tensor:
    refuse_strays(offsets, kernel, stride, padding, size)
    layout = memory_format(input)
    output = _empty_unpooled(input, offsets, kernel, stride, padding, size)
    triton_kernels.batch_norm_unpool.bn_relu_max_unpool2d_fwd(
        dense(input, layout), dense(offsets, layout), kernel_norm(*norm), output,
        _windows(input, kernel, stride, padding),
    )  # fmt: skip
    return output


def _unpool_reference(
    input: Tensor,
    offsets: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    size: list[int],
    *norm: Any,
) -> Tensor:
    refuse_strays(offsets, kernel, stride, padding, size)
    indices = positions.offsets_to_indices(offsets, kernel, stride, padding, size[1]).contiguous()
    between = normalised(input, norm).contiguous()
    return placed(torch.ops.aten.max_unpool2d(between, indices, size), memory_format(input))


UNPOOL = Operator(
    f"batch_norm_relu_max_unpool2d(Tensor input, Tensor offsets, {GEOMETRY}, SymInt[2] output_size, {NORM}) -> Tensor",
    kernel=_unpool_kernel,
    reference=_unpool_reference,
    fake=_empty_unpooled,
    uncovered=lambda input, *rest: uncovered(input),
)


def _empty_gathered(grad: Tensor, offsets: Tensor, input: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return like_input(input), empty_sums(grad, input)


def _unpool_sums_kernel(
    grad: Tensor, offsets: Tensor, input: Tensor, kernel: list[int], stride: list[int], padding: list[int], *norm: Any
) -> tuple[Tensor, Tensor]:
    layout = memory_format(input)
    gathered, sums = _empty_gathered(grad, offsets, input)
    triton_kernels.batch_norm_unpool.bn_relu_max_unpool2d_sums(
        dense(grad, layout), dense(offsets, layout), dense(input, layout), kernel_norm(*norm), gathered,
        sums, _windows(input, kernel, stride, padding),
    )  # fmt: skip
    return gathered, sums


def _unpool_sums_reference(
    grad: Tensor, offsets: Tensor, input: Tensor, kernel: list[int], stride: list[int], padding: list[int], *norm: Any
) -> tuple[Tensor, Tensor]:
    indices = positions.offsets_to_indices(offsets, kernel, stride, padding, grad.shape[-1])
    between = grad.flatten(-2).gather(-1, indices.flatten(-2)).view(input.shape)
    x_hat, behind = x_hat_and_gradient(between, input, norm)
    return placed(behind.to(input.dtype), memory_format(input)), sums_of(x_hat, behind)


UNPOOL_SUMS = Operator(
    f"batch_norm_relu_max_unpool2d_sums(Tensor grad_output, Tensor offsets, Tensor input, {GEOMETRY}, {NORM}) "
    "-> (Tensor, Tensor)",
    kernel=_unpool_sums_kernel,
    reference=_unpool_sums_reference,
    fake=_empty_gathered,
    uncovered=lambda grad, offsets, input, *rest: uncovered(input),
)
