"""CrossEntropyLoss and DiceCrossEntropyLoss."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional as F
from .scripting import refuse_script


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss on fastseg.functional.cross_entropy: same arguments, reductions, errors.

    forward(input (N, C, H, W) logits or any shape torch takes, target of class indices or probabilities). The loss of
    half-precision logits comes in float32. normalization, z_loss, one_pass: the function's.
    """

    __prepare_scriptable__ = refuse_script
    normalization, z_loss, one_pass = "weights", 0.0, None  # of a torch module that is swapped for this one

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        normalization: str = "weights",
        z_loss: float = 0.0,
        one_pass: bool | None = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.normalization, self.z_loss, self.one_pass = normalization, z_loss, one_pass

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            normalization=self.normalization,
            z_loss=self.z_loss,
            one_pass=self.one_pass,
        )


class DiceCrossEntropyLoss(nn.Module):
    """fastseg.functional.dice_cross_entropy with its arguments; weight, of the cross-entropy, is a buffer.

    forward(input (N, C, H, W) logits or any shape that cross_entropy takes, target of class indices).
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        batch: bool = False,
        include_background: bool = True,
        smooth: float = 1e-5,
        dice_weight: float = 1.0,
        ce_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.ignore_index, self.batch, self.include_background = ignore_index, batch, include_background
        self.smooth, self.dice_weight, self.ce_weight = smooth, dice_weight, ce_weight

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.dice_cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            batch=self.batch,
            include_background=self.include_background,
            smooth=self.smooth,
            dice_weight=self.dice_weight,
            ce_weight=self.ce_weight,
        )

    def extra_repr(self) -> str:
        names = ("ignore_index", "batch", "include_background", "smooth", "dice_weight", "ce_weight")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)
