"""Launchers of upsample_cross_entropy.cpp."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...losses.options import LossInputs, LossOptions, LossResults, Resizing
from ..launch import launch
from .cross_entropy import REDUCTIONS, computed_weight, prediction_arguments, raise_for
from .upsample import map_arguments

NAME = "losses/upsample_cross_entropy"


def _problem(inputs: LossInputs, resizing: Resizing, options: LossOptions) -> tuple[Any, ...]:
    low, target, _ = inputs
    return (
        *map_arguments(low, target.shape[1:], resizing), target, target.element_size(), options.ignore_index,
        computed_weight(inputs), options.label_smoothing, options.z_loss, REDUCTIONS[options.reduction],
    )  # fmt: skip


def upsample_cross_entropy_fwd(
    inputs: LossInputs, resizing: Resizing, options: LossOptions, results: LossResults, gradient: Tensor | None = None
) -> None:
    """Fill the results of the logits (N, C, h, w), of any strides, resized to the labels' H x W.

    gradient: receives the gradient of the sum of the losses, in the dtype of the losses; results.lse may have no
    elements then. Raises IndexError for an out-of-range label.
    """
    bad = launch(
        NAME, "upsample_cross_entropy_fwd", {"LOGITS": inputs.logits.dtype}, *_problem(inputs, resizing, options),
        results.loss, results.lse if results.lse.numel() else None, results.denominator,
        *prediction_arguments(results.prediction, results.counts),
        gradient, *((0,) * 4 if gradient is None else gradient.stride()),
    )  # fmt: skip
    raise_for(bad, inputs.targets)


def upsample_cross_entropy_bwd(
    grad_loss: Tensor,
    inputs: LossInputs,
    lse: Tensor,
    denominator: Tensor,
    resizing: Resizing,
    options: LossOptions,
    grad_low: Tensor,
) -> None:
    """Write the gradient of the logits from the lse and denominator of upsample_cross_entropy_fwd."""
    launch(
        NAME, "upsample_cross_entropy_bwd", {"LOGITS": inputs.logits.dtype}, grad_loss,
        *_problem(inputs, resizing, options), lse, denominator, grad_low, *grad_low.stride(),
    )  # fmt: skip
