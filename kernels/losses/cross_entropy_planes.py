"""Cross-entropy whose forward writes the gradient too, in NCHW: a thread owns whole pixels.

The classes of a pixel lie in C planes. If each lane of a tile held one class, as many lanes as the next power of two
would be computed, and every sum over the classes would go through other threads. Here a thread reads its pixels from
one plane after another and keeps them in registers: nothing is masked and no sum leaves the thread, up to HELD classes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import vector_width
from .common import class_shares, exponential, gradient, label_weight, pixel_loss, read_target
from .cross_entropy import store_predictions
from .cross_entropy_bwd import pixel_factors

HELD = 22  # classes of a pixel that a thread holds
LOGITS = 84  # that a thread holds: as many as fit in registers
WARPS = 4  # of a program


@triton.jit
def larger_or_nan(a, b):
    """The larger of two values, NaN if one of them is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def cross_entropy_one_pass_kernel(
    grad_loss, logits, targets, weight, denominator, partials, prediction, counts, grad_logits,
    RUNS, TILES, PROGRAMS, IGNORE,
    C: tl.constexpr, REDUCTION: tl.constexpr, PROBABILITIES: tl.constexpr, WEIGHTED: tl.constexpr,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, SPLIT: tl.constexpr, PREDICT: tl.constexpr, AGAIN: tl.constexpr,
    VEC: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """NCHW: one program writes the gradient of BLOCK pixels of one image, and holds all of their classes.

    A thread owns a few neighbouring pixels. With ROWS = 1 it holds all of their classes; else ROWS threads share the
    classes of a pixel, each with every ROWS-th class, so that lanes are masked only in the last of the STEPS steps.

    Reads logits and targets once, 2 * C + 1 bytes per pixel for bf16 logits and packed labels, and writes 2 * C. The
    gradient is for a loss gradient of 1, and the program also writes its sum of losses and with PREDICT its
    predictions; with AGAIN it is for grad_loss, and nothing is done if that is 1. denominator: the divisor of a mean.
    """
    # 1. The gradient of each pixel's loss
    DTYPE: tl.constexpr = partials.dtype.element_ty
    SHARED: tl.constexpr = PROBABILITIES or SMOOTHING != 0
    scale = tl.full((), 1.0, DTYPE)
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
    SIZE = tl.cast(RUNS, program.dtype) * VEC
    p = ((program % TILES) * BLOCK + tl.arange(0, BLOCK))[None, :]
    m_live = p < SIZE
    image = program // TILES
    pixel = image * SIZE + p
    label, out_of_range = read_target(targets, pixel, m_live, C, IGNORE, PROBABILITIES)
    if not AGAIN:
        tl.device_assert(out_of_range == 0, "cross_entropy: a target is neither a class nor ignore_index")

    # 3. Load the logits, and find the largest
    row = tl.arange(0, ROWS)[:, None]
    o_first = image * C * SIZE + p
    values = ()
    highest = tl.full((ROWS, BLOCK), float("-inf"), DTYPE)
    for step in tl.static_range(STEPS):
        c = step * ROWS + row
        m_value = m_live if (step + 1) * ROWS <= C else m_live & (c < C)
        value = tl.load(logits + (o_first + c * SIZE), mask=m_value, other=float("-inf")).to(DTYPE)
        values += (value,)
        highest = larger_or_nan(highest, value)
    if ROWS > 1:
        highest = tl.reduce(highest, 0, larger_or_nan, keep_dims=True)
    shift = tl.where(highest == float("-inf"), 0.0, highest)

    # 4. Compute the softmax sums
    sums = tl.zeros((ROWS, BLOCK), DTYPE)
    masses = tl.zeros((ROWS, BLOCK), DTYPE)
    distances = tl.zeros((ROWS, BLOCK), DTYPE)
    powers = ()
    for step in tl.static_range(STEPS):
        power = exponential(values[step] - shift)
        powers += (power,)
        sums += power
        if SHARED:
            c = step * ROWS + row
            m_value = m_live & (c < C)
            share = class_shares(
                targets, weight, o_first + c * SIZE, c, m_value, m_value, m_value, DTYPE, C, PROBABILITIES, WEIGHTED,
                SMOOTHING, False,
            )  # fmt: skip
            masses += share
            distances += tl.where(m_value, share * (shift - values[step]), 0.0)
    total = tl.sum(sums, axis=0, keep_dims=True)
    mass = tl.sum(masses, axis=0, keep_dims=True)
    distance = tl.sum(distances, axis=0, keep_dims=True)

    # 5. Store the losses and predictions
    factor = label_weight(weight, label, DTYPE, WEIGHTED and not PROBABILITIES)
    picked = tl.zeros((1, BLOCK), DTYPE)
    if not PROBABILITIES:  # from the cache, which holds the tile
        picked = tl.load(logits + ((image * C + label) * SIZE + p), mask=label >= 0, other=0.0).to(DTYPE)
    if not AGAIN:
        loss = pixel_loss(label, factor, picked, highest, total, mass, distance, PROBABILITIES, SMOOTHING, Z_LOSS)
        tl.store(partials + program, tl.sum(loss))
        if PREDICT:
            best = tl.full((ROWS, BLOCK), C, tl.int32)
            for step in tl.static_range(STEPS - 1, -1, -1):  # the first of equal maxima, or the first NaN
                found = (values[step] == highest) | (values[step] != values[step])
                best = tl.where(found, step * ROWS + row, best)
            best = tl.min(best, axis=0, keep_dims=True)
            store_predictions(prediction, counts, pixel, m_live, label, best, program, PROGRAMS)

    # 6. Compute the gradient, and store it
    gain, spread = pixel_factors(scale, label, factor, highest, tl.log(total), mass, PROBABILITIES, SMOOTHING, Z_LOSS)
    inverse = 1.0 / total
    each = gain * inverse
    own = gain * (exponential(picked - shift) * inverse - 1.0)
    for step in tl.static_range(STEPS):
        c = step * ROWS + row
        m_value = m_live if (step + 1) * ROWS <= C else m_live & (c < C)
        if SHARED or Z_LOSS != 0:
            share = mass
            if SHARED:
                m_share = m_live & (c < C)
                share = class_shares(
                    targets, weight, o_first + c * SIZE, c, m_share, m_share, m_share, DTYPE, C, PROBABILITIES,
                    WEIGHTED, SMOOTHING, False,
                )  # fmt: skip
            grad = gradient(
                powers[step] * inverse, share, label == c, label, gain, spread, scale, PROBABILITIES, SHARED, True
            )
        else:
            grad = tl.where(label == c, own, tl.where(label >= 0, each * powers[step], 0.0))
        tl.store(grad_logits + (o_first + c * SIZE), grad.to(grad_logits.dtype.element_ty), mask=m_value)


def plane_tiling(logits: Tensor, crowded: bool) -> dict[str, int]:
    """How a call is divided: the compile-time arguments that depend on the sizes.

    crowded: a thread also holds predictions and shares of the classes, so it has registers for half of the pixels.
    """
    _, classes, h, w = logits.shape
    held = HELD if logits.element_size() < 8 else HELD // 4
    rows = triton.next_power_of_2(triton.cdiv(classes, held))
    steps = triton.cdiv(classes, rows)
    logits_held = LOGITS // 2 if crowded else LOGITS
    pixels = min(16 // logits.element_size(), 1 << (logits_held // steps).bit_length() - 1)  # of a thread
    block = max(min(32 * WARPS * pixels // rows, triton.next_power_of_2(h * w)), 16)
    vec = min(pixels, vector_width(logits.element_size(), h * w))
    return {"VEC": vec, "ROWS": rows, "STEPS": steps, "BLOCK": block, "num_warps": WARPS}
