"""What the cross-entropy kernels share: labels, targets, softmax sums and gradients.

The target of a pixel gives a share q_c >= 0 to each class. With p = softmax(x), lse = log(sum_c exp(x_c)), the label
smoothing e, the class weights w and the weight z of the z-loss:

    loss        = sum_c q_c * (lse - x_c) + z * lse^2
    dloss/dx_c  = (sum_k q_k + 2 * z * lse) * p_c - q_c
    q_c         = w_c * ((1 - e) * [c = label] + e / C)       for a label
                = w_c * ((1 - e) * target_c + e / C)          for class probabilities

The kernels compute the label's own part of the gradient separately, as gain * (p_c - [c = label]) with
gain = (1 - e) * w_label: p - 1 of a confident pixel is exact, whereas multiplying by a weight first would round. The
factor of p_c in the other parts is called `spread`.

Everything is computed in the dtype of lse: float32, and float64 for float64 logits. For these two dtypes lse is stored
in two terms (SPLIT): the maximum `highest`, and `above` = lse - highest. Their sum would lose the digits that the
gradient of a confident pixel consists of.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..shared import INT32_MAX
from .options import LossInputs, LossOptions

LOG2_E = tl.constexpr(1.4426950408889634)
LONG_ROW = 128  # bytes of a pixel's classes in channels_last: from this size on, four lanes share a row


@triton.jit
def exponential(x):
    """exp(x) for x <= 0. In float32 by the hardware's power of two, which returns 0 for subnormal results."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return tl.exp2(x * LOG2_E)


@triton.jit
def read_label(labels, pixel, m_live, C: tl.constexpr, IGNORE):
    """(the class, or -1 for an ignored or out-of-range label; whether the label is out of range)."""
    label = tl.load(labels + pixel, mask=m_live, other=0).to(tl.int64)
    m_kept = m_live & (label != IGNORE)
    in_range = (label >= 0) & (label < C)
    return tl.where(m_kept & in_range, label, -1).to(tl.int32), m_kept & (in_range == 0)


@triton.jit
def read_target(targets, pixel, m_live, C: tl.constexpr, IGNORE, PROBABILITIES: tl.constexpr):
    """read_label. For class probabilities no pixel is ignored, and the label is always 0."""
    if PROBABILITIES:
        return tl.where(m_live, 0, -1).to(tl.int32), m_live != m_live
    else:
        return read_label(targets, pixel, m_live, C, IGNORE)


@triton.jit
def label_weight(weight, label, DTYPE: tl.constexpr, WEIGHTED: tl.constexpr):
    """The weight of the label's class, 0 if there is none."""
    if WEIGHTED:
        return tl.load(weight + tl.maximum(label, 0), mask=label >= 0, other=0.0).to(DTYPE)
    else:
        return tl.where(label >= 0, 1.0, 0.0).to(DTYPE)


@triton.jit
def class_shares(
    targets, weight, o_tile, c, m_inside, m_whole, m_rest, DTYPE: tl.constexpr, C: tl.constexpr,
    PROBABILITIES: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTHING: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """q of a tile, without the label's own part; 0 outside. `c` may be one row of classes for all pixels."""
    if PROBABILITIES:
        target = read_tile(targets, o_tile, m_whole, m_rest, RAGGED, 0.0).to(DTYPE)
        share = target * (1.0 - SMOOTHING) + SMOOTHING / C
    else:
        share = tl.zeros(m_inside.shape, DTYPE) + SMOOTHING / C
    if WEIGHTED:
        share = share * tl.load(weight + c, mask=(c >= 0) & (c < C), other=0.0).to(DTYPE)
    return tl.where(m_inside, share, 0.0)


@triton.jit
def read_tile(tensor, o_tile, m_whole, m_rest, RAGGED: tl.constexpr, OTHER: tl.constexpr):
    """Elements at o_tile: m_whole in whole groups, m_rest in the group that the tensor ends in (RAGGED)."""
    value = tl.load(tensor + o_tile, mask=m_whole, other=OTHER)
    if RAGGED:
        value = tl.where(m_rest, tl.load(tensor + o_tile, mask=m_rest, other=OTHER), value)
    return value


@triton.jit
def row_tile(
    pixel, m_live, step, ELEMENTS, C: tl.constexpr, RAGGED: tl.constexpr, VEC: tl.constexpr, WIDTH: tl.constexpr
):
    """channels_last: WIDTH elements of each pixel's row, which is read from the start of its first group of VEC.

    Returns (offsets, classes, whether they belong to the row, masks for read_tile: whole groups and single elements).
    """
    lane = tl.arange(0, WIDTH)[None, :]
    o_start = (pixel * C)[:, None]
    skipped = o_start % VEC  # elements of earlier pixels in the row's first group
    o_group = (o_start // VEC + step * (WIDTH // VEC)) * VEC + lane // VEC * VEC
    o_tile = (o_start // VEC + step * (WIDTH // VEC)) * VEC + lane
    m_whole = m_live[:, None] & (step * WIDTH + lane // VEC * VEC < skipped + C)
    m_rest = m_whole
    if RAGGED:
        m_rest = m_whole & (o_group + VEC > ELEMENTS) & (o_tile < ELEMENTS)
        m_whole = m_whole & (o_group + VEC <= ELEMENTS)
    c = step * WIDTH + lane - skipped
    return o_tile, c, m_live[:, None] & (c >= 0) & (c < C), m_whole, m_rest


@triton.jit
def accumulate(value, share, m_inside, highest, total, mass, distance, SHARED: tl.constexpr):
    """One step of the softmax sums over the classes. value: logits, -inf outside the tile.

    highest: the maximum so far. It starts at -inf, which is below every finite logit; while it is -inf, 0 takes its
    place in differences, because -inf - -inf is NaN. total: sum_c exp(x_c - highest). SHARED: mass = sum_c q_c and
    distance = sum_c q_c * (highest - x_c), which keeps its digits if all logits are large.
    """
    peak = tl.maximum(highest, tl.max(value, axis=1))
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    total = total * exponential(highest - shift) + tl.sum(exponential(value - shift[:, None]), axis=1)
    if SHARED:
        before = tl.where(highest == float("-inf"), 0.0, highest)
        distance += mass * (shift - before)
        distance += tl.sum(tl.where(m_inside, share * (shift[:, None] - value), 0.0), axis=1)
        mass += tl.sum(share, axis=1)
    return peak, total, mass, distance


@triton.jit
def first_maximum(value, c, m_inside, best, best_score, first_nan, C: tl.constexpr):
    """One step of the argmax: the first of equal maxima, and NaN before any number, as in torch.argmax."""
    score = tl.where(m_inside & (value == value), value, float("-inf"))
    peak = tl.max(score, axis=1)
    place = tl.min(tl.where(m_inside & (score == peak[:, None]), c, C), axis=1)
    best = tl.where(peak > best_score, place, best)
    first_nan = tl.minimum(first_nan, tl.min(tl.where(m_inside & (value != value), c, C), axis=1))
    return best, tl.maximum(best_score, peak), first_nan


@triton.jit
def pixel_loss(label, factor, picked, highest, total, mass, distance, PROBABILITIES: tl.constexpr,
               SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr):  # fmt: skip
    """The loss of each pixel, 0 if it has no label. factor: the weight of the label."""
    above = tl.log(total)
    loss = tl.zeros_like(total)
    if not PROBABILITIES:
        loss += (1.0 - SMOOTHING) * factor * ((highest - picked) + above)
    if PROBABILITIES or SMOOTHING != 0:
        loss += distance + mass * above
    if Z_LOSS != 0:
        loss += Z_LOSS * (highest + above) * (highest + above)
    return tl.where(label >= 0, loss, 0.0)


@triton.jit
def smoothed_mass(weight, DTYPE: tl.constexpr, C: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTHING: tl.constexpr,
                  PADDED: tl.constexpr):  # fmt: skip
    """e / C * sum_c w_c: the part of sum_c q_c that comes from label smoothing."""
    if WEIGHTED:
        c = tl.arange(0, PADDED)
        return tl.sum(tl.load(weight + c, mask=c < C, other=0.0).to(DTYPE), axis=0) * (SMOOTHING / C)
    else:
        return tl.full((1,), SMOOTHING, DTYPE)


@triton.jit
def gradient(
    p, share, hit, label, gain, spread, scale, PROBABILITIES: tl.constexpr, SHARED: tl.constexpr, SPREAD: tl.constexpr
):
    """scale * dloss/dx of a tile: exactly 0 if a pixel has no label, also if its logits are not finite.

    gain and spread include the factor `scale`, share does not.
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


def has_long_rows(logits: Tensor) -> bool:
    """channels_last: whether the classes of a pixel are so many bytes that four lanes share them."""
    return logits.shape[1] * logits.element_size() >= LONG_ROW


def constants(inputs: LossInputs, options: LossOptions) -> dict[str, Any]:
    """The compile-time arguments of every kernel. Each value of label_smoothing and z_loss is compiled once."""
    logits = inputs.logits
    # WIDE: an offset may not fit in int32, the offset of a masked lane included.
    wide = logits.numel() > INT32_MAX - (logits.shape[1] + 16) * 1024
    return {
        "C": logits.shape[1], "REDUCTION": options.reduction, "PROBABILITIES": inputs.targets.is_floating_point(),
        "WEIGHTED": inputs.weight is not None, "SMOOTHING": float(options.label_smoothing),
        "Z_LOSS": float(options.z_loss),
        "SPLIT": logits.element_size() >= 4, "WIDE": wide,
    }  # fmt: skip
