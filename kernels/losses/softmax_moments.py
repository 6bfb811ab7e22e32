"""softmax_moments: mean, squared deviations and entropy of the softmax over several passes, updated in one read.

Welford's update keeps the mean and the sum of squared deviations of the passes in registers; Chan's formula merges them
with those of the passes before. A difference of sums of squares would lose all digits where a pixel is certain.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import INT32_MAX, launch

TILE = 2048  # elements of a program: pixels times classes


@triton.jit
def softmax_moments_kernel(
    logits, mean, squares, entropy, new_mean, new_squares, new_entropy, N, PLANE, STRIDE_K, STRIDE_P, BEFORE,
    K: tl.constexpr, PASSES: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program updates BLOCK pixels of one image with their K classes by PASSES passes, after BEFORE others.

    logits are (PASSES, N, K, H, W); mean and squares (N, K, H, W) have their strides, entropy is (N, H, W). Reads every
    logit once, and reads and writes each of the three once. PASSES is at least 1. For BEFORE = 0 nothing old is read.
    """
    # 1. Which pixels
    blocks = tl.cdiv(PLANE, BLOCK)
    image, pixel = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK_K)
    if WIDE:
        image, pixel, k = image.to(tl.int64), pixel.to(tl.int64), k.to(tl.int64)
        N = tl.cast(N, tl.int64)
    m_pixel = pixel < PLANE
    m_live = (k < K)[:, None] & m_pixel[None, :]
    o = k[:, None] * STRIDE_K + pixel[None, :] * STRIDE_P
    o_state, o_pixel = image * K * PLANE + o, image * PLANE + pixel

    # 2. Welford over the passes
    average = tl.zeros((BLOCK_K, BLOCK), tl.float32)
    deviations = tl.zeros((BLOCK_K, BLOCK), tl.float32)
    disorder = tl.zeros((BLOCK,), tl.float32)
    for number in range(PASSES):
        o_pass = (number * N + image) * K * PLANE + o
        x = tl.load(logits + o_pass, mask=m_live, other=0.0).to(tl.float32)
        x = tl.where((k < K)[:, None], x, float("-inf"))
        x -= tl.max(x, 0)[None, :]
        power = tl.exp(x)
        total = tl.sum(power, 0)
        p = power / total[None, :]
        # The entropy is log(total) - sum of p * x; where p is 0, x may be -inf
        disorder += tl.log(total) - tl.sum(tl.where(p > 0, p * x, 0.0), 0)
        step = p - average
        average += step / (number + 1)
        deviations += step * (p - average)

    # 3. Merge with the passes before
    if BEFORE > 0:
        old = tl.load(mean + o_state, mask=m_live, other=0.0)
        apart = average - old
        share = PASSES / (BEFORE + PASSES)
        average = old + apart * share
        deviations += tl.load(squares + o_state, mask=m_live, other=0.0) + apart * apart * (BEFORE * share)
        disorder += tl.load(entropy + o_pixel, mask=m_pixel, other=0.0)

    # 4. Store
    tl.store(new_mean + o_state, average, mask=m_live)
    tl.store(new_squares + o_state, deviations, mask=m_live)
    tl.store(new_entropy + o_pixel, disorder, mask=m_pixel)


def softmax_moments(
    logits: Tensor, channels_last: bool, before: int, old: tuple[Tensor, ...], new: tuple[Tensor, ...]
) -> None:
    """Write the moments of `before` passes, `old`, and of those of the dense logits (T, N, K, H, W), into `new`.

    old and new: mean and squared deviations (N, K, H, W) in the logits' layout, sums of entropies (N, H, W); float32.
    """
    passes, images, classes, height, width = logits.shape
    plane, block_k = height * width, triton.next_power_of_2(classes)
    block = max(16, TILE // block_k)
    strides = (1, classes) if channels_last else (plane, 1)
    launch(
        softmax_moments_kernel, images * triton.cdiv(plane, block),
        logits, *old, *new, images, plane, *strides, before,
        K=classes, PASSES=passes, BLOCK_K=block_k, BLOCK=block,
        WIDE=(passes * images + 1) * (classes + block_k) * (plane + block) > INT32_MAX,
        num_warps=8 if block_k * block > TILE else 4,
    )  # fmt: skip
