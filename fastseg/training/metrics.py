"""The scores of the segmentation papers, computed from one confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """Segmentation scores, each a fraction from 0 to 1, or NaN if there was nothing to score."""

    global_accuracy: float
    """Correct pixels divided by all pixels."""
    class_accuracy: float
    """Per class, correct pixels divided by its ground-truth pixels; averaged over the classes in the ground truth."""
    iou: tuple[float, ...]
    """Intersection over union per class. NaN for a class that is in neither ground truth nor prediction."""
    miou: float
    """Mean of `iou` over the classes for which it is not NaN."""
    frequency_weighted_iou: float
    """`iou` weighted by each class's fraction of the ground-truth pixels."""

    def as_dict(self, classes: Sequence[str]) -> dict[str, Any]:
        """The scores in a form that JSON can represent: `iou` by class name, and None in place of NaN.

        Args:
            classes: the names of the classes, in order.
        """
        names = ("miou", "global_accuracy", "class_accuracy", "frequency_weighted_iou")
        single = {name: _or_none(getattr(self, name)) for name in names}
        return single | {"iou": {name: _or_none(value) for name, value in zip(classes, self.iou, strict=True)}}


def _or_none(value: float) -> float | None:
    """The number, or None for NaN."""
    return None if math.isnan(value) else value


def scores(matrix: Tensor) -> Scores:
    r"""Compute the scores of a confusion matrix, in float64.

    With :math:`n_{ij}` pixels of class *i* predicted as class *j*, the IoU of class *i* is
    :math:`n_{ii} / (\sum_j n_{ij} + \sum_j n_{ji} - n_{ii})`.

    Args:
        matrix: pixel counts; rows are ground truth and columns predictions, as
            :func:`fastseg.functional.confusion_matrix` returns them.

    Shape:
        - matrix: (K, K) for K classes.

    Example::

        >>> import torch
        >>> from fastseg.functional import confusion_matrix
        >>> from fastseg.training.metrics import scores
        >>> pred, target = torch.tensor([[0, 1], [1, 1]]), torch.tensor([[0, 0], [1, 1]])
        >>> result = scores(confusion_matrix(pred, target, 2))
        >>> f"{result.global_accuracy:.2f} {result.miou:.2f}"
        '0.75 0.58'

    Source: Long, Shelhamer and Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015.
    """
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
