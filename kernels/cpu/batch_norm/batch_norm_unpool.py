"""Launchers of batch_norm_unpool.cpp: batch norm + ReLU + max-unpooling from offsets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..launch import launch
from ..pooling.arguments import are_cells, parameters, refuse_invalid, sizes
from ..pooling.unpool import max_unpool2d_fwd
from .batch_norm import batch_norm_relu_fwd, norm_arguments

if TYPE_CHECKING:
    from ...batch_norm.arguments import NormArguments
    from ...pooling.geometry import PoolGeometry


def batch_norm_relu_max_unpool2d_fwd(
    x: Tensor, offsets: Tensor, norm: NormArguments, y: Tensor, geometry: PoolGeometry, channels_last: bool
) -> None:
    """Write y (N, C, H, W) = max-unpool(relu(batch norm of x)), each element once.

    Raises RuntimeError for an offset outside its window or the plane; it is never used as an address.
    """
    if are_cells(y, x, geometry):
        invalid = launch(
            "batch_norm/batch_norm_unpool", "batch_norm_relu_max_unpool2d_fwd", parameters(x, channels_last),
            x, offsets, *norm_arguments(norm, x), y, *y.shape, *x.shape[-2:],
        )  # fmt: skip
        refuse_invalid(invalid, offsets, y)
        return
    between = torch.empty_like(x)
    batch_norm_relu_fwd(x, norm, between, channels_last)
    max_unpool2d_fwd(between, offsets, y, geometry, channels_last, trusted=False)


def batch_norm_relu_max_unpool2d_sums(
    grad_y: Tensor, offsets: Tensor, x: Tensor, norm: NormArguments, grad_relu_input: Tensor, sums: Tensor,
    geometry: PoolGeometry, channels_last: bool,
) -> None:  # fmt: skip
    """Write grad_relu_input, of x's shape, and its sums (4, C) as batch_norm_relu_sums does.

    batch_norm_relu_bwd computes the gradient of x from it: applying the ReLU's mask again changes nothing.
    """
    launch(
        "batch_norm/batch_norm_unpool", "batch_norm_relu_max_unpool2d_sums", parameters(x, channels_last),
        grad_y, offsets, x, *norm_arguments(norm, x), grad_relu_input, sums, *sizes(grad_y, x, geometry),
    )  # fmt: skip
