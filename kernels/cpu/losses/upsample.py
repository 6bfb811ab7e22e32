"""Launcher of upsample.cpp, and how the CPU kernels are told to resize."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...losses.options import Resizing
from ..launch import launch


def _ratio(small: int, large: int, scale: float | None, resizing: Resizing) -> float:
    """Source positions per output position along one side, by torch's rules."""
    if resizing.align_corners:
        return (small - 1) / (large - 1) if large > 1 else 0.0
    # torch ignores the scale of a side that keeps its size, and in nearest mode of one that doubles.
    kept = (small, 2 * small) if resizing.mode == "nearest" else (small,)
    return small / large if scale is None or large in kept else 1 / scale


def map_arguments(low: Tensor, size: Sequence[int], resizing: Resizing) -> tuple[Any, ...]:
    """The arguments that all kernels that resize take."""
    scales = resizing.scales or (None, None)
    ratios = (_ratio(*sides, resizing) for sides in zip(low.shape[2:], size, scales, strict=True))
    return (
        low, *low.shape, *low.stride(), *size, resizing.mode == "nearest", resizing.align_corners, *ratios,
    )  # fmt: skip


def upsample_argmax(low: Tensor, labels: Tensor, probability: Tensor | None, resizing: Resizing) -> None:
    """Write the labels (N, H, W) of `low` (N, C, h, w) resized to H x W, and their probabilities if requested."""
    launch(
        "losses/upsample", "upsample_argmax", {"LOGITS": low.dtype},
        *map_arguments(low, labels.shape[1:], resizing), labels, labels.element_size(), probability,
    )  # fmt: skip
