"""Launchers of unpool.cu and overlap.cu: max-unpooling and its gradient."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..launch import index_type, launch
from .tiling import Windows


def max_unpool2d_fwd(x: Tensor, positions: Tensor, y: Tensor, windows: Windows, trusted: bool) -> None:
    """Unpool x (N, C, OH, OW) into y (N, C, H, W), every element of which is written.

    trusted: the positions come from a pool of this geometry, so that each lies in its own window.
    """
    search = not trusted and positions.dtype == torch.int64
    foreign = torch.zeros(1, dtype=torch.int32, device=x.device) if search else None
    if windows.tile:
        _unpool_cells(x, positions, y, foreign, windows, trusted)
    else:
        window_gather(x, positions, y, windows, add=False)
        if not trusted:
            _report_strays(x, positions, y, foreign, windows)
    if search:
        n, c, h, w = y.shape
        launch(
            "pooling/unpool", "max_unpool2d_foreign", (x.dtype, windows.channels_last), n * c,
            x, positions, y, foreign, np.int64(n * c), c, np.int64(h * w), np.int64(x.shape[2] * x.shape[3]),
        )  # fmt: skip


def _unpool_cells(
    x: Tensor, positions: Tensor, y: Tensor, foreign: Tensor | None, windows: Windows, trusted: bool
) -> None:
    n, c, h, w = y.shape
    down, across = (
        max(-(-(size + padding) // stride), pooled)
        for size, padding, stride, pooled in zip((h, w), windows.padding, windows.stride, x.shape[-2:], strict=True)
    )
    rows = windows.rows(y, x, widths=(1, 2))
    vec, runs = windows.groups(x, rows, y, positions)
    groups = n * down * across * c // vec
    runs = runs if windows.channels_last or rows else across
    launch(
        "pooling/unpool", "max_unpool2d_fwd",
        (x.dtype, positions.dtype, index_type(x, y), windows.channels_last, vec, rows, not trusted), groups,
        x, positions, y, foreign, np.int64(groups), runs, down, across, *windows.numbers(y, x),
    )  # fmt: skip


def max_unpool2d_bwd(grad_y: Tensor, positions: Tensor, grad_x: Tensor, windows: Windows) -> None:
    """Gather grad_x (N, C, OH, OW) from grad_y (N, C, H, W) at the positions."""
    kernel = windows.unrolled()
    whole = windows.tile and kernel[0] > 0
    rows = whole and windows.rows(grad_y, grad_x, widths=(1, 2))
    vec, runs = windows.groups(grad_x, rows, grad_y, positions)
    groups = grad_x.numel() // vec
    # In NCHW a thread without whole rows has one position to follow, and reads no more than that.
    whole = whole and (rows or windows.channels_last)
    launch(
        "pooling/unpool", "max_unpool2d_bwd",
        (grad_y.dtype, positions.dtype, index_type(grad_y, grad_x), windows.channels_last, vec, rows, whole,
         *(kernel if whole else (0, 0))), groups,
        grad_y, positions, grad_x, np.int64(groups), runs, *windows.numbers(grad_y, grad_x),
    )  # fmt: skip


def window_gather(x: Tensor, positions: Tensor, y: Tensor, windows: Windows, *, add: bool) -> None:
    """Gather y (N, C, H, W) from x (N, C, OH, OW) at the positions, whatever the windows."""
    vec, runs = windows.groups(y, False, x, positions)
    groups = y.numel() // vec
    launch(
        "pooling/overlapping", "window_gather",
        (x.dtype, positions.dtype, index_type(x, y), windows.channels_last, vec, add), groups,
        x, positions, y, np.int64(groups), runs, *windows.numbers(y, x), *windows.dilation,
    )  # fmt: skip


def _report_strays(x: Tensor, positions: Tensor, y: Tensor, foreign: Tensor | None, windows: Windows) -> None:
    runs = x.shape[1] if windows.channels_last else x.shape[-1]
    launch(
        "pooling/overlapping", "report_strays", (positions.dtype, index_type(x, y), windows.channels_last), x.numel(),
        positions, foreign, np.int64(x.numel()), runs, *windows.numbers(y, x),
    )  # fmt: skip
