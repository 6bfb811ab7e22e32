"""Weights of the classes in the loss."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .data import CAMVID_CLASS_WEIGHTS, SegmentationDataset

MAX_MASKS = 1024
"""The number of masks that frequencies are counted in."""


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
        return median_frequency_weights(dataset, num_classes, dataset.ignore_index)
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


def class_frequencies(
    dataset: SegmentationDataset, num_classes: int, ignore_index: int, limit: int = MAX_MASKS
) -> Tensor:
    """Return the frequency of each class: its pixels divided by all pixels of the masks in which it occurs.

    Ignored pixels are not counted.

    Args:
        dataset: the dataset whose masks are counted.
        num_classes: number of classes K.
        ignore_index: label of ignored pixels.
        limit: a larger dataset is sampled at this many evenly spaced indices.

    Returns:
        Tensor: float64 (K), with NaN for a class that does not occur.
    """
    pixels = torch.zeros(num_classes, dtype=torch.float64)
    pixels_of_masks = torch.zeros_like(pixels)
    length = len(dataset)
    for index in np.linspace(0, length - 1, min(length, limit)).astype(int).tolist():
        labels = dataset.mask(index)
        counts = torch.bincount(labels[labels != ignore_index], minlength=num_classes).double()
        pixels += counts
        pixels_of_masks += (counts > 0) * counts.sum()
    return pixels / pixels_of_masks


def median_frequency_weights(
    dataset: SegmentationDataset, num_classes: int, ignore_index: int, limit: int = MAX_MASKS
) -> Tensor:
    """Median frequency balancing: the median of the class frequencies divided by the frequency of each class.

    Args:
        dataset, num_classes, ignore_index, limit: as for :func:`class_frequencies`.

    Returns:
        Tensor: float32 (K), with 0 for a class that does not occur.

    Source: Eigen and Fergus, "Predicting Depth, Surface Normals and Semantic Labels", ICCV 2015.
    """
    frequencies = class_frequencies(dataset, num_classes, ignore_index, limit)
    median = torch.from_numpy(np.asarray(np.nanmedian(frequencies.numpy())))
    return (median / frequencies).nan_to_num(0).float()
