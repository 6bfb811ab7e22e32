"""The scores of the segmentation papers, from one confusion matrix."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..functional import confusion_matrix

__all__ = ["Scores", "confusion_matrix", "scores"]


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
