"""The arguments of the losses: checks that raise torch's exceptions, and the options that the operators take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.losses.options import LossOptions
from ...torch_internals import legacy_reduction, warn_of_reduction
from ..arguments import require_tensor
from ..operator import register_options

register_options(LossOptions, "str reduction, SymInt count, int ignore_index, float label_smoothing, float z_loss")

LABEL_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
WIDER_DTYPES = {torch.int8: torch.int16, torch.uint16: torch.int32, torch.uint32: torch.int64}
"""The dtypes of LABEL_DTYPES that hold the labels of other dtypes; few operators of torch take unsigned ones."""
LABEL_DTYPE_NAMES = "int8, uint8, int16, uint16, int32, uint32 or int64"
REDUCTIONS = ("none", "mean", "sum")
NORMALIZATIONS = ("weights", "valid", "pixels", "batch")


class LossArguments(NamedTuple):
    """The arguments that the losses share, apart from tensors, as the caller gave them."""

    reduction: str
    ignore_index: int
    label_smoothing: float
    normalization: str
    z_loss: float


def number_of_classes(logits: Tensor) -> int:
    """C of logits (C,), (N, C) or (N, C, d1, ...)."""
    return logits.shape[0 if logits.dim() == 1 else 1]


def pixels_shape(logits: Tensor) -> tuple[int, ...]:
    """The shape of the labels of logits (C,), (N, C) or (N, C, d1, ...): (), (N,) or (N, d1, ...)."""
    return (logits.shape[0], *logits.shape[2:]) if logits.dim() > 1 else ()


def one_of(options: Sequence[str]) -> str:
    """The options for an error message."""
    return f"one of {', '.join(map(repr, options))}"


def wrong_shape(message: str, other_batch: bool) -> Exception:
    """The exception for a wrong shape: torch raises ValueError for another batch size, else RuntimeError."""
    return ValueError(f"{message}: another batch size") if other_batch else RuntimeError(message)


# --- options ---------------------------------------------------------------------------------------------------------


def checked_reduction(function: str, size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """The reduction that torch derives from its three arguments. Raises ValueError for an unknown one."""
    if size_average is not None or reduce is not None:
        return legacy_reduction(size_average, reduce)
    if reduction == "elementwise_mean":
        warn_of_reduction(reduction)
        return "mean"
    if reduction not in REDUCTIONS:
        raise ValueError(f"{function}: reduction must be {one_of(REDUCTIONS)}, but is {reduction!r}")
    return reduction


def require_number(function: str, name: str, value: Any) -> None:
    """Raise TypeError unless the argument is a real number."""
    if not isinstance(value, Real):
        raise TypeError(f"{function}: {name} must be a float, but is of type {type(value).__name__}")


def _check_normalization(function: str, reduction: str, normalization: str) -> None:
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"{function}: normalization must be {one_of(NORMALIZATIONS)}, but is {normalization!r}")
    if reduction != "mean" and normalization != "weights":
        raise ValueError(
            f"{function}: normalization must be left out for reduction {reduction!r}, which divides by nothing, but is "
            f"{normalization!r}"
        )


def check_types(function: str, input: Any, target: Any, weight: Any, arguments: LossArguments) -> None:
    """Raise torch's exceptions for wrong types and values, apart from the shapes of the tensors."""
    require_tensor(function, "input", input)
    require_tensor(function, "target", target)
    if weight is not None:
        require_tensor(function, "weight", weight)
    ignore_index, label_smoothing = arguments.ignore_index, arguments.label_smoothing
    if not isinstance(ignore_index, Integral) or isinstance(ignore_index, bool):
        raise TypeError(f"{function}: ignore_index must be an int, but is of type {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"{function}: ignore_index must fit in 64 bits, but is {ignore_index}")
    require_number(function, "label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"{function}: label_smoothing must be between 0.0 and 1.0, but is {label_smoothing}")
    require_float(function, input)
    if input.dim() == 0:
        raise RuntimeError(f"{function}: input must have a dimension of classes, but has none")
    _check_normalization(function, arguments.reduction, arguments.normalization)
    require_number(function, "z_loss", arguments.z_loss)


def loss_options(
    function: str, logits: Tensor, target: Tensor, weight: Tensor | None, arguments: LossArguments
) -> LossOptions:
    """The options for the operators. Raises torch's exceptions unless target and weight fit the logits.

    Only the shape, dtype and device of `logits` are read.
    """
    _check_target(function, logits, target, arguments.ignore_index)
    _check_weight(function, logits, target, weight)
    reduction, count = arguments.reduction, 0
    if reduction == "mean":
        reduction = arguments.normalization
        if reduction == "batch":
            reduction, count = "count", logits.shape[0] if logits.dim() > 1 else 1
        elif reduction == "pixels" or target.is_floating_point():
            reduction, count = "count", math.prod(pixels_shape(logits))
    return LossOptions(
        reduction, count, int(arguments.ignore_index), float(arguments.label_smoothing), float(arguments.z_loss)
    )


# --- tensors ---------------------------------------------------------------------------------------------------------


def require_float(function: str, input: Tensor) -> None:
    """Raise NotImplementedError unless the logits are of a floating-point dtype."""
    if not input.is_floating_point():
        raise NotImplementedError(f"{function}: input must be of a floating-point dtype, but is of {input.dtype}")


def widened(labels: Any) -> Any:
    """The labels in a dtype that kernels and torch take; what is no label is returned as it is, for the checks."""
    dtype = WIDER_DTYPES.get(labels.dtype) if isinstance(labels, Tensor) else None
    return labels if dtype is None else labels.to(dtype)


def whole_labels(function: str, target: Any, classes: int, ignore_index: int) -> Any:
    """Class indices from a floating-point target of whole numbers, as libraries of binary and volume masks pass them.

    Raises RuntimeError for half precision, in which neighbouring numbers are one, and on a CPU for a number that is not
    whole. On a GPU such a number becomes a label out of range, which a device-side assertion reports, because checking
    here would force a host sync.
    """
    if not (isinstance(target, Tensor) and target.is_floating_point()):
        return target
    if target.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(
            f"{function}: target must be class indices, also as whole numbers of float32 or float64, but is of "
            f"{target.dtype}"
        )
    is_whole = target == target.round()
    if target.device.type == "cpu" and not bool(is_whole.all()):
        where = tuple((~is_whole).nonzero()[0].tolist())
        raise RuntimeError(
            f"{function}: target must be class indices, but holds {target[where].item()} at {where}, which is not whole"
        )
    outside = classes if ignore_index != classes else classes + 1
    return torch.where(is_whole, target, outside).long()


def require_labels(function: str, target: Tensor) -> None:
    """Raise RuntimeError for class probabilities, in a function that takes only class indices."""
    if target.is_floating_point():
        raise RuntimeError(f"{function}: target must be class indices, but is of {target.dtype}")


def _check_target(function: str, logits: Tensor, target: Tensor, ignore_index: int) -> None:
    """Class indices in the shape of the pixels, or class probabilities in the shape of the logits."""
    if target.device != logits.device:
        raise RuntimeError(f"{function}: target must be on input's device {logits.device}, but is on {target.device}")
    if target.is_floating_point() and target.shape == logits.shape:
        if ignore_index >= 0:
            raise RuntimeError(
                f"{function}: ignore_index must be negative, which ignores nothing, for class probabilities, but is "
                f"{ignore_index}"
            )
        return
    if target.dtype not in LABEL_DTYPES:
        raise RuntimeError(
            f"{function}: target must be class indices of dtype {LABEL_DTYPE_NAMES}, or class probabilities of "
            f"input's shape {tuple(logits.shape)}, but is of {target.dtype} and shape {tuple(target.shape)}"
        )
    wanted = pixels_shape(logits)
    if target.shape != wanted and not (logits.dim() == 1 and target.shape == (1,)):
        other_batch = target.shape[:1] != logits.shape[:1] if logits.dim() > 1 else target.dim() == 1
        raise wrong_shape(
            f"{function}: target must have shape {wanted} for input of shape {tuple(logits.shape)}, but has "
            f"{tuple(target.shape)}",
            other_batch and target.shape != logits.shape,  # that would be the shape of probabilities
        )


def _check_weight(function: str, logits: Tensor, target: Tensor, weight: Tensor | None) -> None:
    if weight is None:
        return
    classes = number_of_classes(logits)
    if weight.numel() != classes:
        raise RuntimeError(
            f"{function}: weight must have one entry for each of the {classes} classes, but has shape "
            f"{tuple(weight.shape)}"
        )
    if weight.dtype not in (torch.float32, logits.dtype):
        raise RuntimeError(f"{function}: weight must be of float32 or input's {logits.dtype}, but is of {weight.dtype}")
    if weight.device != logits.device:
        raise RuntimeError(f"{function}: weight must be on input's device {logits.device}, but is on {weight.device}")
    if weight.requires_grad and torch.is_grad_enabled() and not target.is_floating_point():
        raise RuntimeError(
            f"{function}: weight must not require a gradient, which the loss of class indices does not have"
        )


def check_prediction(function: str, classes: int, target: Tensor, dtype: torch.dtype) -> None:
    """Raise unless a call that also predicts classes, in `dtype`, can do so and can count the right ones."""
    if dtype not in (torch.int64, torch.uint8):
        raise ValueError(f"{function}: dtype must be torch.int64 or torch.uint8, but is {dtype}")
    require_labels(function, target)
    if dtype == torch.uint8 and classes > 256:
        raise ValueError(f"{function}: dtype must be torch.int64 for {classes} classes, of which torch.uint8 holds 256")


def require_labels_in_range(function: str, classes: int, target: Tensor, ignore_index: int) -> None:
    """Raise IndexError for a label that is neither a class nor ignore_index.

    CPU only: on a GPU a device-side assertion reports it, because checking here would force a host sync.
    """
    if target.device.type != "cpu" or target.is_floating_point() or target.numel() == 0:
        return
    labels = target.long()  # torch would wrap a number of classes that the labels' dtype cannot hold
    outside = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
    if outside.any():
        where = tuple(outside.nonzero()[0].tolist())
        raise IndexError(
            f"{function}: Target {target[where].item()} is out of bounds at {where}: a target must be a class, 0 to "
            f"{classes - 1}, or ignore_index {ignore_index}"
        )
