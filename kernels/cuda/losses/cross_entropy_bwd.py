"""Launcher of cross_entropy.cu, the gradient."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..launch import launch, vector_width
from .cross_entropy import REDUCTIONS, numbers, types


def cross_entropy_bwd(
    grad_loss: Tensor, logits: Tensor, targets: Tensor, weight: Tensor | None, lse: Tensor, denominator: Tensor,
    reduction: str, ignore_index: int, label_smoothing: float, z_loss: float, channels_last: bool, grad_logits: Tensor,
) -> None:  # fmt: skip
    """Write the gradient of the logits; the arguments are cross_entropy_fwd's."""
    n, classes, h, w = logits.shape
    pixels = n * h * w
    if channels_last:
        vec = vector_width(0, logits, grad_logits)  # chunks of the whole tensor, whatever divides
        groups = -(-logits.numel() // vec)
    else:
        vec = vector_width(h * w, logits, grad_logits)
        groups = pixels // vec
    smoothed = label_smoothing != 0
    mass = (weight.to(lse.dtype).sum() * (label_smoothing / classes)) if smoothed and weight is not None else None
    divisor = denominator if reduction not in ("none", "sum") else None
    launch(
        "losses/cross_entropy", "cross_entropy_bwd",
        (*types(logits, targets, weight), channels_last, vec, REDUCTIONS[reduction], smoothed), groups,
        grad_loss, logits, targets, weight, lse, divisor, mass, grad_logits, np.int64(groups), np.int64(h * w),
        np.int64(pixels), *numbers(logits, ignore_index, label_smoothing, z_loss),
    )  # fmt: skip
