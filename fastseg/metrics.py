"""The scores of the segmentation papers, from one confusion matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def confusion_matrix(pred: Tensor, target: Tensor, num_classes: int, ignore_index: int | None = None) -> Tensor:
    """Counts of pixels by (truth, prediction): int64 [num_classes, num_classes] on the inputs' device.

    pred and target are integer tensors of one shape; pixels whose target is `ignore_index` are left out. Matrices of
    several batches add up. Raises ValueError for other shapes or dtypes and for a label outside 0..num_classes-1.
    """
    if pred.shape != target.shape:
        raise ValueError(f"pred and target must have one shape, not {tuple(pred.shape)} and {tuple(target.shape)}")
    for name, labels in (("pred", pred), ("target", target)):
        if labels.is_floating_point() or labels.is_complex():
            raise ValueError(f"{name} must hold integer labels, not {labels.dtype}")
    pred, target = pred.flatten().long(), target.flatten().long()
    if ignore_index is not None:
        valid = target != ignore_index
        pred, target = pred[valid], target[valid]
    for name, labels in (("pred", pred), ("target", target)):
        if labels.numel() and not 0 <= labels.min() <= labels.max() < num_classes:
            raise ValueError(f"{name} holds labels outside 0..{num_classes - 1}")
    counts = torch.bincount(target * num_classes + pred, minlength=num_classes * num_classes)
    return counts.view(num_classes, num_classes)


@dataclass(frozen=True)
class Scores:
    """Fractions in 0..1; NaN where there was nothing to score."""

    global_accuracy: float
    """Correct pixels over all pixels."""
    class_accuracy: float
    """Each class's correct pixels over its true pixels, averaged over the classes that occur in the truth."""
    iou: tuple[float, ...]
    """Each class's intersection over union; NaN for a class absent from both truth and prediction."""
    miou: float
    """Mean of `iou` over the classes that are not absent."""
    frequency_weighted_iou: float
    """`iou` weighted by each class's share of the true pixels."""


def scores(matrix: Tensor) -> Scores:
    """The scores of a confusion matrix (rows truth, columns prediction), computed in float64."""
    matrix = matrix.double().cpu()
    hits, truth, predicted = matrix.diag(), matrix.sum(1), matrix.sum(0)
    iou = hits / (truth + predicted - hits)
    return Scores(
        global_accuracy=(hits.sum() / truth.sum()).item(),
        class_accuracy=(hits / truth).nanmean().item(),
        iou=tuple(iou.tolist()),
        miou=iou.nanmean().item(),
        frequency_weighted_iou=((truth * iou).nansum() / truth.sum()).item(),
    )
