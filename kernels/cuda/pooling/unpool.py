"""Launchers of unpool.cu and overlapping.cu: max-unpooling and its gradient."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...pooling.geometry import PoolGeometry
from ..launch import index_type, launch
from .tiling import Tiling


def max_unpool2d_fwd(
    x: Tensor, positions: Tensor, y: Tensor, geometry: PoolGeometry, channels_last: bool, *, trusted: bool
) -> None:
    """Unpool x (N, C, OH, OW) into y (N, C, H, W); every element of y is written.

    trusted: the positions come from a pool of this geometry, so each is in its own window.
    """
    tiling = Tiling(geometry, channels_last)
    search = not trusted and positions.dtype == torch.int64
    out_of_window = torch.zeros(1, dtype=torch.int32, device=x.device) if search else None
    if tiling.geometry.has_cells:
        _unpool_cells(x, positions, y, out_of_window, tiling, trusted)
    else:
        window_gather(x, positions, y, tiling, add=False)
        if not trusted:
            _report_out_of_window(x, positions, y, out_of_window, tiling)
    if search:
        n, c, h, w = y.shape
        launch(
            "pooling/unpool", "max_unpool2d_scatter", (x.dtype, tiling.channels_last), n * c,
            x, positions, y, out_of_window, np.int64(n * c), c, np.int64(h * w), np.int64(x.shape[2] * x.shape[3]),
        )  # fmt: skip


def _unpool_cells(
    x: Tensor, positions: Tensor, y: Tensor, out_of_window: Tensor | None, tiling: Tiling, trusted: bool
) -> None:
    n, c, h, w = y.shape
    down, across = (
        max(-(-(size + padding) // stride), pooled)
        for size, padding, stride, pooled in zip(
            (h, w), tiling.geometry.padding, tiling.geometry.stride, x.shape[-2:], strict=True
        )
    )
    rows = tiling.has_whole_rows(y, x, widths=(1, 2))
    vec, runs = tiling.groups(x, rows, y, positions)
    groups = n * down * across * c // vec
    runs = runs if tiling.channels_last or rows else across
    launch(
        "pooling/unpool", "max_unpool2d_fwd",
        (x.dtype, positions.dtype, index_type(x, y), tiling.channels_last, vec, rows, not trusted), groups,
        x, positions, y, out_of_window, np.int64(groups), runs, down, across, *tiling.sizes(y, x),
    )  # fmt: skip


def max_unpool2d_bwd(
    grad_y: Tensor, positions: Tensor, grad_x: Tensor, geometry: PoolGeometry, channels_last: bool
) -> None:
    """Gather grad_x (N, C, OH, OW) from grad_y (N, C, H, W) at the positions."""
    tiling = Tiling(geometry, channels_last)
    kernel = tiling.unrolled_kernel_size()
    whole = tiling.geometry.has_cells and kernel[0] > 0
    rows = whole and tiling.has_whole_rows(grad_y, grad_x, widths=(1, 2))
    vec, runs = tiling.groups(grad_x, rows, grad_y, positions)
    groups = grad_x.numel() // vec
    # In NCHW without whole rows a thread has one position, and reads only that element.
    whole = whole and (rows or tiling.channels_last)
    launch(
        "pooling/unpool", "max_unpool2d_bwd",
        (grad_y.dtype, positions.dtype, index_type(grad_y, grad_x), tiling.channels_last, vec, rows, whole,
         *(kernel if whole else (0, 0))), groups,
        grad_y, positions, grad_x, np.int64(groups), runs, *tiling.sizes(grad_y, grad_x),
    )  # fmt: skip


def window_gather(x: Tensor, positions: Tensor, y: Tensor, tiling: Tiling, *, add: bool) -> None:
    """Gather y (N, C, H, W) from x (N, C, OH, OW) at the positions, for windows that may overlap."""
    vec, runs = tiling.groups(y, False, x, positions)
    groups = y.numel() // vec
    launch(
        "pooling/overlapping", "window_gather",
        (x.dtype, positions.dtype, index_type(x, y), tiling.channels_last, vec, add), groups,
        x, positions, y, np.int64(groups), runs, *tiling.sizes(y, x), *tiling.geometry.dilation,
    )  # fmt: skip


def _report_out_of_window(
    x: Tensor, positions: Tensor, y: Tensor, out_of_window: Tensor | None, tiling: Tiling
) -> None:
    runs = x.shape[1] if tiling.channels_last else x.shape[-1]
    launch(
        "pooling/overlapping", "report_out_of_window",
        (positions.dtype, index_type(x, y), tiling.channels_last), x.numel(),
        positions, out_of_window, np.int64(x.numel()), runs, *tiling.sizes(y, x),
    )  # fmt: skip
