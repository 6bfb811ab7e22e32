"""Launchers of batch_norm.cu, and of batch_norm_pool.cu for batch norm + ReLU alone."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ...batch_norm.arguments import NormArguments, RunningStatistics
from ...pooling.geometry import PoolGeometry
from ..launch import index_type, launch, vector_width
from ..pooling.tiling import Tiling
from .common import Partition, merged, reduce_gradient, write_gradient, write_output


def batch_norm_stats(
    x: Tensor, input_bias: Tensor | None, running: RunningStatistics | None, stats: Tensor, channels_last: bool
) -> None:
    """Write stats (3, C): mean, shift and biased variance of x. Update the running statistics.

    input_bias: the bias of the preceding convolution, if it has not been added to x; the running mean includes it.
    """
    _, c, h, w = x.shape
    vec = vector_width(c if channels_last else h * w, x)
    partition = Partition(x, 1, h * w, channels_last, vec, reducing=True)
    partials = stats.new_empty((3, partition.chunks, c))
    launch(
        "batch_norm/batch_norm", "batch_norm_stats", (x.dtype, index_type(x), channels_last, vec), partition.threads,
        x, partials, *partition.arguments, h * w,
    )  # fmt: skip
    moments = merged(partials, "merge_moments")
    running_mean, running_var, momentum = running or (None, None, 0.0)
    launch(
        "batch_norm/batch_norm", "finish_stats",
        (x.dtype, stats.dtype if running_mean is None else running_mean.dtype), c,
        x, moments, None if input_bias is None else input_bias.to(stats.dtype), stats, running_mean, running_var,
        np.int64(1 if channels_last else h * w), c, np.float64(momentum),
    )  # fmt: skip


def batch_norm_relu_fwd(x: Tensor, norm: NormArguments, y: Tensor, channels_last: bool) -> None:
    """Write y = relu(batch norm of x)."""
    x, y = _flat(channels_last, x, y)
    write_output(x, norm, y, None, _one_pixel_windows(channels_last))


def batch_norm_relu_sums(grad_y: Tensor, x: Tensor, norm: NormArguments, sums: Tensor, channels_last: bool) -> None:
    """Write sums (4, C): the sums of grad and grad * x_hat over the pixels, and their means.

    grad is the gradient of the ReLU's input.
    """
    grad_y, x = _flat(channels_last, grad_y, x)
    reduce_gradient(grad_y, None, x, norm, sums, _one_pixel_windows(channels_last))


def batch_norm_relu_bwd(
    grad_y: Tensor, x: Tensor, norm: NormArguments, means: Tensor | None, grad_x: Tensor, channels_last: bool
) -> None:
    """Write grad_x. means (2, C): those of grad and grad * x_hat, or None if the statistics are constants."""
    grad_y, x, grad_x = _flat(channels_last, grad_y, x, grad_x)
    write_gradient(grad_y, None, x, norm, means, grad_x, _one_pixel_windows(channels_last))


def _flat(channels_last: bool, *maps: Tensor) -> list[Tensor]:
    """NCHW: each plane as one row, because rows of that length more often divide into 16-byte groups."""
    return list(maps) if channels_last else [x.flatten(2).unsqueeze(2) for x in maps]


def _one_pixel_windows(channels_last: bool) -> Tiling:
    """No pooling: each pixel is a window of its own."""
    return Tiling(PoolGeometry([1, 1], [1, 1], [0, 0]), channels_last)
