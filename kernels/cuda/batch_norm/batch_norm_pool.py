"""Launchers of batch_norm_pool.cu: batch norm, ReLU and the max-pooling behind them."""

from __future__ import annotations

from torch import Tensor

from ...pooling.geometry import PoolGeometry
from ..pooling.tiling import Tiling
from .batch_norm import Norm, add_up, write, write_gradient


def bn_relu_max_pool2d_fwd(
    x: Tensor, norm: Norm, y: Tensor, offsets: Tensor | None, geometry: PoolGeometry, channels_last: bool
) -> None:
    """Write y = max-pool(relu(batch norm of x)) and, where they are wanted, the offsets of the maxima."""
    tiling = Tiling(geometry, channels_last)
    write(x, norm, y, offsets, tiling)


def bn_relu_max_pool2d_sums(
    grad_y: Tensor, offsets: Tensor, x: Tensor, norm: Norm, sums: Tensor, geometry: PoolGeometry, channels_last: bool
) -> None:
    """Write sums (4, C), as batch_norm_relu_sums does, of the gradient that the pooling's maxima get."""
    tiling = Tiling(geometry, channels_last)
    add_up(grad_y, offsets, x, norm, sums, tiling)


def bn_relu_max_pool2d_bwd(
    grad_y: Tensor,
    offsets: Tensor,
    x: Tensor,
    norm: Norm,
    means: Tensor | None,
    grad_x: Tensor,
    geometry: PoolGeometry,
    channels_last: bool,
) -> None:
    """Write grad_x; means as in batch_norm_relu_bwd."""
    tiling = Tiling(geometry, channels_last)
    write_gradient(grad_y, offsets, x, norm, means, grad_x, tiling)
