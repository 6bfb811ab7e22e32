"""Launchers of batch_norm.cpp: batch norm + ReLU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...batch_norm.arguments import NormArguments, RunningStatistics
from ..launch import launch
from ..pooling.arguments import parameters


def norm_arguments(norm: NormArguments, x: Tensor) -> tuple[Any, ...]:
    """What the C++ functions take of `norm`: vectors in the type that x is computed in, eps and relu."""
    vectors = (norm.mean, norm.shift, norm.var, norm.weight, norm.bias)
    return (*[None if t is None else computed(t, x) for t in vectors], norm.eps, norm.relu)


def computed(vector: Tensor, x: Tensor) -> Tensor:
    """A vector in the type that x is computed in."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return vector if vector.dtype == dtype else vector.to(dtype)


def _sizes(x: Tensor) -> tuple[int, int, int]:
    n, c, h, w = x.shape
    return n, c, h * w


def batch_norm_stats(
    x: Tensor, input_bias: Tensor | None, running: RunningStatistics | None, stats: Tensor, channels_last: bool
) -> None:
    """Write stats (3, C): mean, shift and biased variance of x. Update the running statistics.

    input_bias: the bias of the preceding convolution, if it has not been added to x; the running mean includes it.
    """
    buffers = () if running is None else (running.running_mean, running.running_var)
    updated = [computed(buffer, x) for buffer in buffers]
    launch(
        "batch_norm/batch_norm", "batch_norm_stats", parameters(x, channels_last),
        x, None if input_bias is None else computed(input_bias, x), *(updated or (None, None)),
        0.0 if running is None else running.momentum, stats, *_sizes(x),
    )  # fmt: skip
    for buffer, new in zip(buffers, updated, strict=True):
        if new is not buffer:  # of another dtype
            buffer.copy_(new)


def batch_norm_relu_fwd(x: Tensor, norm: NormArguments, y: Tensor, channels_last: bool) -> None:
    """Write y = relu(batch norm of x)."""
    launch(
        "batch_norm/batch_norm", "batch_norm_relu_fwd", parameters(x, channels_last),
        x, *norm_arguments(norm, x), y, *_sizes(x),
    )  # fmt: skip


def batch_norm_relu_sums(grad_y: Tensor, x: Tensor, norm: NormArguments, sums: Tensor, channels_last: bool) -> None:
    """Write sums (4, C): the sums of grad and grad * x_hat over the pixels, and their means.

    grad is the gradient of the ReLU's input.
    """
    launch(
        "batch_norm/batch_norm", "batch_norm_relu_sums", parameters(x, channels_last),
        grad_y, x, *norm_arguments(norm, x), sums, *_sizes(x),
    )  # fmt: skip


def batch_norm_relu_bwd(
    grad_y: Tensor, x: Tensor, norm: NormArguments, means: Tensor | None, grad_x: Tensor, channels_last: bool
) -> None:
    """Write grad_x; means (2, C): of grad and grad * x_hat, or None if the statistics are constants."""
    launch(
        "batch_norm/batch_norm", "batch_norm_relu_bwd", parameters(x, channels_last),
        grad_y, x, *norm_arguments(norm, x), means, grad_x, *_sizes(x),
    )  # fmt: skip
