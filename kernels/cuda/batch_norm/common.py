"""What the launchers of batch norm share: the vectors of a channel, the division among threads, the merging of sums."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...batch_norm.arguments import NormArguments
from ..launch import index_type, launch, vector_width
from ..pooling.tiling import Tiling

STEPS = 4  # groups per thread in a kernel that writes a map
REDUCING_STEPS = 8  # fewest groups per thread in a kernel that reduces: it writes 8 or 12 bytes per channel
REDUCING_THREADS = 2**15  # keeps a GPU's memory busy, with four loads in flight per thread
MERGED_ROWS = 64  # partial results per channel after the first merge


def folded_vectors(norm: NormArguments, x: Tensor) -> Tensor:
    """The five vectors of C that the kernels read: see common.cuh."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, shift, var, weight, bias, eps, _ = norm
    vectors = (None if t is None else t.to(dtype) for t in (mean, shift, var, weight, bias))
    folded = torch.empty((5, x.shape[1]), dtype=dtype, device=x.device)
    launch(
        "batch_norm/batch_norm", "fold_norm", (dtype,), x.shape[1],
        *vectors, folded, x.shape[1], np.float64(eps),
    )  # fmt: skip
    return folded


class Partition:
    """How a map of rows x columns per image and channel is divided among threads: see common.cuh."""

    def __init__(
        self, x: Tensor, rows: int, columns: int, channels_last: bool, vec: int, reducing: bool = False
    ) -> None:
        n, c = x.shape[:2]
        runs = (c if channels_last else columns) // vec
        tiles = runs if channels_last else c
        groups = n * rows * (columns if channels_last else runs)
        if reducing:
            self.chunks = min(-(-groups // REDUCING_STEPS), max(REDUCING_THREADS // tiles, 1))
        else:
            self.chunks = -(-groups // STEPS)
        self.threads = tiles * self.chunks
        self.arguments = (tiles, np.int64(groups), np.int64(self.chunks), c, runs)


def merged(partials: Tensor, kernel: str) -> Tensor:
    """(terms, 1, C) from (terms, chunks, C)."""
    for rows in (MERGED_ROWS, 1):
        terms, count, c = partials.shape
        if rows < count:
            result = partials.new_empty((terms, rows, c))
            launch(
                "batch_norm/batch_norm", kernel, (partials.dtype,), rows * c,
                partials, result, np.int64(count), np.int64(rows), c,
            )  # fmt: skip
            partials = result
    return partials


class PoolLaunch:
    """The arguments that the kernels of batch_norm_pool.cu share, for an image x and a pooled map.

    With grad_x the kernel writes the cells of the image, else it reads the windows. reducing: it writes partial sums.
    """

    def __init__(
        self, x: Tensor, pooled: Tensor, offsets: Tensor | None, tiling: Tiling, *, grad_x: Tensor | None = None,
        reducing: bool = False,
    ) -> None:  # fmt: skip
        geometry, channels_last, unrolled = tiling.geometry, tiling.channels_last, tiling.unrolled_kernel_size()
        tensors = [t for t in (pooled, offsets, x, grad_x) if t is not None]
        # 1. How many pixels of an image row belong to a window, if rows are read and written whole (NCHW)
        across = 0
        if not channels_last and geometry.kernel_size == geometry.stride == [1, 1] and not any(geometry.padding):
            across = 1
        elif tiling.has_whole_rows(x, pooled, widths=(1, 2)) and unrolled[0] and tensors[-1].data_ptr() % 16 == 0:
            across = 2
        vec = 1
        if channels_last or across:
            vec = vector_width(x.shape[1] if channels_last else pooled.shape[-1], *tensors)
        # 2. The map whose elements the threads own: the pooled map, or the cells of the image
        rows, columns = pooled.shape[-2:]
        if grad_x is not None:
            rows, columns = (
                max(-(-(size + padding) // stride), o)
                for size, padding, stride, o in zip(
                    x.shape[-2:], geometry.padding, geometry.stride, pooled.shape[-2:], strict=True
                )
            )
        partition = Partition(x, rows, columns, channels_last, vec, reducing)
        # 3. The arguments
        kernel_size = unrolled if grad_x is None else ()
        self.chunks, self.threads, self.arguments = partition.chunks, partition.threads, partition.arguments
        self.parameters = (x.dtype, index_type(x), channels_last, vec, across, *kernel_size, offsets is not None)
        self.sizes = (*(() if grad_x is None else (rows, columns)), *tiling.sizes(x, pooled))


def write_output(x: Tensor, norm: NormArguments, y: Tensor, offsets: Tensor | None, tiling: Tiling) -> None:
    """Write y, and the offsets if there are any."""
    call = PoolLaunch(x, y, offsets, tiling)
    launch(
        "batch_norm/batch_norm_pool", "batch_norm_relu_max_pool2d_fwd", call.parameters, call.threads,
        x, folded_vectors(norm, x), y, offsets, *call.arguments, np.bool_(norm.relu), *call.sizes,
    )  # fmt: skip


def reduce_gradient(
    grad_y: Tensor, offsets: Tensor | None, x: Tensor, norm: NormArguments, sums: Tensor, tiling: Tiling
) -> None:
    """Write sums (4, C)."""
    call = PoolLaunch(x, grad_y, offsets, tiling, reducing=True)
    n, c, h, w = x.shape
    folded, partials = folded_vectors(norm, x), sums.new_empty((2, call.chunks, c))
    launch(
        "batch_norm/batch_norm_pool", "batch_norm_relu_max_pool2d_sums", call.parameters, call.threads,
        grad_y, offsets, x, folded, partials, *call.arguments, np.bool_(norm.relu), *call.sizes,
    )  # fmt: skip
    added = merged(partials, "add_sums")
    launch("batch_norm/batch_norm", "finish_sums", (sums.dtype,), c, added, folded, sums, c, np.int64(n * h * w))


def write_gradient(
    grad_y: Tensor, offsets: Tensor | None, x: Tensor, norm: NormArguments, means: Tensor | None, grad_x: Tensor,
    tiling: Tiling,
) -> None:  # fmt: skip
    """Write grad_x; means as in batch_norm_relu_bwd."""
    call = PoolLaunch(x, grad_y, offsets, tiling, grad_x=grad_x)
    launch(
        "batch_norm/batch_norm_pool", "batch_norm_relu_max_pool2d_bwd", call.parameters, call.threads,
        grad_y, offsets, x, folded_vectors(norm, x), means, grad_x, *call.arguments, np.bool_(norm.relu), *call.sizes,
    )  # fmt: skip
