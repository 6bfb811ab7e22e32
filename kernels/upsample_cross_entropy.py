"""Cross-entropy of logits (N, C, h, w) resized to the labels' H x W, without the large logits ever in memory.

    x = resized logits,   lse = log(sum_c exp(x_c)),   s = label_smoothing,   v = sum_c w_c
    loss      = (1 - s) * w_t * (lse - x_t) + s / C * sum_c w_c * (lse - x_c)
    dloss/dx_c = ((1 - s) * w_t + s / C * v) * exp(x_c - lse) - (1 - s) * w_t * [c = t] - s / C * w_c

Two passes, each of which makes the large logits anew from the small ones, in float32. The forward's tile is that of
kernels/upsample.py; it reads labels and writes lse, 4 bytes a pixel (8 for float32 logits, as in cross_entropy).

The backward gathers. A program owns CLASSES classes of a patch of the small map and goes down it from row to row. The
output rows between two rows of the small map have the same two taps along y, so those two rows are interpolated along x
once, and mixed for each output row; the gradients of the output rows are summed with the weights of the tap above and
of the tap below. Only then are those sums interpolated back along x: a product with the matrix of the weights, which
has two entries a column. What was for the tap below is carried to the next row. Every sum has one order, and nothing is
added up in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cross_entropy import TOTAL_BLOCK, _exp, _label, _scale, _weight, cross_entropy_total_kernel
from .launch import launch
from .upsample import Resizing, _class, _first, _row, _source, _tile, is_wide

BACKWARD_CLASSES = 16  # of a program: the least that a product takes
BACKWARD_COLUMNS = 64  # output columns that it holds at a time
PATCH_ROWS = 8  # of the small map, below one row of which it needs the output too
LEAST_PATCH, LARGEST_PATCH = 16, 32  # columns of the small map in a product


@triton.jit
def upsample_cross_entropy_fwd_kernel(
    low, target, weight, loss, lse, partials, PIXELS, PROGRAMS, TILES_X, TILES_Y, IGNORE, SMOOTH, STEP_H, STEP_W,
    IN_H, IN_W, OUT_H, OUT_W, STRIDE_N, STRIDE_C, STRIDE_H, STRIDE_W,
    C: tl.constexpr, REDUCTION: tl.constexpr, WEIGHTED: tl.constexpr, SPLIT: tl.constexpr, SMOOTHED: tl.constexpr,
    NEAREST: tl.constexpr, CORNERS: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """One program takes a tile of pixels through all classes, two at a time.

    Reads the taps of the small map and the labels; writes lse, and the losses (REDUCTION "none") or the sums of the
    tile's losses and weights. SMOOTH: label_smoothing.
    """
    program = tl.program_id(0)
    image, pixel, live, top, tap, down, column, behind, along, inside = _tile(
        program, TILES_X, TILES_Y, STEP_H, STEP_W, IN_H, IN_W, OUT_H, OUT_W, STRIDE_W,
        NEAREST, CORNERS, ROWS, COLUMNS, WIDE,
    )  # fmt: skip
    label, stray = _label(target, pixel, live, C, IGNORE)
    tl.device_assert(stray == 0, "upsample_cross_entropy: a target is neither a class nor ignore_index")
    highest = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    picked = tl.zeros((ROWS, COLUMNS), tl.float32)
    mixed = tl.zeros((ROWS, COLUMNS), tl.float32)  # sum of w_c * x_c
    weights = 0.0
    for step in range(0, C, 2):
        c = step + image * 0  # a tensor, in the interpreter too
        one = _class(
            low, image * STRIDE_N, c, top, tap, down, column, behind, along, inside, IN_H, STRIDE_C, STRIDE_H,
            C, NEAREST, TAPS, WIDE,
        )  # fmt: skip
        two = _class(
            low, image * STRIDE_N, c + 1, top, tap, down, column, behind, along, inside, IN_H, STRIDE_C, STRIDE_H,
            C, NEAREST, TAPS, WIDE,
        )  # fmt: skip
        picked = tl.where(label == c, one, tl.where(label == c + 1, two, picked))
        if SMOOTHED:
            first = tl.load(weight + c).to(tl.float32) if WEIGHTED else 1.0
            second = tl.where(c + 1 < C, 1.0, 0.0)
            if WEIGHTED:
                second = tl.load(weight + c + 1, mask=c + 1 < C, other=0.0).to(tl.float32)
            mixed += first * one + tl.where(c + 1 < C, second * two, 0.0)
            weights += first + second
        peak = tl.maximum(highest, tl.maximum(one, two))
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        total = total * _exp(highest - shift) + (_exp(one - shift) + _exp(two - shift))
        highest = peak
    above = tl.log(total)
    if SPLIT:
        tl.store(lse + pixel, highest, mask=live)
        tl.store(lse + PIXELS + pixel, above, mask=live)
    else:
        tl.store(lse + pixel, highest + above, mask=live)
    factor = _weight(weight, label, WEIGHTED)
    value = factor * ((highest - picked) + above)
    if SMOOTHED:
        value = (1 - SMOOTH) * value + SMOOTH / C * (weights * (highest + above) - mixed)
    value = tl.where(label >= 0, value, 0.0)
    if REDUCTION == "none":
        tl.store(loss + pixel, value, mask=live)
    else:
        tl.store(partials + program, tl.sum(tl.sum(value, axis=1), axis=0))
        if REDUCTION == "mean":
            tl.store(partials + PROGRAMS + program, tl.sum(tl.sum(factor, axis=1), axis=0))


@triton.jit
def upsample_cross_entropy_bwd_kernel(
    grad_loss, low, target, weight, weights, lse, denominator, grad_low, PIXELS, PATCHES_X, PATCHES_Y, PATCH, IGNORE,
    SMOOTH, STEP_H, STEP_W, IN_H, IN_W, OUT_H, OUT_W, STRIDE_N, STRIDE_C, STRIDE_H, STRIDE_W,
    GRAD_N, GRAD_C, GRAD_H, GRAD_W,
    C: tl.constexpr, REDUCTION: tl.constexpr, WEIGHTED: tl.constexpr, SPLIT: tl.constexpr, SMOOTHED: tl.constexpr,
    NEAREST: tl.constexpr, CORNERS: tl.constexpr, CLASSES: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    LOW_COLUMNS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program writes the gradient of CLASSES classes in a patch of ROWS x PATCH <= LOW_COLUMNS of the small map.

    Reads, for each output pixel whose taps lie in the patch, label and lse once, and the small map once for each of its
    rows. weights: the sum of weight, for label_smoothing.
    """
    program = tl.program_id(0)
    groups = tl.cdiv(C, CLASSES)
    c = program % groups * CLASSES + tl.arange(0, CLASSES)[:, None]
    left = program // groups % PATCHES_X * PATCH
    top = program // groups // PATCHES_X % PATCHES_Y * ROWS
    image = program // groups // PATCHES_X // PATCHES_Y
    if WIDE:
        image = image.to(tl.int64)
        c = c.to(tl.int64)
    o = image * STRIDE_N + c * STRIDE_C
    x_start = _first(left - 1, STEP_W, IN_W, OUT_W, NEAREST, CORNERS)
    x_end = _first(left + PATCH, STEP_W, IN_W, OUT_W, NEAREST, CORNERS)
    low_column = tl.arange(0, LOW_COLUMNS)[None, :]
    if SMOOTHED:
        of_class = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32) if WEIGHTED else 1.0
        all_weights = tl.load(weights) if WEIGHTED else 1.0 * C
    carried = tl.zeros((CLASSES, LOW_COLUMNS), tl.float32)
    for step in range(0, ROWS + 1):
        row = top - 1 + step
        y_start = _first(row, STEP_H, IN_H, OUT_H, NEAREST, CORNERS)
        y_end = _first(row + 1, STEP_H, IN_H, OUT_H, NEAREST, CORNERS)
        grad = carried
        carried = tl.zeros((CLASSES, LOW_COLUMNS), tl.float32)
        for start in range(x_start, x_end, COLUMNS):
            x = start + tl.arange(0, COLUMNS)
            live = x < x_end
            x_tap, x_weight = _source(x, STEP_W, IN_W, NEAREST, CORNERS)
            inside = live[None, :] & (c < C)
            column = (x_tap * STRIDE_W)[None, :]
            behind = (tl.minimum(x_tap + 1, IN_W - 1) * STRIDE_W)[None, :]
            along = x_weight[None, :]
            above = _row(low, o + tl.maximum(row, 0) * STRIDE_H, column, behind, along, inside, NEAREST)
            below = above
            if not NEAREST:
                o_below = o + tl.minimum(row + 1, IN_H - 1) * STRIDE_H
                below = _row(low, o_below, column, behind, along, inside, NEAREST)
            for_above = tl.zeros((CLASSES, COLUMNS), tl.float32)
            for_below = tl.zeros((CLASSES, COLUMNS), tl.float32)
            for down in range(0, y_end - y_start):
                y = y_start + down
                _, y_weight = _source(y, STEP_H, IN_H, NEAREST, CORNERS)
                pixel = (image * OUT_H + y) * OUT_W + x
                label, _ = _label(target, pixel, live, C, IGNORE)
                first = tl.load(lse + pixel, mask=live, other=0.0)
                second = tl.load(lse + PIXELS + pixel, mask=live, other=0.0) if SPLIT else tl.zeros_like(first)
                own = _scale(grad_loss, denominator, weight, pixel, label, REDUCTION, WEIGHTED)
                values = above if NEAREST else (1 - y_weight) * above + y_weight * below
                share = _exp((values - first[None, :]) - second[None, :])
                hit = tl.where(c == label[None, :], 1.0, 0.0)
                change = own[None, :] * (share - hit)
                if SMOOTHED:
                    even = SMOOTH / C * _scale(grad_loss, denominator, weight, pixel, label, REDUCTION, False)
                    change = (1 - SMOOTH) * change + even[None, :] * (all_weights * share - of_class)
                change = tl.where((label >= 0)[None, :], change, 0.0)  # exactly, also where logits are not finite
                if NEAREST:
                    for_above += change
                else:
                    for_above += (1 - y_weight) * change
                    for_below += y_weight * change
            # Products of [classes, columns] with the weights of each column's two taps.
            tap = tl.where(live, x_tap - left, -2)[:, None]
            matrix = tl.where(tap == low_column, (1 - x_weight)[:, None], 0.0)
            if not NEAREST:
                matrix += tl.where(tap + 1 == low_column, x_weight[:, None], 0.0)
            grad += tl.dot(for_above, matrix, input_precision=PRECISION)
            if not NEAREST:
                carried += tl.dot(for_below, matrix, input_precision=PRECISION)
        written = (low_column < PATCH) & (left + low_column < IN_W) & (c < C) & (row >= top) & (row < IN_H)
        at = image * GRAD_N + c * GRAD_C + row * GRAD_H + (left + low_column) * GRAD_W
        tl.store(grad_low + at, grad.to(grad_low.dtype.element_ty), mask=written)


def _constants(
    low: Tensor, weight: Tensor | None, reduction: str, lse: Tensor, smoothing: float, by: Resizing
) -> dict[str, object]:
    """The compile-time arguments that forward and backward share."""
    return {
        "C": low.shape[1], "REDUCTION": reduction, "WEIGHTED": weight is not None, "SPLIT": lse.shape[0] == 2,
        "SMOOTHED": smoothing != 0, **by.modes(), "WIDE": is_wide(low, lse[0].numel()),
    }  # fmt: skip


def upsample_cross_entropy_fwd(
    low: Tensor, target: Tensor, weight: Tensor | None, scales: Sequence[float] | None, mode: str,
    align_corners: bool, reduction: str, ignore_index: int, smoothing: float, loss: Tensor, lse: Tensor,
    denominator: Tensor,
) -> None:  # fmt: skip
    """Write loss, lse and, for the mean, the denominator of `low` (N, C, h, w), of any strides, and `target` (N, H, W).

    loss: (N, H, W) for reduction "none", else of no dimension; lse: (1, N, H, W), or (2, N, H, W) for its two terms.
    """
    by = Resizing.of(low, target.shape[1:], scales, mode, align_corners)
    across, down = by.tiles()
    programs = low.shape[0] * across * down
    summed = reduction != "none"
    partials = torch.empty((2, programs), dtype=torch.float32, device=low.device) if summed else loss
    launch(
        upsample_cross_entropy_fwd_kernel, programs,
        low, target, low if weight is None else weight, loss, lse, partials, target.numel(), programs, across, down,
        ignore_index, float(smoothing), *by.steps(), *by.sizes, *low.stride(),
        **_constants(low, weight, reduction, lse, smoothing, by), **by.tile(),
        num_warps=1, debug=True, sanitize_overflow=False,
    )  # fmt: skip
    if summed:
        launch(
            cross_entropy_total_kernel, 1,
            partials, loss, denominator, programs, REDUCTION=reduction, BLOCK=TOTAL_BLOCK,
        )  # fmt: skip


def upsample_cross_entropy_bwd(
    grad_loss: Tensor, low: Tensor, target: Tensor, weight: Tensor | None, lse: Tensor, denominator: Tensor,
    scales: Sequence[float] | None, mode: str, align_corners: bool, reduction: str, ignore_index: int,
    smoothing: float, grad_low: Tensor,
) -> None:  # fmt: skip
    """Write the gradient of `low`, of any strides; grad_loss, lse and denominator as the forward's."""
    by = Resizing.of(low, target.shape[1:], scales, mode, align_corners)
    n, classes, h, w = low.shape
    # As many columns of the small map as one block of output columns reaches, without the one before them.
    patch = min(max(int(BACKWARD_COLUMNS * by.ratio[1]) - 1, LEAST_PATCH - 1), LARGEST_PATCH)
    across, down = triton.cdiv(w, patch), triton.cdiv(h, PATCH_ROWS)
    smoothed = smoothing != 0 and weight is not None
    launch(
        upsample_cross_entropy_bwd_kernel, n * across * down * triton.cdiv(classes, BACKWARD_CLASSES),
        grad_loss, low, target, low if weight is None else weight,
        weight.sum(dtype=torch.float32) if smoothed else lse, lse, denominator, grad_low, target.numel(),
        across, down, patch, ignore_index, float(smoothing), *by.steps(), *by.sizes, *low.stride(),
        *grad_low.stride(),
        **_constants(low, weight, reduction, lse, smoothing, by), CLASSES=BACKWARD_CLASSES,
        COLUMNS=BACKWARD_COLUMNS, ROWS=PATCH_ROWS, LOW_COLUMNS=triton.next_power_of_2(patch),
        PRECISION="ieee" if low.dtype == torch.float32 else "tf32", num_warps=8,
    )  # fmt: skip
