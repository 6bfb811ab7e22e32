"""Losses over every pixel, and what reads logits as they do, in Triton."""

from typing import TYPE_CHECKING

from ..lazy import submodules

if TYPE_CHECKING:
    from . import (
        common,
        confusion,
        cross_entropy,
        cross_entropy_bwd,
        cross_entropy_one_pass,
        cross_entropy_planes,
        dice_cross_entropy,
        options,
        softmax_moments,
        upsample,
        upsample_cross_entropy,
    )

__all__ = [
    "common",
    "confusion",
    "cross_entropy",
    "cross_entropy_bwd",
    "cross_entropy_one_pass",
    "cross_entropy_planes",
    "dice_cross_entropy",
    "options",
    "softmax_moments",
    "upsample",
    "upsample_cross_entropy",
]
__getattr__ = submodules(__name__, __all__)
