"""Weights of the classes in the loss."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .class_names import CAMVID_CLASS_WEIGHTS
from .data import DigitScenes, SegmentationDataset

COUNTED_SCENES = 1024
"""The number of generated scenes that frequencies are counted in; of files all are counted."""


def class_weights(spec: str, dataset: SegmentationDataset) -> Tensor | None:
    """Return the `weight` argument of the cross-entropy loss.

    Args:
        spec: ``"none"``; ``"median-frequency"``, see :func:`median_frequency_weights`; ``"camvid"``, the weights that
            SegNet's authors published; or comma-separated numbers such as ``"0.5,1,2"``.
        dataset: the training data.

    Returns:
        Tensor or None: float32 (K) for K classes; None for ``"none"``.

    Raises:
        ValueError: `spec` is none of these, or has another number of weights than the dataset has classes.
    """
    num_classes = len(dataset.classes)
    if spec == "none":
        return None
    if spec == "median-frequency":
        return median_frequency_weights(label_counts(dataset))
    try:
        weights = CAMVID_CLASS_WEIGHTS if spec == "camvid" else [float(weight) for weight in spec.split(",")]
    except ValueError:
        raise ValueError(
            f"class_weights must be none, median-frequency, camvid or w0,w1,..., but is {spec!r}"
        ) from None
    if len(weights) != num_classes or not all(0 <= weight < math.inf for weight in weights):
        raise ValueError(
            f"class_weights must be {num_classes} finite numbers of at least 0, one per class, but is {spec}"
        )
    return torch.tensor(weights)


def label_counts(dataset: SegmentationDataset) -> Tensor:
    """Return the pixels of each class in each mask, int64 (N, K); ignored pixels are not counted.

    Of digit scenes COUNTED_SCENES are counted, evenly spaced; of files all, in the check that comes before training.
    """
    num_classes = len(dataset.classes)
    if not isinstance(dataset, DigitScenes):
        return torch.from_numpy(dataset.check().counts(num_classes))
    chosen = np.linspace(0, len(dataset) - 1, min(len(dataset), COUNTED_SCENES)).astype(int).tolist()
    return torch.stack([torch.bincount(dataset.mask(index).flatten(), minlength=num_classes) for index in chosen])


def class_frequencies(counts: Tensor) -> Tensor:
    """Return the frequency of each class: its pixels divided by all pixels of the masks in which it occurs.

    Shape:
        - counts: (N, K), see :func:`label_counts`.
        - output: float64 (K), with NaN for a class that does not occur.
    """
    counts = counts.double()
    return counts.sum(0) / ((counts > 0) * counts.sum(1, keepdim=True)).sum(0)


def median_frequency_weights(counts: Tensor) -> Tensor:
    """Median frequency balancing: the median of the class frequencies divided by the frequency of each class.

    Shape:
        - counts: (N, K), see :func:`label_counts`.
        - output: float32 (K), with 0 for a class that does not occur.

    Source: Eigen and Fergus, "Predicting Depth, Surface Normals and Semantic Labels", ICCV 2015.
    """
    frequencies = class_frequencies(counts)
    median = torch.from_numpy(np.asarray(np.nanmedian(frequencies.numpy())))
    return (median / frequencies).nan_to_num(0).float()
