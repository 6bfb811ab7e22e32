"""Launchers of dice_cross_entropy.cpp."""

from __future__ import annotations

from torch import Tensor

from ...losses.options import LossInputs
from ..launch import launch
from .cross_entropy import computed_weight, raise_for


def dice_cross_entropy_fwd(
    inputs: LossInputs, ignore_index: int, channels_last: bool, loss: Tensor, sums: Tensor
) -> None:
    """Write loss (2,), the sums of the pixels' losses and weights, and sums (N, 3, C). All tensors are dense.

    Raises IndexError for an out-of-range label.
    """
    logits, labels, _ = inputs
    n, classes, h, w = logits.shape
    bad = launch(
        "losses/dice_cross_entropy", "dice_cross_entropy_fwd", {"LOGITS": logits.dtype}, logits, labels,
        computed_weight(inputs), n, classes, h * w, channels_last, labels.element_size(), ignore_index, loss, sums,
    )  # fmt: skip
    raise_for(bad, labels)


def dice_cross_entropy_bwd(
    grad_loss: Tensor,
    grad_sums: Tensor,
    inputs: LossInputs,
    ignore_index: int,
    channels_last: bool,
    grad_logits: Tensor,
) -> None:
    """Write the gradient of the logits for the gradients of loss[0] and of sums."""
    logits, labels, _ = inputs
    n, classes, h, w = logits.shape
    launch(
        "losses/dice_cross_entropy", "dice_cross_entropy_bwd", {"LOGITS": logits.dtype}, grad_loss, grad_sums, logits,
        labels, computed_weight(inputs), n, classes, h * w, channels_last, labels.element_size(), ignore_index,
        grad_logits,
    )  # fmt: skip
