"""The two ways to store where a pooled element's maximum was, and the conversion between them.

`indices` are torch's: int64, h * W + w in the plane of the input. `offsets` are the element's number inside its pooling
window, row-major, uint8: an eighth of the memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import INT32_MAX, IntOrPair
from ..operator import memory_format, placed
from .geometry import PoolGeometry, pool_geometry

MAX_OFFSETS = 256  # the window elements that a uint8 can tell apart


def require_offsets(function: str, geometry: PoolGeometry) -> None:
    """Raise RuntimeError for windows of more elements than a uint8 offset can tell apart."""
    if geometry.taps > MAX_OFFSETS:
        raise RuntimeError(
            f"{function}: kernel_size {tuple(geometry.kernel_size)} has more than {MAX_OFFSETS} elements, which a "
            "uint8 offset cannot tell apart; use torch's indices (return_indices=True)"
        )


def _window_starts(shape: Sequence[int], geometry: PoolGeometry, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of the first element of each window, which may be outside the image."""
    rows = torch.arange(shape[-2], device=device)[:, None] * geometry.stride[0] - geometry.padding[0]
    columns = torch.arange(shape[-1], device=device)[None, :] * geometry.stride[1] - geometry.padding[1]
    return rows, columns


def to_indices(offsets: Tensor, geometry: PoolGeometry, width: int) -> Tensor:
    """int64 indices into planes of the given width, from uint8 offsets (..., OH, OW)."""
    rows, columns = _window_starts(offsets.shape, geometry, offsets.device)
    kernel, gap = geometry.kernel_size, geometry.dilation
    taps = offsets.to(torch.int32)
    i = (taps * (2**16 // kernel[1] + 1)).bitwise_right_shift_(16)  # taps // kernel[1]: division is slow on a CPU
    j = taps.sub_(i, alpha=kernel[1])
    if width * (gap[0] * kernel[0] + 1) + gap[1] * kernel[1] > INT32_MAX:
        i, j = i.long(), j.long()
    return i.mul_(gap[0] * width).add_(j, alpha=gap[1]).long().add_(rows * width + columns)


def to_offsets(indices: Tensor, geometry: PoolGeometry, width: int) -> Tensor:
    """uint8 offsets, from int64 indices (..., OH, OW) that a pool of this geometry returned."""
    rows, columns = _window_starts(indices.shape, geometry, indices.device)
    kernel, gap = geometry.kernel_size, geometry.dilation
    # A table maps the distance from the window's first element inside the image to the offset: division is slow.
    up, left = (-rows).clamp_min(0), (-columns).clamp_min(0)
    i, j = (up + gap[0] - 1) // gap[0], (left + gap[1] - 1) // gap[1]
    first = (rows + i * gap[0]) * width + columns + j * gap[1]
    span = gap[0] * width
    steps = torch.arange(span * kernel[0], device=indices.device)
    table = (steps // span * kernel[1] + steps % span // gap[1]).to(torch.uint8)
    taps = table[(indices - first).clamp_(0, span * kernel[0] - 1)] + (i * kernel[1] + j).to(torch.uint8)
    return placed(taps, memory_format(indices))  # indexing does not keep the memory format


def offsets_to_indices(
    offsets: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None,
    padding: IntOrPair,
    width: int,
    dilation: IntOrPair = 1,
) -> Tensor:
    """Convert uint8 offsets inside pooling windows to torch's int64 indices.

    Args:
        offsets: from max_pool2d_with_offsets, of shape (..., OH, OW).
        kernel_size, stride, padding, dilation: those of the pooling.
        width: the width of the image that was pooled.

    Returns:
        int64 indices h * width + w of the same shape, as torch's max_pool2d returns them.

    Raises:
        RuntimeError: for windows of more than 256 elements.

    Example:
        >>> import torch, fastseg.functional as FS
        >>> pooled, offsets = FS.max_pool2d_with_offsets(torch.arange(16.0).view(1, 1, 4, 4), 2)
        >>> FS.offsets_to_indices(offsets, 2, None, 0, width=4)
        tensor([[[[ 5,  7],
                  [13, 15]]]])
    """
    geometry = pool_geometry("offsets_to_indices", kernel_size, stride, padding, dilation)
    require_offsets("offsets_to_indices", geometry)
    return to_indices(offsets, geometry, width)


def indices_to_offsets(
    indices: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None,
    padding: IntOrPair,
    width: int,
    dilation: IntOrPair = 1,
) -> Tensor:
    """Convert torch's int64 indices to uint8 offsets inside pooling windows.

    Args:
        indices: from a max_pool2d with the geometry below, of shape (..., OH, OW).
        kernel_size, stride, padding, dilation: those of the pooling.
        width: the width of the image that was pooled.

    Returns:
        uint8 offsets of the same shape. An index that is no element of its own window has no offset and is given an
        arbitrary one: checking would force a host sync on a GPU.

    Raises:
        RuntimeError: for windows of more than 256 elements.

    Example:
        >>> import torch, fastseg.functional as FS
        >>> FS.indices_to_offsets(torch.tensor([[[[5, 7], [13, 15]]]]), 2, None, 0, width=4)
        tensor([[[[3, 3],
                  [3, 3]]]], dtype=torch.uint8)
    """
    geometry = pool_geometry("indices_to_offsets", kernel_size, stride, padding, dilation)
    require_offsets("indices_to_offsets", geometry)
    return to_offsets(indices, geometry, width)
