"""Cross-entropy of logits (N, C, h, w) resized to the labels' H x W, without the large logits ever in memory.

The loss of each pixel and its gradient are cross_entropy_parts.py's, of logits that are means of the small map's.
Two passes, each of which makes the large logits anew from the small ones, in float32. The forward's tile is that of
kernels/losses/upsample.py; it reads labels and writes lse, 4 bytes a pixel (8 for float32 logits, as in cross_entropy).

The backward gathers. A program owns CLASSES classes of a patch of the small map and goes down it from row to row. The
output rows between two rows of the small map have the same two taps along y, so those two rows are interpolated along x
once, and mixed for each output row; the gradients of the output rows are summed with the weights of the tap above and
of the tap below. Only then are those sums interpolated back along x: a product with the matrix of the weights, which
has two entries a column. What was for the tap below is carried to the next row. Every sum has one order, and nothing is
added up in memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .common import constants, exponential, gradient, label_weight, pixel_loss, read_label, smoothed_mass
from .cross_entropy import Predicted, add_up_losses
from .cross_entropy_bwd import read_pixels
from .options import LossInputs, LossOptions, LossResults, Resizing
from .upsample import ResizeGeometry, _class, _first, _row, _source, _tile, _wins, is_wide

BACKWARD_CLASSES = 16  # of a program: the least that a product takes
BACKWARD_COLUMNS = 32  # output columns that it holds at a time
PATCH_ROWS = 8  # of the small map, below one row of which it needs the output too
REGISTERS = 168  # at most: left to itself the assembler spills some in order to have fewer
LEAST_PATCH, LARGEST_PATCH = 16, 32  # columns of the small map in a product


@triton.jit
def upsample_cross_entropy_fwd_kernel(
    low, target, weight, loss, lse, partials, prediction, counts, PIXELS, PROGRAMS, TILES_X, TILES_Y, IGNORE,
    STEP_H, STEP_W, IN_H, IN_W, OUT_H, OUT_W, STRIDE_N, STRIDE_C, STRIDE_H, STRIDE_W,
    C: tl.constexpr, REDUCTION: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    SPLIT: tl.constexpr, PREDICT: tl.constexpr, NEAREST: tl.constexpr, CORNERS: tl.constexpr, TAPS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program takes a tile of pixels through all classes, two at a time.

    Reads the taps of the small map and the labels; writes lse, and the losses (REDUCTION "none") or the sums of the
    tile's losses and of what they are divided by. The sums over the classes are cross_entropy_parts.accumulate's.
    PREDICT: also the class of each pixel's largest value, and how many pixels are right and how many count.
    """
    program = tl.program_id(0)
    image, pixel, live, top, tap, down, column, behind, along, inside = _tile(
        program, TILES_X, TILES_Y, STEP_H, STEP_W, IN_H, IN_W, OUT_H, OUT_W, STRIDE_W,
        NEAREST, CORNERS, ROWS, COLUMNS, WIDE,
    )  # fmt: skip
    label, stray = read_label(target, pixel, live, C, IGNORE)
    tl.device_assert(stray == 0, "upsample_cross_entropy: a target is neither a class nor ignore_index")
    highest = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    picked = tl.zeros((ROWS, COLUMNS), tl.float32)
    short = tl.zeros((ROWS, COLUMNS), tl.float32)
    mass = 0.0
    if PREDICT:
        best = tl.zeros((ROWS, COLUMNS), tl.int32)
        winner = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)  # `highest` passes over NaN
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
        peak = tl.maximum(highest, tl.maximum(one, two))
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        total = total * exponential(highest - shift) + (exponential(one - shift) + exponential(two - shift))
        if SMOOTHING != 0:
            first = SMOOTHING / C
            second = tl.where(c + 1 < C, SMOOTHING / C, 0.0)
            if WEIGHTED:
                first *= tl.load(weight + c).to(tl.float32)
                second *= tl.load(weight + c + 1, mask=c + 1 < C, other=0.0).to(tl.float32)
            short += mass * (shift - tl.where(highest == float("-inf"), 0.0, highest)) + first * (shift - one)
            short += tl.where(c + 1 < C, second * (shift - two), 0.0)
            mass += first + second
        highest = peak
        if PREDICT:
            higher = _wins(one, winner)
            best = tl.where(higher, c.to(tl.int32), best)
            winner = tl.where(higher, one, winner)
            higher = _wins(two, winner)
            best = tl.where(higher, (c + 1).to(tl.int32), best)
            winner = tl.where(higher, two, winner)
    above = tl.log(total)
    if SPLIT:
        tl.store(lse + pixel, highest, mask=live)
        tl.store(lse + PIXELS + pixel, above, mask=live)
    else:
        tl.store(lse + pixel, highest + above, mask=live)
    factor = label_weight(weight, label, tl.float32, WEIGHTED)
    value = pixel_loss(label, factor, picked, highest, total, mass, short, False, SMOOTHING, Z_LOSS)
    if REDUCTION == "none":
        tl.store(loss + pixel, value, mask=live)
    else:
        tl.store(partials + program, tl.sum(tl.sum(value, axis=1), axis=0))
        if REDUCTION == "valid":
            factor = tl.where(label >= 0, 1.0, 0.0)
        if REDUCTION == "weights" or REDUCTION == "valid":
            tl.store(partials + PROGRAMS + program, tl.sum(tl.sum(factor, axis=1), axis=0))
    if PREDICT:
        tl.store(prediction + pixel, best.to(prediction.dtype.element_ty), mask=live)
        tl.store(counts + program, tl.sum(tl.sum((label == best).to(tl.int32), axis=1), axis=0))
        tl.store(counts + PROGRAMS + program, tl.sum(tl.sum((label >= 0).to(tl.int32), axis=1), axis=0))


@triton.jit
def upsample_cross_entropy_bwd_kernel(
    grad_loss, low, target, weight, lse, denominator, grad_low, PIXELS, PATCHES_X, PATCHES_Y, PATCH, IGNORE,
    STEP_H, STEP_W, IN_H, IN_W, OUT_H, OUT_W, STRIDE_N, STRIDE_C, STRIDE_H, STRIDE_W,
    GRAD_N, GRAD_C, GRAD_H, GRAD_W,
    C: tl.constexpr, REDUCTION: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    SPLIT: tl.constexpr, NEAREST: tl.constexpr, CORNERS: tl.constexpr, PADDED: tl.constexpr, CLASSES: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, LOW_COLUMNS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program writes the gradient of CLASSES classes in a patch of ROWS x PATCH <= LOW_COLUMNS of the small map.

    Reads, for each output pixel whose taps lie in the patch, label and lse once, and the small map once for each of its
    rows.
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
        left = left.to(tl.int64)
        top = top.to(tl.int64)
    o = image * STRIDE_N + c * STRIDE_C
    x_start = _first(left - 1, STEP_W, IN_W, OUT_W, NEAREST, CORNERS)
    x_end = _first(left + PATCH, STEP_W, IN_W, OUT_W, NEAREST, CORNERS)
    low_column = tl.arange(0, LOW_COLUMNS)[None, :]
    smoothed = smoothed_mass(weight, tl.float32, C, WEIGHTED, SMOOTHING, PADDED)
    share = tl.zeros((CLASSES, 1), tl.float32) + SMOOTHING / C
    if WEIGHTED and SMOOTHING != 0:
        share *= tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
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
            if WIDE:
                x_tap = x_tap.to(tl.int64)
            inside = live[None, :] & (c < C)
            column = (x_tap * STRIDE_W)[None, :]
            behind = (tl.minimum(x_tap + 1, IN_W - 1) * STRIDE_W)[None, :]
            along = x_weight[None, :]
            o_above = o + tl.minimum(tl.maximum(row, 0), IN_H - 1) * STRIDE_H
            above = _row(low, o_above, column, behind, along, inside, NEAREST)
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
                label, scale, highest, rest, gain, spread = read_pixels(
                    grad_loss, target, weight, lse, denominator, pixel, live, PIXELS, IGNORE, smoothed,
                    C, REDUCTION, False, WEIGHTED, SMOOTHING, Z_LOSS, SPLIT,
                )  # fmt: skip
                values = above if NEAREST else (1 - y_weight) * above + y_weight * below
                change = gradient(
                    exponential((values - highest[None, :]) - rest[None, :]), share, c == label[None, :],
                    label[None, :], gain[None, :], spread[None, :], scale[None, :],
                    False, SMOOTHING != 0, SMOOTHING != 0 or Z_LOSS != 0,
                )  # fmt: skip
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


def _constants(inputs: LossInputs, options: LossOptions, geometry: ResizeGeometry, *maps: Tensor) -> dict[str, Any]:
    """The compile-time arguments that forward and backward share. maps: the small maps that are read and written."""
    shared = constants(inputs, options)
    del shared["PROBABILITIES"]
    return shared | geometry.modes() | {"WIDE": is_wide(inputs.targets.numel(), *maps)}


def upsample_cross_entropy_fwd(
    inputs: LossInputs, resizing: Resizing, options: LossOptions, results: LossResults
) -> None:
    """Fill the results of the logits (N, C, h, w), of any strides, resized to the labels' H x W."""
    low, target, _ = inputs
    loss, lse, denominator, prediction, counts = results
    geometry = ResizeGeometry.of(low, target.shape[1:], resizing)
    across, down = geometry.tiles()
    programs = low.shape[0] * across * down
    partials = torch.empty((2, programs), dtype=torch.float32, device=low.device) if options.is_reduced else loss
    predicted = Predicted(prediction, counts, programs, loss)
    launch(
        upsample_cross_entropy_fwd_kernel, programs,
        low, target, inputs.weight_or_logits, loss, lse, partials, *predicted.arguments,
        target.numel(), programs, across, down, options.ignore_index, *geometry.steps(), *geometry.sizes,
        *low.stride(),
        **_constants(inputs, options, geometry, low), **geometry.tile(),
        PREDICT=predicted.wanted, num_warps=1, debug=True, sanitize_overflow=False,
    )  # fmt: skip
    predicted.total()
    if options.is_reduced:
        add_up_losses(partials, loss, denominator, options.reduction)


def upsample_cross_entropy_bwd(
    grad_loss: Tensor,
    inputs: LossInputs,
    lse: Tensor,
    denominator: Tensor,
    resizing: Resizing,
    options: LossOptions,
    grad_low: Tensor,
) -> None:
    """Write the gradient of the logits (N, C, h, w), of any strides, from the forward's lse and denominator."""
    low, target, _ = inputs
    geometry = ResizeGeometry.of(low, target.shape[1:], resizing)
    n, classes, h, w = low.shape
    # As many columns of the small map as one block of output columns reaches, without the one before them.
    patch = min(max(int(BACKWARD_COLUMNS * geometry.ratio[1]) - 1, LEAST_PATCH - 1), LARGEST_PATCH)
    across, down = triton.cdiv(w, patch), triton.cdiv(h, PATCH_ROWS)
    launch(
        upsample_cross_entropy_bwd_kernel, n * across * down * triton.cdiv(classes, BACKWARD_CLASSES),
        grad_loss, low, target, inputs.weight_or_logits, lse, denominator, grad_low, target.numel(),
        across, down, patch, options.ignore_index, *geometry.steps(), *geometry.sizes, *low.stride(),
        *grad_low.stride(),
        **_constants(inputs, options, geometry, low, grad_low),
        PADDED=triton.next_power_of_2(classes), CLASSES=BACKWARD_CLASSES, COLUMNS=BACKWARD_COLUMNS, ROWS=PATCH_ROWS,
        LOW_COLUMNS=triton.next_power_of_2(patch), PRECISION="ieee" if low.dtype == torch.float32 else "tf32",
        num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
