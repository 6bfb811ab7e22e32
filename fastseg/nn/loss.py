"""Cross-entropy losses: alone, with soft Dice, of resized logits, and of a 1x1 classifier's features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import functional as F
from .scripting import refuse_script

LOSS_ARGUMENTS = ("ignore_index", "reduction", "label_smoothing", "normalization", "z_loss")


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """Cross-entropy of logits, on :func:`fastseg.functional.cross_entropy`.

        loss = sum over pixels of w[t] * (log(sum_c exp(x[c])) - x[t]), divided as `normalization` says

    The arguments, reductions and errors of :class:`torch.nn.CrossEntropyLoss`. The loss of half-precision logits is
    computed and returned in float32.

    Args:
        weight: a weight per class, (C,).
        size_average, reduce: deprecated, as in torch.
        ignore_index: pixels with this label do not count.
        reduction: "mean", "sum" or "none".
        label_smoothing: between 0 and 1.
        normalization: the divisor of a mean: "weights" (torch's: the sum of the weights of the labels), "valid" (the
            number of pixels that are not ignored), "pixels" (of all pixels) or "batch" (N).
        z_loss: adds z_loss * lse ** 2 per pixel that is not ignored, where lse is the log-sum-exp of its logits.
        one_pass: whether the forward also computes the gradient. None: all dtypes but float16. See the function.

    Shape:
        - Input: logits (C,), (N, C) or (N, C, d1, ...).
        - Target: class indices (), (N,) or (N, d1, ...), or class probabilities of the input's shape.
        - Output: a scalar, or with reduction "none" the shape of the class indices.

    Example:
        >>> import torch, fastseg
        >>> loss = fastseg.nn.CrossEntropyLoss(ignore_index=255)
        >>> logits = torch.zeros(1, 4, 2, 2)
        >>> target = torch.tensor([[[0, 1], [2, 255]]])
        >>> round(loss(logits, target).item(), 4)  # log(4)
        1.3863

    Note:
        Deterministic.

    Source:
        torch.nn.CrossEntropyLoss
    """

    __prepare_scriptable__ = refuse_script
    normalization, z_loss, one_pass = "weights", 0.0, None  # for instances that swap gave this class

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
    """Cross-entropy plus soft Dice loss, on :func:`fastseg.functional.dice_cross_entropy`.

        loss = ce_weight * cross_entropy + dice_weight * (1 - dice)
        dice = mean over classes of (2 * sum(p * t) + smooth) / (sum(p) + sum(t) + smooth),  p = softmax(x)

    t is 1 where the label is the class and 0 elsewhere.

    Args:
        weight: a weight per class in the cross-entropy, (C,); a buffer.
        ignore_index: pixels with this label count in neither loss.
        batch: sum the Dice over the whole batch and not for each sample.
        include_background: False leaves class 0 out of the Dice.
        smooth: added to numerator and denominator of the Dice.
        dice_weight, ce_weight: weights of the two losses.

    Shape:
        - Input: logits (C,), (N, C) or (N, C, d1, ...).
        - Target: class indices (), (N,) or (N, d1, ...).
        - Output: a scalar.

    Example:
        >>> import torch, fastseg
        >>> loss = fastseg.nn.DiceCrossEntropyLoss(ignore_index=255)
        >>> logits = torch.tensor([[[[9.0, -9.0]], [[-9.0, 9.0]]]], requires_grad=True)
        >>> value = loss(logits, torch.tensor([[[0, 1]]]))
        >>> round(value.item(), 4)
        0.0
        >>> value.backward()

    Note:
        Deterministic.

    Source:
        Milletari et al., "V-Net", 3DV 2016; the combination is that of nnU-Net and MONAI
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


def _extra_repr(module: nn.Module, *names: str) -> str:
    """The named attributes of a module that are not None, for its repr."""
    return ", ".join(f"{name}={getattr(module, name)!r}" for name in names if getattr(module, name) is not None)


class UpsampleCrossEntropyLoss(nn.CrossEntropyLoss):
    """Cross-entropy of resized logits, on :func:`fastseg.functional.upsample_cross_entropy`.

        loss = cross_entropy(interpolate(x), target)

    The resized logits are never stored.

    Args:
        weight, size_average, ignore_index, reduce, reduction, label_smoothing, normalization, z_loss: as in
            :class:`CrossEntropyLoss`.
        size, scale_factor, align_corners, recompute_scale_factor: as in :class:`torch.nn.Upsample`. With neither size
            nor scale_factor the logits are resized to the size of the target.
        mode: "bilinear" or "nearest".

    Shape:
        - Input: logits (N, C, h, w).
        - Target: class indices (N, H, W), or class probabilities (N, C, H, W).
        - Output: a scalar, or (N, H, W) with reduction "none".

    Example:
        >>> import torch, fastseg
        >>> loss = fastseg.nn.UpsampleCrossEntropyLoss(ignore_index=255)
        >>> logits, target = torch.zeros(1, 4, 8, 8), torch.randint(4, (1, 32, 32))
        >>> round(loss(logits, target).item(), 4)  # log(4)
        1.3863

    Note:
        Deterministic on the kernels.

    Source:
        torch.nn.Upsample, torch.nn.CrossEntropyLoss
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
        return _extra_repr(self, *resizing, *LOSS_ARGUMENTS)


class LinearCrossEntropyLoss(nn.CrossEntropyLoss):
    """A 1x1 classifier and its cross-entropy, on :func:`fastseg.functional.linear_cross_entropy`.

        loss = cross_entropy(conv2d(x, linear.weight, linear.bias), target)

    The logits are computed for a chunk of pixels at a time and never stored as a whole. The state_dict keys are those
    of torch.nn.LinearCrossEntropyLoss without `out_features` and `options`: `linear.weight`, `linear.bias`, `weight`.

    Args:
        in_features: number of features D.
        num_classes: number of classes C.
        bias: whether the classifier has a bias.
        device, dtype: of the classifier.
        reduction, weight, ignore_index, label_smoothing, normalization, z_loss: as in :class:`CrossEntropyLoss`.
        chunk: number of pixels in a chunk. None: as many as fit in a CPU's caches or fill a GPU.

    Shape:
        - Input: features (N, D, H, W), (N, D) or (D,).
        - Target: class indices (N, H, W), (N,) or (), or class probabilities of the logits' shape.
        - Output: a scalar, or the shape of the class indices with reduction "none".

    Example:
        >>> import torch, fastseg
        >>> loss = fastseg.nn.LinearCrossEntropyLoss(16, 4)
        >>> value = loss(torch.zeros(1, 16, 8, 8), torch.randint(4, (1, 8, 8)))
        >>> round(value.item(), 4)  # log(4)
        1.3863

    Note:
        Deterministic where torch.mm is.

    Source:
        torch.nn.LinearCrossEntropyLoss
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
        return _extra_repr(self, *LOSS_ARGUMENTS, "chunk")
