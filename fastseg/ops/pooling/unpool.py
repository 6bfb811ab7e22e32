"""max_unpool2d: what the operators mean, their torch reference, gradients and functions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import pooling as triton_kernels
from ...kernels.cuda import pooling as cuda_kernels
from ..operator import Operator, dense, empty, memory_format, placed, wants_graph
from .positions import (
    IntOrPair,
    batch,
    offsets_to_indices,
    pair,
    require_offsets,
    require_tensor,
    uncovered,
    unset,
    vmap_folds,
)

TORCH_UNPOOLS = (torch.float32, torch.float64)  # dtypes of its own operator on every device


def check_unpool(function: str, input: Tensor, positions: Tensor, name: str, dtype: torch.dtype) -> None:
    require_tensor(function, "input", input)
    require_tensor(function, name, positions)
    if input.dim() not in (3, 4):
        raise RuntimeError(f"{function}: input must be (N, C, H, W) or (C, H, W), but has shape {tuple(input.shape)}")
    if positions.dtype != dtype:
        raise RuntimeError(f"{function}: {name} must be of dtype {dtype}, but is of {positions.dtype}")
    if positions.shape != input.shape:
        raise RuntimeError(
            f"{function}: {name} must have input's shape {tuple(input.shape)}, but has {tuple(positions.shape)}"
        )
    if positions.device != input.device:
        raise RuntimeError(f"{function}: {name} must be on input's device {input.device}, but is on {positions.device}")
    if any(size == 0 for size in input.shape[1 if input.dim() == 4 else 0 :]):
        raise RuntimeError(f"{function}: input may be empty in its batch only, but has shape {tuple(input.shape)}")


def unpooled_size(
    function: str, size: Sequence[int], kernel: list[int], stride: list[int], padding: list[int],
    output_size: Sequence[int] | None,
) -> list[int]:  # fmt: skip
    """Height and width to unpool to: output_size's last two entries, or the smallest image that pools to `size`.

    Raises ValueError, as torch does, for an output_size that no pool of this geometry could have come from.
    """
    default = [(o - 1) * s - 2 * p + k for o, s, p, k in zip(size, stride, padding, kernel, strict=True)]
    if output_size is None:
        return default
    if len(output_size) not in (2, 3, 4):
        raise ValueError(f"{function}: output_size must have 2 to 4 entries, but is {tuple(output_size)}")
    wanted = list(output_size[-2:])
    for length, middle, s in zip(wanted, default, stride, strict=True):
        if not middle - s < length < middle + s:
            raise ValueError(
                f"{function}: output_size {tuple(wanted)} must differ from {tuple(default)} by less than "
                f"stride {tuple(stride)} in each dimension"
            )
    return wanted


def _indices(positions: Tensor, kernel: list[int], stride: list[int], padding: list[int], width: int) -> Tensor:
    if positions.dtype == torch.uint8:
        return offsets_to_indices(positions, kernel, stride, padding, width)
    return positions


def _over_an_edge(offsets: Tensor, kernel: list[int], stride: list[int], padding: list[int], size: list[int]) -> bool:
    """Whether an offset names a place outside of the plane, where only windows that reach over its edges may."""
    for side, divide in enumerate((Tensor.floor_divide, Tensor.remainder)):
        starts = torch.arange(offsets.shape[side - 2]) * stride[side] - padding[side]
        reaching = ((starts < 0) | (starts + kernel[side] > size[side])).nonzero().flatten()
        taps = offsets.index_select(side - 2, reaching).long()
        places = divide(taps, kernel[1]) + starts[reaching].view((-1, 1) if side == 0 else (-1,))
        if bool(((places < 0) | (places >= size[side])).any()):
            return True
    return False


def refuse_strays(positions: Tensor, kernel: list[int], stride: list[int], padding: list[int], size: list[int]) -> None:
    """RuntimeError for a position outside the plane or its window. On a GPU a device-side assertion says it."""
    if positions.device.type != "cpu" or positions.numel() == 0:
        return
    if positions.dtype == torch.uint8:
        inside = int(positions.amax()) < kernel[0] * kernel[1]
        inside = inside and not _over_an_edge(positions, kernel, stride, padding, size)
    else:
        least, most = positions.aminmax()
        inside = 0 <= int(least) <= int(most) < size[0] * size[1]
    if inside:
        return
    indices = _indices(positions, kernel, stride, padding, size[1])
    stray = (indices < 0) | (indices >= size[0] * size[1])
    if positions.dtype == torch.uint8:
        # Behind the right edge a tap's index would belong to the next row.
        columns = torch.arange(positions.shape[-1]) * stride[1] - padding[1] + positions.long() % kernel[1]
        stray |= (columns < 0) | (columns >= size[1]) | (positions >= kernel[0] * kernel[1])
    if stray.any():
        where = tuple(stray.nonzero()[0].tolist())
        function, name = ("max_unpool2d", "index") if indices is positions else ("max_unpool2d_with_offsets", "offset")
        raise RuntimeError(
            f"{function}: found an invalid max {name}: {positions[where].item()} at {where} "
            f"(output volumes are of size {size[0]}x{size[1]}, windows of {kernel[0]}x{kernel[1]})"
        )


# --- operators -------------------------------------------------------------------------------------------------------


def _empty_unpooled(
    input: Tensor, positions: Tensor, kernel: list[int], stride: list[int], padding: list[int], size: list[int]
) -> Tensor:
    return empty(input, [*input.shape[:-2], *size], memory_format(input))


def _max_unpool2d_kernel(
    code: ModuleType, input: Tensor, positions: Tensor, kernel: list[int], stride: list[int], padding: list[int],
    size: list[int],
) -> Tensor:  # fmt: skip
    refuse_strays(positions, kernel, stride, padding, size)
    layout = memory_format(input)
    output = _empty_unpooled(input, positions, kernel, stride, padding, size)
    windows = code.tiling.Windows(kernel, stride, padding, layout == torch.channels_last)
    code.unpool.max_unpool2d_fwd(
        batch(dense(input, layout)), batch(dense(positions, layout)), batch(output), windows, trusted=False
    )
    return output


def _max_unpool2d_reference(
    input: Tensor, positions: Tensor, kernel: list[int], stride: list[int], padding: list[int], size: list[int]
) -> Tensor:
    refuse_strays(positions, kernel, stride, padding, size)
    indices = _indices(positions, kernel, stride, padding, size[1])
    apart = all(k <= s for k, s in zip(kernel, stride, strict=True)) and positions.dtype == torch.uint8
    if apart and input.dtype in TORCH_UNPOOLS and not torch.are_deterministic_algorithms_enabled():
        layout = memory_format(input)
        return placed(torch.ops.aten.max_unpool2d(dense(input, layout), dense(indices, layout), size), layout)
    indices = indices.flatten(-2)
    zeros = input.new_zeros(*input.shape[:-2], size[0] * size[1])
    if input.device.type == "cpu":
        output = zeros.scatter_(-1, indices, input.flatten(-2))  # a CPU goes through each plane in order
    else:  # the last element that names a place, by a maximum, which no order changes
        order = torch.arange(indices.shape[-1], device=input.device).expand_as(indices)
        last = indices.new_full(zeros.shape, -1).scatter_reduce_(-1, indices, order, "amax")
        output = torch.where(last < 0, zeros, input.flatten(-2).gather(-1, last.clamp_min(0)))
    return placed(output.unflatten(-1, size), memory_format(input))


MAX_UNPOOL2D = Operator(
    "max_unpool2d(Tensor input, Tensor positions, int[2] kernel_size, int[2] stride, int[2] padding, "
    "SymInt[2] output_size) -> Tensor",
    kernel=partial(_max_unpool2d_kernel, triton_kernels),
    cuda=partial(_max_unpool2d_kernel, cuda_kernels),
    reference=_max_unpool2d_reference,
    fake=_empty_unpooled,
    uncovered=lambda input, *arguments: uncovered(input),
)
vmap_folds(MAX_UNPOOL2D)


def _empty_unpool_gradient(
    grad: Tensor, positions: Tensor, kernel: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    return empty(grad, positions.shape, memory_format(positions))


def _max_unpool2d_backward_kernel(
    code: ModuleType, grad: Tensor, positions: Tensor, kernel: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    layout = memory_format(positions)
    grad_input = _empty_unpool_gradient(grad, positions, kernel, stride, padding)
    windows = code.tiling.Windows(kernel, stride, padding, layout == torch.channels_last)
    code.unpool.max_unpool2d_bwd(
        batch(dense(grad, layout)), batch(dense(positions, layout)), batch(grad_input), windows
    )
    return grad_input


def _gathered(grad: Tensor, positions: Tensor, kernel: list[int], stride: list[int], padding: list[int]) -> Tensor:
    """The gradient in torch's differentiable functions."""
    indices = _indices(positions, kernel, stride, padding, grad.shape[-1])
    return grad.flatten(-2).gather(-1, indices.flatten(-2)).view(positions.shape)


def _max_unpool2d_backward_reference(
    grad: Tensor, positions: Tensor, kernel: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    return placed(_gathered(grad, positions, kernel, stride, padding), memory_format(positions))


MAX_UNPOOL2D_BACKWARD = Operator(
    "max_unpool2d_backward(Tensor grad_output, Tensor positions, int[2] kernel_size, int[2] stride, int[2] padding) "
    "-> Tensor",
    kernel=partial(_max_unpool2d_backward_kernel, triton_kernels),
    cuda=partial(_max_unpool2d_backward_kernel, cuda_kernels),
    reference=_max_unpool2d_backward_reference,
    fake=_empty_unpool_gradient,
    uncovered=lambda grad, *arguments: uncovered(grad),
)
vmap_folds(MAX_UNPOOL2D_BACKWARD)


# --- functions -------------------------------------------------------------------------------------------------------


class MaxUnpool2dFunction(torch.autograd.Function):
    """(input, positions, geometry, output_size) -> output; the gradient gathers at the positions."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor, positions: Tensor, kernel: list[int], stride: list[int], padding: list[int], size: list[int]
    ) -> Tensor:
        return MAX_UNPOOL2D(input, positions, kernel, stride, padding, size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, positions, *ctx.geometry, _ = inputs
        ctx.save_for_backward(positions)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        run = _gathered if wants_graph() else MAX_UNPOOL2D_BACKWARD
        return run(grad, *ctx.saved_tensors, *ctx.geometry), *(None,) * 5


def max_unpool2d(
    input: Tensor,
    indices: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """torch.nn.functional.max_unpool2d: deterministic, layout kept, each output element written once.

    input: (N, C, H, W) or (C, H, W), any float dtype; indices: int64, input's shape, from max_pool2d with
    return_indices, whatever its windows, or any others inside the plane. output_size: 2 to 4 entries, the last two are
    used; default (size - 1) * stride - 2 * padding + kernel_size. Where indices repeat, the last in row-major order
    stays and, as in torch, each receives the gradient. Indices inside their own windows are gathered; if there is one
    elsewhere, a second kernel writes each plane in order, which is slow. Works under
    torch.use_deterministic_algorithms(True), on every backend.

    Raises RuntimeError for indices of another shape or dtype and, on a CPU, for an index outside the plane (on a GPU a
    device-side assertion), ValueError for an impossible output_size.
    """
    name = "max_unpool2d"
    check_unpool(name, input, indices, "indices", torch.int64)
    arguments = unpool_arguments(name, input, kernel_size, stride, padding, output_size)
    backend = MAX_UNPOOL2D.choose(input, indices, *arguments).backend
    if backend == "torch" and not torch.are_deterministic_algorithms_enabled():  # which torch's own refuses
        *geometry, size = arguments
        try:
            return F.max_unpool2d(input, indices, *geometry, output_size=size)
        except RuntimeError:
            refuse_strays(indices, *arguments)  # torch's own message does not say where
            raise
    return MaxUnpool2dFunction.apply(input, indices, *arguments)


def max_unpool2d_with_offsets(
    input: Tensor,
    offsets: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """max_unpool2d from the uint8 offsets of max_pool2d_with_offsets (dilation 1), to exactly output_size.

    Every other argument and error is max_unpool2d's; where windows overlap on one maximum, the last of them in
    row-major order gives the value. Offsets of a dilated pool are for max_unpool2d, after offsets_to_indices. An
    offset that points outside its window or the plane is an invalid position: RuntimeError on a CPU, a device-side
    assertion on a GPU.
    """
    name = "max_unpool2d_with_offsets"
    check_unpool(name, input, offsets, "offsets", torch.uint8)
    arguments = unpool_arguments(name, input, kernel_size, stride, padding, output_size)
    require_offsets(name, arguments[0])
    MAX_UNPOOL2D.choose(input, offsets, *arguments)  # for explain: the operator itself asks when it runs
    return MaxUnpool2dFunction.apply(input, offsets, *arguments)


def unpool_arguments(
    function: str, input: Tensor, kernel_size: IntOrPair, stride: IntOrPair | None, padding: IntOrPair,
    output_size: Sequence[int] | None,
) -> tuple[list[int], list[int], list[int], list[int]]:  # fmt: skip
    kernel = pair(kernel_size, function, "kernel_size", 1)
    stride_ = kernel if unset(stride) else pair(stride, function, "stride", 1)
    padding_ = pair(padding, function, "padding", 0)
    size = unpooled_size(function, input.shape[-2:], kernel, stride_, padding_, output_size)
    if min(size) < 1:
        raise RuntimeError(f"{function}: output_size must be positive, but is {tuple(size)}")
    return kernel, stride_, padding_, size
