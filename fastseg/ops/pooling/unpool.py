"""max_unpool2d: its operators, torch reference, gradient and functions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import torch_internals
from ...kernels import pooling as triton_kernels
from ...kernels.cpu import pooling as cpu_kernels
from ...kernels.cuda import pooling as cuda_kernels
from ..arguments import IntOrPair, require_tensor
from ..operator import (
    Implementation,
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
    unsupported_dtype,
)
from .positions import require_offsets, to_indices

FEW_ELEMENTS = {torch.contiguous_format: 2**18, torch.channels_last: 2**18}  # on a CPU: see few_elements
TORCH_UNPOOLS = (torch.float32, torch.float64)  # the dtypes that torch's own operator supports on every device


def check_unpool(function: str, input: Tensor, positions: Tensor, name: str, dtype: torch.dtype) -> None:
    """Raise TypeError or RuntimeError unless `positions`, the argument called `name`, fits the input."""
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
    function: str, size: Sequence[int], geometry: PoolGeometry, output_size: Sequence[int] | None
) -> list[int]:
    """Height and width to unpool to: output_size's last two entries, or the smallest image that pools to `size`.

    Raises:
        ValueError: as torch does, for an output_size that no pool of this geometry could have had as its input.
        RuntimeError: for a size that is not positive.
    """
    kernel, stride, padding, _ = geometry
    default = [(o - 1) * s - 2 * p + k for o, s, p, k in zip(size, stride, padding, kernel, strict=True)]
    wanted = default if output_size is None else list(output_size[-2:])
    if output_size is not None:
        if len(output_size) not in (2, 3, 4):
            raise ValueError(f"{function}: output_size must have 2 to 4 entries, but is {tuple(output_size)}")
        for length, middle, s in zip(wanted, default, stride, strict=True):
            if not middle - s < length < middle + s:
                raise ValueError(
                    f"{function}: output_size {tuple(wanted)} must differ from {tuple(default)} by less than "
                    f"stride {tuple(stride)} in each dimension"
                )
    if min(wanted) < 1:
        raise RuntimeError(f"{function}: output_size must be positive, but is {tuple(wanted)}")
    return wanted


def _as_indices(positions: Tensor, geometry: PoolGeometry, width: int) -> Tensor:
    return to_indices(positions, geometry, width) if positions.dtype == torch.uint8 else positions


def _offset_leaves_plane(offsets: Tensor, geometry: PoolGeometry, size: list[int]) -> bool:
    """Whether an offset points outside the plane. Only windows that cross its edges are looked at."""
    kernel, stride, padding, _ = geometry
    for side, divide in enumerate((Tensor.floor_divide, Tensor.remainder)):
        starts = torch.arange(offsets.shape[side - 2]) * stride[side] - padding[side]
        crossing = ((starts < 0) | (starts + kernel[side] > size[side])).nonzero().flatten()
        taps = offsets.index_select(side - 2, crossing).long()
        places = divide(taps, kernel[1]) + starts[crossing].view((-1, 1) if side == 0 else (-1,))
        if bool(((places < 0) | (places >= size[side])).any()):
            return True
    return False


def require_positions_inside(positions: Tensor, geometry: PoolGeometry, size: list[int]) -> None:
    """Raise RuntimeError for an index outside the plane, or an offset outside its window or the plane.

    CPU only: on a GPU a device-side assertion reports it, because checking here would force a host sync.
    """
    if positions.device.type != "cpu" or positions.numel() == 0:
        return
    kernel, stride, padding, _ = geometry
    # 1. A quick look, which is all that valid positions cost
    if positions.dtype == torch.uint8:
        inside = int(positions.amax()) < geometry.taps and not _offset_leaves_plane(positions, geometry, size)
    else:
        least, most = positions.aminmax()
        inside = 0 <= int(least) <= int(most) < size[0] * size[1]
    if inside:
        return
    # 2. Find the first invalid one for the message
    indices = _as_indices(positions, geometry, size[1])
    invalid = (indices < 0) | (indices >= size[0] * size[1])
    if positions.dtype == torch.uint8:
        # To the right of the plane, the index of a window element would belong to the next row.
        columns = torch.arange(positions.shape[-1]) * stride[1] - padding[1] + positions.long() % kernel[1]
        invalid |= (columns < 0) | (columns >= size[1]) | (positions >= geometry.taps)
    if invalid.any():
        where = tuple(invalid.nonzero()[0].tolist())
        function, name = ("max_unpool2d", "index") if indices is positions else ("max_unpool2d_with_offsets", "offset")
        raise RuntimeError(
            f"{function}: found an invalid max {name}: {positions[where].item()} at {where} "
            f"(output volumes are of size {size[0]}x{size[1]}, windows of {kernel[0]}x{kernel[1]})"
        )


def _unsupported(input: Tensor, positions: Tensor, geometry: PoolGeometry, *rest: Any) -> str | None:
    return "dilation" if tuple(geometry.dilation) != (1, 1) else unsupported_dtype(input)


# --- forward ---------------------------------------------------------------------------------------------------------


def _empty_unpooled(input: Tensor, positions: Tensor, geometry: PoolGeometry, size: list[int]) -> Tensor:
    return empty(input, [*input.shape[:-2], *size], memory_format(input))


def _max_unpool2d_kernel(
    kernels: ModuleType, input: Tensor, positions: Tensor, geometry: PoolGeometry, size: list[int]
) -> Tensor:
    if kernels is not cpu_kernels:  # which check the positions themselves
        require_positions_inside(positions, geometry, size)
    layout = memory_format(input)
    output = _empty_unpooled(input, positions, geometry, size)
    kernels.unpool.max_unpool2d_fwd(
        as_batch(dense(input, layout)),
        as_batch(dense(positions, layout)),
        as_batch(output),
        geometry,
        layout == torch.channels_last,
        trusted=False,
    )
    return output


def _max_unpool2d_on_cpu(input: Tensor, positions: Tensor, geometry: PoolGeometry, size: list[int]) -> Tensor:
    try:
        return _max_unpool2d_kernel(cpu_kernels, input, positions, geometry, size)
    except RuntimeError:
        require_positions_inside(positions, geometry, size)  # its message says where
        raise


def _max_unpool2d_reference(input: Tensor, positions: Tensor, geometry: PoolGeometry, size: list[int]) -> Tensor:
    require_positions_inside(positions, geometry, size)
    indices = _as_indices(positions, geometry, size[1])
    layout = memory_format(input)
    unique = positions.dtype == torch.uint8 and not geometry.overlaps
    if unique and input.dtype in TORCH_UNPOOLS and not torch.are_deterministic_algorithms_enabled():
        return placed(torch.ops.aten.max_unpool2d(dense(input, layout), dense(indices, layout), size), layout)
    indices = indices.flatten(-2)
    zeros = input.new_zeros(*input.shape[:-2], size[0] * size[1])
    if input.device.type == "cpu":
        output = zeros.scatter_(-1, indices, input.flatten(-2))  # a CPU scatters each plane in order
    else:  # of equal indices the last wins: found by a maximum, which does not depend on the order
        order = torch.arange(indices.shape[-1], device=input.device).expand_as(indices)
        last = indices.new_full(zeros.shape, -1).scatter_reduce_(-1, indices, order, "amax")
        output = torch.where(last < 0, zeros, input.flatten(-2).gather(-1, last.clamp_min(0)))
    return placed(output.unflatten(-1, size), layout)


MAX_UNPOOL2D = Operator(
    "max_unpool2d(Tensor input, Tensor positions, PoolGeometry geometry, SymInt[2] output_size) -> Tensor",
    kernels={
        "triton": Implementation(partial(_max_unpool2d_kernel, triton_kernels), _unsupported),
        "cuda": Implementation(partial(_max_unpool2d_kernel, cuda_kernels), _unsupported),
        "cpu": Implementation(_max_unpool2d_on_cpu, _unsupported),
    },
    reference=_max_unpool2d_reference,
    fake=_empty_unpooled,
)
map_over_batch(MAX_UNPOOL2D)


# --- backward --------------------------------------------------------------------------------------------------------


def _empty_gradient(grad: Tensor, positions: Tensor, geometry: PoolGeometry) -> Tensor:
    return empty(grad, positions.shape, memory_format(positions))


def _max_unpool2d_backward_kernel(
    kernels: ModuleType, grad: Tensor, positions: Tensor, geometry: PoolGeometry
) -> Tensor:
    layout = memory_format(positions)
    grad_input = _empty_gradient(grad, positions, geometry)
    kernels.unpool.max_unpool2d_bwd(
        as_batch(dense(grad, layout)),
        as_batch(dense(positions, layout)),
        as_batch(grad_input),
        geometry,
        layout == torch.channels_last,
    )
    return grad_input


def _gather(grad: Tensor, positions: Tensor, geometry: PoolGeometry) -> Tensor:
    """The gradient in torch's differentiable functions."""
    indices = _as_indices(positions, geometry, grad.shape[-1])
    return grad.flatten(-2).gather(-1, indices.flatten(-2)).view(positions.shape)


def _max_unpool2d_backward_reference(grad: Tensor, positions: Tensor, geometry: PoolGeometry) -> Tensor:
    return placed(_gather(grad, positions, geometry), memory_format(positions))


MAX_UNPOOL2D_BACKWARD = Operator(
    "max_unpool2d_backward(Tensor grad_output, Tensor positions, PoolGeometry geometry) -> Tensor",
    kernels=for_backends(
        _max_unpool2d_backward_kernel, _unsupported, triton=triton_kernels, cuda=cuda_kernels, cpu=cpu_kernels
    ),
    reference=_max_unpool2d_backward_reference,
    fake=_empty_gradient,
    gradient=True,
)
map_over_batch(MAX_UNPOOL2D_BACKWARD)


class MaxUnpool2dFunction(torch.autograd.Function):
    """(input, positions, geometry, output_size) -> output. The gradient is gathered at the positions."""

    generate_vmap_rule = True

    @staticmethod
    @known_signature
    def forward(input: Tensor, positions: Tensor, geometry: PoolGeometry, size: list[int]) -> Tensor:
        return MAX_UNPOOL2D(input, positions, geometry, size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, positions, ctx.geometry, _ = inputs
        ctx.save_for_backward(positions)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        run = _gather if wants_graph() else MAX_UNPOOL2D_BACKWARD
        return run(grad, *ctx.saved_tensors, ctx.geometry), None, None, None


# --- functions -------------------------------------------------------------------------------------------------------


def max_unpool2d(
    input: Tensor,
    indices: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """Max-unpooling as torch.nn.functional.max_unpool2d: deterministic, and each output element is written once.

    Args:
        input: the pooled map, of any floating-point dtype.
        indices: int64, from max_pool2d with return_indices, or any others inside the planes.
        kernel_size, stride, padding: those of the pooling. `stride` defaults to `kernel_size`.
        output_size: 2 to 4 entries, of which the last two are used. Default: (size - 1) * stride - 2 * padding +
            kernel_size.

    Shape:
        - input, indices: (N, C, H, W) or (C, H, W).
        - output: ``(N, C, *output_size)`` or ``(C, *output_size)``, in the input's dtype and memory format.

    Raises:
        RuntimeError: for indices of another shape or dtype and, on a CPU, for an index outside its plane. On a GPU that
            is a device-side assertion, and nothing is written outside the plane.
        ValueError: for an output_size that the geometry does not allow.

    Note:
        Works under torch.use_deterministic_algorithms(True) on every backend. If indices repeat, the last in row-major
        order stays and, as in torch, each receives the gradient. An index outside its own pooling window makes a
        second, slow kernel write each plane in order.

    Example:
        >>> import torch, fastseg.functional as FS
        >>> pooled, indices = FS.max_pool2d(torch.arange(16.0).view(1, 1, 4, 4), 2, return_indices=True)
        >>> FS.max_unpool2d(pooled, indices, 2)
        tensor([[[[ 0.,  0.,  0.,  0.],
                  [ 0.,  5.,  0.,  7.],
                  [ 0.,  0.,  0.,  0.],
                  [ 0., 13.,  0., 15.]]]])

    Source:
        torch.nn.functional.max_unpool2d.
    """
    name = "max_unpool2d"
    check_unpool(name, input, indices, "indices", torch.int64)
    geometry = pool_geometry(name, kernel_size, stride, padding)
    size = unpooled_size(name, input.shape[-2:], geometry, output_size)
    backend = MAX_UNPOOL2D.choose(input, indices, geometry, size, preferred=few_elements(input, FEW_ELEMENTS)).backend
    if backend == "torch" and not torch.are_deterministic_algorithms_enabled():  # torch's own refuses to run then
        try:
            return F.max_unpool2d(
                input, indices, geometry.kernel_size, geometry.stride, geometry.padding, output_size=size
            )
        except RuntimeError:
            require_positions_inside(indices, geometry, size)  # torch's own message does not say where
            raise
    return torch_internals.apply(MaxUnpool2dFunction, input, indices, geometry, size)


def max_unpool2d_with_offsets(
    input: Tensor,
    offsets: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """Max-unpooling from the uint8 offsets of max_pool2d_with_offsets.

    Args:
        input: the pooled map, of any floating-point dtype.
        offsets: uint8, of the input's shape, from a pool without dilation. Convert those of a dilated pool with
            offsets_to_indices and use max_unpool2d.
        kernel_size, stride, padding, output_size: as in max_unpool2d.

    Returns:
        The unpooled map, exactly of output_size. If overlapping windows share a maximum, the last window in row-major
        order gives the value.

    Raises:
        RuntimeError, ValueError: as max_unpool2d. An offset outside its window or the plane is an invalid position:
            RuntimeError on a CPU, a device-side assertion on a GPU.

    Example:
        >>> import torch, fastseg.functional as FS
        >>> pooled, offsets = FS.max_pool2d_with_offsets(torch.tensor([[[[1.0, 2.0], [4.0, 3.0]]]]), 2)
        >>> FS.max_unpool2d_with_offsets(pooled, offsets, 2)
        tensor([[[[0., 0.],
                  [4., 0.]]]])
    """
    name = "max_unpool2d_with_offsets"
    check_unpool(name, input, offsets, "offsets", torch.uint8)
    geometry = pool_geometry(name, kernel_size, stride, padding)
    size = unpooled_size(name, input.shape[-2:], geometry, output_size)
    require_offsets(name, geometry)
    MAX_UNPOOL2D.choose(input, offsets, geometry, size)  # only for `explain`: the operator chooses again when it runs
    return torch_internals.apply(MaxUnpool2dFunction, input, offsets, geometry, size)
