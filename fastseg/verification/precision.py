"""How torch's convolutions, and the kernels that replace them, multiply float32: exactly, or rounded to TF32.

This module is the one place that changes the setting. torch has one for convolutions and one for recurrent networks,
both "tf32" by default, and an older switch for both, `torch.backends.cudnn.allow_tf32`, that raises when it is read
while the three disagree. So all three are set together.

What was set is restored by its value. torch's first setting also follows a later `torch.backends.fp32_precision`, which
no setting does that was ever set; the same is true after torch's own `torch.backends.cudnn.flags`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

PRECISIONS = ("ieee", "tf32")
TF32_EPSILON = 2.0**-10
"""The distance from 1 to the next TF32 number."""


def in_force() -> str:
    """The precision in which convolutions multiply float32 now: "ieee" or "tf32"."""
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


@contextlib.contextmanager
def convolving(precision: str) -> Iterator[None]:
    """Multiply float32 in this precision in convolutions, for the duration of a ``with`` block.

    Args:
        precision: "ieee" or "tf32".

    Raises:
        ValueError: for another precision.

    Example:
        >>> with convolving("ieee"):
        ...     in_force()
        'ieee'
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}, but is {precision!r}")
    before = _settings()
    older = _older_switch()
    _set((precision, precision), precision == "tf32")
    try:
        yield
    finally:
        _set(before, older)


def _settings() -> tuple[str, str]:
    return torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.rnn.fp32_precision


def _set(settings: tuple[str, str], older: bool) -> None:
    torch.backends.cudnn.allow_tf32 = older  # first: it also sets the two others
    torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.rnn.fp32_precision = settings


def _older_switch() -> bool:
    """The value of torch.backends.cudnn.allow_tf32. Where reading it raises, it is found by setting the two others."""
    with contextlib.suppress(RuntimeError):
        return torch.backends.cudnn.allow_tf32
    before = _settings()
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.rnn.fp32_precision = "tf32"
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:  # it disagrees with both
        return False
    finally:
        torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.rnn.fp32_precision = before
