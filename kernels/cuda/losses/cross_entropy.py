"""Launcher of cross_entropy.cu, forward: for labels, without predictions."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ...losses.options import LossInputs, LossOptions, LossResults
from ..launch import index_type, launch, vector_width

REDUCTIONS = {"none": "NONE", "sum": "SUM", "count": "SUM", "weights": "WEIGHTS", "valid": "VALID"}
ROWS = 4096, 64  # partial sums that remain after each step


def template_types(inputs: LossInputs) -> tuple[object, ...]:
    """The first template parameters of both passes."""
    weight = inputs.weight
    return (
        inputs.logits.dtype,
        inputs.targets.dtype,
        None if weight is None else weight.dtype,
        index_type(inputs.logits),
    )


def scalars(inputs: LossInputs, options: LossOptions) -> tuple[object, ...]:
    """The last arguments of both passes."""
    classes, smoothing = inputs.logits.shape[1], options.label_smoothing
    factors = (np.float64(value) for value in (smoothing, smoothing / classes, options.z_loss))
    return classes, np.int64(options.ignore_index), *factors


def cross_entropy_fwd(inputs: LossInputs, options: LossOptions, channels_last: bool, results: LossResults) -> None:
    """Fill the results, as the Triton launcher of this name does, for labels and without predictions."""
    logits, targets, weight = inputs
    loss, lse, denominator, _, _ = results
    n, classes, h, w = logits.shape
    if channels_last:
        vec, pixels, groups = vector_width(classes, logits), n * h * w, n * h * w
    else:
        vec = vector_width(h * w, logits, targets, lse, *([] if options.is_reduced else [loss]))
        pixels, groups = h * w, n * h * w // vec
    partials = loss.new_empty((2, groups)) if options.is_reduced else None
    launch(
        "losses/cross_entropy", "cross_entropy_fwd",
        (*template_types(inputs), channels_last, vec, REDUCTIONS[options.reduction], options.label_smoothing != 0),
        groups,
        logits, targets, weight, None if options.is_reduced else loss, lse, partials, np.int64(groups),
        np.int64(pixels), *scalars(inputs, options),
    )  # fmt: skip
    if partials is not None:
        _add_up_losses(partials, loss, denominator, options)


def _add_up_losses(partials: Tensor, loss: Tensor, denominator: Tensor, options: LossOptions) -> None:
    parameters = (loss.dtype, options.sums_denominator)
    for rows in ROWS:
        count = partials.shape[1]
        if count > 2 * rows:
            sums = partials.new_empty((2, rows))
            launch(
                "losses/cross_entropy", "add_partials", parameters, rows, partials, sums, np.int64(count),
                np.int64(rows),
            )  # fmt: skip
            partials = sums
    divisor = None if options.reduction == "sum" else denominator
    launch(
        "losses/cross_entropy", "cross_entropy_total", parameters, 1, partials, loss, divisor,
        np.int64(partials.shape[1]),
    )  # fmt: skip
