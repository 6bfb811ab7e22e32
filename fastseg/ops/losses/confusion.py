"""confusion_matrix: what the operator means, its torch reference and function."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import losses as triton_kernels
from ..operator import Implementation, Operator
from .checks import LABEL_DTYPES
from .upsample import upsample_argmax


def _refuse_strays(pred: Tensor, target: Tensor, num_classes: int, ignore_index: int | None) -> None:
    """ValueError for a label that is no class, where looking makes nobody wait. A GPU's kernel asserts it."""
    if target.device.type != "cpu":
        return
    if ignore_index is not None:
        ignored = target.long() == ignore_index  # as int64: torch would wrap a number that the dtype cannot hold
        pred, target = (labels.masked_fill(ignored, 0) for labels in (pred, target))
    for name, labels in (("pred", pred), ("target", target)):
        least, most = labels.aminmax() if labels.numel() else (0, 0)
        if not 0 <= int(least) <= int(most) < num_classes:
            raise ValueError(f"{name} holds labels outside 0..{num_classes - 1}")


def _empty(pred: Tensor, target: Tensor, num_classes: int, ignore_index: int | None) -> Tensor:
    return target.new_empty((num_classes, num_classes), dtype=torch.int64)


def _kernel(pred: Tensor, target: Tensor, num_classes: int, ignore_index: int | None) -> Tensor:
    _refuse_strays(pred, target, num_classes, ignore_index)
    parts = triton_kernels.confusion.confusion_matrix(pred.contiguous(), target.contiguous(), num_classes, ignore_index)
    return parts.sum(0, dtype=torch.int64)


def _within(labels: Tensor, most: int) -> bool:
    return labels.numel() == 0 or all(0 <= int(end) <= most for end in labels.aminmax())


def _reference(pred: Tensor, target: Tensor, num_classes: int, ignore_index: int | None) -> Tensor:
    pred, target = pred.flatten().long(), target.flatten().long()
    rows = target
    if ignore_index is not None:
        rows = target.masked_fill(target == ignore_index, num_classes)  # a row of their own
    # Looked at thoroughly only where a short look finds something; on a GPU looking would be a wait.
    quick = target.device.type == "cpu" and _within(pred, num_classes - 1) and _within(rows, num_classes)
    if not quick or (ignore_index != num_classes and bool((target == num_classes).any())):
        _refuse_strays(pred, target, num_classes, ignore_index)
    counts = torch.bincount(rows * num_classes + pred, minlength=num_classes * (num_classes + 1))
    return counts[: num_classes**2].view(num_classes, num_classes).clone()


def _uncovered(pred: Tensor, target: Tensor, num_classes: int, ignore_index: int | None) -> str | None:
    for labels in (pred, target):
        if labels.dtype not in LABEL_DTYPES:
            return f"labels of dtype {labels.dtype}"
    return None


CONFUSION_MATRIX = Operator(
    "confusion_matrix(Tensor pred, Tensor target, int num_classes, int? ignore_index) -> Tensor",
    kernels={
        "triton": Implementation(_kernel, _uncovered),
    },
    reference=_reference,
    fake=_empty,
)


def confusion_matrix(
    pred: Tensor, target: Tensor, num_classes: int | None = None, ignore_index: int | None = None
) -> Tensor:
    """Counts of pixels by (truth, prediction): int64 [num_classes, num_classes] on the inputs' device.

    target: integer labels. pred: integer labels of the same shape, or logits (N, C, h, w) for a target (N, H, W): they
    are resized to it in bilinear mode and labelled by upsample_argmax, and num_classes is C. Pixels whose target is
    `ignore_index` are left out. Matrices of several batches add up. Deterministic; nothing waits for the device.

    Raises ValueError for other shapes or dtypes, and on a CPU for a label outside 0..num_classes-1 (on a GPU a
    device-side assertion).
    """
    if target.is_floating_point() or target.is_complex():
        raise ValueError(f"target must hold integer labels, not {target.dtype}")
    if pred.is_floating_point() and pred.dim() == 4:
        if target.shape != (pred.shape[0], *target.shape[-2:]):
            raise ValueError(
                f"target must have shape ({pred.shape[0]}, H, W) for logits of shape {tuple(pred.shape)}, not "
                f"{tuple(target.shape)}"
            )
        if num_classes not in (None, pred.shape[1]):
            raise ValueError(f"num_classes must be the {pred.shape[1]} classes of the logits, not {num_classes}")
        num_classes = pred.shape[1]
        pred = upsample_argmax(pred, target.shape[1:], dtype=torch.uint8 if num_classes <= 256 else torch.int64)
    if pred.is_floating_point() or pred.is_complex():
        raise ValueError(f"pred must hold integer labels, or be logits (N, C, h, w), not {pred.dtype}")
    if pred.shape != target.shape:
        raise ValueError(f"pred and target must have one shape, not {tuple(pred.shape)} and {tuple(target.shape)}")
    if num_classes is None or num_classes < 1:
        raise ValueError(f"num_classes must be the number of classes, not {num_classes}")
    if pred.device != target.device:
        raise ValueError(f"pred and target must be on one device, not on {pred.device} and {target.device}")
    CONFUSION_MATRIX.choose(pred, target, num_classes, ignore_index)
    return CONFUSION_MATRIX(pred, target, num_classes, ignore_index)
