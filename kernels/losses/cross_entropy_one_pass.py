"""Cross-entropy whose forward writes the gradient too, for a loss gradient of 1: 4 * C + 10 bytes per pixel in total.

A program reads the logits of its pixels once from memory; if it reads them again, they come from the L1 cache. The
denominator of a mean must be known before the gradient, so the labels are counted first (8 bytes per pixel) and packed
into one byte each. The backward checks the gradient of the loss on the device. If it is 1, there is nothing to do. Else
it recomputes the gradient from the logits, so that no value is rounded twice and none that underflowed is scaled up.
The formulas are in common.py. The kernel for NCHW is in cross_entropy_planes.py, that for channels_last in this file.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import INT32_MAX, launch
from .common import (
    accumulate,
    class_shares,
    constants,
    first_maximum,
    has_long_rows,
    label_weight,
    pixel_loss,
    read_label,
    read_target,
    read_tile,
    row_tile,
)
from .cross_entropy import (
    TOTAL_BLOCK,
    Predictions,
    add_up_losses,
    cross_entropy_total_kernel,
    row_steps,
    store_predictions,
)
from .cross_entropy_bwd import group_width, pixel_factors, write_groups
from .cross_entropy_planes import cross_entropy_one_pass_kernel, plane_tiling
from .options import LossInputs, LossOptions, OnePassResults

ROWS = 256  # pixels of a program in channels_last: as many as fit in its part of the L1 cache
LONG_ROWS = 64  # the same if their rows are long
GROUPS = 256  # written at a time in channels_last
LABELS = 2048  # of a program that counts labels
NO_LABEL = {torch.uint8: 255, torch.int16: -1}  # marks ignored pixels in packed labels


@triton.jit
def cross_entropy_labels_kernel(
    labels, weight, packed, partials, PIXELS, IGNORE, NONE, C: tl.constexpr, REDUCTION: tl.constexpr,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program packs BLOCK labels into one byte each (or two), NONE for an ignored pixel, and counts them.

    Reads each label once; writes the packed labels and the program's sum of weights, or number of labels.
    """
    # 1. Load the labels
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    p = program * BLOCK + tl.arange(0, BLOCK)
    m_live = p < PIXELS
    label, out_of_range = read_label(labels, p, m_live, C, IGNORE)
    tl.device_assert(out_of_range == 0, "cross_entropy: a target is neither a class nor ignore_index")

    # 2. Store them packed, and the program's part of the denominator
    tl.store(packed + p, tl.where(label < 0, NONE, label).to(packed.dtype.element_ty), mask=m_live)
    DTYPE: tl.constexpr = partials.dtype.element_ty
    counted = label_weight(weight, label, DTYPE, WEIGHTED and REDUCTION == "weights")
    tl.store(partials + program, tl.sum(counted, axis=0))


@triton.jit
def cross_entropy_one_pass_rows_kernel(
    grad_loss, logits, targets, weight, denominator, partials, prediction, counts, grad_logits,
    ELEMENTS, PIXELS, PROGRAMS, IGNORE,
    C: tl.constexpr, REDUCTION: tl.constexpr, PROBABILITIES: tl.constexpr, WEIGHTED: tl.constexpr,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, SPLIT: tl.constexpr, PREDICT: tl.constexpr, AGAIN: tl.constexpr,
    ROW_RAGGED: tl.constexpr, ROW_VEC: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr, UNROLL: tl.constexpr,
    RAGGED: tl.constexpr, VEC: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """channels_last: one program writes the gradient of BLOCK pixels, with the meaning and bytes of the NCHW kernel.

    It first reads the row of each pixel, like the forward of two passes. Then it reads these rows again, from the
    cache, as one sequence of groups of VEC elements, and writes them like the backward of two passes. A group takes the
    sums of its pixels from the program's registers.
    """
    # 1. The gradient of each pixel's loss
    DTYPE: tl.constexpr = partials.dtype.element_ty
    SHARED: tl.constexpr = PROBABILITIES or SMOOTHING != 0
    scale = tl.full((1,), 1.0, DTYPE)
    if AGAIN:
        given = tl.load(grad_loss)
        if given == 1.0:
            return
        scale = scale * given
    if REDUCTION != "sum":
        scale = scale / tl.load(denominator)

    # 2. Which pixels; load their targets
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    start = program * BLOCK
    pixel = start + tl.arange(0, BLOCK)
    m_live = pixel < PIXELS
    label, out_of_range = read_target(targets, pixel, m_live, C, IGNORE, PROBABILITIES)
    if not AGAIN:
        tl.device_assert(out_of_range == 0, "cross_entropy: a target is neither a class nor ignore_index")

    # 3. Load the logits, and accumulate the softmax sums and the argmax over the classes
    highest = tl.full((BLOCK,), float("-inf"), DTYPE)
    total = tl.zeros((BLOCK,), DTYPE)
    mass = tl.zeros((BLOCK,), DTYPE)
    distance = tl.zeros((BLOCK,), DTYPE)
    best = tl.zeros((BLOCK,), tl.int32)
    best_score = tl.full((BLOCK,), float("-inf"), DTYPE)
    first_nan = tl.full((BLOCK,), C, tl.int32)
    for step in tl.range(0, STEPS, loop_unroll_factor=UNROLL):
        o_logits, c, m_inside, m_whole, m_rest = row_tile(pixel, m_live, step, ELEMENTS, C, ROW_RAGGED, ROW_VEC, WIDTH)
        value = read_tile(logits, o_logits, m_whole, m_rest, ROW_RAGGED, 0.0).to(DTYPE)
        value = tl.where(m_inside, value, float("-inf"))
        share = value
        if SHARED:
            share = class_shares(
                targets, weight, o_logits, c, m_inside, m_whole, m_rest,
                DTYPE, C, PROBABILITIES, WEIGHTED, SMOOTHING, ROW_RAGGED,
            )  # fmt: skip
        highest, total, mass, distance = accumulate(value, share, m_inside, highest, total, mass, distance, SHARED)
        if PREDICT and not AGAIN:
            best, best_score, first_nan = first_maximum(value, c, m_inside, best, best_score, first_nan, C)

    # 4. The losses and predictions
    factor = label_weight(weight, label, DTYPE, WEIGHTED and not PROBABILITIES)
    above = tl.log(total)
    if not AGAIN:
        picked = tl.zeros((BLOCK,), DTYPE)
        if not PROBABILITIES:
            picked = tl.load(logits + pixel * C + label, mask=label >= 0, other=0.0).to(DTYPE)
        loss = pixel_loss(label, factor, picked, highest, total, mass, distance, PROBABILITIES, SMOOTHING, Z_LOSS)
        tl.store(partials + program, tl.sum(loss, axis=0))
        if PREDICT:
            best = tl.where(first_nan < C, first_nan, best)
            store_predictions(prediction, counts, pixel, m_live, label, best, program, PROGRAMS)

    # 5. For each group: load the logits again, compute the gradient, and store it
    gain, spread = pixel_factors(scale, label, factor, highest, above, mass, PROBABILITIES, SMOOTHING, Z_LOSS)
    if not SPLIT:
        highest = highest + above
    for step in range(0, (BLOCK * C) // (VEC * GROUPS) + ((BLOCK * C) % (VEC * GROUPS) != 0)):
        o_first = (step * GROUPS + tl.arange(0, GROUPS)) * VEC  # element in the program's rows
        row = o_first // C
        m_within = (row < BLOCK) & (start + row < PIXELS)
        row = tl.minimum(row, BLOCK - 1)
        label_1, highest_1, above_1, gain_1, spread_1 = pick(
            row, label, highest, above, gain, spread, PROBABILITIES, SPLIT, SHARED or Z_LOSS != 0
        )
        lane = tl.arange(0, VEC)[None, :]
        c = lane + (o_first - row * C)[:, None]
        if C % VEC != 0:
            label_2, highest_2, above_2, gain_2, spread_2 = pick(
                tl.minimum(row + 1, BLOCK - 1), label, highest, above, gain, spread, PROBABILITIES, SPLIT,
                SHARED or Z_LOSS != 0,
            )  # fmt: skip
            later = c >= C
            c = tl.where(later, c - C, c)
            label_1 = tl.where(later, label_2, label_1)
            highest_1 = tl.where(later, highest_2, highest_1)
            above_1 = tl.where(later, above_2, above_1)
            gain_1 = tl.where(later, gain_2, gain_1)
            spread_1 = tl.where(later, spread_2, spread_1)
        write_groups(
            logits, targets, weight, grad_logits, start * C + o_first, m_within, c, label_1, scale[:, None], highest_1,
            above_1, gain_1, spread_1, ELEMENTS,
            DTYPE, C, PROBABILITIES, WEIGHTED, SMOOTHING, Z_LOSS, VEC, RAGGED,
        )  # fmt: skip


@triton.jit
def pick(
    row, label, highest, above, gain, spread, PROBABILITIES: tl.constexpr, SPLIT: tl.constexpr, SPREAD: tl.constexpr
):
    """The values of the program's pixel `row` that its groups need, as columns; 0 for values that are not needed."""
    highest = tl.gather(highest, row, 0)[:, None]
    nothing = tl.zeros_like(highest)
    above = tl.gather(above, row, 0)[:, None] if SPLIT else nothing
    gain = nothing if PROBABILITIES else tl.gather(gain, row, 0)[:, None]
    spread = tl.gather(spread, row, 0)[:, None] if SPREAD else nothing
    return tl.gather(label, row, 0)[:, None], highest, above, gain, spread


def _launch(
    grad_loss: Tensor | None, inputs: LossInputs, options: LossOptions, channels_last: bool, results: OnePassResults
) -> Tensor:
    """Write grad_logits for this gradient of the loss; for None, which is 1, predictions too.

    Returns the programs' sums of losses, which are written only for None.
    """
    logits, targets, _ = inputs
    denominator = results.denominator
    n, _, h, w = logits.shape
    pixels = n * h * w
    block = LONG_ROWS if has_long_rows(logits) else ROWS
    programs = triton.cdiv(pixels, block)
    shares = options.label_smoothing != 0 or targets.is_floating_point()
    planes = plane_tiling(logits, crowded=shares and results.counts.numel() > 0)
    tiles = triton.cdiv(h * w, planes["BLOCK"])  # of an image, in NCHW
    if not channels_last:
        programs = n * tiles
    partials = denominator.new_empty((programs,))
    predictions = Predictions(results.prediction, results.counts, programs, partials)
    tensors = (
        partials if grad_loss is None else grad_loss, logits, targets, inputs.weight_or_logits, denominator, partials,
        *predictions.arguments, results.grad_logits,
    )  # fmt: skip
    shared = constants(inputs, options) | {
        "PREDICT": predictions.requested, "AGAIN": grad_loss is not None, "debug": True, "sanitize_overflow": False,
    }  # fmt: skip
    if channels_last:
        row_vec, vec = 16 // logits.element_size(), group_width(logits)
        launch(
            cross_entropy_one_pass_rows_kernel, programs,
            *tensors, logits.numel(), pixels, programs, options.ignore_index,
            **shared, ROW_RAGGED=logits.numel() % row_vec != 0, ROW_VEC=row_vec, **row_steps(logits, row_vec),
            RAGGED=logits.numel() % vec != 0, VEC=vec, GROUPS=GROUPS, BLOCK=block,
        )  # fmt: skip
    else:
        launch(
            cross_entropy_one_pass_kernel, programs,
            *tensors, h * w // planes["VEC"], tiles, programs, options.ignore_index, **shared, **planes,
        )  # fmt: skip
    predictions.add_up_counts()
    return partials


def cross_entropy_one_pass(
    inputs: LossInputs, options: LossOptions, channels_last: bool, results: OnePassResults
) -> None:
    """Fill the results: the loss, and the gradient of the logits for a loss gradient of 1. All tensors are dense.

    Every reduction but "none", up to 256 classes. In packed_labels an ignored pixel has the label 255 (-1 in int16).
    """
    loss, packed, denominator = results.loss, results.packed_labels, results.denominator
    if options.sums_denominator:
        targets, weight = inputs.targets, inputs.weight
        programs, none = triton.cdiv(packed.numel(), LABELS), NO_LABEL[packed.dtype]
        partials = denominator.new_empty((programs,))
        launch(
            cross_entropy_labels_kernel, programs,
            targets, inputs.weight_or_logits, packed, partials, packed.numel(), options.ignore_index, none,
            C=inputs.logits.shape[1], REDUCTION=options.reduction, WEIGHTED=weight is not None, BLOCK=LABELS,
            WIDE=packed.numel() > INT32_MAX - LABELS, debug=True, sanitize_overflow=False,
        )  # fmt: skip
        add_up_losses(partials, denominator, denominator, "sum")
        inputs, options = inputs._replace(targets=packed), options._replace(ignore_index=none)
    partials = _launch(None, inputs, options, channels_last, results)
    launch(
        cross_entropy_total_kernel, 1,
        partials, loss, denominator, partials.numel(), DIVIDED=options.is_mean, SUMMED=False, BLOCK=TOTAL_BLOCK,
    )  # fmt: skip


def cross_entropy_one_pass_bwd(
    grad_loss: Tensor,
    inputs: LossInputs,
    denominator: Tensor,
    options: LossOptions,
    channels_last: bool,
    grad_logits: Tensor,
) -> None:
    """Recompute grad_logits for this gradient of the loss, unless that is 1.

    The targets and options.ignore_index are cross_entropy_one_pass's packed labels and the label of an ignored pixel
    in them, or those that it was given.
    """
    nothing = grad_logits.new_empty((0,))
    results = OnePassResults(nothing, grad_logits, nothing, denominator, nothing, nothing)
    _launch(grad_loss, inputs, options, channels_last, results)
