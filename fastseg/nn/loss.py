"""CrossEntropyLoss, DiceCrossEntropyLoss, UpsampleCrossEntropyLoss and LinearCrossEntropyLoss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import functional as F
from .scripting import refuse_script

LOSS_ARGUMENTS = ("ignore_index", "reduction", "label_smoothing", "normalization", "z_loss")


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


def _shown(module: nn.Module, *names: str) -> str:
    return ", ".join(f"{name}={getattr(module, name)!r}" for name in names if getattr(module, name) is not None)


class UpsampleCrossEntropyLoss(nn.CrossEntropyLoss):
    """nn.CrossEntropyLoss of logits that are resized to the target, on fastseg.functional.upsample_cross_entropy.

    Its arguments in its order, weight being a buffer, and by name torch.nn.Upsample's size, scale_factor, mode
    ("bilinear" or "nearest"), align_corners and recompute_scale_factor; with neither size nor scale_factor the size is
    the target's. normalization, z_loss: as the function's. forward(input (N, C, h, w), target (N, H, W)).
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        size: int | Sequence[int] | None = None,
        scale_factor: float | Sequence[float] | None = None,
        mode: str = "bilinear",
        align_corners: bool | None = None,
        recompute_scale_factor: bool | None = None,
        normalization: str = "weights",
        z_loss: float = 0.0,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.size, self.scale_factor, self.mode = size, scale_factor, mode
        self.align_corners, self.recompute_scale_factor = align_corners, recompute_scale_factor
        self.normalization, self.z_loss = normalization, z_loss

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.upsample_cross_entropy(
            input,
            target,
            weight=self.weight,
            size=self.size,
            scale_factor=self.scale_factor,
            mode=self.mode,
            align_corners=self.align_corners,
            recompute_scale_factor=self.recompute_scale_factor,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            normalization=self.normalization,
            z_loss=self.z_loss,
        )

    def extra_repr(self) -> str:
        resizing = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")
        return _shown(self, *resizing, *LOSS_ARGUMENTS)


class LinearCrossEntropyLoss(nn.CrossEntropyLoss):
    """A 1x1 classifier and its cross-entropy, on fastseg.functional.linear_cross_entropy.

    The arguments and the state_dict's keys are those of torch.nn.LinearCrossEntropyLoss without out_features and
    options: the classifier is `linear`, an nn.Linear(in_features, num_classes, bias), and weight, of the classes, a
    buffer. normalization, z_loss, chunk: as the function's. forward(input (N, D, H, W) or (N, D), target (N, H, W) or
    (N,)).
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        normalization: str = "weights",
        z_loss: float = 0.0,
        chunk: int | None = None,
    ) -> None:
        super().__init__(weight, None, ignore_index, None, reduction, label_smoothing)
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.normalization, self.z_loss, self.chunk = normalization, z_loss, chunk

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            normalization=self.normalization,
            z_loss=self.z_loss,
            chunk=self.chunk,
        )

    def extra_repr(self) -> str:
        return _shown(self, *LOSS_ARGUMENTS, "chunk")
