"""Launcher of confusion.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ..launch import launch

HOLDERS = {1: "pred", 2: "target"}  # of an out-of-range label, by the kernel's result


def confusion_matrix(pred: Tensor, target: Tensor, classes: int, ignore_index: int | None) -> Tensor:
    """The matrix (1, classes, classes) of int64 that counts the pixels of dense pred and target.

    Raises ValueError for a label outside the classes.
    """
    counts = torch.empty((1, classes, classes), dtype=torch.int64)
    bad = launch(
        "losses/confusion", "confusion_matrix", {}, pred, pred.element_size(), target, target.element_size(),
        target.numel(), classes, ignore_index is not None, ignore_index or 0, counts,
    )  # fmt: skip
    if bad:
        raise ValueError(f"{HOLDERS[bad]} must hold labels from 0 to {classes - 1}")
    return counts
