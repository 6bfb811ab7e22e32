"""Losses over every pixel, and what reads logits as they do, in C++ for the CPU."""

from typing import TYPE_CHECKING

from ...lazy import submodules

if TYPE_CHECKING:
    from . import (
        confusion,
        cross_entropy,
        cross_entropy_bwd,
        cross_entropy_one_pass,
        dice_cross_entropy,
        upsample,
        upsample_cross_entropy,
    )

__all__ = [
    "confusion",
    "cross_entropy",
    "cross_entropy_bwd",
    "cross_entropy_one_pass",
    "dice_cross_entropy",
    "upsample",
    "upsample_cross_entropy",
]
__getattr__ = submodules(__name__, __all__)
