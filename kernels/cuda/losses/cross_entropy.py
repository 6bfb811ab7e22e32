"""Launcher of cross_entropy.cu, forward: labels alone, without predictions."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..launch import index_type, launch, vector_width

REDUCTIONS = {"none": "NONE", "sum": "SUM", "count": "SUM", "weights": "WEIGHTS", "valid": "VALID"}
ROWS = 4096, 64  # partial sums that are left after each step


def types(logits: Tensor, labels: Tensor, weight: Tensor | None) -> tuple[object, ...]:
    """The parameters of the templates that both passes begin with."""
    return logits.dtype, labels.dtype, None if weight is None else weight.dtype, index_type(logits)


def numbers(logits: Tensor, ignore_index: int, label_smoothing: float, z_loss: float) -> tuple[object, ...]:
    """The arguments that both passes end with."""
    classes = logits.shape[1]
    smoothing = (np.float64(value) for value in (label_smoothing, label_smoothing / classes, z_loss))
    return classes, np.int64(ignore_index), *smoothing


def cross_entropy_fwd(
    logits: Tensor, targets: Tensor, weight: Tensor | None, reduction: str, ignore_index: int, label_smoothing: float,
    z_loss: float, channels_last: bool, loss: Tensor, lse: Tensor, denominator: Tensor, prediction: Tensor,
    counts: Tensor,
) -> None:  # fmt: skip
    """Write loss, lse and, where it is a sum, the denominator: as the Triton launcher of this name, of labels.

    prediction and counts are empty.
    """
    n, classes, h, w = logits.shape
    summed = reduction != "none"
    if channels_last:
        vec, pixels, groups = vector_width(classes, logits), n * h * w, n * h * w
    else:
        vec = vector_width(h * w, logits, targets, lse, *([] if summed else [loss]))
        pixels, groups = h * w, n * h * w // vec
    partials = loss.new_empty((2, groups)) if summed else None
    launch(
        "losses/cross_entropy", "cross_entropy_fwd",
        (*types(logits, targets, weight), channels_last, vec, REDUCTIONS[reduction], label_smoothing != 0), groups,
        logits, targets, weight, None if summed else loss, lse, partials, np.int64(groups), np.int64(pixels),
        *numbers(logits, ignore_index, label_smoothing, z_loss),
    )  # fmt: skip
    if partials is not None:
        _total(partials, loss, denominator, reduction)


def _total(partials: Tensor, loss: Tensor, denominator: Tensor, reduction: str) -> None:
    parameters = (loss.dtype, reduction in ("weights", "valid"))
    for rows in ROWS:
        count = partials.shape[1]
        if count > 2 * rows:
            sums = partials.new_empty((2, rows))
            launch(
                "losses/cross_entropy",
                "add_partials",
                parameters,
                rows,
                partials,
                sums,
                np.int64(count),
                np.int64(rows),
            )
            partials = sums
    divisor = None if reduction == "sum" else denominator
    launch(
        "losses/cross_entropy", "cross_entropy_total", parameters, 1, partials, loss, divisor,
        np.int64(partials.shape[1]),
    )  # fmt: skip
