"""The arguments of functions that resize logits: torch.nn.functional.interpolate's, with its rules and exceptions."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.losses.options import Resizing
from ..arguments import FLOAT_DTYPES, MAX_FLOAT_SIDE, require_tensor
from ..operator import register_options
from .checks import LABEL_DTYPE_NAMES, LABEL_DTYPES, one_of, require_float, wrong_shape

register_options(Resizing, "float[]? scales, str mode, bool align_corners")

MODES = ("nearest", "bilinear")


class ResizingArguments(NamedTuple):
    """interpolate's arguments as the caller gave them."""

    size: int | Sequence[int] | None
    scale_factor: float | Sequence[float] | None
    mode: str
    align_corners: bool | None
    recompute_scale_factor: bool | None


def check_map(function: str, input: Any) -> None:
    """Raise torch's exceptions for logits that cannot be resized."""
    require_tensor(function, "input", input)
    require_float(function, input)
    if input.dim() != 4:
        raise NotImplementedError(f"{function}: input must have shape (N, C, h, w), but has {tuple(input.shape)}")
    if 0 in input.shape[1:]:
        raise RuntimeError(f"{function}: input must have classes, rows and columns, but has shape {tuple(input.shape)}")


def _as_two_numbers(function: str, name: str, value: Any, kind: type) -> list[Any]:
    numbers = list(value) if isinstance(value, (list, tuple)) else [value, value]
    if len(numbers) != 2:
        raise ValueError(f"{function}: {name} must be one number or two (height, width), but is {value!r}")
    for number in numbers:
        if not isinstance(number, (kind, torch.SymInt, torch.SymFloat)) or isinstance(number, bool):
            raise TypeError(f"{function}: {name} must be of {kind.__name__} numbers, but is {value!r}")
    return numbers


def check_resizing(
    function: str, input: Tensor, arguments: ResizingArguments, default_size: Sequence[int] | None = None
) -> tuple[list[int], Resizing]:
    """The output's height and width, and how to resize to them. Raises interpolate's exceptions.

    default_size: the size if neither size nor scale_factor is given.
    """
    size, scale_factor, mode, align_corners, recompute_scale_factor = arguments
    if mode not in MODES:
        raise NotImplementedError(f"{function}: mode must be {one_of(MODES)}, but is {mode!r}")
    if mode == "nearest" and align_corners is not None:
        raise ValueError(f"{function}: align_corners must be left out in mode 'nearest', but is {align_corners}")
    scales = None
    if size is not None:
        if scale_factor is not None:
            raise ValueError(f"{function}: only one of size and scale_factor may be given")
        if recompute_scale_factor:
            raise ValueError(f"{function}: recompute_scale_factor must be left out if size is given")
        out = _as_two_numbers(function, "size", size, Integral)
    elif scale_factor is not None:
        scales = [float(scale) for scale in _as_two_numbers(function, "scale_factor", scale_factor, Real)]
        if not all(0 < scale < math.inf for scale in scales):
            raise ValueError(f"{function}: scale_factor must be above 0 and finite, but is {scale_factor!r}")
        out = [torch.sym_int(side * scale) for side, scale in zip(input.shape[2:], scales, strict=True)]
        if recompute_scale_factor:
            scales = None
    elif default_size is not None:
        out = list(default_size)
    else:
        raise ValueError(f"{function}: either size or scale_factor must be given")
    if any(side <= 0 for side in out):
        raise RuntimeError(f"{function}: the output must have rows and columns, but its size would be {tuple(out)}")
    return out, Resizing(scales, mode, bool(align_corners))


def check_target_kind(function: str, input: Tensor, target: Tensor) -> None:
    """Raise unless the target is labels (N, H, W) or class probabilities (N, C, H, W), of any H and W above 0."""
    probabilities = target.is_floating_point()
    if not ((probabilities or target.dtype in LABEL_DTYPES) and target.dim() == (4 if probabilities else 3)):
        raise wrong_shape(
            f"{function}: target must be class indices (N, H, W) of dtype {LABEL_DTYPE_NAMES}, or class "
            f"probabilities (N, C, H, W), for input of shape {tuple(input.shape)}, but is of {target.dtype} and shape "
            f"{tuple(target.shape)}",
            target.shape[:1] != input.shape[:1],
        )


def check_target_size(function: str, input: Tensor, size: Sequence[int], target: Tensor) -> None:
    """Raise unless a target of the right kind has the batch, classes and size of the resized logits."""
    wanted = (*input.shape[: target.dim() - 2], *size)
    if target.shape != wanted:
        raise wrong_shape(
            f"{function}: target must have shape {wanted} for input of shape {tuple(input.shape)} resized to "
            f"{tuple(size)}, but has {tuple(target.shape)}",
            target.shape[0] != input.shape[0],
        )


def unsupported_resizing(
    input: Tensor, size: Sequence[int], dtypes: Collection[torch.dtype] = FLOAT_DTYPES
) -> str | None:
    """What of a resizing the kernels do not support, in words, or None."""
    if input.dtype not in dtypes:
        return f"dtype {input.dtype}"
    if any(side > MAX_FLOAT_SIDE for side in (*input.shape[2:], *size)):
        return f"maps of more than {MAX_FLOAT_SIDE} rows or columns"
    return None
