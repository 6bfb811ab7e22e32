"""Cross-entropy of (N, C, H, W) logits with index labels, in NCHW and in channels_last.

    lse = log(sum_c exp(x_c)),   loss = w_t * (lse - x_t),   dloss / dx_c = w_t * (exp(x_c - lse) - [c = t])

Two passes. The forward reads the logits once and keeps lse, 4 bytes a pixel; the backward reads logits, labels and lse
once and writes the gradient once. For bf16 logits and int64 labels that is 6 * C + 24 bytes a pixel in all. Whatever
the logits' dtype, everything is computed and summed in fp32. For fp32 logits lse is kept in two terms, the maximum and
what is above it, 4 bytes more: as one number it loses the digits that the gradient of a confident pixel is made of.

A label picks its logit by comparison with the class numbers; only a valid label is ever part of an address. Sums over
pixels are partial sums of programs, added up in a fixed order: no atomics.

In NCHW a program's pixels lie side by side in each class's plane, and it walks over the classes. In channels_last a
pixel's classes lie side by side, C of them and seldom a multiple of 16 bytes: the forward reads the whole aligned
chunks of VEC elements that a pixel's row touches, the backward treats the tensor as one run of chunks, each of which
holds classes of one pixel, or of one and the next. Where the run ends inside a chunk (RAGGED), that chunk is read and
written element by element.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INT32_MAX, launch, vector_width

FEW_PROGRAMS = 512  # too few to fill a GPU: smaller ones are taken then
CLASSES = 4  # that a program reads at a time in NCHW, forward and backward: what its registers hold
BACKWARD_CLASSES = 2
LONG_ROW = 128  # bytes of a pixel's classes in channels_last, from which on four lanes share a row
ROWS = 256  # pixels of a forward program in channels_last, and where their rows are long
LONG_ROWS = 128
CHUNKS = 256  # of a backward program in channels_last
TOTAL_BLOCK = 1024
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _exp(x):
    """exp of x <= 0 by the hardware's power of two; a result too small for a normal number is 0."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def _label(labels, o, live, C: tl.constexpr, IGNORE):
    """(the class or -1 where there is none, whether the label is neither a class nor to be ignored)."""
    label = tl.load(labels + o, mask=live, other=0).to(tl.int64)
    kept = live & (label != IGNORE)
    inside = (label >= 0) & (label < C)
    return tl.where(kept & inside, label, -1).to(tl.int32), kept & (inside == 0)


@triton.jit
def _weight(weight, label, WEIGHTED: tl.constexpr):
    """The label's weight, 0 where there is none."""
    if WEIGHTED:
        return tl.load(weight + tl.maximum(label, 0), mask=label >= 0, other=0.0).to(tl.float32)
    else:
        return tl.where(label >= 0, 1.0, 0.0)


@triton.jit
def _scale(grad_loss, denominator, weight, o, label, REDUCTION: tl.constexpr, WEIGHTED: tl.constexpr):
    """The gradient of the pixel's lse - x_t, 0 where the label is none."""
    if REDUCTION == "none":
        grad = tl.load(grad_loss + o, mask=label >= 0, other=0.0)
    else:
        grad = tl.load(grad_loss)
        if REDUCTION == "mean":
            grad = grad / tl.load(denominator)
    return grad * _weight(weight, label, WEIGHTED)


@triton.jit
def _lse(lse, PIXELS, o, live, SPLIT: tl.constexpr):
    """The two terms of lse, the second 0 where it is kept as one."""
    first = tl.load(lse + o, mask=live, other=0.0)
    second = tl.load(lse + PIXELS + o, mask=live, other=0.0) if SPLIT else tl.zeros_like(first)
    return first, second


@triton.jit
def _row_tile(
    logits, pixel, live, step, ELEMENTS, C: tl.constexpr, RAGGED: tl.constexpr, VEC: tl.constexpr, WIDTH: tl.constexpr
):
    """channels_last: the step's WIDTH elements from the first chunk of each pixel's row on, -inf outside the row."""
    lane = tl.arange(0, WIDTH)[None, :]
    start = (pixel * C)[:, None]
    behind = start % VEC  # elements of earlier pixels in the row's first chunk
    chunk = (start // VEC + step * (WIDTH // VEC)) * VEC + lane // VEC * VEC
    o = (start // VEC + step * (WIDTH // VEC)) * VEC + lane
    touched = live[:, None] & (step * WIDTH + lane // VEC * VEC < behind + C)
    if RAGGED:
        whole = touched & (chunk + VEC <= ELEMENTS)
        rest = touched & (chunk + VEC > ELEMENTS) & (o < ELEMENTS)
        value = tl.load(logits + o, mask=whole, other=0.0).to(tl.float32)
        value = tl.where(rest, tl.load(logits + o, mask=rest, other=0.0).to(tl.float32), value)
    else:
        value = tl.load(logits + o, mask=touched, other=0.0).to(tl.float32)
    c = step * WIDTH + lane - behind
    return tl.where((c >= 0) & (c < C), value, float("-inf"))


@triton.jit
def cross_entropy_fwd_kernel(
    logits, labels, weight, loss, lse, partials, ELEMENTS, PIXELS, RUNS, TILES, PROGRAMS, IGNORE,
    C: tl.constexpr, REDUCTION: tl.constexpr, WEIGHTED: tl.constexpr, SPLIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, RAGGED: tl.constexpr, VEC: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
    UNROLL: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program takes BLOCK pixels: of one image in NCHW, of the batch in channels_last.

    Reads their logits once, WIDTH classes at a time, and their labels; writes lse, and the losses (REDUCTION "none")
    or the sums of the program's losses and weights. The maximum so far starts at -inf, so that no finite logit is out
    of its reach; as long as it is -inf, 0 stands in for it, so that -inf - -inf does not spoil the classes to come.
    """
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    SIZE = PIXELS if CHANNELS_LAST else RUNS * VEC
    p = (program % TILES) * BLOCK + tl.arange(0, BLOCK)
    live = p < SIZE
    image = program // TILES
    pixel = image * SIZE + p
    label, stray = _label(labels, pixel, live, C, IGNORE)
    tl.device_assert(stray == 0, "cross_entropy: a target is neither a class nor ignore_index")
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    picked = tl.zeros((BLOCK,), tl.float32)
    lane = tl.arange(0, WIDTH)[None, :]
    for step in tl.range(0, STEPS, loop_unroll_factor=UNROLL):
        if CHANNELS_LAST:
            value = _row_tile(logits, pixel, live, step, ELEMENTS, C, RAGGED, VEC, WIDTH)
        else:
            c = step * WIDTH + lane
            o = (image * C + c) * SIZE + p[:, None]
            value = tl.load(logits + o, mask=live[:, None] & (c < C), other=float("-inf")).to(tl.float32)
            # A gather of these would cost a sector for each pixel.
            picked += tl.sum(tl.where(lane == (label - step * WIDTH)[:, None], value, 0.0), axis=1)
        peak = tl.maximum(highest, tl.max(value, axis=1))
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        total = total * _exp(highest - shift) + tl.sum(_exp(value - shift[:, None]), axis=1)
        highest = peak
    if CHANNELS_LAST:
        picked = tl.load(logits + pixel * C + label, mask=label >= 0, other=0.0).to(tl.float32)
    above = tl.log(total)
    if SPLIT:
        tl.store(lse + pixel, highest, mask=live)
        tl.store(lse + PIXELS + pixel, above, mask=live)
    else:
        tl.store(lse + pixel, highest + above, mask=live)
    factor = _weight(weight, label, WEIGHTED)
    value = tl.where(label >= 0, factor * ((highest - picked) + above), 0.0)
    if REDUCTION == "none":
        tl.store(loss + pixel, value, mask=live)
    else:
        tl.store(partials + program, tl.sum(value, axis=0))
        if REDUCTION == "mean":
            tl.store(partials + PROGRAMS + program, tl.sum(factor, axis=0))


@triton.jit
def cross_entropy_total_kernel(partials, loss, denominator, PARTIALS, REDUCTION: tl.constexpr, BLOCK: tl.constexpr):
    """One program adds up the partial sums, in an order that depends on their number alone, and divides for the mean.

    A batch with nothing valid has mean 0 / 0 = NaN and sum 0, as in torch.
    """
    losses = tl.zeros((BLOCK,), tl.float32)
    weights = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, PARTIALS, BLOCK):
        o = start + tl.arange(0, BLOCK)
        losses += tl.load(partials + o, mask=o < PARTIALS, other=0.0)
        if REDUCTION == "mean":
            weights += tl.load(partials + PARTIALS + o, mask=o < PARTIALS, other=0.0)
    total = tl.sum(losses, axis=0)
    if REDUCTION == "mean":
        divisor = tl.sum(weights, axis=0)
        tl.store(denominator, divisor)
        total = total / divisor
    tl.store(loss, total)


@triton.jit
def cross_entropy_bwd_kernel(
    grad_loss, logits, labels, weight, lse, denominator, grad_logits, PIXELS, RUNS, TILES, IGNORE,
    C: tl.constexpr, REDUCTION: tl.constexpr, WEIGHTED: tl.constexpr, SPLIT: tl.constexpr, VEC: tl.constexpr,
    WIDTH: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """NCHW: one program writes the gradient of BLOCK pixels of one image, WIDTH classes at a time.

    Reads their logits, labels and lse once. What is ignored gets exactly 0, also where its logits are not finite.
    """
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    SIZE = RUNS * VEC
    p = (program % TILES) * BLOCK + tl.arange(0, BLOCK)
    live = p < SIZE
    image = program // TILES
    pixel = image * SIZE + p
    label, _ = _label(labels, pixel, live, C, IGNORE)
    scale = _scale(grad_loss, denominator, weight, pixel, label, REDUCTION, WEIGHTED)[:, None]
    highest, above = _lse(lse, PIXELS, pixel, live, SPLIT)
    lane = tl.arange(0, WIDTH)[None, :]
    for step in range(STEPS):
        c = step * WIDTH + lane
        o = (image * C + c) * SIZE + p[:, None]
        inside = live[:, None] & (c < C)
        value = tl.load(logits + o, mask=inside, other=0.0).to(tl.float32)
        hit = lane == (label - step * WIDTH)[:, None]
        grad = scale * (_exp((value - highest[:, None]) - above[:, None]) - tl.where(hit, 1.0, 0.0))
        grad = tl.where(label[:, None] >= 0, grad, 0.0)
        tl.store(grad_logits + o, grad.to(grad_logits.dtype.element_ty), mask=inside)


@triton.jit
def cross_entropy_bwd_rows_kernel(
    grad_loss, logits, labels, weight, lse, denominator, grad_logits, PIXELS, ELEMENTS, IGNORE,
    C: tl.constexpr, REDUCTION: tl.constexpr, WEIGHTED: tl.constexpr, SPLIT: tl.constexpr, VEC: tl.constexpr,
    RAGGED: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """channels_last: one program writes BLOCK chunks of VEC <= C elements of the gradient.

    Reads the same chunks of the logits, and the labels and lse of the pixels in them: a chunk's first `split` elements
    belong to one pixel, the others to the next. What is ignored gets exactly 0, as in NCHW.
    """
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    first = (program * BLOCK + tl.arange(0, BLOCK)) * VEC
    pixel = first // C
    live = pixel < PIXELS
    label, _ = _label(labels, pixel, live, C, IGNORE)
    scale = _scale(grad_loss, denominator, weight, pixel, label, REDUCTION, WEIGHTED)[:, None]
    highest, above = _lse(lse, PIXELS, pixel, live, SPLIT)
    label, highest, above = label[:, None], highest[:, None], above[:, None]
    lane = tl.arange(0, VEC)[None, :]
    c = lane + (first - pixel * C)[:, None]
    if C % VEC != 0:
        split = (pixel + 1) * C - first
        straddles = (split < VEC) & (pixel + 1 < PIXELS)
        label_2, _ = _label(labels, pixel + 1, straddles, C, IGNORE)
        scale_2 = _scale(grad_loss, denominator, weight, pixel + 1, label_2, REDUCTION, WEIGHTED)
        highest_2, above_2 = _lse(lse, PIXELS, pixel + 1, straddles, SPLIT)
        later = lane >= split[:, None]
        c = tl.where(later, c - C, c)
        label = tl.where(later, label_2[:, None], label)
        scale = tl.where(later, scale_2[:, None], scale)
        highest = tl.where(later, highest_2[:, None], highest)
        above = tl.where(later, above_2[:, None], above)
    o = first[:, None] + lane
    whole = live[:, None]
    if RAGGED:
        rest = whole & (first[:, None] + VEC > ELEMENTS) & (o < ELEMENTS)
        whole = whole & (first[:, None] + VEC <= ELEMENTS)
        value = tl.load(logits + o, mask=whole, other=0.0).to(tl.float32)
        value = tl.where(rest, tl.load(logits + o, mask=rest, other=0.0).to(tl.float32), value)
    else:
        value = tl.load(logits + o, mask=whole, other=0.0).to(tl.float32)
    grad = scale * (_exp((value - highest) - above) - tl.where(c == label, 1.0, 0.0))
    grad = tl.where(label >= 0, grad, 0.0).to(grad_logits.dtype.element_ty)
    tl.store(grad_logits + o, grad, mask=whole)
    if RAGGED:
        tl.store(grad_logits + o, grad, mask=rest)


class Tiles(NamedTuple):
    """How the pixels of a call are divided among programs: in NCHW, and for the forward in channels_last."""

    runs: int  # pixels of an image in units of vec; NCHW alone uses it
    tiles: int  # programs of an image (NCHW), of the batch (channels_last)
    programs: int
    vec: int  # elements of one access
    block: int
    warps: int

    @classmethod
    def of(cls, logits: Tensor, channels_last: bool) -> Tiles:
        n, _, h, w = logits.shape
        warps = 4
        if channels_last:
            block = LONG_ROWS if _long_rows(logits) else ROWS
            tiles = triton.cdiv(n * h * w, block)
            return cls(h * w, tiles, tiles, 16 // logits.element_size(), block, warps)
        vec = vector_width(logits.element_size(), h * w)
        lane = max(vec, 4)  # pixels of a lane: one access, or 4 where that is narrow
        if n * triton.cdiv(h * w, 32 * warps * lane) < FEW_PROGRAMS:
            warps = 1
        block = 32 * warps * lane
        tiles = triton.cdiv(h * w, block)
        return cls(h * w // vec, tiles, n * tiles, vec, block, warps)


def _long_rows(logits: Tensor) -> bool:
    return logits.shape[1] * logits.element_size() >= LONG_ROW


def _steps(logits: Tensor, vec: int, channels_last: bool) -> dict[str, int]:
    """The forward's WIDTH, classes that it reads at a time, STEPS, and UNROLL, steps that are in flight together."""
    classes = logits.shape[1]
    if not channels_last:
        return {"WIDTH": CLASSES, "STEPS": triton.cdiv(classes, CLASSES), "UNROLL": 1}
    width = 4 * vec if _long_rows(logits) else vec
    # A row begins anywhere in its first chunk, at a multiple of gcd(classes, vec).
    steps = triton.cdiv(classes + vec - math.gcd(classes, vec), width)
    return {"WIDTH": width, "STEPS": steps, "UNROLL": 1 if _long_rows(logits) else min(steps, 4)}


def _constants(logits: Tensor, weight: Tensor | None, reduction: str, lse: Tensor) -> dict[str, Any]:
    """The compile-time arguments that forward and backward share."""
    # WIDE: an offset, also of a lane that is masked, can pass int32.
    wide = logits.numel() > INT32_MAX - (logits.shape[1] + 16) * 1024
    return {
        "C": logits.shape[1], "REDUCTION": reduction, "WEIGHTED": weight is not None, "SPLIT": lse.shape[0] == 2,
        "WIDE": wide,
    }  # fmt: skip


def cross_entropy_fwd(
    logits: Tensor, labels: Tensor, weight: Tensor | None, reduction: str, ignore_index: int, channels_last: bool,
    loss: Tensor, lse: Tensor, denominator: Tensor,
) -> None:  # fmt: skip
    """Write loss, lse and, for the mean, the denominator of logits (N, C, H, W) and labels (N, H, W), all dense.

    loss: (N, H, W) for reduction "none", else of no dimension; lse: (1, N, H, W), or (2, N, H, W) for its two terms.
    """
    tiles = Tiles.of(logits, channels_last)
    summed = reduction != "none"
    partials = torch.empty((2, tiles.programs), dtype=torch.float32, device=logits.device) if summed else loss
    launch(
        cross_entropy_fwd_kernel, tiles.programs,
        logits, labels, logits if weight is None else weight, loss, lse, partials,
        logits.numel(), labels.numel(), tiles.runs, tiles.tiles, tiles.programs, ignore_index,
        **_constants(logits, weight, reduction, lse), CHANNELS_LAST=channels_last,
        RAGGED=channels_last and logits.numel() % tiles.vec != 0, VEC=tiles.vec,
        **_steps(logits, tiles.vec, channels_last), BLOCK=tiles.block,
        num_warps=tiles.warps, debug=True, sanitize_overflow=False,
    )  # fmt: skip
    if summed:
        launch(
            cross_entropy_total_kernel, 1,
            partials, loss, denominator, tiles.programs, REDUCTION=reduction, BLOCK=TOTAL_BLOCK,
        )  # fmt: skip


def cross_entropy_bwd(
    grad_loss: Tensor, logits: Tensor, labels: Tensor, weight: Tensor | None, lse: Tensor, denominator: Tensor,
    reduction: str, ignore_index: int, channels_last: bool, grad_logits: Tensor,
) -> None:  # fmt: skip
    """Write the gradient of the logits; grad_loss, lse and denominator are shaped as cross_entropy_fwd's."""
    tensors = (grad_loss, logits, labels, logits if weight is None else weight, lse, denominator, grad_logits)
    constants = _constants(logits, weight, reduction, lse)
    classes = logits.shape[1]
    if channels_last:
        vec = min(16 // logits.element_size(), 1 << (classes.bit_length() - 1))
        launch(
            cross_entropy_bwd_rows_kernel, triton.cdiv(logits.numel(), vec * CHUNKS),
            *tensors, labels.numel(), logits.numel(), ignore_index,
            **constants, VEC=vec, RAGGED=logits.numel() % vec != 0, BLOCK=CHUNKS,
        )  # fmt: skip
    else:
        tiles = Tiles.of(logits, channels_last)
        launch(
            cross_entropy_bwd_kernel, tiles.programs,
            *tensors, labels.numel(), tiles.runs, tiles.tiles, ignore_index,
            **constants, VEC=tiles.vec, WIDTH=BACKWARD_CLASSES, STEPS=triton.cdiv(classes, BACKWARD_CLASSES),
            BLOCK=tiles.block, num_warps=tiles.warps,
        )  # fmt: skip
