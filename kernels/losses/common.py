"""What the cross-entropy kernels share: labels, the share of each class in a pixel's target, softmax sums, gradients.

A pixel's target is a share q_c >= 0 of each class, and with p = softmax(x), lse = log(sum_c exp(x_c)), e the label
smoothing, w the weights of the classes, z the weight of the z-loss:

    loss        = sum_c q_c * (lse - x_c) + z * lse^2
    dloss/dx_c  = (sum_k q_k + 2 * z * lse) * p_c - q_c
    q_c         = w_c * ((1 - e) * [c = label] + e / C)       of a label
                = w_c * ((1 - e) * target_c + e / C)          of class probabilities

The label's own part is kept apart as `gain` * (p_c - [c = label]), gain = (1 - e) * w_label: a confident pixel's p - 1
is exact, a product with a weight in front of the subtraction would not be. What else multiplies p_c is `spread`.

Everything is computed in the dtype of `lse`: float32, and float64 for float64 logits. lse is kept in two terms there
and for float32 logits (SPLIT), the maximum and what is above it: as one number it would lose the digits that the
gradient of a confident pixel is made of.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..launch import INT32_MAX
from .options import LossInputs, LossOptions

LOG2_E = tl.constexpr(1.4426950408889634)
LONG_ROW = 128  # bytes of a pixel's classes in channels_last, from which on four lanes share a row


@triton.jit
def exponential(x):
    """exp of x <= 0. In float32 by the hardware's power of two; a result too small for a normal number is 0."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return tl.exp2(x * LOG2_E)


@triton.jit
def read_label(labels, o, live, C: tl.constexpr, IGNORE):
    """(the class or -1 where there is none, whether the label is neither a class nor to be ignored)."""
    label = tl.load(labels + o, mask=live, other=0).to(tl.int64)
    kept = live & (label != IGNORE)
    inside = (label >= 0) & (label < C)
    return tl.where(kept & inside, label, -1).to(tl.int32), kept & (inside == 0)


@triton.jit
def read_target(targets, o, live, C: tl.constexpr, IGNORE, PROBABILITIES: tl.constexpr):
    """read_label; of class probabilities every pixel counts, and its label 0 is nobody's."""
    if PROBABILITIES:
        return tl.where(live, 0, -1).to(tl.int32), live != live
    else:
        return read_label(targets, o, live, C, IGNORE)


@triton.jit
def label_weight(weight, label, DTYPE: tl.constexpr, WEIGHTED: tl.constexpr):
    """The label's weight, 0 where there is none."""
    if WEIGHTED:
        return tl.load(weight + tl.maximum(label, 0), mask=label >= 0, other=0.0).to(DTYPE)
    else:
        return tl.where(label >= 0, 1.0, 0.0).to(DTYPE)


@triton.jit
def class_shares(
    targets, weight, o, c, inside, whole, rest, DTYPE: tl.constexpr, C: tl.constexpr, PROBABILITIES: tl.constexpr,
    WEIGHTED: tl.constexpr, SMOOTHING: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """q of a tile, without the label's own part; 0 outside. c may be one row of classes for all pixels."""
    if PROBABILITIES:
        target = read_tile(targets, o, whole, rest, RAGGED, 0.0).to(DTYPE)
        share = target * (1.0 - SMOOTHING) + SMOOTHING / C
    else:
        share = tl.zeros(inside.shape, DTYPE) + SMOOTHING / C
    if WEIGHTED:
        share = share * tl.load(weight + c, mask=(c >= 0) & (c < C), other=0.0).to(DTYPE)
    return tl.where(inside, share, 0.0)


@triton.jit
def read_tile(tensor, o, whole, rest, RAGGED: tl.constexpr, OTHER: tl.constexpr):
    """Elements of whole chunks, and those of a chunk that the tensor ends in."""
    value = tl.load(tensor + o, mask=whole, other=OTHER)
    if RAGGED:
        value = tl.where(rest, tl.load(tensor + o, mask=rest, other=OTHER), value)
    return value


@triton.jit
def row_tile(
    pixel, live, step, ELEMENTS, C: tl.constexpr, RAGGED: tl.constexpr, VEC: tl.constexpr, WIDTH: tl.constexpr
):
    """channels_last: the step's WIDTH elements from the first chunk of each pixel's row on.

    (offsets, classes, whether they are the row's, whether to read them with their chunk, or one by one).
    """
    lane = tl.arange(0, WIDTH)[None, :]
    start = (pixel * C)[:, None]
    behind = start % VEC  # elements of earlier pixels in the row's first chunk
    chunk = (start // VEC + step * (WIDTH // VEC)) * VEC + lane // VEC * VEC
    o = (start // VEC + step * (WIDTH // VEC)) * VEC + lane
    whole = live[:, None] & (step * WIDTH + lane // VEC * VEC < behind + C)
    rest = whole
    if RAGGED:
        rest = whole & (chunk + VEC > ELEMENTS) & (o < ELEMENTS)
        whole = whole & (chunk + VEC <= ELEMENTS)
    c = step * WIDTH + lane - behind
    return o, c, live[:, None] & (c >= 0) & (c < C), whole, rest


@triton.jit
def accumulate(value, share, inside, highest, total, mass, short, SHARED: tl.constexpr):
    """One step of the softmax sums over the classes, -inf outside.

    highest: the maximum so far, from -inf, so that no finite logit is out of its reach; as long as it is -inf, 0
    stands in for it, so that -inf - -inf does not spoil the classes to come. total: sum_c exp(x_c - highest).
    SHARED: mass = sum_c q_c and short = sum_c q_c * (highest - x_c), which loses nothing to large logits.
    """
    peak = tl.maximum(highest, tl.max(value, axis=1))
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    total = total * exponential(highest - shift) + tl.sum(exponential(value - shift[:, None]), axis=1)
    if SHARED:
        before = tl.where(highest == float("-inf"), 0.0, highest)
        short += mass * (shift - before)
        short += tl.sum(tl.where(inside, share * (shift[:, None] - value), 0.0), axis=1)
        mass += tl.sum(share, axis=1)
    return peak, total, mass, short


@triton.jit
def first_maximum(value, c, inside, best, best_score, first_nan, C: tl.constexpr):
    """One step of the argmax: the first of equal maxima, and a NaN before any number, as torch's argmax."""
    score = tl.where(inside & (value == value), value, float("-inf"))
    peak = tl.max(score, axis=1)
    place = tl.min(tl.where(inside & (score == peak[:, None]), c, C), axis=1)
    best = tl.where(peak > best_score, place, best)
    first_nan = tl.minimum(first_nan, tl.min(tl.where(inside & (value != value), c, C), axis=1))
    return best, tl.maximum(best_score, peak), first_nan


@triton.jit
def pixel_loss(label, factor, picked, highest, total, mass, short, PROBABILITIES: tl.constexpr,
               SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr):  # fmt: skip
    """The loss of each pixel, 0 where there is no label. factor: the label's weight."""
    above = tl.log(total)
    loss = tl.zeros_like(total)
    if not PROBABILITIES:
        loss += (1.0 - SMOOTHING) * factor * ((highest - picked) + above)
    if PROBABILITIES or SMOOTHING != 0:
        loss += short + mass * above
    if Z_LOSS != 0:
        loss += Z_LOSS * (highest + above) * (highest + above)
    return tl.where(label >= 0, loss, 0.0)


@triton.jit
def smoothed_mass(weight, DTYPE: tl.constexpr, C: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTHING: tl.constexpr,
                  PADDED: tl.constexpr):  # fmt: skip
    """e / C * sum_c w_c: what label smoothing adds to the mass of a labelled pixel."""
    if WEIGHTED:
        c = tl.arange(0, PADDED)
        return tl.sum(tl.load(weight + c, mask=c < C, other=0.0).to(DTYPE), axis=0) * (SMOOTHING / C)
    else:
        return tl.full((1,), SMOOTHING, DTYPE)


@triton.jit
def gradient(
    p, share, hit, label, gain, spread, scale, PROBABILITIES: tl.constexpr, SHARED: tl.constexpr, SPREAD: tl.constexpr
):
    """scale * dloss/dx of a tile, exactly 0 where there is no label, also where the logits are not finite.

    gain and spread are scaled already, share is not.
    """
    if PROBABILITIES:
        grad = spread * p - scale * share
    else:
        grad = gain * (p - tl.where(hit, 1.0, 0.0))
        if SPREAD:
            grad += spread * p
        if SHARED:
            grad -= scale * share
    return tl.where(label >= 0, grad, 0.0)


def long_rows(logits: Tensor) -> bool:
    return logits.shape[1] * logits.element_size() >= LONG_ROW


def constants(inputs: LossInputs, options: LossOptions) -> dict[str, Any]:
    """The compile-time arguments of every kernel. Each value of label_smoothing and z_loss is compiled once."""
    logits = inputs.logits
    # WIDE: an offset, also of a lane that is masked, can pass int32.
    wide = logits.numel() > INT32_MAX - (logits.shape[1] + 16) * 1024
    return {
        "C": logits.shape[1], "REDUCTION": options.reduction, "PROBABILITIES": inputs.targets.is_floating_point(),
        "WEIGHTED": inputs.weight is not None, "SMOOTHING": float(options.label_smoothing),
        "Z_LOSS": float(options.z_loss),
        "SPLIT": logits.element_size() >= 4, "WIDE": wide,
    }  # fmt: skip
