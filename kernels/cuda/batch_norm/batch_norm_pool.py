"""Launchers of batch_norm_pool.cu: batch norm + ReLU + max-pooling."""

from __future__ import annotations

from torch import Tensor

from ...batch_norm.arguments import NormArguments
from ...pooling.geometry import PoolGeometry
from ..pooling.tiling import Tiling
from .common import reduce_gradient, write_gradient, write_output


def batch_norm_relu_max_pool2d_fwd(
    x: Tensor, norm: NormArguments, y: Tensor, offsets: Tensor | None, geometry: PoolGeometry, channels_last: bool
) -> None:
    """Write y = max-pool(relu(batch norm of x)) and, unless `offsets` is None, the offsets of the maxima."""
    write_output(x, norm, y, offsets, Tiling(geometry, channels_last))


def batch_norm_relu_max_pool2d_sums(
    grad_y: Tensor, offsets: Tensor, x: Tensor, norm: NormArguments, sums: Tensor, geometry: PoolGeometry,
    channels_last: bool,
) -> None:  # fmt: skip
    """Write sums (4, C) as batch_norm_relu_sums does, for the gradient of the pooling's input."""
    reduce_gradient(grad_y, offsets, x, norm, sums, Tiling(geometry, channels_last))


def batch_norm_relu_max_pool2d_bwd(
    grad_y: Tensor, offsets: Tensor, x: Tensor, norm: NormArguments, means: Tensor | None, grad_x: Tensor,
    geometry: PoolGeometry, channels_last: bool,
) -> None:  # fmt: skip
    """Write grad_x; means as in batch_norm_relu_bwd."""
    write_gradient(grad_y, offsets, x, norm, means, grad_x, Tiling(geometry, channels_last))
