"""Launcher of cross_entropy.cpp: the backward of two passes."""

from __future__ import annotations

from torch import Tensor

from ...losses.options import LossInputs, LossOptions
from ..launch import launch
from .cross_entropy import REDUCTIONS, parameters, problem


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
    launch(
        "losses/cross_entropy", "cross_entropy_bwd", parameters(inputs), grad_loss,
        *problem(inputs, options, channels_last), lse, denominator, REDUCTIONS[options.reduction], grad_logits,
    )  # fmt: skip
