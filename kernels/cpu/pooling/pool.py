"""Launchers of pool.cpp: max-pooling and its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..launch import launch
from .arguments import as_pointers, parameters, sizes

if TYPE_CHECKING:
    from ...pooling.geometry import PoolGeometry


def max_pool2d_fwd(x: Tensor, y: Tensor, positions: Tensor | None, geometry: PoolGeometry, channels_last: bool) -> None:
    """Pool x (N, C, H, W) into y (N, C, OH, OW); positions like y, uint8 or int64, or None."""
    launch(
        "pooling/pool", "max_pool2d_fwd", parameters(x, channels_last),
        x, y, *as_pointers(positions), *sizes(x, y, geometry),
    )  # fmt: skip


def max_pool2d_bwd(
    grad_y: Tensor, positions: Tensor, grad_x: Tensor, geometry: PoolGeometry, channels_last: bool
) -> None:
    """The gradient grad_x (N, C, H, W) of a pool that kept `positions`; every element of it is written once."""
    launch(
        "pooling/pool", "max_pool2d_bwd", parameters(grad_y, channels_last),
        grad_y, *as_pointers(positions), grad_x, *sizes(grad_x, grad_y, geometry),
    )  # fmt: skip
