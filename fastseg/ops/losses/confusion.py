"""confusion_matrix: its operator, torch reference and function."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import losses as triton_kernels
from ...kernels.cpu import losses as cpu_kernels
from ..operator import Implementation, Operator
from .checks import LABEL_DTYPES, widened
from .upsample import upsample_argmax

NAME = "confusion_matrix"


def _require_classes(pred: Tensor, target: Tensor, num_classes: int, ignore_index: int | None) -> None:
    """Raise ValueError for a label that is not a class.

    CPU only: on a GPU a device-side assertion reports it, because checking here would force a host sync.
    """
    if target.device.type != "cpu":
        return
    if ignore_index is not None:
        ignored = target.long() == ignore_index  # as int64: torch would wrap a number that the dtype cannot hold
        pred, target = (labels.masked_fill(ignored, 0) for labels in (pred, target))
    for name, labels in (("pred", pred), ("target", target)):
        least, most = map(int, labels.aminmax()) if labels.numel() else (0, 0)
        if not 0 <= least <= most < num_classes:
            raise ValueError(
                f"{NAME}: {name} must hold labels from 0 to {num_classes - 1}, but holds labels from {least} to {most}"
            )


def _empty_matrix(pred: Tensor, target: Tensor, num_classes: int, ignore_index: int | None) -> Tensor:
    return target.new_empty((num_classes, num_classes), dtype=torch.int64)


def _kernel(pred: Tensor, target: Tensor, num_classes: int, ignore_index: int | None) -> Tensor:
    _require_classes(pred, target, num_classes, ignore_index)
    parts = triton_kernels.confusion.confusion_matrix(pred.contiguous(), target.contiguous(), num_classes, ignore_index)
    return parts.sum(0, dtype=torch.int64)


def _cpu_kernel(pred: Tensor, target: Tensor, num_classes: int, ignore_index: int | None) -> Tensor:
    dense_pred, dense_target = pred.contiguous(), target.contiguous()
    try:
        return cpu_kernels.confusion.confusion_matrix(dense_pred, dense_target, num_classes, ignore_index)[0]
    except ValueError:
        _require_classes(pred, target, num_classes, ignore_index)  # to name the labels
        raise


def _within(labels: Tensor, most: int) -> bool:
    return labels.numel() == 0 or all(0 <= int(end) <= most for end in labels.aminmax())


def _reference(pred: Tensor, target: Tensor, num_classes: int, ignore_index: int | None) -> Tensor:
    pred, target = pred.flatten().long(), target.flatten().long()
    rows = target
    if ignore_index is not None:
        rows = target.masked_fill(target == ignore_index, num_classes)  # counted in an extra row, which is dropped
    # The full check runs only if this quick one, which does not tell ignored labels from num_classes, finds something.
    valid = target.device.type == "cpu" and _within(pred, num_classes - 1) and _within(rows, num_classes)
    if not valid or (ignore_index != num_classes and bool((target == num_classes).any())):
        _require_classes(pred, target, num_classes, ignore_index)
    counts = torch.bincount(rows * num_classes + pred, minlength=num_classes * (num_classes + 1))
    return counts[: num_classes**2].view(num_classes, num_classes).clone()


def _unsupported(pred: Tensor, target: Tensor, num_classes: int, ignore_index: int | None) -> str | None:
    for labels in (pred, target):
        if labels.dtype not in LABEL_DTYPES:
            return f"labels of dtype {labels.dtype}"
    return None


CONFUSION_MATRIX = Operator(
    "confusion_matrix(Tensor pred, Tensor target, int num_classes, int? ignore_index) -> Tensor",
    kernels={
        "triton": Implementation(_kernel, _unsupported),
        "cpu": Implementation(_cpu_kernel, _unsupported),
    },
    reference=_reference,
    fake=_empty_matrix,
)


def confusion_matrix(
    pred: Tensor, target: Tensor, num_classes: int | None = None, ignore_index: int | None = None
) -> Tensor:
    """Count the pixels of each true class that were predicted as each class.

        matrix[t, p] = sum over pixels of [target = t] * [pred = p]

    The matrices of several batches add up to that of all of them.

    Args:
        pred: predicted labels of any integer dtype, or floating-point logits. Logits are resized to the size of the
            target in bilinear mode, and labelled as upsample_argmax does.
        target: true labels of any integer dtype.
        num_classes: the number of classes. It may be left out for logits.
        ignore_index: pixels with this target do not count, whatever their prediction.

    Shape:
        - pred: any shape, or logits (N, C, h, w).
        - target: the shape of the labels `pred`; for logits (N, H, W).
        - output: (num_classes, num_classes), int64, on the device of the inputs.

    Returns:
        The counts: rows are true classes, columns are predicted ones. ``fastseg.training.metrics.scores`` derives
        accuracy, IoU and mIoU from them.

    Raises:
        ValueError: for other shapes, dtypes and devices, for num_classes that contradicts the logits, and on a CPU for
            a label that is neither a class nor ignored. On a GPU the latter is a device-side assertion.

    Note:
        Deterministic, without atomics and, on the kernels, without a host sync.

    Example:
        >>> import torch, fastseg.functional as FS
        >>> target = torch.tensor([0, 0, 1, 1, 255])
        >>> pred = torch.tensor([0, 1, 1, 1, 0])
        >>> FS.confusion_matrix(pred, target, 2, ignore_index=255)
        tensor([[1, 1],
                [0, 2]])
    """
    pred, target = widened(pred), widened(target)
    if target.is_floating_point() or target.is_complex():
        raise ValueError(f"{NAME}: target must hold integer labels, but is of {target.dtype}")
    if pred.is_floating_point() and pred.dim() == 4:
        if target.shape != (pred.shape[0], *target.shape[-2:]):
            raise ValueError(
                f"{NAME}: target must have shape ({pred.shape[0]}, H, W) for logits of shape {tuple(pred.shape)}, but "
                f"has {tuple(target.shape)}"
            )
        if num_classes not in (None, pred.shape[1]):
            raise ValueError(
                f"{NAME}: num_classes must be the {pred.shape[1]} classes of the logits, but is {num_classes}"
            )
        num_classes = pred.shape[1]
        pred = upsample_argmax(pred, target.shape[1:], dtype=torch.uint8 if num_classes <= 256 else torch.int64)
    if pred.is_floating_point() or pred.is_complex():
        raise ValueError(f"{NAME}: pred must hold integer labels, or be logits (N, C, h, w), but is of {pred.dtype}")
    if pred.shape != target.shape:
        raise ValueError(
            f"{NAME}: pred must have the shape of target, {tuple(target.shape)}, but has {tuple(pred.shape)}"
        )
    if num_classes is None or num_classes < 1:
        raise ValueError(f"{NAME}: num_classes must be the number of classes, but is {num_classes}")
    if pred.device != target.device:
        raise ValueError(f"{NAME}: pred must be on the device of target, {target.device}, but is on {pred.device}")
    CONFUSION_MATRIX.choose(pred, target, num_classes, ignore_index)  # for `explain`: the operator chooses again
    return CONFUSION_MATRIX(pred, target, num_classes, ignore_index)
