"""Launchers of batch_norm_pool.cpp: batch norm + ReLU + max-pooling.

Windows that are not cells of 2x2 pixels run as two kernels, with the map between in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..launch import launch
from ..pooling.arguments import are_cells, parameters
from ..pooling.pool import max_pool2d_bwd, max_pool2d_fwd
from .batch_norm import batch_norm_relu_bwd, batch_norm_relu_fwd, batch_norm_relu_sums, norm_arguments

if TYPE_CHECKING:
    from ...batch_norm.arguments import NormArguments
    from ...pooling.geometry import PoolGeometry


def batch_norm_relu_max_pool2d_fwd(
    x: Tensor, norm: NormArguments, y: Tensor, offsets: Tensor | None, geometry: PoolGeometry, channels_last: bool
) -> None:
    """Write y = max-pool(relu(batch norm of x)) and, unless `offsets` is None, the offsets of the maxima."""
    if are_cells(x, y, geometry):
        launch(
            "batch_norm/batch_norm_pool", "batch_norm_relu_max_pool2d_fwd", parameters(x, channels_last),
            x, *norm_arguments(norm, x), y, offsets, *x.shape, *y.shape[-2:],
        )  # fmt: skip
        return
    between = torch.empty_like(x)
    batch_norm_relu_fwd(x, norm, between, channels_last)
    max_pool2d_fwd(between, y, offsets, geometry, channels_last)


def batch_norm_relu_max_pool2d_sums(
    grad_y: Tensor,
    offsets: Tensor,
    x: Tensor,
    norm: NormArguments,
    sums: Tensor,
    geometry: PoolGeometry,
    channels_last: bool,
) -> None:
    """Write sums (4, C) as batch_norm_relu_sums does, for the gradient of the pooling's input."""
    if are_cells(x, grad_y, geometry):
        launch(
            "batch_norm/batch_norm_pool", "batch_norm_relu_max_pool2d_sums", parameters(x, channels_last),
            grad_y, offsets, x, *norm_arguments(norm, x), sums, *x.shape, *grad_y.shape[-2:],
        )  # fmt: skip
        return
    between = torch.empty_like(x)
    max_pool2d_bwd(grad_y, offsets, between, geometry, channels_last)
    batch_norm_relu_sums(between, x, norm, sums, channels_last)


def batch_norm_relu_max_pool2d_bwd(
    grad_y: Tensor, offsets: Tensor, x: Tensor, norm: NormArguments, means: Tensor | None, grad_x: Tensor,
    geometry: PoolGeometry, channels_last: bool,
) -> None:  # fmt: skip
    """Write grad_x; means as in batch_norm_relu_bwd."""
    if are_cells(x, grad_y, geometry):
        launch(
            "batch_norm/batch_norm_pool", "batch_norm_relu_max_pool2d_bwd", parameters(x, channels_last),
            grad_y, offsets, x, *norm_arguments(norm, x), means, grad_x, *x.shape, *grad_y.shape[-2:],
        )  # fmt: skip
        return
    between = torch.empty_like(x)
    max_pool2d_bwd(grad_y, offsets, between, geometry, channels_last)
    batch_norm_relu_bwd(between, x, norm, means, grad_x, channels_last)
