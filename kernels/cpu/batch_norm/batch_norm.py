"""Launchers of batch_norm.cpp: batch norm with the ReLU after it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..launch import launch
from ..pooling.arguments import parameters


class Norm(NamedTuple):
    """The statistics and parameters of a call, vectors of C: centred = (x - mean) + shift."""

    mean: Tensor
    shift: Tensor | None
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    relu: bool

    def arguments(self, x: Tensor) -> tuple[Any, ...]:
        """What the C++ functions take: vectors in the type that x is computed in, eps and relu."""
        return (*[None if t is None else computed(t, x) for t in self[:5]], self.eps, self.relu)


def computed(vector: Tensor, x: Tensor) -> Tensor:
    """A vector in the type that x is computed in."""
    return vector.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _sizes(x: Tensor) -> tuple[int, int, int]:
    n, c, h, w = x.shape
    return n, c, h * w


def batch_norm_stats(
    x: Tensor, input_bias: Tensor | None, running: tuple[Tensor, Tensor] | None, momentum: float, stats: Tensor,
    channels_last: bool,
) -> None:  # fmt: skip
    """Write stats (3, C), mean, shift and biased variance of x, and move the running mean and variance.

    input_bias: what a convolution before x has not added; the running mean counts it in.
    """
    moved = None if running is None else [computed(t, x) for t in running]
    launch(
        "batch_norm/batch_norm", "batch_norm_stats", parameters(x, channels_last),
        x, None if input_bias is None else computed(input_bias, x), *(moved or (None, None)), momentum, stats,
        *_sizes(x),
    )  # fmt: skip
    for buffer, new in zip(running or (), moved or (), strict=True):
        if new is not buffer:
            buffer.copy_(new)


def batch_norm_relu_fwd(x: Tensor, norm: Norm, y: Tensor, channels_last: bool) -> None:
    """Write y = relu(batch norm of x)."""
    launch(
        "batch_norm/batch_norm", "batch_norm_relu_fwd", parameters(x, channels_last),
        x, *norm.arguments(x), y, *_sizes(x),
    )  # fmt: skip


def batch_norm_relu_sums(grad_y: Tensor, x: Tensor, norm: Norm, sums: Tensor, channels_last: bool) -> None:
    """Write sums (4, C): of grad and grad * x_hat over the pixels, where grad is before the ReLU, and their means."""
    launch(
        "batch_norm/batch_norm", "batch_norm_relu_sums", parameters(x, channels_last),
        grad_y, x, *norm.arguments(x), sums, *_sizes(x),
    )  # fmt: skip


def batch_norm_relu_bwd(
    grad_y: Tensor, x: Tensor, norm: Norm, means: Tensor | None, grad_x: Tensor, channels_last: bool
) -> None:
    """Write grad_x; means (2, C): of grad and grad * x_hat, or None where the statistics are constants."""
    launch(
        "batch_norm/batch_norm", "batch_norm_relu_bwd", parameters(x, channels_last),
        grad_y, x, *norm.arguments(x), means, grad_x, *_sizes(x),
    )  # fmt: skip
