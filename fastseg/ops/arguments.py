"""Checks of arguments, and the dtypes that the kernels support, for every family."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.shared import INT32_MAX as INT32_MAX  # the operators import it from here

IntOrPair = int | Sequence[int]

HALF_DTYPES = (torch.float16, torch.bfloat16)
FLOAT_DTYPES = (torch.float32, *HALF_DTYPES)
FLOAT_AND_DOUBLE_DTYPES = (*FLOAT_DTYPES, torch.float64)
MAX_FLOAT_SIDE = 2**20  # the largest height or width of maps whose rows and columns kernels compute in float32


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are summed and their statistics are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product or convolution reads x: autocast's if it is on and casts x, else x's own."""
    device = x.device.type
    autocast = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    casts = autocast and x.is_floating_point() and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if casts else x.dtype


def require_tensor(function: str, name: str, value: object) -> None:
    """Raise TypeError unless the argument is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {name} must be a Tensor, but is of type {type(value).__name__}")


def as_pair(value: IntOrPair, function: str, name: str, least: int) -> list[int]:
    """`value` as [height, width], with torch's rules.

    Raises:
        TypeError: if it is neither an int nor a sequence of ints.
        RuntimeError: if it has more than two entries or none, or an entry below `least`.
    """
    if type(value) is int and value >= least:
        return [value, value]
    entries = list(value) if isinstance(value, (tuple, list)) else [value]
    if any(isinstance(entry, (float, str)) or not hasattr(entry, "__index__") for entry in entries):
        raise TypeError(f"{function}: {name} must be an int or two ints, but is {value!r}")
    entries = entries * 2 if len(entries) == 1 else entries
    if len(entries) != 2:
        raise RuntimeError(f"{function}: {name} must be an int or two ints, but is {tuple(entries)}")
    if any(entry < least for entry in entries):
        raise RuntimeError(f"{function}: {name} must be at least {least}, but is {tuple(entries)}")
    return entries


def is_unset(stride: IntOrPair | None) -> bool:
    """Whether the stride defaults to kernel_size: it is None or, as torch allows, an empty sequence."""
    return stride is None or (isinstance(stride, (tuple, list)) and len(stride) == 0)
