"""Cross-entropy of (N, C, H, W) logits in two passes, in NCHW and channels_last. This file holds the forward.

The forward reads the logits once and writes lse, 4 bytes per pixel. The backward (cross_entropy_bwd.py) reads logits,
labels and lse once and writes the gradient once. For bf16 logits and int64 labels these are 6 * C + 24 bytes per pixel
in total, and 8 more for float32 logits, whose lse has two terms. Class probabilities are read once in each pass. The
formulas are in common.py; cross_entropy_one_pass.py is the form whose forward computes the gradient too.

The logit of a label is found by comparing class numbers, and only a valid label is ever part of an address. Sums over
pixels are partial sums of the programs, added up in a fixed order: no atomics.

In NCHW the pixels of a program are next to each other in each class's plane, and the program loops over the classes. In
channels_last the classes of a pixel are next to each other, C of them, which is seldom a multiple of 16 bytes. The
forward therefore reads all aligned groups of VEC elements (16 bytes) that contain a part of a pixel's row. If the
tensor ends inside a group (RAGGED), that group is read element by element.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch, vector_width
from ..triton_internals import VERSION
from .common import (
    accumulate,
    class_shares,
    constants,
    first_maximum,
    has_long_rows,
    label_weight,
    pixel_loss,
    read_target,
    read_tile,
    row_tile,
)
from .options import LossInputs, LossOptions, LossResults

FEW_PROGRAMS = 512  # too few to fill a GPU: programs are made smaller then
# Classes read at a time in NCHW, as many as fit in registers, and steps whose loads are in flight together. Of four
# classes at a time Triton 3.8 spills a value on sm_100; it needs fewer registers for two times two.
CLASSES, UNROLL = (2, 2) if VERSION == (3, 8) else (4, 1)
ROWS = 256  # pixels of a program in channels_last
LONG_ROWS = 128  # the same if their rows are long
TOTAL_BLOCK = 1024  # partial sums that are added at a time


@triton.jit
def cross_entropy_fwd_kernel(
    logits, targets, weight, loss, lse, partials, prediction, counts, ELEMENTS, PIXELS, RUNS, TILES, PROGRAMS, IGNORE,
    C: tl.constexpr, REDUCTION: tl.constexpr, PROBABILITIES: tl.constexpr, WEIGHTED: tl.constexpr,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, SPLIT: tl.constexpr, PREDICT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, RAGGED: tl.constexpr, VEC: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
    UNROLL: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program computes lse and loss of BLOCK pixels: of one image in NCHW, of the batch in channels_last.

    Reads their logits once, WIDTH classes at a time, and their targets. Writes lse, and for REDUCTION "none" the
    losses, else the program's sums of the losses and of the denominator's terms: 2 * C + 12 bytes per pixel for bf16
    logits, int64 labels and a mean. PREDICT: writes also the class of each pixel's largest logit, and the numbers of
    pixels that are predicted right and that are not ignored.
    """
    # 1. Which pixels
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    DTYPE: tl.constexpr = lse.dtype.element_ty
    SHARED: tl.constexpr = PROBABILITIES or SMOOTHING != 0
    SIZE = PIXELS if CHANNELS_LAST else tl.cast(RUNS, program.dtype) * VEC
    p = (program % TILES) * BLOCK + tl.arange(0, BLOCK)
    m_live = p < SIZE
    image = program // TILES
    pixel = image * SIZE + p

    # 2. Load the targets
    label, out_of_range = read_target(targets, pixel, m_live, C, IGNORE, PROBABILITIES)
    tl.device_assert(out_of_range == 0, "cross_entropy: a target is neither a class nor ignore_index")

    # 3. Load the logits, and accumulate the softmax sums and the argmax over the classes
    highest = tl.full((BLOCK,), float("-inf"), DTYPE)
    total = tl.zeros((BLOCK,), DTYPE)
    mass = tl.zeros((BLOCK,), DTYPE)
    distance = tl.zeros((BLOCK,), DTYPE)
    picked = tl.zeros((BLOCK,), DTYPE)
    best = tl.zeros((BLOCK,), tl.int32)
    best_score = tl.full((BLOCK,), float("-inf"), DTYPE)
    first_nan = tl.full((BLOCK,), C, tl.int32)
    lane = tl.arange(0, WIDTH)[None, :]
    for step in tl.range(0, STEPS, loop_unroll_factor=UNROLL):
        if CHANNELS_LAST:
            o_logits, c, m_inside, m_whole, m_rest = row_tile(pixel, m_live, step, ELEMENTS, C, RAGGED, VEC, WIDTH)
            value = read_tile(logits, o_logits, m_whole, m_rest, RAGGED, 0.0).to(DTYPE)
            value = tl.where(m_inside, value, float("-inf"))
        else:
            c = step * WIDTH + lane
            o_logits = (image * C + c) * SIZE + p[:, None]
            m_inside = m_live[:, None] & (c < C)
            m_whole = m_inside
            m_rest = m_inside
            value = tl.load(logits + o_logits, mask=m_inside, other=float("-inf")).to(DTYPE)
            if not PROBABILITIES:  # loading these at the end would read a sector for each pixel
                picked += tl.sum(tl.where(lane == (label - step * WIDTH)[:, None], value, 0.0), axis=1)
        share = value
        if SHARED:
            share = class_shares(
                targets, weight, o_logits, c, m_inside, m_whole, m_rest,
                DTYPE, C, PROBABILITIES, WEIGHTED, SMOOTHING, RAGGED,
            )  # fmt: skip
        highest, total, mass, distance = accumulate(value, share, m_inside, highest, total, mass, distance, SHARED)
        if PREDICT:
            best, best_score, first_nan = first_maximum(value, c, m_inside, best, best_score, first_nan, C)
    if CHANNELS_LAST and not PROBABILITIES:
        picked = tl.load(logits + pixel * C + label, mask=label >= 0, other=0.0).to(DTYPE)

    # 4. Store lse
    above = tl.log(total)
    if SPLIT:
        tl.store(lse + pixel, highest, mask=m_live)
        tl.store(lse + PIXELS + pixel, above, mask=m_live)
    else:
        tl.store(lse + pixel, highest + above, mask=m_live)
    if PROBABILITIES:
        masses = lse + PIXELS + PIXELS if SPLIT else lse + PIXELS  # 2 * PIXELS can pass int32
        tl.store(masses + pixel, mass, mask=m_live)

    # 5. The losses, and their sum
    factor = label_weight(weight, label, DTYPE, WEIGHTED and not PROBABILITIES)
    value = pixel_loss(label, factor, picked, highest, total, mass, distance, PROBABILITIES, SMOOTHING, Z_LOSS)
    if REDUCTION == "none":
        tl.store(loss + pixel, value, mask=m_live)
    else:
        tl.store(partials + program, tl.sum(value, axis=0))
        if REDUCTION == "weights":
            tl.store(partials + PROGRAMS + program, tl.sum(factor, axis=0))
        elif REDUCTION == "valid":
            tl.store(partials + PROGRAMS + program, tl.sum(tl.where(label >= 0, 1.0, 0.0).to(DTYPE), axis=0))

    # 6. Store the predictions
    if PREDICT:
        store_predictions(prediction, counts, pixel, m_live, label, best, first_nan, program, PROGRAMS, C)


@triton.jit
def store_predictions(prediction, counts, pixel, m_live, label, best, first_nan, program, PROGRAMS, C: tl.constexpr):
    """Write the predicted classes, and the program's numbers of pixels predicted right and not ignored."""
    best = tl.where(first_nan < C, first_nan, best)
    tl.store(prediction + pixel, best.to(prediction.dtype.element_ty), mask=m_live)
    tl.store(counts + program, tl.sum(((label == best) & m_live).to(tl.int32), axis=0))
    tl.store(counts + PROGRAMS + program, tl.sum((label >= 0).to(tl.int32), axis=0))


@triton.jit
def cross_entropy_total_kernel(
    partials, loss, denominator, PARTIALS, DIVIDED: tl.constexpr, SUMMED: tl.constexpr, BLOCK: tl.constexpr
):
    """One program adds up the partial sums, in an order that depends on their number alone, and divides for a mean.

    SUMMED: the denominator is a sum of partial sums too, and is written; else it is read. If all pixels are ignored,
    the mean is 0 / 0 = NaN and the sum 0, as in torch.
    """
    # 1. Add up the partial sums
    losses = tl.zeros((BLOCK,), partials.dtype.element_ty)
    divisors = tl.zeros((BLOCK,), partials.dtype.element_ty)
    for start in range(0, PARTIALS, BLOCK):
        o = start + tl.arange(0, BLOCK)
        losses += tl.load(partials + o, mask=o < PARTIALS, other=0.0)
        if SUMMED:
            divisors += tl.load(partials + PARTIALS + o, mask=o < PARTIALS, other=0.0)

    # 2. Divide, and store
    total = tl.sum(losses, axis=0)
    if SUMMED:
        divisor = tl.sum(divisors, axis=0)
        tl.store(denominator, divisor)
        total = total / divisor
    elif DIVIDED:
        total = total / tl.load(denominator)
    tl.store(loss, total)


@triton.jit
def cross_entropy_counts_kernel(partials, counts, PARTIALS, BLOCK: tl.constexpr):
    """One program adds up the programs' numbers of pixels predicted right and not ignored."""
    # 1. Add up the partial sums
    right = tl.zeros((BLOCK,), tl.int64)
    valid = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, PARTIALS, BLOCK):
        o = start + tl.arange(0, BLOCK)
        right += tl.load(partials + o, mask=o < PARTIALS, other=0)
        valid += tl.load(partials + PARTIALS + o, mask=o < PARTIALS, other=0)

    # 2. Store
    tl.store(counts, tl.sum(right, axis=0))
    tl.store(counts + 1, tl.sum(valid, axis=0))


class PixelTiling(NamedTuple):
    """How the pixels of a call are divided among programs: in NCHW, and for the forward in channels_last."""

    runs: int  # pixels of an image in units of vec; only used in NCHW
    tiles: int  # programs per image (NCHW) or per batch (channels_last)
    programs: int
    vec: int  # elements of one access
    block: int  # pixels of a program
    warps: int

    @classmethod
    def of(cls, logits: Tensor, channels_last: bool) -> PixelTiling:
        n, _, h, w = logits.shape
        warps = 4
        if channels_last:
            block = LONG_ROWS if has_long_rows(logits) else ROWS
            tiles = triton.cdiv(n * h * w, block)
            return cls(h * w, tiles, tiles, 16 // logits.element_size(), block, warps)
        vec = vector_width(logits.element_size(), h * w)
        lane = max(vec, 4 if logits.element_size() < 8 else 2)  # pixels of a lane: one access, or several narrow ones
        if n * triton.cdiv(h * w, 32 * warps * lane) < FEW_PROGRAMS:
            warps = 1
        block = 32 * warps * lane
        tiles = triton.cdiv(h * w, block)
        return cls(h * w // vec, tiles, n * tiles, vec, block, warps)


def row_steps(logits: Tensor, vec: int) -> dict[str, int]:
    """channels_last: WIDTH (classes read at a time), STEPS, and UNROLL (steps whose loads are in flight together)."""
    classes = logits.shape[1]
    width = 4 * vec if has_long_rows(logits) else vec
    # A row begins at any multiple of gcd(classes, vec) in its first group.
    steps = triton.cdiv(classes + vec - math.gcd(classes, vec), width)
    return {"WIDTH": width, "STEPS": steps, "UNROLL": 1 if has_long_rows(logits) else min(steps, 4)}


class Predictions:
    """The predictions of a forward, if requested (counts has elements), and the counts of its programs."""

    def __init__(self, prediction: Tensor, counts: Tensor, programs: int, unused: Tensor) -> None:
        self.requested, self.programs, self.counts = counts.numel() > 0, programs, counts
        self.partials = counts.new_empty((2, programs), dtype=torch.int32) if self.requested else unused
        self.arguments = (prediction if self.requested else unused, self.partials)

    def add_up_counts(self) -> None:
        """Write the counts, after the forward's launch."""
        if self.requested:
            launch(cross_entropy_counts_kernel, 1, self.partials, self.counts, self.programs, BLOCK=TOTAL_BLOCK)


def cross_entropy_fwd(inputs: LossInputs, options: LossOptions, channels_last: bool, results: LossResults) -> None:
    """Fill the results: loss and lse, and denominator, prediction and counts if requested. All tensors are dense."""
    logits, targets, _ = inputs
    loss, lse, denominator, prediction, counts = results
    tiling = PixelTiling.of(logits, channels_last)
    pixels = lse[0].numel()
    partials = loss.new_empty((2, tiling.programs)) if options.is_reduced else loss
    predictions = Predictions(prediction, counts, tiling.programs, loss)
    steps = {"WIDTH": CLASSES, "STEPS": triton.cdiv(logits.shape[1], CLASSES), "UNROLL": UNROLL}
    launch(
        cross_entropy_fwd_kernel, tiling.programs,
        logits, targets, inputs.weight_or_logits, loss, lse, partials, *predictions.arguments,
        logits.numel(), pixels, tiling.runs, tiling.tiles, tiling.programs, options.ignore_index,
        **constants(inputs, options), PREDICT=predictions.requested,
        CHANNELS_LAST=channels_last, RAGGED=channels_last and logits.numel() % tiling.vec != 0, VEC=tiling.vec,
        **(row_steps(logits, tiling.vec) if channels_last else steps), BLOCK=tiling.block,
        num_warps=tiling.warps, debug=True, sanitize_overflow=False,
    )  # fmt: skip
    predictions.add_up_counts()
    if options.is_reduced:
        add_up_losses(partials, loss, denominator, options.reduction)


def add_up_losses(partials: Tensor, loss: Tensor, denominator: Tensor, reduction: str) -> None:
    """Add up the programs' losses, and the denominator if it is a sum over the pixels too; divide for a mean."""
    launch(
        cross_entropy_total_kernel, 1,
        partials, loss, denominator, partials.shape[-1],
        DIVIDED=reduction != "sum", SUMMED=reduction in ("weights", "valid"), BLOCK=TOTAL_BLOCK,
    )  # fmt: skip
