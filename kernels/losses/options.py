"""What the launchers of the losses take, for every backend. No triton here: the other kernels run where it is missing.

The tensors of a call stay together from the operator to the launch: what a loss is computed from (LossInputs), how
(LossOptions, Resizing), and the tensors that a launch fills (LossResults, OnePassResults).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class LossOptions(NamedTuple):
    """How the losses of the pixels are computed and reduced.

    reduction: "none", "sum", or the divisor of a mean: "weights" (the sum of the weights of the pixels that are not
    ignored), "valid" (the number of these pixels) or "count" (`count`, which follows from the shape alone).
    """

    reduction: str
    count: int
    ignore_index: int
    label_smoothing: float
    z_loss: float

    @property
    def is_reduced(self) -> bool:
        """Whether the result is one number."""
        return self.reduction != "none"

    @property
    def is_mean(self) -> bool:
        """Whether the sum of the losses is divided by a denominator."""
        return self.reduction not in ("none", "sum")

    @property
    def sums_denominator(self) -> bool:
        """Whether the denominator is a sum over the pixels, known only after the labels have been read."""
        return self.reduction in ("weights", "valid")


class Resizing(NamedTuple):
    """How a map is resized: torch.nn.functional.interpolate's arguments, apart from the size.

    scales: the factors that source positions are divided by; None: the ratios of the sizes. mode: "bilinear" or
    "nearest".
    """

    scales: Sequence[float] | None
    mode: str
    align_corners: bool


class LossInputs(NamedTuple):
    """Logits (N, C, H, W), targets and class weights (C,) of a loss.

    targets: labels (N, H, W), or class probabilities in the shape and memory format of the logits. For a loss of
    resized logits, H and W are those of the targets only.
    """

    logits: Tensor
    targets: Tensor
    weight: Tensor | None

    @property
    def weight_or_logits(self) -> Tensor:
        """The argument of a kernel that reads weights only if there are some."""
        return self.logits if self.weight is None else self.weight


class LossResults(NamedTuple):
    """The tensors that a forward fills; those that are not requested have no elements.

    loss: (N, H, W) for reduction "none", else a scalar. lse: (terms, N, H, W), the log-sum-exp of each pixel's logits
    in one term or two, and for class probabilities the sum of the pixel's target as the last term. denominator: the
    divisor of a mean; for "count" it is filled already. prediction: (N, H, W), the classes of the largest logits.
    counts: (2,), the numbers of pixels that are predicted right and that are not ignored.
    """

    loss: Tensor
    lse: Tensor
    denominator: Tensor
    prediction: Tensor
    counts: Tensor


class OnePassResults(NamedTuple):
    """The tensors that a forward fills that computes the gradient too; the others are as in LossResults.

    grad_logits: the gradient of the logits for a loss gradient of 1. packed_labels: the labels in one byte (two from
    256 classes on), for a denominator that is a sum over the pixels; else it has no elements.
    """

    loss: Tensor
    grad_logits: Tensor
    packed_labels: Tensor
    denominator: Tensor
    prediction: Tensor
    counts: Tensor
