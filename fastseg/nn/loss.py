"""CrossEntropyLoss."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional as F


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss on fastseg.functional.cross_entropy: same arguments, reductions, errors.

    forward(input (N, C, H, W) logits or any shape torch takes, target of class indices or probabilities). The loss of
    half-precision logits comes in float32.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
