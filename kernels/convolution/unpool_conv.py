"""Max-unpooling and the 3x3 convolution after it as one implicit GEMM: the unpooled map is never stored.

In evaluation the batch norm and the ReLU after the convolution are part of the epilogue. Those in front of the
unpooling are not part of the loader, which would repeat for each of the nine taps what one pass over the small map does
once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import INTERPRETED, launch, vector_width
from ..pooling.geometry import PoolGeometry
from ..pooling.tiling import Tiling
from .gemm import (
    apply_epilogue,
    dot,
    input_precision,
    needs_int64_offsets,
    pixel_coordinates,
    tile_count,
    tile_sizes,
    to_layout,
    transpose_into,
)
from .options import Epilogue


@triton.jit
def window_of(
    h, v, i, j, H, W, OH, OW, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr,
    PW: tl.constexpr,
):  # fmt: skip
    """The window that holds the unpooled pixel under tap (i, j) of the 3x3 kernel at (h, v).

    Returns (row and column of the window, the pixel's offset inside it, whether there is such a window).
    """
    row, column = h + i - 1, v + j - 1
    m_inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
    row, column = tl.where(m_inside, row, 0) + PH, tl.where(m_inside, column, 0) + PW
    oh, ow, r, s = row // SH, column // SW, row % SH, column % SW
    return oh, ow, r * KW + s, m_inside & (oh < OH) & (ow < OW) & (r < KH) & (s < KW)


@triton.jit
def max_unpool2d_conv2d_fwd_kernel(
    x, offsets, w, scale, bias, y, PIXELS, H, W, OH, OW, C_RUNS, K_RUNS,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    C_VEC: tl.constexpr, K_VEC: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """channels_last: one program computes BLOCK_M pixels x BLOCK_N channels of y (N, H, W, K).

    For each tap of the 3x3 kernel a pixel takes the pooled value (N, OH, OW, C) of the window that it is in, if the
    offset says that the maximum was at this pixel, else 0. w: (K, 3, 3, C). Pooled values and offsets are read nine
    times, the first time from memory and then from the caches; y is written once.
    """
    # 1. Which pixels and channels
    C, K = C_RUNS * C_VEC, K_RUNS * K_VEC
    program = tl.program_id(0)
    if WIDE:
        C, K, program = tl.cast(C, tl.int64), tl.cast(K, tl.int64), program.to(tl.int64)
    tiles = tl.cdiv(K, BLOCK_N)
    first = program // tiles * BLOCK_M
    n = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m = first + tl.arange(0, BLOCK_M)
    m_m, m_n = m < PIXELS, n < K
    image, h, v = pixel_coordinates(first, H, W, BLOCK_M)
    r = tl.arange(0, BLOCK_R)

    # 2. Check the offsets of the windows that its own pixels are in: that is every window
    if program % tiles == 0:
        oh, ow, _, m_window = window_of(h, v, 1, 1, H, W, OH, OW, KH, KW, SH, SW, PH, PW)
        o_offsets = ((image * OH + oh) * OW + ow) * C
        for c0 in range(0, C, BLOCK_R):
            m_pixels = (m_m & m_window)[:, None] & (r < C - c0)[None, :]
            offset = tl.load(offsets + ((o_offsets + c0)[:, None] + r[None, :]), mask=m_pixels, other=0).to(tl.int32)
            row, column = (oh * SH - PH)[:, None] + offset // KW, (ow * SW - PW)[:, None] + offset % KW
            right = (offset < KH * KW) & (row >= 0) & (row < H) & (column >= 0) & (column < W)
            tl.device_assert(right | ~m_pixels, "max_unpool2d_conv2d: found an offset outside its window")

    # 3. Sum over taps and input channels
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    tap, c0 = 0, 0
    for _ in range(9 * tl.cdiv(C, BLOCK_R)):
        oh, ow, wanted, m_window = window_of(h, v, tap // 3, tap % 3, H, W, OH, OW, KH, KW, SH, SW, PH, PW)
        m_r = r < C - c0
        m_pixels = (m_m & m_window)[:, None] & m_r[None, :]
        o_pixels = (((image * OH + oh) * OW + ow) * C + c0)[:, None] + r[None, :]
        offset = tl.load(offsets + o_pixels, mask=m_pixels, other=0).to(tl.int32)
        pixels = tl.load(x + o_pixels, mask=m_pixels, other=0.0)
        if UPCAST:
            pixels = pixels.to(tl.float32)
        pixels = tl.where(offset == wanted[:, None], pixels, 0.0)
        o_weights = (n * (9 * C) + (tap * C + c0))[None, :] + r[:, None]
        weights = tl.load(w + o_weights, mask=m_r[:, None] & m_n[None, :], other=0.0)
        acc = dot(pixels, weights, acc, PRECISION, UPCAST)
        c0 += BLOCK_R
        tap = tl.where(c0 < C, tap, tap + 1)
        c0 = tl.where(c0 < C, c0, 0)

    # 4. Apply the epilogue, and store
    acc = apply_epilogue(acc, scale, bias, n, m_n, SCALE, BIAS, RELU)
    tl.store(y + ((m * K)[:, None] + n[None, :]), acc.to(y.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


def max_unpool2d_conv2d_fwd(
    x: Tensor,
    offsets: Tensor,
    weight: Tensor,
    y: Tensor,
    geometry: PoolGeometry,
    epilogue: Epilogue,
    channels_last: bool,
) -> None:
    """Write y (N, K, H, W) from x and offsets (N, C, OH, OW) and weight (K, C, 3, 3).

    channels_last: the layout of y. Every other tensor is dense in either layout. An offset outside its window fails a
    device-side assertion and is never used as an address.
    """
    if y.numel() == 0:
        return
    x, offsets, weight = (to_layout(t, torch.channels_last) for t in (x, offsets, weight))
    target = y if channels_last else torch.empty_like(y, memory_format=torch.channels_last)
    (c, oh, ow), (n, k, h, w) = x.shape[1:], y.shape
    sizes = tile_sizes(n * h * w, k, c, x) | {"num_warps": 8}  # a tile of values and offsets is held in registers
    c_vec, k_vec = vector_width(x.element_size(), c), vector_width(x.element_size(), k)
    launch(
        max_unpool2d_conv2d_fwd_kernel, tile_count(n * h * w, k, sizes),
        x, offsets, weight, *epilogue.pointers(y), target, n * h * w, h, w, oh, ow, c // c_vec, k // k_vec,
        C_VEC=c_vec, K_VEC=k_vec, **epilogue.constants(), PRECISION=input_precision(x), UPCAST=INTERPRETED,
        WIDE=needs_int64_offsets(x, weight, y), **Tiling(geometry, channels_last).window_constants(), **sizes,
        debug=True, sanitize_overflow=False,
    )  # fmt: skip
    if target is not y:
        transpose_into(target, y, to_channels_last=False)
