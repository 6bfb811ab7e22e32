"""Launchers of pool.cu: max-pooling and its gradient."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ...pooling.geometry import PoolGeometry
from ..launch import index_type, launch
from .tiling import Tiling
from .unpool import max_unpool2d_fwd, window_gather


def max_pool2d_fwd(x: Tensor, y: Tensor, positions: Tensor | None, geometry: PoolGeometry, channels_last: bool) -> None:
    """Pool x (N, C, H, W) into y (N, C, OH, OW). positions: of y's shape, uint8 or int64, or None."""
    tiling = Tiling(geometry, channels_last)
    rows = tiling.has_whole_rows(x, y, widths=(2,))
    vec, runs = tiling.groups(y, rows, x, *([] if positions is None else [positions]))
    kept = None if positions is None else positions.dtype
    groups = y.numel() // vec
    launch(
        "pooling/pool", "max_pool2d_fwd",
        (x.dtype, kept, index_type(x, y), tiling.channels_last, vec, rows, *tiling.unrolled_kernel_size()), groups,
        x, y, positions, np.int64(groups), runs, *tiling.sizes(x, y), *geometry.dilation,
    )  # fmt: skip


def max_pool2d_bwd(
    grad_y: Tensor, positions: Tensor, grad_x: Tensor, geometry: PoolGeometry, channels_last: bool
) -> None:
    """Write the gradient grad_x (N, C, H, W) of a pool with these positions, each element once."""
    tiling = Tiling(geometry, channels_last)
    if geometry.has_cells:
        max_unpool2d_fwd(grad_y, positions, grad_x, geometry, channels_last, trusted=True)
    else:
        window_gather(grad_y, positions, grad_x, tiling, add=True)
