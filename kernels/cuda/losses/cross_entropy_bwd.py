"""Launcher of cross_entropy.cu, backward."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ...losses.options import LossInputs, LossOptions
from ..launch import launch, vector_width
from .cross_entropy import REDUCTIONS, scalars, template_types


def cross_entropy_bwd(
    grad_loss: Tensor,
    inputs: LossInputs,
    lse: Tensor,
    denominator: Tensor,
    options: LossOptions,
    channels_last: bool,
    grad_logits: Tensor,
) -> None:
    """Write the gradient of the logits from the lse and denominator of cross_entropy_fwd."""
    logits, targets, weight = inputs
    n, classes, h, w = logits.shape
    pixels = n * h * w
    if channels_last:
        vec = vector_width(0, logits, grad_logits)  # groups of the whole tensor, whose end need not be aligned
        groups = -(-logits.numel() // vec)
    else:
        vec = vector_width(h * w, logits, grad_logits)
        groups = pixels // vec
    smoothing = options.label_smoothing
    mass = (weight.to(lse.dtype).sum() * (smoothing / classes)) if smoothing != 0 and weight is not None else None
    launch(
        "losses/cross_entropy", "cross_entropy_bwd",
        (*template_types(inputs), channels_last, vec, REDUCTIONS[options.reduction], smoothing != 0), groups,
        grad_loss, logits, targets, weight, lse, denominator if options.is_mean else None, mass, grad_logits,
        np.int64(groups), np.int64(h * w), np.int64(pixels), *scalars(inputs, options),
    )  # fmt: skip
