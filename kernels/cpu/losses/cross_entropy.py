"""Launcher of cross_entropy.cpp: the forward of two passes, and what the launchers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...losses.options import LossInputs, LossOptions, LossResults
from ..launch import launch

REDUCTIONS = {"none": 0, "sum": 1, "count": 2, "weights": 3, "valid": 4}


def parameters(inputs: LossInputs) -> dict[str, torch.dtype]:
    """The macros that cross_entropy.cpp is compiled with."""
    found = {"LOGITS": inputs.logits.dtype}
    return found | {"TARGET": inputs.targets.dtype} if inputs.targets.is_floating_point() else found


def computed_weight(inputs: LossInputs) -> Tensor | None:
    """The weights of the classes in the dtype that the loss is computed in."""
    if inputs.weight is None:
        return None
    return inputs.weight.to(torch.float64 if inputs.logits.dtype == torch.float64 else torch.float32).contiguous()


def problem(inputs: LossInputs, options: LossOptions, channels_last: bool) -> tuple[Any, ...]:
    """The arguments that all kernels of cross_entropy.cpp take."""
    logits, targets, _ = inputs
    n, classes, h, w = logits.shape
    return (
        logits, targets, computed_weight(inputs), n, classes, h * w, channels_last, targets.element_size(),
        options.ignore_index, options.label_smoothing, options.z_loss,
    )  # fmt: skip


def prediction_arguments(prediction: Tensor, counts: Tensor) -> tuple[Any, ...]:
    """Where the predictions go, the size of one, and where the counts go: nowhere if they are not requested."""
    return (prediction, prediction.element_size(), counts) if counts.numel() else (None, 0, None)


def raise_for(bad: int, targets: Tensor) -> None:
    """Raise IndexError if a kernel returned the number of a pixel with an out-of-range label, plus 1."""
    if bad:
        where = tuple(index.item() for index in torch.unravel_index(torch.tensor(bad - 1), targets.shape))
        raise IndexError(f"Target {targets[where].item()} is out of bounds at {where}")


def cross_entropy_fwd(inputs: LossInputs, options: LossOptions, channels_last: bool, results: LossResults) -> None:
    """Fill the results: loss and lse, and denominator, prediction and counts if requested. All tensors are dense.

    Raises IndexError for an out-of-range label.
    """
    bad = launch(
        "losses/cross_entropy", "cross_entropy_fwd", parameters(inputs), *problem(inputs, options, channels_last),
        REDUCTIONS[options.reduction], results.loss, results.lse, results.denominator,
        *prediction_arguments(results.prediction, results.counts),
    )  # fmt: skip
    raise_for(bad, inputs.targets)
