"""The confusion matrix of two label maps: how many pixels of each true class were predicted as each class.

Counting is a matrix product of zeros and ones: [true class, pixel] times [pixel, predicted class]. It runs on tensor
cores, has one order and needs no atomics. float32 counts exactly up to 2^24.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from ..shared import INT32_MAX

CLASSES = 64  # the most rows and columns of the matrix that a program counts
BLOCK = 128  # pixels that are read at a time
LEAST_PIXELS = 2048  # of a program
MOST_PIXELS = 2**22  # of a program
MOST_COUNTS = 2**21  # elements of all partial matrices together, unless that many pixels need more programs


@triton.jit
def confusion_matrix_kernel(
    pred, target, counts, PIXELS, SPAN, IGNORE, C: tl.constexpr, CLASSES: tl.constexpr, IGNORES: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program counts SPAN pixels for CLASSES true and CLASSES predicted classes, and writes a partial matrix.

    Reads both labels of its pixels once: 9 bytes per pixel for int64 targets and uint8 predictions. With more than
    CLASSES classes, every pair of groups of classes reads the labels again.
    """
    # 1. Which pixels and which classes
    program = tl.program_id(0)
    groups = tl.cdiv(C, CLASSES)
    part = program // (groups * groups)
    true = program // groups % groups * CLASSES + tl.arange(0, CLASSES)
    predicted = program % groups * CLASSES + tl.arange(0, CLASSES)
    begin = (part.to(tl.int64) if WIDE else part) * SPAN

    # 2. Load the labels, and count
    count = tl.zeros((CLASSES, CLASSES), tl.float32)
    for step in range(0, SPAN, BLOCK):
        o = begin + step + tl.arange(0, BLOCK)
        m_live = o < PIXELS
        truth = tl.load(target + o, mask=m_live, other=0).to(tl.int64)
        guess = tl.load(pred + o, mask=m_live, other=0).to(tl.int64)
        if IGNORES:
            m_live = m_live & (truth != IGNORE)
        m_outside = m_live & ((truth < 0) | (truth >= C) | (guess < 0) | (guess >= C))
        tl.device_assert(m_outside == 0, "confusion_matrix: pred or target holds a label outside the classes")
        rows = (truth[None, :] == true[:, None]) & m_live[None, :]
        columns = guess[:, None] == predicted[None, :]
        count = tl.dot(rows.to(tl.float16), columns.to(tl.float16), count)

    # 3. Store
    o_counts = (part * C + true[:, None]) * C + predicted[None, :]
    tl.store(counts + o_counts, count.to(tl.int32), mask=(true < C)[:, None] & (predicted < C)[None, :])


def confusion_matrix(pred: Tensor, target: Tensor, classes: int, ignore_index: int | None) -> Tensor:
    """int32 matrices (parts, classes, classes) whose sum is the confusion matrix of the dense pred and target."""
    pixels = target.numel()
    parts = min(triton.cdiv(pixels, LEAST_PIXELS), max(1, MOST_COUNTS // classes**2))
    parts = max(parts, triton.cdiv(pixels, MOST_PIXELS))
    span = triton.cdiv(triton.cdiv(pixels, max(parts, 1)), BLOCK) * BLOCK
    counts = torch.empty((parts, classes, classes), dtype=torch.int32, device=target.device)
    block = min(CLASSES, max(16, triton.next_power_of_2(classes)))
    launch(
        confusion_matrix_kernel, parts * triton.cdiv(classes, block) ** 2,
        pred, target, counts, pixels, span, 0 if ignore_index is None else ignore_index,
        C=classes, CLASSES=block, IGNORES=ignore_index is not None, BLOCK=BLOCK,
        WIDE=pixels + MOST_PIXELS > INT32_MAX, debug=True, sanitize_overflow=False,
        num_stages=1,  # Triton 3.6 would prefetch across the assertion, and spill registers for it; 3.7 does not
    )  # fmt: skip
    return counts
