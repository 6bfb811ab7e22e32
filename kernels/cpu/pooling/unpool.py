"""Launchers of unpool.cpp: max-unpooling and its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..launch import launch
from .arguments import as_pointers, parameters, refuse_invalid, sizes

if TYPE_CHECKING:
    from ...pooling.geometry import PoolGeometry


def max_unpool2d_fwd(
    x: Tensor, positions: Tensor, y: Tensor, geometry: PoolGeometry, channels_last: bool, trusted: bool
) -> None:
    """Unpool x (N, C, OH, OW) into y (N, C, H, W), every element of which is written.

    Raises RuntimeError for an index outside the plane, or an offset outside its window or the plane, unless `trusted`;
    such a position is never used as an address.
    """
    invalid = launch(
        "pooling/unpool", "max_unpool2d_fwd", parameters(x, channels_last),
        x, *as_pointers(positions), y, *sizes(y, x, geometry),
    )  # fmt: skip
    refuse_invalid(invalid and not trusted, positions, y)


def max_unpool2d_bwd(
    grad_y: Tensor, positions: Tensor, grad_x: Tensor, geometry: PoolGeometry, channels_last: bool
) -> None:
    """Gather grad_x (N, C, OH, OW) from grad_y (N, C, H, W) at the positions; zero for a position outside."""
    launch(
        "pooling/unpool", "max_unpool2d_bwd", parameters(grad_y, channels_last),
        grad_y, *as_pointers(positions), grad_x, *sizes(grad_y, grad_x, geometry),
    )  # fmt: skip
