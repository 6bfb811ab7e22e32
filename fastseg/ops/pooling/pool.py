"""max_pool2d: its operators, torch reference, gradient and functions."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import torch_internals
from ...kernels import pooling as triton_kernels
from ...kernels.cpu import pooling as cpu_kernels
from ...kernels.cuda import pooling as cuda_kernels
from ..arguments import IntOrPair, accumulator, require_tensor
from ..operator import (
    Operator,
    dense,
    empty,
    few_elements,
    for_backends,
    known_signature,
    memory_format,
    placed,
    wants_graph,
)
from .geometry import (
    PoolGeometry,
    as_batch,
    map_over_batch,
    pool_geometry,
    pooled_size,
    unsupported_dtype,
)
from .positions import MAX_OFFSETS, require_offsets, to_indices, to_offsets

FEW_ELEMENTS = {torch.contiguous_format: 2**16, torch.channels_last: 2**20}  # on a CPU: see few_elements
NO_POSITIONS, OFFSETS, INDICES = "none", "offsets", "indices"


def checked_geometry(function: str, input: Tensor, geometry: PoolGeometry, ceil_mode: bool) -> PoolGeometry:
    """`geometry`, which must fit the input. Raises TypeError or RuntimeError as torch does."""
    require_tensor(function, "input", input)
    kernel, padding = geometry.kernel_size, geometry.padding
    if input.dim() not in (3, 4):
        raise RuntimeError(f"{function}: input must be (N, C, H, W) or (C, H, W), but has shape {tuple(input.shape)}")
    if any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
        raise RuntimeError(f"{function}: padding must be at most half of kernel_size {kernel}, but is {padding}")
    if any(size == 0 for size in input.shape[-3:]):
        raise RuntimeError(f"{function}: input may be empty in its batch only, but has shape {tuple(input.shape)}")
    if min(pooled_size(input.shape[-2:], geometry, ceil_mode)) < 1:
        raise RuntimeError(
            f"{function}: input of shape {tuple(input.shape)} is smaller than a window of kernel_size {kernel}, "
            f"padding {padding}; the output would be empty"
        )
    return geometry


# --- forward ---------------------------------------------------------------------------------------------------------


def _empty_pooled(input: Tensor, geometry: PoolGeometry, ceil_mode: bool, positions: str) -> tuple[Tensor, Tensor]:
    layout = memory_format(input)
    shape = [*input.shape[:-2], *pooled_size(input.shape[-2:], geometry, ceil_mode)]
    output = empty(input, shape, layout)
    if positions == NO_POSITIONS:
        return output, input.new_empty(0, dtype=torch.uint8)
    return output, empty(input, shape, layout, torch.uint8 if positions == OFFSETS else torch.int64)


def _max_pool2d_kernel(
    kernels: ModuleType, input: Tensor, geometry: PoolGeometry, ceil_mode: bool, positions: str
) -> tuple[Tensor, Tensor]:
    output, found = _empty_pooled(input, geometry, ceil_mode, positions)
    layout = memory_format(input)
    kernels.pool.max_pool2d_fwd(
        as_batch(dense(input, layout)),
        as_batch(output),
        None if positions == NO_POSITIONS else as_batch(found),
        geometry,
        layout == torch.channels_last,
    )
    return output, found


def _max_pool2d_reference(
    input: Tensor, geometry: PoolGeometry, ceil_mode: bool, positions: str
) -> tuple[Tensor, Tensor]:
    layout = memory_format(input)
    output, found = F.max_pool2d(input, *geometry, ceil_mode, return_indices=True)
    if positions == NO_POSITIONS:
        return placed(output, layout), input.new_empty(0, dtype=torch.uint8)
    if positions == OFFSETS:
        found = to_offsets(found, geometry, input.shape[-1])
    return placed(output, layout), placed(found, layout)


def _unsupported(input: Tensor, *rest: Any) -> str | None:
    return unsupported_dtype(input)


MAX_POOL2D = Operator(
    "max_pool2d(Tensor input, PoolGeometry geometry, bool ceil_mode, str positions) -> (Tensor, Tensor)",
    kernels=for_backends(_max_pool2d_kernel, _unsupported, triton=triton_kernels, cuda=cuda_kernels, cpu=cpu_kernels),
    reference=_max_pool2d_reference,
    fake=_empty_pooled,
)
map_over_batch(MAX_POOL2D)


# --- backward --------------------------------------------------------------------------------------------------------


def _empty_gradient(grad: Tensor, positions: Tensor, geometry: PoolGeometry, size: list[int]) -> Tensor:
    return empty(grad, [*grad.shape[:-2], *size], memory_format(positions))


def _max_pool2d_backward_kernel(
    kernels: ModuleType, grad: Tensor, positions: Tensor, geometry: PoolGeometry, size: list[int]
) -> Tensor:
    layout = memory_format(positions)
    grad_input = _empty_gradient(grad, positions, geometry, size)
    kernels.pool.max_pool2d_bwd(
        as_batch(dense(grad, layout)),
        as_batch(dense(positions, layout)),
        as_batch(grad_input),
        geometry,
        layout == torch.channels_last,
    )
    return grad_input


def _scatter(grad: Tensor, positions: Tensor, geometry: PoolGeometry, size: list[int]) -> Tensor:
    """The gradient in torch's differentiable functions. Overlapping windows are summed in float32 or float64."""
    indices = to_indices(positions, geometry, size[1]) if positions.dtype == torch.uint8 else positions
    wide = grad.to(accumulator(grad.dtype))
    planes = wide.new_zeros(*grad.shape[:-2], size[0] * size[1])
    sums = planes.scatter_add(-1, indices.flatten(-2), wide.flatten(-2))
    return sums.unflatten(-1, size).to(grad.dtype)


def _max_pool2d_backward_reference(grad: Tensor, positions: Tensor, geometry: PoolGeometry, size: list[int]) -> Tensor:
    return placed(_scatter(grad, positions, geometry, size), memory_format(positions))


MAX_POOL2D_BACKWARD = Operator(
    "max_pool2d_backward(Tensor grad_output, Tensor positions, PoolGeometry geometry, SymInt[2] input_size) -> Tensor",
    kernels=for_backends(
        _max_pool2d_backward_kernel, _unsupported, triton=triton_kernels, cuda=cuda_kernels, cpu=cpu_kernels
    ),
    reference=_max_pool2d_backward_reference,
    fake=_empty_gradient,
    gradient=True,
)
map_over_batch(MAX_POOL2D_BACKWARD)


class MaxPool2dFunction(torch.autograd.Function):
    """(input, geometry, ceil_mode, positions) -> (output, positions). The gradient goes to the maxima."""

    generate_vmap_rule = True

    @staticmethod
    @known_signature
    def forward(input: Tensor, geometry: PoolGeometry, ceil_mode: bool, positions: str) -> tuple[Tensor, Tensor]:
        return MAX_POOL2D(input, geometry, ceil_mode, positions)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, ctx.geometry, _, _ = inputs
        ctx.size = list(input.shape[-2:])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        (positions,) = ctx.saved_tensors
        run = _scatter if wants_graph() else MAX_POOL2D_BACKWARD
        return run(grad, positions, ctx.geometry, ctx.size), None, None, None


# --- functions -------------------------------------------------------------------------------------------------------


def _positions_to_save(input: Tensor, geometry: PoolGeometry) -> str:
    """What to save for the backward when indices are not returned."""
    # Inside torch.func transforms requires_grad does not tell whether an outer transform differentiates.
    differentiated = input.requires_grad or torch_internals.functorch_transforms_active()
    if not (torch.is_grad_enabled() and differentiated):
        return NO_POSITIONS
    return OFFSETS if geometry.taps <= MAX_OFFSETS else INDICES


def max_pool2d(
    input: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Max-pooling as torch.nn.functional.max_pool2d, with a gradient that needs no zero-fill and no atomics.

    Ties go to the first maximum in row-major order and NaN wins, as in torch. Without `return_indices` training keeps
    one byte per pooled element for the backward (eight for windows of more than 256 elements).

    Args:
        input: of any floating-point dtype.
        kernel_size, stride, padding, dilation: an int or two ints (height, width). `stride` defaults to `kernel_size`.
        ceil_mode: round the output size up.
        return_indices: also return where each maximum was.

    Shape:
        - input: (N, C, H, W) or (C, H, W).
        - output: the pooled map, in the dtype and memory format of the input.

    Returns:
        The pooled map; with `return_indices` also int64 indices h * W + w into the input's planes.

    Raises:
        TypeError, RuntimeError: for arguments that torch refuses.
        NotImplementedError: if the kernels are requested for a dtype or a forward-mode derivative they do not support.

    Note:
        Deterministic. If windows overlap, each element of the gradient sums what its windows contribute in row-major
        order, in float32 (float64 for float64).

    Example:
        >>> import torch, fastseg.functional as FS
        >>> FS.max_pool2d(torch.arange(16.0).view(1, 1, 4, 4), 2)
        tensor([[[[ 5.,  7.],
                  [13., 15.]]]])

    Source:
        torch.nn.functional.max_pool2d.
    """
    geometry = pool_geometry("max_pool2d", kernel_size, stride, padding, dilation)
    checked_geometry("max_pool2d", input, geometry, ceil_mode)
    positions = INDICES if return_indices else _positions_to_save(input, geometry)
    choice = MAX_POOL2D.choose(input, geometry, ceil_mode, positions, preferred=few_elements(input, FEW_ELEMENTS))
    if choice.backend == "torch":
        return F.max_pool2d(input, *geometry, ceil_mode=ceil_mode, return_indices=return_indices)
    output, indices = torch_internals.apply(MaxPool2dFunction, input, geometry, ceil_mode, positions)
    return (output, indices) if return_indices else output


def max_pool2d_with_offsets(
    input: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """Max-pooling that returns uint8 offsets inside the windows, an eighth of the memory of torch's indices.

    Args:
        input, kernel_size, stride, padding, dilation, ceil_mode: as in max_pool2d.

    Returns:
        (output, offsets). `offsets` has the output's shape and memory format: i * kernel_width + j for the window's
        row i and column j (a dilation's gaps are not counted). max_unpool2d_with_offsets takes the offsets of a pool
        without dilation; offsets_to_indices converts them to torch's indices.

    Raises:
        TypeError, RuntimeError: as max_pool2d, and for windows of more than 256 elements.

    Note:
        On a CPU without kernels torch's own pool runs, and keeps its int64 indices for the backward.

    Example:
        >>> import torch, fastseg.functional as FS
        >>> output, offsets = FS.max_pool2d_with_offsets(torch.arange(16.0).view(1, 1, 4, 4), 2)
        >>> offsets
        tensor([[[[3, 3],
                  [3, 3]]]], dtype=torch.uint8)
    """
    name = "max_pool2d_with_offsets"
    geometry = pool_geometry(name, kernel_size, stride, padding, dilation)
    checked_geometry(name, input, geometry, ceil_mode)
    require_offsets(name, geometry)
    backend = MAX_POOL2D.choose(input, geometry, ceil_mode, OFFSETS).backend
    # A traced graph holds the operator itself, because it may run on another device.
    if backend == "torch" and input.device.type == "cpu" and not torch.compiler.is_compiling():
        output, indices = F.max_pool2d(input, *geometry, ceil_mode=ceil_mode, return_indices=True)
        return output, to_offsets(indices, geometry, input.shape[-1])
    return torch_internals.apply(MaxPool2dFunction, input, geometry, ceil_mode, OFFSETS)
