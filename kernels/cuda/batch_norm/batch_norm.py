"""Launchers of batch_norm.cu, and of batch_norm_pool.cu for batch norm and ReLU alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...pooling.geometry import PoolGeometry
from ..launch import index_type, launch, vector_width
from ..pooling.tiling import Tiling

STEPS = 4  # groups of a thread that writes
REDUCING_STEPS = 8  # at least, of a thread that reduces: its partial results are 8 or 12 bytes a channel
REDUCING_THREADS = 2**15  # what keeps a GPU's memory busy, four loads each
MERGED_ROWS = 64  # partial results of a channel that are left after the first merge


class Norm(NamedTuple):
    """The statistics and parameters of a call, vectors of C: centred = (x - mean) + shift."""

    mean: Tensor
    shift: Tensor | None
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    relu: bool

    def folded(self, x: Tensor) -> Tensor:
        """The five vectors of norm.cuh."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        vectors = [None if t is None else t.to(dtype) for t in self[:5]]
        folded = torch.empty((5, x.shape[1]), dtype=dtype, device=x.device)
        launch(
            "batch_norm/batch_norm",
            "fold_norm",
            (dtype,),
            x.shape[1],
            *vectors,
            folded,
            x.shape[1],
            np.float64(self.eps),
        )
        return folded


class Parts:
    """How a map of rows x columns for each image and channel is divided among threads: see norm.cuh."""

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


def batch_norm_stats(
    x: Tensor, input_bias: Tensor | None, running: tuple[Tensor, Tensor] | None, momentum: float, stats: Tensor,
    channels_last: bool,
) -> None:  # fmt: skip
    """Write stats (3, C), mean, shift and biased variance of x, and move the running mean and variance."""
    _, c, h, w = x.shape
    vec = vector_width(c if channels_last else h * w, x)
    parts = Parts(x, 1, h * w, channels_last, vec, reducing=True)
    partials = stats.new_empty((3, parts.chunks, c))
    launch(
        "batch_norm/batch_norm", "batch_norm_stats", (x.dtype, index_type(x), channels_last, vec), parts.threads,
        x, partials, *parts.arguments, h * w,
    )  # fmt: skip
    moments = _merged(partials, "merge_moments")
    buffers = running or (None, None)
    launch(
        "batch_norm/batch_norm", "finish_stats", (x.dtype, stats.dtype if running is None else running[0].dtype), c,
        x, moments, None if input_bias is None else input_bias.to(stats.dtype), stats, *buffers,
        np.int64(1 if channels_last else h * w), c, np.float64(momentum),
    )  # fmt: skip


def _merged(partials: Tensor, kernel: str) -> Tensor:
    """(terms, 1, C) from (terms, chunks, C)."""
    for rows in (MERGED_ROWS, 1):
        terms, count, c = partials.shape
        if rows < count:
            merged = partials.new_empty((terms, rows, c))
            launch("batch_norm/batch_norm", kernel, (partials.dtype,), rows * c, partials, merged, np.int64(count),
                   np.int64(rows), c)  # fmt: skip
            partials = merged
    return partials


def batch_norm_relu_fwd(x: Tensor, norm: Norm, y: Tensor, channels_last: bool) -> None:
    """Write y = relu(batch norm of x)."""
    x, y = _flat(channels_last, x, y)
    write(x, norm, y, None, _pixels(channels_last))


def batch_norm_relu_sums(grad_y: Tensor, x: Tensor, norm: Norm, sums: Tensor, channels_last: bool) -> None:
    """Write sums (4, C): of grad and grad * x_hat over the pixels, where grad is behind the ReLU, and their means."""
    grad_y, x = _flat(channels_last, grad_y, x)
    add_up(grad_y, None, x, norm, sums, _pixels(channels_last))


def batch_norm_relu_bwd(
    grad_y: Tensor, x: Tensor, norm: Norm, means: Tensor | None, grad_x: Tensor, channels_last: bool
) -> None:
    """Write grad_x; means (2, C): of grad and grad * x_hat, or None where the statistics are constants."""
    grad_y, x, grad_x = _flat(channels_last, grad_y, x, grad_x)
    write_gradient(grad_y, None, x, norm, means, grad_x, _pixels(channels_last))


def _flat(channels_last: bool, *maps: Tensor) -> list[Tensor]:
    """NCHW: the maps with planes of one row, which 16 bytes divide more often."""
    return list(maps) if channels_last else [x.flatten(2).unsqueeze(2) for x in maps]


def _pixels(channels_last: bool) -> Tiling:
    """A window for each pixel."""
    return Tiling(PoolGeometry([1, 1], [1, 1], [0, 0]), channels_last)


class _Call:
    """What the kernels of batch_norm_pool.cu take in one call, besides their tensors."""

    def __init__(
        self, x: Tensor, pooled: Tensor, tiling: Tiling, tensors: tuple[Tensor | None, ...], cells: bool,
        reducing: bool,
    ) -> None:  # fmt: skip
        given = [t for t in tensors if t is not None]
        last, unrolled = tiling.channels_last, tiling.unrolled_kernel_size()
        self.across = 0
        if (
            not last
            and tiling.geometry.kernel_size == tiling.geometry.stride == [1, 1]
            and not any(tiling.geometry.padding)
        ):
            self.across = 1
        elif tiling.has_whole_rows(x, pooled, widths=(1, 2)) and unrolled[0] and given[-1].data_ptr() % 16 == 0:
            self.across = 2
        vec = vector_width(x.shape[1] if last else pooled.shape[-1], *given) if last or self.across else 1
        map = pooled.shape[-2:]
        if cells:
            sizes = zip(x.shape[-2:], pooled.shape[-2:], tiling.geometry.stride, tiling.geometry.padding, strict=True)
            map = [max(-(-(size + padding) // stride), o) for size, o, stride, padding in sizes]
        parts = Parts(x, *map, last, vec, reducing)
        self.chunks, self.threads = parts.chunks, parts.threads
        self.parameters = (x.dtype, index_type(x), last, vec, self.across, *([] if cells else unrolled))
        self.sizes = (*(map if cells else ()), *tiling.sizes(x, pooled))
        self.arguments = parts.arguments


def write(x: Tensor, norm: Norm, y: Tensor, offsets: Tensor | None, tiling: Tiling) -> None:
    call = _Call(x, y, tiling, (y, offsets, x), cells=False, reducing=False)
    launch(
        "batch_norm/batch_norm_pool", "bn_relu_max_pool2d_fwd", (*call.parameters, offsets is not None), call.threads,
        x, norm.folded(x), y, offsets, *call.arguments, np.bool_(norm.relu), *call.sizes,
    )  # fmt: skip


def add_up(grad_y: Tensor, offsets: Tensor | None, x: Tensor, norm: Norm, sums: Tensor, tiling: Tiling) -> None:
    call = _Call(x, grad_y, tiling, (grad_y, offsets, x), cells=False, reducing=True)
    n, c, h, w = x.shape
    folded, partials = norm.folded(x), sums.new_empty((2, call.chunks, c))
    launch(
        "batch_norm/batch_norm_pool", "bn_relu_max_pool2d_sums", (*call.parameters, offsets is not None), call.threads,
        grad_y, offsets, x, folded, partials, *call.arguments, np.bool_(norm.relu), *call.sizes,
    )  # fmt: skip
    added = _merged(partials, "add_sums")
    launch("batch_norm/batch_norm", "finish_sums", (sums.dtype,), c, added, folded, sums, c, np.int64(n * h * w))


def write_gradient(
    grad_y: Tensor, offsets: Tensor | None, x: Tensor, norm: Norm, means: Tensor | None, grad_x: Tensor,
    tiling: Tiling,
) -> None:  # fmt: skip
    call = _Call(x, grad_y, tiling, (grad_y, offsets, x, grad_x), cells=True, reducing=False)
    launch(
        "batch_norm/batch_norm_pool", "bn_relu_max_pool2d_bwd", (*call.parameters, offsets is not None), call.threads,
        grad_y, offsets, x, norm.folded(x), means, grad_x, *call.arguments, np.bool_(norm.relu), *call.sizes,
    )  # fmt: skip
