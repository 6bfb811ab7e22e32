"""Pooling windows: their arguments, the size they give, and the two ways to keep a maximum's position.

A pooled element remembers where its maximum stood either as torch's `indices` (int64, h * W + w in the plane of the
input) or as `offsets` (uint8, the tap inside the window, row-major), an eighth of the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..operator import LIB, Operator, memory_format, placed

IntOrPair = int | Sequence[int]
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_OFFSETS = 256  # taps that a uint8 can tell apart
INT32_MAX = 2**31 - 1
LONGEST_SIDE = 2**20  # of maps whose rows and columns kernels tell apart in float32


def require_tensor(function: str, name: str, value: object) -> None:
    """TypeError unless the argument is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {name} must be a Tensor, but is of type {type(value).__name__}")


def require_offsets(function: str, kernel: list[int]) -> None:
    """RuntimeError for windows of more elements than a uint8 offset can tell apart."""
    if kernel[0] * kernel[1] > MAX_OFFSETS:
        raise RuntimeError(
            f"{function}: kernel_size {tuple(kernel)} has more than {MAX_OFFSETS} elements, which a uint8 offset "
            "cannot tell apart; use torch's indices (return_indices=True)"
        )


def pair(value: IntOrPair, function: str, name: str, least: int) -> list[int]:
    """`value` as [height, width], as torch reads it.

    TypeError for what is neither an int nor a sequence of ints, RuntimeError for another number of entries than one
    or two, or for an entry below `least`.
    """
    entries = list(value) if isinstance(value, (tuple, list)) else [value]
    if any(isinstance(entry, (float, str)) or not hasattr(entry, "__index__") for entry in entries):
        raise TypeError(f"{function}: {name} must be an int or two ints, but is {value!r}")
    entries = entries * 2 if len(entries) == 1 else entries
    if len(entries) != 2:
        raise RuntimeError(f"{function}: {name} must be an int or two ints, but is {tuple(entries)}")
    if any(entry < least for entry in entries):
        raise RuntimeError(f"{function}: {name} must be at least {least}, but is {tuple(entries)}")
    return entries


def unset(stride: IntOrPair | None) -> bool:
    """Whether a stride is left to be the kernel_size: None or, as torch has it, an empty sequence."""
    return stride is None or (isinstance(stride, (tuple, list)) and len(stride) == 0)


def pooled_size(
    size: Sequence[int], kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> list[int]:
    """Height and width of the pooled map. With ceil_mode a window may start inside the image or its left padding."""
    result = []
    for length, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True):
        room = length + 2 * p - d * (k - 1) - 1
        out = (room + (s - 1 if ceil_mode else 0)) // s + 1
        if ceil_mode and (out - 1) * s >= length + p:
            out -= 1
        result.append(out)
    return result


def uncovered(input: Tensor) -> str | None:
    """Why the kernels cannot run a call, in words, or None: they take every geometry."""
    if input.dtype not in (*KERNEL_DTYPES, torch.float64):
        return f"dtype {input.dtype}"
    return None


def batch(x: Tensor) -> Tensor:
    """(C, H, W) as a batch of one, without a copy."""
    return x if x.dim() == 4 else x.unsqueeze(0)


def vmap_folds(operator: Operator) -> None:
    """Teach torch.func.vmap an operator on images: the mapped dimension joins the batch, in one launch."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        size, batched = info.batch_size, False

        def fold(x: Any, dim: int | None) -> Any:
            nonlocal batched
            if not isinstance(x, Tensor):
                return x
            x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            batched = x.dim() == 5
            return x.flatten(0, 1) if batched else x

        result = operator(*(fold(x, dim) for x, dim in zip(args, in_dims, strict=True)))
        outputs = result if isinstance(result, tuple) else (result,)
        dims = tuple(0 if x.dim() == 4 else None for x in outputs)  # the positions of a pool that keeps none: (0,)
        outputs = tuple(
            x.unflatten(0, (size, -1 if x.shape[0] else 0)) if batched and dim == 0 else x
            for x, dim in zip(outputs, dims, strict=True)
        )
        return (outputs, dims) if isinstance(result, tuple) else (outputs[0], dims[0])

    torch.library.register_vmap(operator.op, rule, lib=LIB)


# --- conversion between the two kinds of positions -------------------------------------------------------------------


def _positions(
    function: str, shape: Sequence[int], kernel_size: IntOrPair, stride: IntOrPair | None, padding: IntOrPair,
    dilation: IntOrPair, device: torch.device,
) -> tuple[list[int], list[int], Tensor, Tensor]:  # fmt: skip
    """Kernel, dilation, and row and column of each window's first tap, in or outside the image."""
    kernel, gap = pair(kernel_size, function, "kernel_size", 1), pair(dilation, function, "dilation", 1)
    step = kernel if unset(stride) else pair(stride, function, "stride", 1)
    margin = pair(padding, function, "padding", 0)
    require_offsets(function, kernel)
    rows = torch.arange(shape[-2], device=device)[:, None] * step[0] - margin[0]
    columns = torch.arange(shape[-1], device=device)[None, :] * step[1] - margin[1]
    return kernel, gap, rows, columns


def offsets_to_indices(
    offsets: Tensor, kernel_size: IntOrPair, stride: IntOrPair | None, padding: IntOrPair, width: int,
    dilation: IntOrPair = 1,
) -> Tensor:  # fmt: skip
    """torch's int64 indices into planes of the given width, from uint8 offsets (..., OH, OW)."""
    kernel, gap, rows, columns = _positions(
        "offsets_to_indices", offsets.shape, kernel_size, stride, padding, dilation, offsets.device
    )
    taps = offsets.to(torch.int32)
    i = (taps * (2**16 // kernel[1] + 1)).bitwise_right_shift_(16)  # taps // kernel[1], which a CPU takes long for
    j = taps.sub_(i, alpha=kernel[1])
    if width * (gap[0] * kernel[0] + 1) + gap[1] * kernel[1] > INT32_MAX:
        i, j = i.long(), j.long()
    return i.mul_(gap[0] * width).add_(j, alpha=gap[1]).long().add_(rows * width + columns)


def indices_to_offsets(
    indices: Tensor, kernel_size: IntOrPair, stride: IntOrPair | None, padding: IntOrPair, width: int,
    dilation: IntOrPair = 1,
) -> Tensor:  # fmt: skip
    """uint8 offsets in the window, from int64 indices (..., OH, OW) that a pool of this geometry made.

    An index on no tap of its own window has no offset, and gets a meaningless one: looking would make a GPU's host
    wait.
    """
    kernel, gap, rows, columns = _positions(
        "indices_to_offsets", indices.shape, kernel_size, stride, padding, dilation, indices.device
    )
    # Counted from the window's first tap inside the image, a table tells the tap: divisions are slow on a CPU.
    up, left = (-rows).clamp_min(0), (-columns).clamp_min(0)
    i, j = (up + gap[0] - 1) // gap[0], (left + gap[1] - 1) // gap[1]
    first = (rows + i * gap[0]) * width + columns + j * gap[1]
    span = gap[0] * width
    steps = torch.arange(span * kernel[0], device=indices.device)
    table = (steps // span * kernel[1] + steps % span // gap[1]).to(torch.uint8)
    taps = table[(indices - first).clamp_(0, span * kernel[0] - 1)] + (i * kernel[1] + j).to(torch.uint8)
    return placed(taps, memory_format(indices))  # which indexing does not keep
