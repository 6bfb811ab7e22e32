"""The gradient of cross-entropy from lse, the second of two passes. The formulas are in common.py.

It reads logits, targets and lse once and writes the gradient once: 4 * C + 12 bytes per pixel for bf16 logits and int64
labels. In NCHW the pixels of a program are next to each other in each class's plane, and the program loops over the
classes. channels_last is treated as one sequence of groups of VEC elements, each of which holds classes of one pixel,
or of one pixel and the next.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .common import class_shares, constants, exponential, gradient, label_weight, read_target, read_tile, smoothed_mass
from .cross_entropy import PixelTiling
from .options import LossInputs, LossOptions

CLASSES = 2  # written at a time in NCHW: as many as fit in registers
GROUPS = 256  # of a program in channels_last


@triton.jit
def read_scale(grad_loss, denominator, pixel, label, REDUCTION: tl.constexpr):
    """The gradient of each pixel's loss."""
    if REDUCTION == "none":
        return tl.load(grad_loss + pixel, mask=label >= 0, other=0.0)
    elif REDUCTION == "sum":
        return tl.load(grad_loss)
    else:
        return tl.load(grad_loss) / tl.load(denominator)


@triton.jit
def read_lse(lse, PIXELS, pixel, m_live, SPLIT: tl.constexpr):
    """The two terms of lse; the second is 0 if lse is stored in one."""
    first = tl.load(lse + pixel, mask=m_live, other=0.0)
    second = tl.load(lse + PIXELS + pixel, mask=m_live, other=0.0) if SPLIT else tl.zeros_like(first)
    return first, second


@triton.jit
def pixel_factors(
    scale, label, factor, highest, above, mass, PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
):  # fmt: skip
    """(gain, spread), scaled. factor: the weight of the label; mass: the sum of q without the label's own part."""
    spread = tl.zeros_like(highest)
    if PROBABILITIES or SMOOTHING != 0:
        spread += mass
    if Z_LOSS != 0:
        spread += 2.0 * Z_LOSS * (highest + above)
    return scale * factor * (1.0 - SMOOTHING), tl.where(label >= 0, spread, 0.0) * scale


@triton.jit
def read_pixels(
    grad_loss, targets, weight, lse, denominator, pixel, m_live, PIXELS, IGNORE, smoothed, C: tl.constexpr,
    REDUCTION: tl.constexpr, PROBABILITIES: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """What the gradient of a pixel depends on, apart from its logits and shares."""
    label, _ = read_target(targets, pixel, m_live, C, IGNORE, PROBABILITIES)
    scale = read_scale(grad_loss, denominator, pixel, label, REDUCTION) + tl.zeros(label.shape, lse.dtype.element_ty)
    highest, above = read_lse(lse, PIXELS, pixel, m_live, SPLIT)
    mass = smoothed + tl.zeros_like(highest)
    if PROBABILITIES:
        masses = lse + PIXELS + PIXELS if SPLIT else lse + PIXELS  # 2 * PIXELS can pass int32
        mass = tl.load(masses + pixel, mask=m_live, other=0.0)
    factor = label_weight(weight, label, lse.dtype.element_ty, WEIGHTED and not PROBABILITIES)
    gain, spread = pixel_factors(scale, label, factor, highest, above, mass, PROBABILITIES, SMOOTHING, Z_LOSS)
    return label, scale, highest, above, gain, spread


@triton.jit
def cross_entropy_bwd_kernel(
    grad_loss, logits, targets, weight, lse, denominator, grad_logits, PIXELS, RUNS, TILES, IGNORE,
    C: tl.constexpr, REDUCTION: tl.constexpr, PROBABILITIES: tl.constexpr, WEIGHTED: tl.constexpr,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, SPLIT: tl.constexpr, PADDED: tl.constexpr, VEC: tl.constexpr,
    WIDTH: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """NCHW: one program writes the gradient of BLOCK pixels of one image, WIDTH classes at a time.

    Reads their logits, targets and lse once. The gradient of an ignored pixel is exactly 0, also if its logits are not
    finite.
    """
    # 1. Which pixels
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    DTYPE: tl.constexpr = lse.dtype.element_ty
    SHARED: tl.constexpr = PROBABILITIES or SMOOTHING != 0
    SIZE = tl.cast(RUNS, program.dtype) * VEC
    p = (program % TILES) * BLOCK + tl.arange(0, BLOCK)
    m_live = p < SIZE
    image = program // TILES
    pixel = image * SIZE + p

    # 2. Load targets and lse
    smoothed = smoothed_mass(weight, DTYPE, C, WEIGHTED, SMOOTHING, PADDED)
    label, scale, highest, above, gain, spread = read_pixels(
        grad_loss, targets, weight, lse, denominator, pixel, m_live, PIXELS, IGNORE, smoothed,
        C, REDUCTION, PROBABILITIES, WEIGHTED, SMOOTHING, Z_LOSS, SPLIT,
    )  # fmt: skip

    # 3. For each group of classes: load the logits, compute the gradient, and store it
    lane = tl.arange(0, WIDTH)[None, :]
    for step in range(STEPS):
        c = step * WIDTH + lane
        o_logits = (image * C + c) * SIZE + p[:, None]
        m_inside = m_live[:, None] & (c < C)
        value = tl.load(logits + o_logits, mask=m_inside, other=0.0).to(DTYPE)
        share = value
        if SHARED:
            share = class_shares(
                targets, weight, o_logits, c, m_inside, m_inside, m_inside,
                DTYPE, C, PROBABILITIES, WEIGHTED, SMOOTHING, False,
            )  # fmt: skip
        grad = gradient(
            exponential((value - highest[:, None]) - above[:, None]), share, lane == (label - step * WIDTH)[:, None],
            label[:, None], gain[:, None], spread[:, None], scale[:, None],
            PROBABILITIES, SHARED, SHARED or Z_LOSS != 0,
        )  # fmt: skip
        tl.store(grad_logits + o_logits, grad.to(grad_logits.dtype.element_ty), mask=m_inside)


@triton.jit
def cross_entropy_bwd_rows_kernel(
    grad_loss, logits, targets, weight, lse, denominator, grad_logits, PIXELS, ELEMENTS, IGNORE,
    C: tl.constexpr, REDUCTION: tl.constexpr, PROBABILITIES: tl.constexpr, WEIGHTED: tl.constexpr,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, SPLIT: tl.constexpr, PADDED: tl.constexpr, VEC: tl.constexpr,
    RAGGED: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """channels_last: one program writes BLOCK groups of VEC <= C elements of the gradient.

    Reads the same groups of the logits, and the targets and lse of the pixels in them: the first `split` elements of a
    group belong to one pixel, the others to the next. The gradient of an ignored pixel is exactly 0, as in NCHW.
    """
    # 1. Which groups, and the pixels of their first elements
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    DTYPE: tl.constexpr = lse.dtype.element_ty
    o_first = (program * BLOCK + tl.arange(0, BLOCK)) * VEC
    pixel = o_first // C
    m_live = pixel < PIXELS

    # 2. Load targets and lse of these pixels
    smoothed = smoothed_mass(weight, DTYPE, C, WEIGHTED, SMOOTHING, PADDED)
    label, scale, highest, above, gain, spread = read_pixels(
        grad_loss, targets, weight, lse, denominator, pixel, m_live, PIXELS, IGNORE, smoothed,
        C, REDUCTION, PROBABILITIES, WEIGHTED, SMOOTHING, Z_LOSS, SPLIT,
    )  # fmt: skip
    label, scale, highest = label[:, None], scale[:, None], highest[:, None]
    above, gain, spread = above[:, None], gain[:, None], spread[:, None]
    lane = tl.arange(0, VEC)[None, :]
    c = lane + (o_first - pixel * C)[:, None]

    # 3. The same of the next pixels, for the elements that belong to them
    if C % VEC != 0:
        split = (pixel + 1) * C - o_first
        m_straddles = (split < VEC) & (pixel + 1 < PIXELS)
        label_2, scale_2, highest_2, above_2, gain_2, spread_2 = read_pixels(
            grad_loss, targets, weight, lse, denominator, pixel + 1, m_straddles, PIXELS, IGNORE, smoothed,
            C, REDUCTION, PROBABILITIES, WEIGHTED, SMOOTHING, Z_LOSS, SPLIT,
        )  # fmt: skip
        later = lane >= split[:, None]
        c = tl.where(later, c - C, c)
        label = tl.where(later, label_2[:, None], label)
        scale = tl.where(later, scale_2[:, None], scale)
        highest = tl.where(later, highest_2[:, None], highest)
        above = tl.where(later, above_2[:, None], above)
        gain = tl.where(later, gain_2[:, None], gain)
        spread = tl.where(later, spread_2[:, None], spread)

    # 4. Load the logits, compute the gradient, and store it
    write_groups(
        logits, targets, weight, grad_logits, o_first, m_live, c, label, scale, highest, above, gain, spread, ELEMENTS,
        DTYPE, C, PROBABILITIES, WEIGHTED, SMOOTHING, Z_LOSS, VEC, RAGGED,
    )  # fmt: skip


@triton.jit
def write_groups(
    logits, targets, weight, grad_logits, o_first, m_live, c, label, scale, highest, above, gain, spread, ELEMENTS,
    DTYPE: tl.constexpr, C: tl.constexpr, PROBABILITIES: tl.constexpr, WEIGHTED: tl.constexpr,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the groups that begin at o_first. c: each element's class; label to spread: its pixel's."""
    SHARED: tl.constexpr = PROBABILITIES or SMOOTHING != 0
    o_logits = o_first[:, None] + tl.arange(0, VEC)[None, :]
    m_whole = m_live[:, None]
    m_rest = m_whole
    if RAGGED:
        m_rest = m_whole & (o_first[:, None] + VEC > ELEMENTS) & (o_logits < ELEMENTS)
        m_whole = m_whole & (o_first[:, None] + VEC <= ELEMENTS)
    value = read_tile(logits, o_logits, m_whole, m_rest, RAGGED, 0.0).to(DTYPE)
    share = value
    if SHARED:
        share = class_shares(
            targets, weight, o_logits, c, c >= 0, m_whole, m_rest, DTYPE, C, PROBABILITIES, WEIGHTED, SMOOTHING, RAGGED
        )
    grad = gradient(
        exponential((value - highest) - above), share, c == label, label, gain, spread, scale,
        PROBABILITIES, SHARED, SHARED or Z_LOSS != 0,
    ).to(grad_logits.dtype.element_ty)  # fmt: skip
    tl.store(grad_logits + o_logits, grad, mask=m_whole)
    if RAGGED:
        tl.store(grad_logits + o_logits, grad, mask=m_rest)


def group_width(logits: Tensor) -> int:
    """Elements of a group: 16 bytes, and at most the classes of a pixel, so that a group belongs to at most two."""
    return min(16 // logits.element_size(), 1 << (logits.shape[1].bit_length() - 1))


def cross_entropy_bwd(
    grad_loss: Tensor,
    inputs: LossInputs,
    lse: Tensor,
    denominator: Tensor,
    options: LossOptions,
    channels_last: bool,
    grad_logits: Tensor,
) -> None:
    """Write the gradient of the logits from the lse and denominator of cross_entropy_fwd."""
    logits, targets, _ = inputs
    tensors = (grad_loss, logits, targets, inputs.weight_or_logits, lse, denominator, grad_logits)
    classes, pixels = logits.shape[1], lse[0].numel()
    shared = constants(inputs, options) | {"PADDED": triton.next_power_of_2(classes)}
    if channels_last:
        vec = group_width(logits)
        launch(
            cross_entropy_bwd_rows_kernel, triton.cdiv(logits.numel(), vec * GROUPS),
            *tensors, pixels, logits.numel(), options.ignore_index,
            **shared, VEC=vec, RAGGED=logits.numel() % vec != 0, BLOCK=GROUPS,
        )  # fmt: skip
    else:
        tiling = PixelTiling.of(logits, channels_last)
        launch(
            cross_entropy_bwd_kernel, tiling.programs,
            *tensors, pixels, tiling.runs, tiling.tiles, options.ignore_index,
            **shared, VEC=tiling.vec, WIDTH=CLASSES, STEPS=triton.cdiv(classes, CLASSES),
            BLOCK=tiling.block, num_warps=tiling.warps,
        )  # fmt: skip
