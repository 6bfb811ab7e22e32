"""Launchers of cross_entropy.cpp: the forward that writes the gradient too."""

from __future__ import annotations

from torch import Tensor

from ...losses.options import LossInputs, LossOptions, OnePassResults
from ..launch import launch
from .cross_entropy import REDUCTIONS, parameters, prediction_arguments, problem, raise_for


def cross_entropy_one_pass(
    inputs: LossInputs, options: LossOptions, channels_last: bool, results: OnePassResults
) -> None:
    """Fill the results: the loss, and the gradient of the logits for a loss gradient of 1. All tensors are dense.

    Every reduction but "none". In packed_labels an ignored pixel has the label 255 (-1 in int16). Raises IndexError for
    an out-of-range label.
    """
    packed = results.packed_labels
    bad = launch(
        "losses/cross_entropy", "cross_entropy_one_pass", parameters(inputs),
        *problem(inputs, options, channels_last), REDUCTIONS[options.reduction], results.loss, results.grad_logits,
        packed, packed.element_size(), results.denominator, *prediction_arguments(results.prediction, results.counts),
    )  # fmt: skip
    raise_for(bad, inputs.targets)


def cross_entropy_one_pass_bwd(
    grad_loss: Tensor,
    inputs: LossInputs,
    denominator: Tensor,
    options: LossOptions,
    channels_last: bool,
    grad_logits: Tensor,
) -> None:
    """Recompute grad_logits for this gradient of the loss, unless that is 1.

    The targets and options.ignore_index are cross_entropy_one_pass's packed labels and the label of an ignored pixel
    in them, or those that it was given.
    """
    launch(
        "losses/cross_entropy", "cross_entropy_one_pass_bwd", parameters(inputs), grad_loss,
        *problem(inputs, options, channels_last), REDUCTIONS[options.reduction], denominator, grad_logits,
    )  # fmt: skip
