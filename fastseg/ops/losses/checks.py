"""Arguments of the losses over classes: what torch refuses is refused by torch's exception, and a sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ...torch_internals import legacy_reduction, warn_of_reduction

LOGITS_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LABEL_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
REDUCTIONS = ("none", "mean", "sum")
NORMALIZATIONS = ("weights", "valid", "pixels", "batch")


def computed(dtype: torch.dtype) -> torch.dtype:
    """What a loss of logits of this dtype is computed and returned in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def one_of(options: Sequence[str]) -> str:
    return f"one of {', '.join(map(repr, options))}"


def checked_reduction(name: str, size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """The reduction that torch takes from its three arguments; ValueError if it is none."""
    if size_average is not None or reduce is not None:
        return legacy_reduction(size_average, reduce)
    if reduction == "elementwise_mean":
        warn_of_reduction(reduction)
        return "mean"
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction must be {one_of(REDUCTIONS)}, but is {reduction!r}")
    return reduction


def check_normalization(name: str, reduction: str, normalization: str) -> None:
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"{name}: normalization must be {one_of(NORMALIZATIONS)}, but is {normalization!r}")
    if reduction != "mean" and normalization != "weights":
        raise ValueError(
            f"{name}: normalization must be left out for reduction {reduction!r}, which divides by nothing, but is "
            f"{normalization!r}"
        )


def pixels_shape(input: Tensor) -> tuple[int, ...]:
    """Of the pixels of logits (C,), (N, C) or (N, C, d1, ...): (), (N,) or (N, d1, ...)."""
    return (input.shape[0], *input.shape[2:]) if input.dim() > 1 else ()


def divided(input: Tensor, target: Tensor, reduction: str, normalization: str) -> tuple[str, int]:
    """What the operators take: ("none" | "sum", 0), or what a mean divides the sum by, and that count if it is known.

    "weights", the sum of the weights of the valid pixels; "valid", their number; "count", a number of the shape alone.
    """
    if reduction != "mean":
        return reduction, 0
    if normalization == "batch":
        return "count", input.shape[0] if input.dim() > 1 else 1
    if normalization == "pixels" or target.is_floating_point():
        return "count", math.prod(pixels_shape(input))
    return normalization, 0


def check_number(name: str, argument: str, value: Any) -> None:
    if not isinstance(value, Real):
        raise TypeError(f"{name}: {argument} must be a float, but is of type {type(value).__name__}")


def check_types(name: str, input: Any, target: Any, weight: Any, ignore_index: Any, label_smoothing: Any = 0.0) -> None:
    for argument, value in (("input", input), ("target", target), ("weight", weight)):
        if not isinstance(value, Tensor) and not (argument == "weight" and value is None):
            raise TypeError(f"{name}: {argument} must be a Tensor, but is of type {type(value).__name__}")
    if not isinstance(ignore_index, Integral) or isinstance(ignore_index, bool):
        raise TypeError(f"{name}: ignore_index must be an int, but is of type {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"{name}: ignore_index must fit in 64 bits, but is {ignore_index}")
    check_number(name, "label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"{name}: label_smoothing must be between 0.0 and 1.0, but is {label_smoothing}")
    if not input.is_floating_point():
        raise NotImplementedError(f"{name}: input must be of a floating-point dtype, but is of {input.dtype}")
    if input.dim() == 0:
        raise RuntimeError(f"{name}: input must have a dimension of classes, but has none")


def check_target(name: str, input: Tensor, target: Tensor, ignore_index: int) -> None:
    """Labels of the pixels' shape, or class probabilities of input's shape."""
    if target.device != input.device:
        raise RuntimeError(f"{name}: target must be on input's device {input.device}, but is on {target.device}")
    if target.is_floating_point() and target.shape == input.shape:
        if ignore_index >= 0:
            raise RuntimeError(
                f"{name}: ignore_index must be negative, which ignores nothing, for class probabilities, but is "
                f"{ignore_index}"
            )
        return
    if target.dtype not in LABEL_DTYPES:
        raise RuntimeError(
            f"{name}: target must be class indices of dtype uint8, int16, int32 or int64, or class probabilities of "
            f"input's shape {tuple(input.shape)}, but is of {target.dtype} and shape {tuple(target.shape)}"
        )
    wanted = pixels_shape(input)
    if target.shape != wanted and not (input.dim() == 1 and target.shape == (1,)):
        other_batch = target.shape[:1] != input.shape[:1] if input.dim() > 1 else target.dim() == 1
        other_batch = other_batch and target.shape != input.shape  # that would be probabilities
        raise (ValueError if other_batch else RuntimeError)(
            f"{name}: target must have shape {wanted} for input of shape {tuple(input.shape)}, but has "
            f"{tuple(target.shape)}" + (": another batch size" if other_batch else "")
        )


def check_weight(name: str, input: Tensor, target: Tensor, weight: Tensor | None) -> None:
    if weight is None:
        return
    classes = input.shape[0 if input.dim() == 1 else 1]
    if weight.numel() != classes:
        raise RuntimeError(
            f"{name}: weight must have one entry for each of the {classes} classes, but has shape {tuple(weight.shape)}"
        )
    if weight.dtype not in (torch.float32, input.dtype):
        raise RuntimeError(f"{name}: weight must be of float32 or input's {input.dtype}, but is of {weight.dtype}")
    if weight.device != input.device:
        raise RuntimeError(f"{name}: weight must be on input's device {input.device}, but is on {weight.device}")
    if weight.requires_grad and torch.is_grad_enabled() and not target.is_floating_point():
        raise RuntimeError(f"{name}: weight must not require a gradient, which the loss of class indices does not have")


def check_prediction(name: str, classes: int, target: Tensor, dtype: torch.dtype) -> None:
    """What a call asks for that predicts classes, in `dtype`, and counts the right ones."""
    if dtype not in (torch.int64, torch.uint8):
        raise ValueError(f"{name}: dtype must be torch.int64 or torch.uint8, but is {dtype}")
    if target.is_floating_point():
        raise RuntimeError(f"{name}: target must be class indices, but is of {target.dtype}")
    if dtype == torch.uint8 and classes > 256:
        raise ValueError(f"{name}: dtype must be torch.int64 for {classes} classes, of which torch.uint8 holds 256")


def refuse_strays(name: str, classes: int, target: Tensor, ignore_index: int) -> None:
    """IndexError for a label that is neither a class nor ignored. On a GPU a device-side assertion says it."""
    if target.device.type != "cpu" or target.is_floating_point() or target.numel() == 0:
        return
    labels = target.long()  # torch would wrap a number of classes that the labels' dtype cannot hold
    stray = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
    if stray.any():
        where = tuple(stray.nonzero()[0].tolist())
        raise IndexError(
            f"{name}: Target {target[where].item()} is out of bounds at {where}: a target must be a class, 0 to "
            f"{classes - 1}, or ignore_index {ignore_index}"
        )
