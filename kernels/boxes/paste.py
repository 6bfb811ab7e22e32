"""paste_boxes: the maps of many boxes, each resized to its box, reduced into one canvas.

Resizing is bilinear, and averages where it shrinks, as torch's interpolate with antialias=True: with the scale s = map
side / box side, an output position o weighs the taps j by max(0, 1 - |j + 1/2 - s (o + 1/2)| / max(s, 1)), divided by
their sum.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import INT32_MAX, launch

HEIGHT, WIDTH = 4, 32  # pixels of a tile of the canvas
CLASSES = 4  # of a program


@triton.jit
def _support(IN, OUT):
    """(source positions per position of the box, how far the taps of one reach, the most taps)."""
    scale = IN.to(tl.float32) / OUT.to(tl.float32)
    reach = tl.maximum(scale, 1.0)
    return scale, reach, (2 * reach).to(tl.int32) + 2


@triton.jit
def _taps(o, scale, reach, IN):
    """(first tap, sum of the weights, centre) of each output position."""
    centre = (o.to(tl.float32) + 0.5) * scale
    first = tl.maximum((centre - reach + 0.5).to(tl.int32), 0)
    total = tl.zeros_like(centre)
    for step in range((2 * reach).to(tl.int32) + 2):
        total += _weight(first + step, centre, reach, IN)
    return first, tl.where(total > 0, total, 1.0), centre  # 0 beyond the box, whose values are not used


@triton.jit
def _weight(tap, centre, reach, IN):
    """The weight of a tap, before the division by their sum; 0 outside of the map."""
    distance = tl.abs(tap.to(tl.float32) + 0.5 - centre) / reach
    return tl.where(tap < IN, tl.maximum(1.0 - distance, 0.0), 0.0)


@triton.jit
def paste_boxes_kernel(
    maps, boxes, weights, start, canvas, B, K, h, w, H, W, STRIDE_K, STRIDE_P,
    MAX: tl.constexpr, WEIGHTED: tl.constexpr, STARTED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    CLASSES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program computes CLASSES classes of a tile of BLOCK_H x BLOCK_W pixels of the canvas (K, H, W).

    maps are (B, K, h, w) with strides STRIDE_K and STRIDE_P between classes and pixels, boxes (B, 4): left, top, width,
    height. The program walks over the boxes in order, and leaves out those that do not touch its tile. Each map is read
    once, from the cache if tiles share its elements; the canvas is written once, and read once if STARTED.
    """
    # 1. Which pixels and classes
    across, down = tl.cdiv(W, BLOCK_W), tl.cdiv(H, BLOCK_H)
    tile = tl.program_id(0) % (across * down)
    k = tl.program_id(0) // (across * down) * CLASSES + tl.arange(0, CLASSES)
    top, left = tile // across * BLOCK_H, tile % across * BLOCK_W
    pixel = tl.arange(0, BLOCK_H * BLOCK_W)
    y, x = top + pixel // BLOCK_W, left + pixel % BLOCK_W
    plane = h * w
    if WIDE:
        k, plane, STRIDE_P = k.to(tl.int64), tl.cast(plane, tl.int64), tl.cast(STRIDE_P, tl.int64)
    m_live = (k < K)[:, None] & ((y < H) & (x < W))[None, :]
    o_canvas = k[:, None] * H * W + (y * W + x)[None, :]
    if STARTED:
        total = tl.load(start + o_canvas, mask=m_live, other=0.0)
    else:
        total = tl.zeros((CLASSES, BLOCK_H * BLOCK_W), tl.float32)

    # 2. Reduce the boxes that touch the tile
    for n in range(B):
        box_x, box_y = tl.load(boxes + 4 * n), tl.load(boxes + 4 * n + 1)
        box_w, box_h = tl.load(boxes + 4 * n + 2), tl.load(boxes + 4 * n + 3)
        touches = (box_x < left + BLOCK_W) & (box_x + box_w > left) & (box_y < top + BLOCK_H) & (box_y + box_h > top)
        if touches & (box_w > 0) & (box_h > 0):
            m_inside = m_live & ((y >= box_y) & (y < box_y + box_h) & (x >= box_x) & (x < box_x + box_w))[None, :]
            scale_y, reach_y, steps_y = _support(h + 0 * box_h, box_h)
            scale_x, reach_x, steps_x = _support(w + 0 * box_w, box_w)
            first_y, total_y, centre_y = _taps(y - box_y, scale_y, reach_y, h)
            first_x, total_x, centre_x = _taps(x - box_x, scale_x, reach_x, w)
            value = tl.zeros((CLASSES, BLOCK_H * BLOCK_W), tl.float32)
            for step_y in range(steps_y):
                weight_y = _weight(first_y + step_y, centre_y, reach_y, h)
                o_row = (n + 0 * k[:, None]) * K * plane + k[:, None] * STRIDE_K
                o_row += (tl.minimum(first_y + step_y, h - 1) * w * STRIDE_P)[None, :]
                row = tl.zeros((CLASSES, BLOCK_H * BLOCK_W), tl.float32)
                for step_x in range(steps_x):
                    weight_x = _weight(first_x + step_x, centre_x, reach_x, w)
                    o_tap = o_row + (tl.minimum(first_x + step_x, w - 1) * STRIDE_P)[None, :]
                    m_tap = m_inside & (weight_x * weight_y > 0)[None, :]
                    row += weight_x[None, :] * tl.load(maps + o_tap, mask=m_tap, other=0.0).to(tl.float32)
                value += weight_y[None, :] * row
            value = value / (total_y * total_x)[None, :]
            if WEIGHTED:
                value *= tl.load(weights + n)
            if MAX:
                total = tl.where(m_inside & ((value > total) | (value != value)), value, total)
            else:
                total += tl.where(m_inside, value, 0.0)

    # 3. Store
    tl.store(canvas + o_canvas, total, mask=m_live)


def paste_boxes(
    maps: Tensor, boxes: Tensor, largest: bool, weights: Tensor | None, start: Tensor | None, canvas: Tensor
) -> None:
    """Write the largest value at each pixel, or the weighted sum, of the maps (B, K, h, w) into `canvas`.

    maps: dense, contiguous or channels_last. boxes: int32 (B, 4). weights: float32 (B,), or None for 1. start: an
    earlier canvas, or None for zeros. canvas: float32 (K, H, W).
    """
    count, classes, h, w = maps.shape
    _, height, width = canvas.shape
    tiles = triton.cdiv(height, HEIGHT) * triton.cdiv(width, WIDTH)
    padded = classes + CLASSES
    launch(
        paste_boxes_kernel, tiles * triton.cdiv(classes, CLASSES),
        maps, boxes, canvas if weights is None else weights, canvas if start is None else start, canvas,
        count, classes, h, w, height, width, maps.stride(1), maps.stride(3),
        MAX=largest, WEIGHTED=weights is not None, STARTED=start is not None, BLOCK_H=HEIGHT, BLOCK_W=WIDTH,
        CLASSES=CLASSES, num_warps=4,
        WIDE=max(count * padded * h * w, padded * (height + HEIGHT) * (width + WIDTH)) > INT32_MAX,
    )  # fmt: skip
