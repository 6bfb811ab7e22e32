"""Resizing of maps (N, C, h, w) to H x W, nearest or bilinear, inside kernels that never store the large map.

An output position has one source coordinate per side. Its value is the weighted mean of the taps i and i + 1, with
weights 1 - l and l (nearest: the value of tap i). torch's formulas define the taps. In bilinear mode the coordinate is
computed here in integers with 40 binary digits after the point, which is more exact than a float32 weight. In nearest
mode it is torch's own float32 product, because its rounding decides which tap is taken.

A tile has ROWS output rows and COLUMNS columns, one column per lane. All of its rows lie between TAPS rows of the small
map. Each lane interpolates these along x once, and mixes them for each of its output rows.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from ..shared import INT32_MAX
from .options import Resizing

POINT = tl.constexpr(40)  # binary digits after the point of a source coordinate
HALF = tl.constexpr(2**39)  # one half in this format
COLUMNS = 32  # of a tile: the lanes of its one warp


@triton.jit
def source_taps(position, STEP, IN, NEAREST: tl.constexpr, CORNERS: tl.constexpr):
    """(first tap, weight of the second tap) of output positions; at the far edge the weight is 0."""
    if NEAREST:
        tap = tl.minimum((position.to(tl.float32) * STEP).to(tl.int32), IN - 1)
        return tap, tap.to(tl.float32) * 0
    else:
        at = position.to(tl.int64) * STEP
        if not CORNERS:  # pixel centres are at halves
            at = tl.maximum(at + (STEP >> 1) - HALF, 0)
        tap = tl.minimum(at >> POINT, IN - 1).to(tl.int32)
        weight = ((at >> (POINT - 24)) & 0xFFFFFF).to(tl.int32).to(tl.float32) * (1 / (1 << 24))
        return tap, tl.where(tap == IN - 1, 0.0, weight)


@triton.jit
def first_position(tap, STEP, IN, OUT, NEAREST: tl.constexpr, CORNERS: tl.constexpr):
    """The first output position whose first tap is `tap` or a later one; OUT if there is none."""
    if NEAREST:
        position = tl.maximum((tap.to(tl.float32) / STEP).to(tl.int64) - 2, 0)
        for _ in tl.static_range(4):
            position += ((position.to(tl.float32) * STEP).to(tl.int32) < tap).to(tl.int64)
    else:
        at = tap.to(tl.int64) << POINT
        if not CORNERS:
            at = at - (STEP >> 1) + HALF
        step = tl.maximum(STEP, 1).to(tl.int64)
        position = tl.maximum(at + step - 1, 0) // step
    return tl.where(tap <= 0, 0, tl.where(tap >= IN, OUT, tl.minimum(position, OUT))).to(tl.int32)


@triton.jit
def interpolated_row(low, o_row, o_left, o_right, x_weight, m_inside, NEAREST: tl.constexpr):
    """A row of the small map at o_row, interpolated along x between the columns at the offsets o_left and o_right.

    x_weight: that of the right column.
    """
    value = tl.load(low + o_row + o_left, mask=m_inside, other=0.0).to(tl.float32)
    if NEAREST:
        return value
    else:
        left = (1 - x_weight) * value
        return left + x_weight * tl.load(low + o_row + o_right, mask=m_inside, other=0.0).to(tl.float32)


@triton.jit
def resized_tile(
    program, TILES_X, TILES_Y, STEP_H, STEP_W, IN_H, IN_W, OUT_H, OUT_W, STRIDE_W,
    NEAREST: tl.constexpr, CORNERS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The tile of a program.

    Returns its image, pixels [ROWS, COLUMNS] and which of them exist; along y the topmost tap, each row's first tap
    counted from it, and the weight of the second; along x the offsets of the two taps, the weight of the second, and
    which columns exist.
    """
    image = program // (TILES_X * TILES_Y)
    if WIDE:
        image = image.to(tl.int64)
    above = program // TILES_X % TILES_Y * ROWS
    y = above + tl.arange(0, ROWS)
    x = program % TILES_X * COLUMNS + tl.arange(0, COLUMNS)
    m_live = (y < OUT_H)[:, None] & (x < OUT_W)[None, :]
    pixel = (image * OUT_H + y[:, None]) * OUT_W + x[None, :]
    top, _ = source_taps(above, STEP_H, IN_H, NEAREST, CORNERS)
    y_tap, y_weight = source_taps(y, STEP_H, IN_H, NEAREST, CORNERS)
    x_tap, x_weight = source_taps(x, STEP_W, IN_W, NEAREST, CORNERS)
    tap = (y_tap - top)[:, None]
    if WIDE:  # inside one image, too, the offset of a row or column may not fit in int32
        top = top.to(tl.int64)
        x_tap = x_tap.to(tl.int64)
    o_right = tl.minimum(x_tap + 1, IN_W - 1) * STRIDE_W
    return (
        image,
        pixel,
        m_live,
        top,
        tap,
        y_weight[:, None],
        x_tap * STRIDE_W,
        o_right,
        x_weight,
        (x < OUT_W),
    )


@triton.jit
def resized_class(
    low, o_low, c, top, tap, y_weight, o_left, o_right, x_weight, m_inside, IN_H, STRIDE_C, STRIDE_H,
    C: tl.constexpr, NEAREST: tl.constexpr, TAPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The values [ROWS, COLUMNS] of a class in a tile whose image begins at o_low; -inf for a class past the last."""
    o_low += (c.to(tl.int64) if WIDE else c) * STRIDE_C
    # Not `&`: Triton 3.9's interpreter broadcasts a comparison of scalars as int32, which is no mask.
    m_inside = tl.where(c < C, m_inside, False)
    for k in tl.static_range(TAPS):
        o_row = o_low + tl.minimum(top + k, IN_H - 1) * STRIDE_H
        row = interpolated_row(low, o_row, o_left, o_right, x_weight, m_inside, NEAREST)[None, :]
        # Selected, not multiplied by a weight of 0: infinite and NaN logits must not reach other pixels.
        if k == 0:
            above = row + tl.zeros_like(y_weight)
            below = above
        else:
            above = tl.where(tap == k, row, above)
            below = tl.where(tap == k - 1, row, below)
    values = above if NEAREST else (1 - y_weight) * above + y_weight * below
    return tl.where(c < C, values, float("-inf"))


@triton.jit
def wins(values, highest):
    """Whether a class replaces the best so far: the first of equal values stays, and NaN wins over any number."""
    return (values > highest) | ((values != values) & (highest == highest))


@triton.jit
def upsample_argmax_kernel(
    low, labels, probability, TILES_X, TILES_Y, STEP_H, STEP_W, IN_H, IN_W, OUT_H, OUT_W,
    STRIDE_N, STRIDE_C, STRIDE_H, STRIDE_W,
    C: tl.constexpr, PROBABILITY: tl.constexpr, NEAREST: tl.constexpr, CORNERS: tl.constexpr, TAPS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program labels a tile with the class of the largest value: the first of equal ones, NaN first of all.

    Reads TAPS rows of the small map for each class, from the cache if tiles share them. Writes each pixel's label once,
    one byte for uint8, and with PROBABILITY its softmax probability, 4 bytes.
    """
    # 1. Which pixels
    image, pixel, m_live, top, tap, y_weight, o_left, o_right, x_weight, m_inside = resized_tile(
        tl.program_id(0), TILES_X, TILES_Y, STEP_H, STEP_W, IN_H, IN_W, OUT_H, OUT_W, STRIDE_W,
        NEAREST, CORNERS, ROWS, COLUMNS, WIDE,
    )  # fmt: skip

    # 2. For each class: load, resize, and keep the largest value
    highest = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    best = tl.zeros((ROWS, COLUMNS), tl.int32)
    for step in range(0, C):
        c = step + image * 0  # a tensor, in the interpreter too
        values = resized_class(
            low, image * STRIDE_N, c, top, tap, y_weight, o_left, o_right, x_weight, m_inside, IN_H, STRIDE_C, STRIDE_H,
            C, NEAREST, TAPS, WIDE,
        )  # fmt: skip
        higher = wins(values, highest)
        best = tl.where(higher, c.to(tl.int32), best)
        peak = tl.where(higher, values, highest)
        if PROBABILITY:
            shift = tl.where(peak == float("-inf"), 0.0, peak)
            total = total * tl.exp(highest - shift) + tl.exp(values - shift)
        highest = peak

    # 3. Store
    tl.store(labels + pixel, best.to(labels.dtype.element_ty), mask=m_live)
    if PROBABILITY:
        tl.store(probability + pixel, tl.where(highest == float("-inf"), float("nan"), 1 / total), mask=m_live)


def _float32(number: float) -> float:
    return struct.unpack("f", struct.pack("f", number))[0]


class ResizeGeometry(NamedTuple):
    """The way from h x w to H x W as the kernels need it."""

    nearest: bool
    corners: bool
    ratio: tuple[Fraction, Fraction]  # source positions per output position, along y and x
    sizes: tuple[int, int, int, int]  # h, w, H, W

    @classmethod
    def of(cls, low: Tensor, size: Sequence[int], resizing: Resizing) -> ResizeGeometry:
        scales, nearest = resizing.scales, resizing.mode == "nearest"
        if tuple(low.shape[2:]) == tuple(size):  # torch copies then, whatever the factors
            scales = None
        ratios = []
        for side, (short, long) in enumerate(zip(low.shape[2:], size, strict=True)):
            if resizing.align_corners:
                ratio = Fraction(short - 1, long - 1) if long > 1 else Fraction(0)
            elif nearest and long in (short, 2 * short):  # torch ignores the scales for these two
                ratio = Fraction(short, long)
            elif nearest:
                ratio = Fraction(_float32(short / long if scales is None else 1.0 / scales[side]))
            else:
                ratio = Fraction(short, long) if scales is None else 1 / Fraction(scales[side])
            ratios.append(ratio)
        return cls(nearest, resizing.align_corners, (ratios[0], ratios[1]), (*low.shape[2:], *size))

    def steps(self) -> tuple[int | float, int | float]:
        """STEP_H, STEP_W."""
        if self.nearest:
            return float(self.ratio[0]), float(self.ratio[1])
        return round(self.ratio[0] * 2**POINT.value), round(self.ratio[1] * 2**POINT.value)

    def modes(self) -> dict[str, bool]:
        """The compile-time arguments of every kernel that resizes."""
        return {"NEAREST": self.nearest, "CORNERS": self.corners}

    def tile(self) -> dict[str, int]:
        """The sizes of a tile. Its rows share few rows of the small map."""
        ratio = self.ratio[0]
        rows = 4 if ratio <= Fraction(1, 2) else 2 if ratio <= 1 else 1
        return {"ROWS": rows, "TAPS": math.ceil((rows - 1) * ratio) + 2, "COLUMNS": COLUMNS}

    def tiles(self) -> tuple[int, int]:
        """The number of tiles along x and y."""
        return triton.cdiv(self.sizes[3], COLUMNS), triton.cdiv(self.sizes[2], self.tile()["ROWS"])


def is_wide(pixels: int, *maps: Tensor) -> bool:
    """Whether an offset in a small map or the output may not fit in int32, those of masked lanes included."""
    reaches = [
        1 + sum((n - 1) * stride for n, stride in zip(low.shape, low.stride(), strict=True)) + 64 * low.stride(1)
        for low in maps
    ]
    return max(*reaches, pixels + 2**20) > INT32_MAX


def upsample_argmax(low: Tensor, labels: Tensor, probability: Tensor | None, resizing: Resizing) -> None:
    """Write the labels (N, H, W) of `low` (N, C, h, w) resized to H x W, and their probabilities if requested."""
    geometry = ResizeGeometry.of(low, labels.shape[1:], resizing)
    across, down = geometry.tiles()
    launch(
        upsample_argmax_kernel, low.shape[0] * across * down,
        low, labels, labels if probability is None else probability, across, down, *geometry.steps(), *geometry.sizes,
        *low.stride(),
        C=low.shape[1], PROBABILITY=probability is not None, **geometry.modes(), **geometry.tile(),
        WIDE=is_wide(labels.numel(), low), num_warps=1,
    )  # fmt: skip
