"""Launchers of pool.cu: max-pooling and its gradient."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..launch import index_type, launch
from .tiling import Windows
from .unpool import max_unpool2d_fwd, window_gather


def max_pool2d_fwd(x: Tensor, y: Tensor, positions: Tensor | None, windows: Windows) -> None:
    """Pool x (N, C, H, W) into y (N, C, OH, OW); positions like y, uint8 or int64, or None."""
    rows = windows.rows(x, y, widths=(2,))
    vec, runs = windows.groups(y, rows, x, *([] if positions is None else [positions]))
    kept = None if positions is None else positions.dtype
    groups = y.numel() // vec
    launch(
        "pooling/pool", "max_pool2d_fwd",
        (x.dtype, kept, index_type(x, y), windows.channels_last, vec, rows, *windows.unrolled()), groups,
        x, y, positions, np.int64(groups), runs, *windows.numbers(x, y), *windows.dilation,
    )  # fmt: skip


def max_pool2d_bwd(grad_y: Tensor, positions: Tensor, grad_x: Tensor, windows: Windows) -> None:
    """The gradient grad_x (N, C, H, W) of a pool that kept `positions`; every element of it is written once."""
    if windows.tile:
        max_unpool2d_fwd(grad_y, positions, grad_x, windows, trusted=True)
    else:
        window_gather(grad_y, positions, grad_x, windows, add=True)
