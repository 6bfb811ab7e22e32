"""Cross-entropy of logits (N, C, h, w) resized to the labels' H x W, without storing the large logits.

Loss and gradient of a pixel are those of common.py, for logits that are weighted means of the small map's. There are
two passes, and each recomputes the large logits from the small ones, in float32. The tile of the forward is that of
upsample.py. The forward reads the labels and writes lse, 4 bytes per pixel (8 for float32 logits, as in cross_entropy).

The backward gathers. A program owns CLASSES classes of a patch of the small map, and goes down the patch from row to
row. The output rows between two rows of the small map have the same two taps along y. So those two rows are
interpolated along x once, and mixed for each output row. The gradients of the output rows are summed twice: with the
weights of the upper tap and with those of the lower tap. Only these sums are then interpolated back along x, by a
matrix product with the matrix of the weights, which has two entries per column. The sum for the lower tap is carried to
the next row. Every sum has one order, and nothing is added up in memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import has_tf32, launch
from .common import constants, exponential, gradient, label_weight, pixel_loss, read_label, smoothed_mass
from .cross_entropy import Predictions, add_up_losses
from .cross_entropy_bwd import read_pixels
from .options import LossInputs, LossOptions, LossResults, Resizing
from .upsample import (
    ResizeGeometry,
    first_position,
    interpolated_row,
    is_wide,
    resized_class,
    resized_tile,
    source_taps,
    wins,
)

BACKWARD_CLASSES = 16  # of a program: the fewest that tl.dot takes
BACKWARD_COLUMNS = 32  # output columns that a program holds at a time
PATCH_ROWS = 8  # of the small map; a program also reads the output rows above the first
REGISTERS = 168  # the most of a thread: without a limit of its own, the assembler aims for fewer and spills
LEAST_PATCH, LARGEST_PATCH = 16, 32  # columns of the small map in a matrix product


@triton.jit
def upsample_cross_entropy_fwd_kernel(
    low, target, weight, loss, lse, partials, prediction, counts, PIXELS, PROGRAMS, TILES_X, TILES_Y, IGNORE,
    STEP_H, STEP_W, IN_H, IN_W, OUT_H, OUT_W, STRIDE_N, STRIDE_C, STRIDE_H, STRIDE_W,
    C: tl.constexpr, REDUCTION: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    SPLIT: tl.constexpr, PREDICT: tl.constexpr, NEAREST: tl.constexpr, CORNERS: tl.constexpr, TAPS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program computes lse and loss of a tile of pixels, two classes at a time.

    Reads TAPS rows of the small map for each class and the labels once. Writes lse, and for REDUCTION "none" the
    losses, else the tile's sums of the losses and of the denominator's terms. The sums over the classes are those of
    common.accumulate. PREDICT: writes also the class of each pixel's largest value, and the numbers of pixels that are
    predicted right and that are not ignored.
    """
    # 1. Which pixels; load their labels
    program = tl.program_id(0)
    image, pixel, m_live, top, tap, y_weight, o_left, o_right, x_weight, m_inside = resized_tile(
        program, TILES_X, TILES_Y, STEP_H, STEP_W, IN_H, IN_W, OUT_H, OUT_W, STRIDE_W,
        NEAREST, CORNERS, ROWS, COLUMNS, WIDE,
    )  # fmt: skip
    label, out_of_range = read_label(target, pixel, m_live, C, IGNORE)
    tl.device_assert(out_of_range == 0, "upsample_cross_entropy: a target is neither a class nor ignore_index")

    # 2. For each pair of classes: load, resize, and accumulate the softmax sums and the argmax
    highest = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    picked = tl.zeros((ROWS, COLUMNS), tl.float32)
    distance = tl.zeros((ROWS, COLUMNS), tl.float32)
    mass = 0.0
    if PREDICT:
        best = tl.zeros((ROWS, COLUMNS), tl.int32)
        winner = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)  # `highest` ignores NaN
    for step in range(0, C, 2):
        c = step + image * 0  # a tensor, in the interpreter too
        one = resized_class(
            low, image * STRIDE_N, c, top, tap, y_weight, o_left, o_right, x_weight, m_inside, IN_H, STRIDE_C, STRIDE_H,
            C, NEAREST, TAPS, WIDE,
        )  # fmt: skip
        two = resized_class(
            low, image * STRIDE_N, c + 1, top, tap, y_weight, o_left, o_right, x_weight, m_inside, IN_H,
            STRIDE_C, STRIDE_H, C, NEAREST, TAPS, WIDE,
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
            distance += mass * (shift - tl.where(highest == float("-inf"), 0.0, highest)) + first * (shift - one)
            distance += tl.where(c + 1 < C, second * (shift - two), 0.0)
            mass += first + second
        highest = peak
        if PREDICT:
            higher = wins(one, winner)
            best = tl.where(higher, c.to(tl.int32), best)
            winner = tl.where(higher, one, winner)
            higher = wins(two, winner)
            best = tl.where(higher, (c + 1).to(tl.int32), best)
            winner = tl.where(higher, two, winner)

    # 3. Store lse
    above = tl.log(total)
    if SPLIT:
        tl.store(lse + pixel, highest, mask=m_live)
        tl.store(lse + PIXELS + pixel, above, mask=m_live)
    else:
        tl.store(lse + pixel, highest + above, mask=m_live)

    # 4. The losses, and their sum
    factor = label_weight(weight, label, tl.float32, WEIGHTED)
    value = pixel_loss(label, factor, picked, highest, total, mass, distance, False, SMOOTHING, Z_LOSS)
    if REDUCTION == "none":
        tl.store(loss + pixel, value, mask=m_live)
    else:
        tl.store(partials + program, tl.sum(tl.sum(value, axis=1), axis=0))
        if REDUCTION == "valid":
            factor = tl.where(label >= 0, 1.0, 0.0)
        if REDUCTION == "weights" or REDUCTION == "valid":
            tl.store(partials + PROGRAMS + program, tl.sum(tl.sum(factor, axis=1), axis=0))

    # 5. Store the predictions
    if PREDICT:
        tl.store(prediction + pixel, best.to(prediction.dtype.element_ty), mask=m_live)
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

    Reads label and lse once for each output pixel that has a tap in the patch, and each row of the patch, with the one
    above and the one below, for each pair of rows that it belongs to. Writes each element of the gradient once.
    """
    # 1. Which classes, and which patch of the small map
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
    o_low = image * STRIDE_N + c * STRIDE_C

    # 2. The output columns with a tap in the patch, and the part of the gradient that all pixels share
    x_start = first_position(left - 1, STEP_W, IN_W, OUT_W, NEAREST, CORNERS)
    x_end = first_position(left + PATCH, STEP_W, IN_W, OUT_W, NEAREST, CORNERS)
    low_column = tl.arange(0, LOW_COLUMNS)[None, :]
    smoothed = smoothed_mass(weight, tl.float32, C, WEIGHTED, SMOOTHING, PADDED)
    share = tl.zeros((CLASSES, 1), tl.float32) + SMOOTHING / C
    if WEIGHTED and SMOOTHING != 0:
        share *= tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)

    # 3. For each row of the patch, from the one above it
    carried = tl.zeros((CLASSES, LOW_COLUMNS), tl.float32)
    for step in range(0, ROWS + 1):
        row = top - 1 + step
        y_start = first_position(row, STEP_H, IN_H, OUT_H, NEAREST, CORNERS)
        y_end = first_position(row + 1, STEP_H, IN_H, OUT_H, NEAREST, CORNERS)
        grad = carried
        carried = tl.zeros((CLASSES, LOW_COLUMNS), tl.float32)
        for start in range(x_start, x_end, COLUMNS):
            # 4. Load this row and the next, interpolated along x
            x = start + tl.arange(0, COLUMNS)
            m_live = x < x_end
            x_tap, x_weight = source_taps(x, STEP_W, IN_W, NEAREST, CORNERS)
            if WIDE:
                x_tap = x_tap.to(tl.int64)
            m_inside = m_live[None, :] & (c < C)
            o_first = (x_tap * STRIDE_W)[None, :]
            o_second = (tl.minimum(x_tap + 1, IN_W - 1) * STRIDE_W)[None, :]
            second_weight = x_weight[None, :]
            o_above = o_low + tl.minimum(tl.maximum(row, 0), IN_H - 1) * STRIDE_H
            above = interpolated_row(low, o_above, o_first, o_second, second_weight, m_inside, NEAREST)
            below = above
            if not NEAREST:
                o_below = o_low + tl.minimum(row + 1, IN_H - 1) * STRIDE_H
                below = interpolated_row(low, o_below, o_first, o_second, second_weight, m_inside, NEAREST)

            # 5. Sum the gradients of the output rows between the two, for the upper and for the lower one
            for_above = tl.zeros((CLASSES, COLUMNS), tl.float32)
            for_below = tl.zeros((CLASSES, COLUMNS), tl.float32)
            for down in range(0, y_end - y_start):
                y = y_start + down
                _, y_weight = source_taps(y, STEP_H, IN_H, NEAREST, CORNERS)
                pixel = (image * OUT_H + y) * OUT_W + x
                label, scale, highest, rest, gain, spread = read_pixels(
                    grad_loss, target, weight, lse, denominator, pixel, m_live, PIXELS, IGNORE, smoothed,
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

            # 6. Interpolate the sums back along x: matrix products with the weights of each column's two taps
            tap = tl.where(m_live, x_tap - left, -2)[:, None]
            matrix = tl.where(tap == low_column, (1 - x_weight)[:, None], 0.0)
            if not NEAREST:
                matrix += tl.where(tap + 1 == low_column, x_weight[:, None], 0.0)
            grad += tl.dot(for_above, matrix, input_precision=PRECISION)
            if not NEAREST:
                carried += tl.dot(for_below, matrix, input_precision=PRECISION)

        # 7. Store the row
        rows = row + tl.zeros_like(low_column)  # a block, so that Triton 3.9's interpreter finds a mask of booleans
        m_written = (low_column < PATCH) & (left + low_column < IN_W) & (c < C) & (rows >= top) & (rows < IN_H)
        o_grad = image * GRAD_N + c * GRAD_C + row * GRAD_H + (left + low_column) * GRAD_W
        tl.store(grad_low + o_grad, grad.to(grad_low.dtype.element_ty), mask=m_written)


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
    predictions = Predictions(prediction, counts, programs, loss)
    launch(
        upsample_cross_entropy_fwd_kernel, programs,
        low, target, inputs.weight_or_logits, loss, lse, partials, *predictions.arguments,
        target.numel(), programs, across, down, options.ignore_index, *geometry.steps(), *geometry.sizes,
        *low.stride(),
        **_constants(inputs, options, geometry, low), **geometry.tile(),
        PREDICT=predictions.requested, num_warps=1, debug=True, sanitize_overflow=False,
    )  # fmt: skip
    predictions.add_up_counts()
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
    # As many columns of the small map as one block of output columns has as taps, without the leftmost.
    patch = min(max(int(BACKWARD_COLUMNS * geometry.ratio[1]) - 1, LEAST_PATCH - 1), LARGEST_PATCH)
    across, down = triton.cdiv(w, patch), triton.cdiv(h, PATCH_ROWS)
    precision = "tf32" if low.dtype != torch.float32 and has_tf32(low) else "ieee"
    launch(
        upsample_cross_entropy_bwd_kernel, n * across * down * triton.cdiv(classes, BACKWARD_CLASSES),
        grad_loss, low, target, inputs.weight_or_logits, lse, denominator, grad_low, target.numel(),
        across, down, patch, options.ignore_index, *geometry.steps(), *geometry.sizes, *low.stride(),
        *grad_low.stride(),
        **_constants(inputs, options, geometry, low, grad_low),
        PADDED=triton.next_power_of_2(classes), CLASSES=BACKWARD_CLASSES, COLUMNS=BACKWARD_COLUMNS, ROWS=PATCH_ROWS,
        LOW_COLUMNS=triton.next_power_of_2(patch), PRECISION=precision,
        num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
