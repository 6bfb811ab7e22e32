"""How many instructions a memory-bound call may need, and which calls need more, and why.

The figures are thread instructions a byte on sm_90, of the Triton kernels in bfloat16, compiled by Triton 3.7.
tests/inspect compares them with the count of the same machine code. It fails for a call that is above the budget and
not listed, that is above its figure, or that is listed and within the budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PER_BYTE = {90: 3.5, 100: 2.5}  # thread instructions a byte of the floor: half of the issue slots of an H200 and a B200
IN_FLIGHT = 0.6  # of the bytes that Little's law asks for
MEMORY_BOUND = ("max_pool2d", "max_unpool2d", "max_unpool2d_with_offsets", "batch_norm", "cross_entropy")
FUSED_CONVOLUTION = "conv2d"  # in the name of an operator that also multiplies matrices


# By reason: the calls, "operator mode layout size", and their figures.
EXCESSES: dict[str, dict[str, float]] = {
    "offsets of one byte leave few bytes for the comparisons that make or read them": {
        "max_pool2d_with_offsets forward nchw 8x64x360x480 k2 s2 p0 ceil": 4.08,
        "max_pool2d_with_offsets forward channels_last 8x64x360x480 k2 s2 p0 ceil": 3.64,
        "max_pool2d_with_offsets forward channels_last 8x256x45x60 k2 s2 p0 ceil": 3.73,
        "max_unpool2d_with_offsets forward nchw 8x64x360x480 k2 s2 p0 ceil": 3.58,
        "max_unpool2d_with_offsets backward nchw 8x64x360x480 k2 s2 p0 ceil": 4.50,
        "max_unpool2d_with_offsets forward channels_last 8x256x45x60 k2 s2 p0 ceil": 4.19,
    },
    "rows of pixels that 16 bytes do not divide are read and written by single elements": {
        "max_pool2d forward nchw 8x256x45x60 k2 s2 p0 ceil": 4.59,
        "max_pool2d backward nchw 8x256x45x60 k2 s2 p0 ceil": 7.51,
        "max_pool2d_with_offsets forward nchw 8x256x45x60 k2 s2 p0 ceil": 6.86,
        "max_pool2d_with_offsets backward nchw 8x256x45x60 k2 s2 p0 ceil": 9.63,
        "max_unpool2d forward nchw 8x256x45x60 k2 s2 p0 ceil": 8.49,
        "max_unpool2d backward nchw 8x256x45x60 k2 s2 p0 ceil": 4.71,
        "max_unpool2d_with_offsets forward nchw 8x256x45x60 k2 s2 p0 ceil": 11.04,
        "max_unpool2d_with_offsets backward nchw 8x256x45x60 k2 s2 p0 ceil": 4.41,
        "batch_norm_relu forward nchw 8x256x45x60": 7.83,
        "batch_norm_relu backward nchw 8x256x45x60": 5.05,
        "batch_norm_relu_max_pool2d forward nchw 8x256x45x60 k2 ceil": 14.15,
        "batch_norm_relu_max_pool2d backward nchw 8x256x45x60 k2 ceil": 8.56,
        "batch_norm_relu_max_unpool2d forward nchw 8x256x45x60 k2 ceil": 15.37,
        "batch_norm_relu_max_unpool2d backward nchw 8x256x45x60 k2 ceil": 6.09,
    },
    "nine elements of a window are compared one by one, and a pooled element has few bytes": {
        "max_pool2d forward nchw 8x64x112x112 k3 s2 p1": 5.78,
        "max_pool2d_with_offsets forward nchw 8x64x112x112 k3 s2 p1": 9.20,
        "max_pool2d forward channels_last 8x64x112x112 k3 s2 p1": 4.92,
        "max_pool2d_with_offsets forward channels_last 8x64x112x112 k3 s2 p1": 8.32,
    },
    "a pixel is compared with each window that can hold it": {
        "max_pool2d backward nchw 8x64x112x112 k3 s2 p1": 5.27,
        "max_pool2d_with_offsets backward nchw 8x64x112x112 k3 s2 p1": 6.56,
        "max_pool2d backward channels_last 8x64x112x112 k3 s2 p1": 4.25,
        "max_pool2d_with_offsets backward channels_last 8x64x112x112 k3 s2 p1": 5.06,
        "max_unpool2d forward nchw 8x64x112x112 k3 s2 p1": 6.17,
        "max_unpool2d_with_offsets forward nchw 8x64x112x112 k3 s2 p1": 7.69,
        "max_unpool2d forward channels_last 8x64x112x112 k3 s2 p1": 4.87,
        "max_unpool2d_with_offsets forward channels_last 8x64x112x112 k3 s2 p1": 6.50,
    },
    "indices of 64 bits are compared, and one outside its window is looked up by itself": {
        "max_unpool2d forward nchw 8x64x360x480 k2 s2 p0 ceil": 3.51,
        "max_unpool2d backward nchw 8x64x360x480 k2 s2 p0 ceil": 5.36,
    },
    "single elements are read at the positions, which keeps few bytes in flight": {
        "max_unpool2d_with_offsets backward nchw 8x64x112x112 k3 s2 p1": 3.34,
        "max_unpool2d_with_offsets backward channels_last 8x64x112x112 k3 s2 p1": 3.70,
    },
    "four classes are read at a time, and their sums are made in tiles; not rewritten yet": {
        "cross_entropy forward nchw 8x11x360x480 ignore 255 mean two passes": 6.85,
        "cross_entropy backward nchw 8x11x360x480 ignore 255 mean two passes": 3.80,
        "cross_entropy forward nchw 8x19x360x480 ignore 255 mean two passes": 6.73,
        "cross_entropy backward nchw 8x19x360x480 ignore 255 mean two passes": 3.82,
        "cross_entropy forward nchw 8x150x360x480 ignore 255 mean two passes": 6.57,
        "cross_entropy backward nchw 8x150x360x480 ignore 255 mean two passes": 3.62,
        "cross_entropy_with_predictions forward nchw 8x19x360x480 ignore 255 mean two passes": 10.71,
        "cross_entropy_with_predictions backward nchw 8x19x360x480 ignore 255 mean two passes": 3.82,
    },
    "about eleven instructions a logit of four bytes: maximum, exp2, sum, gradient, label": {
        "cross_entropy forward nchw 8x19x360x480 ignore 255 mean": 4.37,
        "cross_entropy forward nchw 8x150x360x480 ignore 255 mean": 4.95,
    },
    "as without predictions, and three more instructions a logit for the largest": {
        "cross_entropy_with_predictions forward nchw 8x19x360x480 ignore 255 mean": 6.42,
    },
    "rows of classes are no multiple of 16 bytes: lanes are masked, groups share two pixels; not rewritten yet": {
        "cross_entropy forward channels_last 8x11x360x480 ignore 255 mean two passes": 9.91,
        "cross_entropy backward channels_last 8x11x360x480 ignore 255 mean two passes": 5.23,
        "cross_entropy forward channels_last 8x19x360x480 ignore 255 mean two passes": 8.16,
        "cross_entropy backward channels_last 8x19x360x480 ignore 255 mean two passes": 5.75,
        "cross_entropy forward channels_last 8x19x360x480 ignore 255 mean": 12.06,
        "cross_entropy forward channels_last 8x150x360x480 ignore 255 mean two passes": 9.43,
        "cross_entropy backward channels_last 8x150x360x480 ignore 255 mean two passes": 5.82,
        "cross_entropy forward channels_last 8x150x360x480 ignore 255 mean": 10.76,
        "cross_entropy_with_predictions forward channels_last 8x19x360x480 ignore 255 mean two passes": 13.64,
        "cross_entropy_with_predictions backward channels_last 8x19x360x480 ignore 255 mean two passes": 5.75,
        "cross_entropy_with_predictions forward channels_last 8x19x360x480 ignore 255 mean": 15.86,
    },
    "statistics and the normalization are computed in float32 for two bytes an element; not rewritten yet": {
        "batch_norm_relu forward nchw 8x64x360x480": 5.16,
        "batch_norm_relu backward nchw 8x64x360x480": 3.61,
        "batch_norm_relu_max_pool2d forward nchw 8x64x360x480 k2 ceil": 7.60,
        "batch_norm_relu_max_pool2d backward nchw 8x64x360x480 k2 ceil": 5.80,
        "batch_norm_relu_max_unpool2d forward nchw 8x64x360x480 k2 ceil": 6.39,
        "batch_norm_relu_max_unpool2d backward nchw 8x64x360x480 k2 ceil": 4.59,
        "batch_norm_relu forward channels_last 8x64x360x480": 4.97,
        "batch_norm_relu backward channels_last 8x64x360x480": 3.66,
        "batch_norm_relu_max_pool2d forward channels_last 8x64x360x480 k2 ceil": 6.63,
        "batch_norm_relu_max_pool2d backward channels_last 8x64x360x480 k2 ceil": 4.14,
        "batch_norm_relu_max_unpool2d forward channels_last 8x64x360x480 k2 ceil": 6.01,
        "batch_norm_relu forward channels_last 8x256x45x60": 5.64,
        "batch_norm_relu backward channels_last 8x256x45x60": 4.23,
        "batch_norm_relu_max_pool2d forward channels_last 8x256x45x60 k2 ceil": 8.09,
        "batch_norm_relu_max_pool2d backward channels_last 8x256x45x60 k2 ceil": 4.62,
        "batch_norm_relu_max_unpool2d forward channels_last 8x256x45x60 k2 ceil": 6.42,
        "batch_norm_relu_max_unpool2d backward channels_last 8x256x45x60 k2 ceil": 3.84,
    },
}


def is_memory_bound(operator: str) -> bool:
    """Whether the budget applies to an operator."""
    return operator.startswith(MEMORY_BOUND) and FUSED_CONVOLUTION not in operator


def excess(row: Mapping[str, Any]) -> list[str]:
    """What a row of the report is above the budget in; nothing for an operator or GPU generation that has none."""
    if row["sm"] not in PER_BYTE or not is_memory_bound(row["operator"]):
        return []
    found = []
    if row["per byte"] > PER_BYTE[row["sm"]]:
        found.append(f"{row['per byte']:.2f} instructions a byte are more than {PER_BYTE[row['sm']]}")
    for name, on in row["gpus"].items():
        if on["in flight"] is not None and on["in flight"] < IN_FLIGHT:
            found.append(f"{on['in flight']:.0%} of the bytes in flight that {name} needs")
    return found


def listed(row: Mapping[str, Any]) -> float | None:
    """The figure of a row in the list, or None."""
    call = f"{row['operator']} {row['mode']} {row['layout']} {row['size']}"
    return next((calls[call] for calls in EXCESSES.values() if call in calls), None)
