"""Launchers of batch_norm_unpool.cpp: batch norm, ReLU and max-unpooling from offsets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..launch import launch
from ..pooling.arguments import are_cells, parameters, refuse_invalid, sizes
from ..pooling.unpool import max_unpool2d_fwd
from .batch_norm import Norm, batch_norm_relu_fwd

if TYPE_CHECKING:
    from ...pooling.geometry import PoolGeometry


def bn_relu_max_unpool2d_fwd(
    x: Tensor, offsets: Tensor, norm: Norm, y: Tensor, geometry: PoolGeometry, channels_last: bool
) -> None:
    """Write y (N, C, H, W) = max-unpool(relu(batch norm of x)), every element of it.

    Raises RuntimeError for an offset outside its window or the plane; it is never used as an address.
    """
    if are_cells(y, x, geometry):
        invalid = launch(
            "batch_norm/batch_norm_unpool", "bn_relu_max_unpool2d_fwd", parameters(x, channels_last),
            x, offsets, *norm.arguments(x), y, *y.shape, *x.shape[-2:],
        )  # fmt: skip
        refuse_invalid(invalid, offsets, y)
        return
    between = torch.empty_like(x)
    batch_norm_relu_fwd(x, norm, between, channels_last)
    max_unpool2d_fwd(between, offsets, y, geometry, channels_last, trusted=False)


def bn_relu_max_unpool2d_sums(
    grad_y: Tensor, offsets: Tensor, x: Tensor, norm: Norm, grads: Tensor, sums: Tensor, geometry: PoolGeometry,
    channels_last: bool,
) -> None:  # fmt: skip
    """Write grads, like x, what reaches the batch norm before the ReLU, and sums (4, C), as batch_norm_relu_sums does.

    The gradient of x is then batch_norm_relu_bwd's of grads.
    """
    launch(
        "batch_norm/batch_norm_unpool", "bn_relu_max_unpool2d_sums", parameters(x, channels_last),
        grad_y, offsets, x, *norm.arguments(x), grads, sums, *sizes(grad_y, x, geometry),
    )  # fmt: skip
