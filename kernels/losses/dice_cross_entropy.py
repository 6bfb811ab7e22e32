"""The sums of soft Dice and cross-entropy from one read of the logits, and their gradient in one read and one write.

With p = softmax(x), the label t of a pixel that is not ignored, and the class weights w:

    overlap_c = sum p_c * [c = t]     predicted_c = sum p_c     labelled_c = sum [c = t]       of each image
    loss = sum w_t * (log(sum_c exp(x_c)) - x_t)                weights = sum w_t              of the batch

torch computes the loss from these few numbers, and returns the gradients a_c of overlap_c, b_c of predicted_c and g of
loss. The gradient of a pixel is

    u_c = a_c * [c = t] + b_c,    dx_c = p_c * (u_c - sum_k p_k * u_k) + g * w_t * (p_c - [c = t])

A program holds all classes of its pixels, in both layouts. The backward recomputes the softmax, so only the logits are
kept: 2 C + 8 bytes per pixel forward and 4 C + 8 backward for bf16 logits and int64 labels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from ..shared import INT32_MAX
from .common import exponential, label_weight, read_label
from .options import LossInputs

TILE = 4096  # logits of a step: as many as fit in the registers of 8 warps
FEW_PROGRAMS = 512  # too few to fill a GPU: programs take fewer steps then
REGISTERS = 192  # the most of a thread in float64
STEPS = 64  # the most steps of a program, which writes its sums once


@triton.jit
def read_softmax(
    logits, labels, image, p, SIZE, IGNORE, DTYPE: tl.constexpr, C: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Read the pixels p of an image.

    Returns (offsets, mask, label, whether it is out of range, softmax, loss, whether a class is the label).
    """
    m_live = p < SIZE
    label, out_of_range = read_label(labels, image * SIZE + p, m_live, C, IGNORE)
    c = tl.arange(0, WIDTH)[None, :]
    o_logits = image * SIZE * C + (p[:, None] * C + c if CHANNELS_LAST else c.to(p.dtype) * SIZE + p[:, None])
    m_inside = m_live[:, None] & (c < C)
    value = tl.load(logits + o_logits, mask=m_inside, other=float("-inf")).to(DTYPE)
    highest = tl.max(value, axis=1)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    power = exponential(value - shift[:, None])
    total = tl.sum(power, axis=1)
    hit = c == label[:, None]
    picked = tl.sum(tl.where(hit, value, 0.0), axis=1)
    softmax, loss = power * (1.0 / total)[:, None], (highest - picked) + tl.log(total)
    return o_logits, m_inside, label, out_of_range, softmax, loss, hit


@triton.jit
def dice_cross_entropy_fwd_kernel(
    logits, labels, weight, sums, totals, SIZE, PARTS, PROGRAMS, IGNORE,
    C: tl.constexpr, WEIGHTED: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program sums over STEPS times BLOCK pixels of one image.

    Reads their logits and labels once, 2 C + 8 bytes per pixel. Writes its sums: overlap, predicted and labelled
    (program, 3, C), losses and weights (2, program).
    """
    # 1. Which image
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    DTYPE: tl.constexpr = sums.dtype.element_ty
    image = program // PARTS

    # 2. For each block of pixels: load, compute the softmax, and add to the sums
    overlap = tl.zeros((WIDTH,), DTYPE)
    predicted = tl.zeros((WIDTH,), DTYPE)
    labelled = tl.zeros((WIDTH,), DTYPE)
    losses = tl.zeros((BLOCK,), DTYPE)
    weights = tl.zeros((BLOCK,), DTYPE)
    for step in range(STEPS):
        p = (program % PARTS * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        _, _, label, out_of_range, softmax, loss, hit = read_softmax(
            logits, labels, image, p, SIZE, IGNORE, DTYPE, C, CHANNELS_LAST, WIDTH
        )
        tl.device_assert(out_of_range == 0, "dice_cross_entropy: a target is neither a class nor ignore_index")
        softmax = tl.where(label[:, None] >= 0, softmax, 0.0)
        predicted += tl.sum(softmax, axis=0)
        overlap += tl.sum(tl.where(hit, softmax, 0.0), axis=0)
        labelled += tl.sum(tl.where(hit, 1.0, 0.0).to(DTYPE), axis=0)
        factor = label_weight(weight, label, DTYPE, WEIGHTED)
        losses += tl.where(label >= 0, factor * loss, 0.0)
        weights += factor

    # 3. Store the sums
    c = tl.arange(0, WIDTH)
    o_sums = program * 3 * C + c
    tl.store(sums + o_sums, overlap, mask=c < C)
    tl.store(sums + C + o_sums, predicted, mask=c < C)
    tl.store(sums + 2 * C + o_sums, labelled, mask=c < C)
    tl.store(totals + program, tl.sum(losses, axis=0))
    tl.store(totals + PROGRAMS + program, tl.sum(weights, axis=0))


@triton.jit
def dice_cross_entropy_bwd_kernel(
    grad_loss, grad_sums, logits, labels, weight, grad_logits, SIZE, PARTS, IGNORE,
    C: tl.constexpr, WEIGHTED: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """One program writes the gradient of BLOCK pixels of one image, exactly 0 for an ignored pixel.

    Reads their logits and labels once and writes the gradient once: 4 C + 8 bytes per pixel.
    """
    # 1. Which pixels
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    DTYPE: tl.constexpr = grad_sums.dtype.element_ty
    image = program // PARTS
    p = program % PARTS * BLOCK + tl.arange(0, BLOCK)

    # 2. Load, and compute the softmax
    o_logits, m_inside, label, _, softmax, _, hit = read_softmax(
        logits, labels, image, p, SIZE, IGNORE, DTYPE, C, CHANNELS_LAST, WIDTH
    )

    # 3. The gradient
    c = tl.arange(0, WIDTH)
    overlap = tl.load(grad_sums + image * 3 * C + c, mask=c < C, other=0.0)[None, :]
    predicted = tl.load(grad_sums + image * 3 * C + C + c, mask=c < C, other=0.0)[None, :]
    grad_softmax = tl.where(hit, overlap, 0.0) + predicted
    scale = tl.load(grad_loss) * label_weight(weight, label, DTYPE, WEIGHTED)
    grad = softmax * (grad_softmax - tl.sum(softmax * grad_softmax, axis=1)[:, None])
    grad += scale[:, None] * (softmax - tl.where(hit, 1.0, 0.0))
    grad = tl.where(label[:, None] >= 0, grad, 0.0)

    # 4. Store
    tl.store(grad_logits + o_logits, grad.to(grad_logits.dtype.element_ty), mask=m_inside)


def _tile_sizes(logits: Tensor) -> tuple[int, dict[str, int]]:
    """(blocks of an image, the compile-time sizes)."""
    _, classes, h, w = logits.shape
    width = triton.next_power_of_2(classes)
    tile = TILE * 4 // max(logits.element_size(), 4)  # float64 takes two registers
    line = 32 // logits.element_size()  # pixels of a sector, in NCHW
    block = min(max(tile // width, line), 1024, max(line, triton.next_power_of_2(h * w)))
    # WIDE: an offset may not fit in int32, the offset of a masked lane included.
    wide = logits.numel() > INT32_MAX - 2 * STEPS * block * width
    sizes = {"WIDTH": width, "BLOCK": block, "WIDE": wide, "num_warps": max(4, block * width // tile * 8)}
    if logits.dtype == torch.float64:
        # Without a limit of its own, the assembler aims for fewer registers and spills.
        sizes["maxnreg"] = min(REGISTERS, 2**16 // (32 * sizes["num_warps"]))
    return triton.cdiv(h * w, block), sizes


def dice_cross_entropy_fwd(
    inputs: LossInputs, ignore_index: int, channels_last: bool, loss: Tensor, sums: Tensor
) -> None:
    """Write loss (2,), the sums of the pixels' losses and weights, and sums (N, 3, C). All tensors are dense."""
    logits, labels, weight = inputs
    n, classes, h, w = logits.shape
    blocks, sizes = _tile_sizes(logits)
    steps = STEPS
    while steps > 1 and n * triton.cdiv(blocks, steps) < FEW_PROGRAMS:
        steps //= 2
    parts = triton.cdiv(blocks, steps)
    partial_sums = sums.new_empty((n, parts, 3, classes))
    partial_losses = sums.new_empty((2, n * parts))
    launch(
        dice_cross_entropy_fwd_kernel, n * parts,
        logits, labels, inputs.weight_or_logits, partial_sums, partial_losses,
        h * w, parts, n * parts, ignore_index,
        C=classes, WEIGHTED=weight is not None, CHANNELS_LAST=channels_last, STEPS=steps, **sizes,
        debug=True, sanitize_overflow=False,
    )  # fmt: skip
    torch.sum(partial_sums, 1, out=sums)
    torch.sum(partial_losses, 1, out=loss)


def dice_cross_entropy_bwd(
    grad_loss: Tensor,
    grad_sums: Tensor,
    inputs: LossInputs,
    ignore_index: int,
    channels_last: bool,
    grad_logits: Tensor,
) -> None:
    """Write the gradient of the logits for the gradients of loss[0] and of sums."""
    logits, labels, weight = inputs
    n, classes, h, w = logits.shape
    blocks, sizes = _tile_sizes(logits)
    launch(
        dice_cross_entropy_bwd_kernel, n * blocks,
        grad_loss, grad_sums, logits, labels, inputs.weight_or_logits, grad_logits,
        h * w, blocks, ignore_index,
        C=classes, WEIGHTED=weight is not None, CHANNELS_LAST=channels_last, **sizes,
    )  # fmt: skip
