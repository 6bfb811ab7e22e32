"""Cross-entropy whose forward writes the gradient too, for a gradient of the loss that is 1: 4 * C + 10 bytes a pixel.

The logits of a program's pixels are read once, from memory or, the second time, from the first-level cache; what a
mean divides by must be known before, so the labels are counted first (8 bytes a pixel), and left in one byte each.
The backward looks at the gradient of the loss, on the device: where it is 1 all is done, else it makes the gradient
anew, from the logits, so that nothing is ever rounded twice and nothing that underflowed is scaled up again.
Formulas in cross_entropy_parts.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import INT32_MAX, launch, vector_width
from .common import (
    accumulate,
    class_shares,
    constants,
    exponential,
    first_maximum,
    gradient,
    label_weight,
    long_rows,
    pixel_loss,
    read_label,
    read_target,
    read_tile,
    row_tile,
)
from .cross_entropy import (
    TOTAL_BLOCK,
    Predicted,
    add_up_losses,
    cross_entropy_total_kernel,
    row_steps,
    store_predictions,
)
from .cross_entropy_bwd import chunk_width, pixel_factors, write_chunks
from .options import LossInputs, LossOptions, OnePassResults

TILE = 8192  # logits of a program in NCHW, which its registers hold
ROWS = 256  # pixels of a program in channels_last, which its share of the first-level cache holds
LONG_ROWS = 64
CHUNKS = 256  # that it writes at a time there
LABELS = 2048  # of a program that counts them
NO_LABEL = {torch.uint8: 255, torch.int16: -1}  # in packed labels


@triton.jit
def cross_entropy_labels_kernel(
    labels, weight, packed, partials, PIXELS, IGNORE, NONE, C: tl.constexpr, REDUCTION: tl.constexpr,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes labels in one byte (or two), NONE where there is none, and each program's sum of weights or number."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    p = program * BLOCK + tl.arange(0, BLOCK)
    live = p < PIXELS
    label, stray = read_label(labels, p, live, C, IGNORE)
    tl.device_assert(stray == 0, "cross_entropy: a target is neither a class nor ignore_index")
    tl.store(packed + p, tl.where(label < 0, NONE, label).to(packed.dtype.element_ty), mask=live)
    DTYPE: tl.constexpr = partials.dtype.element_ty
    counted = label_weight(weight, label, DTYPE, WEIGHTED and REDUCTION == "weights")
    tl.store(partials + program, tl.sum(counted, axis=0))


@triton.jit
def cross_entropy_one_pass_kernel(
    grad_loss, logits, targets, weight, denominator, partials, prediction, counts, grad_logits,
    RUNS, TILES, PROGRAMS, IGNORE,
    C: tl.constexpr, REDUCTION: tl.constexpr, PROBABILITIES: tl.constexpr, WEIGHTED: tl.constexpr,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, SPLIT: tl.constexpr, PREDICT: tl.constexpr, AGAIN: tl.constexpr,
    VEC: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """NCHW: one program writes the gradient of BLOCK pixels of one image, all classes of which it holds.

    Reads their logits and targets once. AGAIN: for the gradient of the loss, unless that is 1. Else for 1, with the
    program's sum of losses and, PREDICT, its predictions. denominator: what the sum of all losses is divided by.
    """
    DTYPE: tl.constexpr = partials.dtype.element_ty
    SHARED: tl.constexpr = PROBABILITIES or SMOOTHING != 0
    scale = tl.full((BLOCK,), 1.0, DTYPE)
    if AGAIN:
        given = tl.load(grad_loss)
        if given == 1.0:
            return
        scale = scale * given
    if REDUCTION != "sum":
        scale = scale / tl.load(denominator)
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    SIZE = tl.cast(RUNS, program.dtype) * VEC
    p = (program % TILES) * BLOCK + tl.arange(0, BLOCK)
    live = p < SIZE
    image = program // TILES
    pixel = image * SIZE + p
    label, stray = read_target(targets, pixel, live, C, IGNORE, PROBABILITIES)
    if not AGAIN:
        tl.device_assert(stray == 0, "cross_entropy: a target is neither a class nor ignore_index")
    c = tl.arange(0, WIDTH)[None, :]
    o = (image * C + c) * SIZE + p[:, None]
    inside = live[:, None] & (c < C)
    hit = c == label[:, None]
    value = tl.load(logits + o, mask=inside, other=float("-inf")).to(DTYPE)
    share = value
    if SHARED:
        share = class_shares(
            targets, weight, o, c, inside, inside, inside, DTYPE, C, PROBABILITIES, WEIGHTED, SMOOTHING, False
        )
    zeros = tl.zeros((BLOCK,), DTYPE)
    highest, total, mass, short = accumulate(
        value, share, inside, tl.full((BLOCK,), float("-inf"), DTYPE), zeros, zeros, zeros, SHARED
    )
    factor = label_weight(weight, label, DTYPE, WEIGHTED and not PROBABILITIES)
    if not AGAIN:
        picked = zeros
        if not PROBABILITIES:  # of the tile that was just read
            picked = tl.load(logits + (image * C + label) * SIZE + p, mask=label >= 0, other=0.0).to(DTYPE)
        loss = pixel_loss(label, factor, picked, highest, total, mass, short, PROBABILITIES, SMOOTHING, Z_LOSS)
        tl.store(partials + program, tl.sum(loss, axis=0))
        if PREDICT:
            best, _, first_nan = first_maximum(
                value, c, inside, tl.zeros((BLOCK,), tl.int32), tl.full((BLOCK,), float("-inf"), DTYPE),
                tl.full((BLOCK,), C, tl.int32), C,
            )  # fmt: skip
            store_predictions(prediction, counts, pixel, live, label, best, first_nan, program, PROGRAMS, C)
    gain, spread = pixel_factors(scale, label, factor, highest, tl.log(total), mass, PROBABILITIES, SMOOTHING, Z_LOSS)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    grad = gradient(
        exponential(value - shift[:, None]) * (1.0 / total)[:, None], share, hit, label[:, None], gain[:, None],
        spread[:, None], scale[:, None], PROBABILITIES, SHARED, SHARED or Z_LOSS != 0,
    )  # fmt: skip
    tl.store(grad_logits + o, grad.to(grad_logits.dtype.element_ty), mask=inside)


@triton.jit
def cross_entropy_one_pass_rows_kernel(
    grad_loss, logits, targets, weight, denominator, partials, prediction, counts, grad_logits,
    ELEMENTS, PIXELS, PROGRAMS, IGNORE,
    C: tl.constexpr, REDUCTION: tl.constexpr, PROBABILITIES: tl.constexpr, WEIGHTED: tl.constexpr,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, SPLIT: tl.constexpr, PREDICT: tl.constexpr, AGAIN: tl.constexpr,
    ROW_RAGGED: tl.constexpr, ROW_VEC: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr, UNROLL: tl.constexpr,
    RAGGED: tl.constexpr, VEC: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """channels_last: one program writes the gradient of BLOCK pixels, as the kernel for NCHW does.

    First it reads the row of each pixel, as the forward of two passes; then it reads and writes the run of chunks that
    these rows are, as the backward does. A chunk takes the sums of its pixels from the program's own registers.
    """
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
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    start = program * BLOCK
    pixel = start + tl.arange(0, BLOCK)
    live = pixel < PIXELS
    label, stray = read_target(targets, pixel, live, C, IGNORE, PROBABILITIES)
    if not AGAIN:
        tl.device_assert(stray == 0, "cross_entropy: a target is neither a class nor ignore_index")
    highest = tl.full((BLOCK,), float("-inf"), DTYPE)
    total = tl.zeros((BLOCK,), DTYPE)
    mass = tl.zeros((BLOCK,), DTYPE)
    short = tl.zeros((BLOCK,), DTYPE)
    best = tl.zeros((BLOCK,), tl.int32)
    best_score = tl.full((BLOCK,), float("-inf"), DTYPE)
    first_nan = tl.full((BLOCK,), C, tl.int32)
    for step in tl.range(0, STEPS, loop_unroll_factor=UNROLL):
        o, c, inside, whole, rest = row_tile(pixel, live, step, ELEMENTS, C, ROW_RAGGED, ROW_VEC, WIDTH)
        value = read_tile(logits, o, whole, rest, ROW_RAGGED, 0.0).to(DTYPE)
        value = tl.where(inside, value, float("-inf"))
        share = value
        if SHARED:
            share = class_shares(
                targets, weight, o, c, inside, whole, rest, DTYPE, C, PROBABILITIES, WEIGHTED, SMOOTHING, ROW_RAGGED
            )
        highest, total, mass, short = accumulate(value, share, inside, highest, total, mass, short, SHARED)
        if PREDICT and not AGAIN:
            best, best_score, first_nan = first_maximum(value, c, inside, best, best_score, first_nan, C)
    factor = label_weight(weight, label, DTYPE, WEIGHTED and not PROBABILITIES)
    above = tl.log(total)
    if not AGAIN:
        picked = tl.zeros((BLOCK,), DTYPE)
        if not PROBABILITIES:
            picked = tl.load(logits + pixel * C + label, mask=label >= 0, other=0.0).to(DTYPE)
        loss = pixel_loss(label, factor, picked, highest, total, mass, short, PROBABILITIES, SMOOTHING, Z_LOSS)
        tl.store(partials + program, tl.sum(loss, axis=0))
        if PREDICT:
            store_predictions(prediction, counts, pixel, live, label, best, first_nan, program, PROGRAMS, C)
    gain, spread = pixel_factors(scale, label, factor, highest, above, mass, PROBABILITIES, SMOOTHING, Z_LOSS)
    if not SPLIT:
        highest = highest + above
    for step in range(0, (BLOCK * C) // (VEC * CHUNKS) + ((BLOCK * C) % (VEC * CHUNKS) != 0)):
        first = (step * CHUNKS + tl.arange(0, CHUNKS)) * VEC  # element of the program's run
        row = first // C
        within = (row < BLOCK) & (start + row < PIXELS)
        row = tl.minimum(row, BLOCK - 1)
        label_1, highest_1, above_1, gain_1, spread_1 = pick(
            row, label, highest, above, gain, spread, PROBABILITIES, SPLIT, SHARED or Z_LOSS != 0
        )
        lane = tl.arange(0, VEC)[None, :]
        c = lane + (first - row * C)[:, None]
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
        write_chunks(
            logits, targets, weight, grad_logits, start * C + first, within, c, label_1, scale[:, None], highest_1,
            above_1, gain_1, spread_1, ELEMENTS,
            DTYPE, C, PROBABILITIES, WEIGHTED, SMOOTHING, Z_LOSS, VEC, RAGGED,
        )  # fmt: skip


@triton.jit
def pick(
    row, label, highest, above, gain, spread, PROBABILITIES: tl.constexpr, SPLIT: tl.constexpr, SPREAD: tl.constexpr
):
    """What a chunk needs of the program's pixel `row`, as columns; what it does not need stays 0."""
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
    n, classes, h, w = logits.shape
    again, vec, pixels = grad_loss is not None, vector_width(logits.element_size(), h * w), n * h * w
    width = triton.next_power_of_2(classes)
    block = LONG_ROWS if long_rows(logits) else ROWS
    programs = triton.cdiv(pixels, block)
    if not channels_last:
        tile = TILE * 4 // max(logits.element_size(), 4)  # float64 takes two registers
        line = 128 // logits.element_size()  # pixels of a whole line of the cache
        block = min(max(tile // width, line), 1024, max(line, triton.next_power_of_2(h * w)))
        programs = n * triton.cdiv(h * w, block)
    partials = denominator.new_empty((programs,))
    predicted = Predicted(results.prediction, results.counts, programs, partials)
    tensors = (
        partials if grad_loss is None else grad_loss, logits, targets, inputs.weight_or_logits, denominator, partials,
        *predicted.arguments, results.grad_logits,
    )  # fmt: skip
    shared = constants(inputs, options) | {
        "PREDICT": predicted.wanted, "AGAIN": again, "BLOCK": block, "debug": True, "sanitize_overflow": False,
    }  # fmt: skip
    if channels_last:
        row_vec, vec = 16 // logits.element_size(), chunk_width(logits)
        launch(
            cross_entropy_one_pass_rows_kernel, programs,
            *tensors, logits.numel(), pixels, programs, options.ignore_index,
            **shared, ROW_RAGGED=logits.numel() % row_vec != 0, ROW_VEC=row_vec, **row_steps(logits, row_vec),
            RAGGED=logits.numel() % vec != 0, VEC=vec, CHUNKS=CHUNKS,
        )  # fmt: skip
    else:
        launch(
            cross_entropy_one_pass_kernel, programs,
            *tensors, h * w // vec, triton.cdiv(h * w, block), programs, options.ignore_index,
            **shared, VEC=vec, WIDTH=width, num_warps=max(4, block * width // tile * 8),
        )  # fmt: skip
    predicted.total()
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
