"""max_pool2d: what the operators mean, their torch reference, gradient and functions."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import torch_internals
from ...kernels import pooling as triton_kernels
from ...kernels.cuda import pooling as cuda_kernels
from ..operator import Operator, dense, empty, memory_format, placed, wants_graph
from .positions import (
    MAX_OFFSETS,
    IntOrPair,
    batch,
    indices_to_offsets,
    offsets_to_indices,
    pair,
    pooled_size,
    require_offsets,
    require_tensor,
    uncovered,
    unset,
    vmap_folds,
)

NO_POSITIONS, OFFSETS, INDICES = "none", "offsets", "indices"


def _check_pool(function: str, input: Tensor, geometry: tuple[list[int], ...], ceil_mode: bool) -> None:
    kernel, _, padding, _ = geometry
    if input.dim() not in (3, 4):
        raise RuntimeError(f"{function}: input must be (N, C, H, W) or (C, H, W), but has shape {tuple(input.shape)}")
    if any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
        raise RuntimeError(f"{function}: padding must be at most half of kernel_size {kernel}, but is {padding}")
    if any(size == 0 for size in input.shape[-3:]):
        raise RuntimeError(f"{function}: input may be empty in its batch only, but has shape {tuple(input.shape)}")
    if min(pooled_size(input.shape[-2:], *geometry, ceil_mode)) < 1:
        raise RuntimeError(
            f"{function}: input of shape {tuple(input.shape)} is smaller than a window of kernel_size {kernel}, "
            f"padding {padding}; the output would be empty"
        )


def pool_arguments(
    function: str, input: Tensor, kernel_size: IntOrPair, stride: IntOrPair | None, padding: IntOrPair,
    dilation: IntOrPair, ceil_mode: bool,
) -> tuple[list[int], list[int], list[int], list[int]]:  # fmt: skip
    require_tensor(function, "input", input)
    geometry = (
        pair(kernel_size, function, "kernel_size", 1),
        pair(kernel_size if unset(stride) else stride, function, "stride", 1),
        pair(padding, function, "padding", 0),
        pair(dilation, function, "dilation", 1),
    )
    _check_pool(function, input, geometry, ceil_mode)
    return geometry


def _empty_pooled(
    input: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool,
    positions: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    layout = memory_format(input)
    shape = [*input.shape[:-2], *pooled_size(input.shape[-2:], kernel, stride, padding, dilation, ceil_mode)]
    output = empty(input, shape, layout)
    if positions == NO_POSITIONS:
        return output, input.new_empty(0, dtype=torch.uint8)
    return output, empty(input, shape, layout, torch.uint8 if positions == OFFSETS else torch.int64)


def _max_pool2d_kernel(
    code: ModuleType, input: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int],
    ceil_mode: bool, positions: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    output, kept = _empty_pooled(input, kernel, stride, padding, dilation, ceil_mode, positions)
    layout = memory_format(input)
    windows = code.tiling.Windows(kernel, stride, padding, layout == torch.channels_last, dilation)
    code.pool.max_pool2d_fwd(
        batch(dense(input, layout)), batch(output), None if positions == NO_POSITIONS else batch(kept), windows
    )
    return output, kept


def _max_pool2d_reference(
    input: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool,
    positions: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    layout = memory_format(input)
    output, kept = F.max_pool2d(input, kernel, stride, padding, dilation, ceil_mode, return_indices=True)
    if positions == NO_POSITIONS:
        return placed(output, layout), input.new_empty(0, dtype=torch.uint8)
    if positions == OFFSETS:
        kept = indices_to_offsets(kept, kernel, stride, padding, input.shape[-1], dilation)
    return placed(output, layout), placed(kept, layout)


MAX_POOL2D = Operator(
    "max_pool2d(Tensor input, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode, "
    "str positions) -> (Tensor, Tensor)",
    kernel=partial(_max_pool2d_kernel, triton_kernels),
    cuda=partial(_max_pool2d_kernel, cuda_kernels),
    reference=_max_pool2d_reference,
    fake=_empty_pooled,
    uncovered=lambda input, *arguments: uncovered(input),
)
vmap_folds(MAX_POOL2D)


def _empty_pool_gradient(
    grad: Tensor, kept: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int],
    size: list[int],
) -> Tensor:  # fmt: skip
    return empty(grad, [*grad.shape[:-2], *size], memory_format(kept))


def _max_pool2d_backward_kernel(
    code: ModuleType, grad: Tensor, kept: Tensor, kernel: list[int], stride: list[int], padding: list[int],
    dilation: list[int], size: list[int],
) -> Tensor:  # fmt: skip
    layout = memory_format(kept)
    grad_input = _empty_pool_gradient(grad, kept, kernel, stride, padding, dilation, size)
    windows = code.tiling.Windows(kernel, stride, padding, layout == torch.channels_last, dilation)
    code.pool.max_pool2d_bwd(batch(dense(grad, layout)), batch(dense(kept, layout)), batch(grad_input), windows)
    return grad_input


def _scattered(
    grad: Tensor, kept: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int],
    size: list[int],
) -> Tensor:  # fmt: skip
    """The gradient in torch's differentiable functions; where windows overlap it sums, in float32 for halves."""
    indices = kept
    if kept.dtype == torch.uint8:
        indices = offsets_to_indices(kept, kernel, stride, padding, size[1], dilation)
    wide = grad if grad.dtype == torch.float64 else grad.float()
    empty_plane = wide.new_zeros(*grad.shape[:-2], size[0] * size[1])
    sums = empty_plane.scatter_add(-1, indices.flatten(-2), wide.flatten(-2))
    return sums.unflatten(-1, size).to(grad.dtype)


def _max_pool2d_backward_reference(
    grad: Tensor, kept: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int],
    size: list[int],
) -> Tensor:  # fmt: skip
    return placed(_scattered(grad, kept, kernel, stride, padding, dilation, size), memory_format(kept))


MAX_POOL2D_BACKWARD = Operator(
    "max_pool2d_backward(Tensor grad_output, Tensor positions, int[2] kernel_size, int[2] stride, int[2] padding, "
    "int[2] dilation, SymInt[2] input_size) -> Tensor",
    kernel=partial(_max_pool2d_backward_kernel, triton_kernels),
    cuda=partial(_max_pool2d_backward_kernel, cuda_kernels),
    reference=_max_pool2d_backward_reference,
    fake=_empty_pool_gradient,
    uncovered=lambda grad, *arguments: uncovered(grad),
)
vmap_folds(MAX_POOL2D_BACKWARD)


class MaxPool2dFunction(torch.autograd.Function):
    """(input, geometry, ceil_mode, positions) -> (output, positions); the gradient goes where the maxima stood."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool,
        positions: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return MAX_POOL2D(input, kernel, stride, padding, dilation, ceil_mode, positions)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, *geometry, _, _ = inputs
        ctx.arguments = (*geometry, list(input.shape[-2:]))
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        run = _scattered if wants_graph() else MAX_POOL2D_BACKWARD
        return run(grad, *ctx.saved_tensors, *ctx.arguments), *(None,) * 6


def _kept(input: Tensor, kernel: list[int]) -> str:
    """What a pool whose positions nobody asked for keeps for its backward."""
    # Under torch.func a tensor that is differentiated further out does not say so.
    if not (torch.is_grad_enabled() and (input.requires_grad or torch_internals.functorch_transforms_active())):
        return NO_POSITIONS
    return OFFSETS if kernel[0] * kernel[1] <= MAX_OFFSETS else INDICES


def max_pool2d(
    input: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """torch.nn.functional.max_pool2d, with a backward that neither zero-fills nor uses atomics.

    input: (N, C, H, W) or (C, H, W), any float dtype; the output keeps dtype and memory format. Ties go to the
    first maximum in row-major order, NaN wins, as in torch. Returns the pooled map, and with return_indices also
    int64 indices (h * W + w in the plane). Without them, training keeps one byte per pooled element (eight for
    windows of more than 256 elements). Deterministic: where windows overlap each element of the gradient adds up what
    its windows give in row-major order, in float32 (float64 for float64). Raises RuntimeError for arguments that torch
    refuses, NotImplementedError for forward-mode derivatives where the kernels are demanded.
    """
    arguments = pool_arguments("max_pool2d", input, kernel_size, stride, padding, dilation, ceil_mode)
    positions = INDICES if return_indices else _kept(input, arguments[0])
    if MAX_POOL2D.choose(input, *arguments, ceil_mode, positions).backend == "torch":
        return F.max_pool2d(input, *arguments, ceil_mode=ceil_mode, return_indices=return_indices)
    output, indices = MaxPool2dFunction.apply(input, *arguments, ceil_mode, positions)
    return (output, indices) if return_indices else output


def max_pool2d_with_offsets(
    input: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """max_pool2d that returns (output, offsets): uint8 positions in the window, an eighth of torch's indices.

    offsets: shape of the output, tap i * kernel_width + j of the maximum, for windows of up to 256 elements
    (RuntimeError beyond), counted without the gaps of a dilation. max_unpool2d_with_offsets takes them (of dilation 1),
    offsets_to_indices converts them; everything else is as in max_pool2d. On a CPU torch's own pool runs, and keeps its
    indices for the backward.
    """
    arguments = pool_arguments("max_pool2d_with_offsets", input, kernel_size, stride, padding, dilation, ceil_mode)
    require_offsets("max_pool2d_with_offsets", arguments[0])
    backend = MAX_POOL2D.choose(input, *arguments, ceil_mode, OFFSETS).backend
    # A graph that is traced holds the operator: it may run elsewhere.
    if backend == "torch" and input.device.type == "cpu" and not torch.compiler.is_compiling():
        output, indices = F.max_pool2d(input, *arguments, ceil_mode=ceil_mode, return_indices=True)
        kernel, *geometry, dilation = arguments
        return output, indices_to_offsets(indices, kernel, *geometry, input.shape[-1], dilation)
    return MaxPool2dFunction.apply(input, *arguments, ceil_mode, OFFSETS)
