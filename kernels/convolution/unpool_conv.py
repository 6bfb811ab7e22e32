"""Max-unpooling and the 3x3 convolution behind it as one implicit matrix product: the map between is never stored.

A batch norm in evaluation and the ReLU behind the convolution go into its epilogue. Those in front of the unpooling do
not go into the loader, which would do for each of the nine taps what a pass over the small map does once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import INTERPRETED, launch, vector_width
from ..pooling.geometry import PoolGeometry
from ..pooling.tiling import Tiling
from .gemm import blocks, multiply, place, precision, programs, transpose_into, transposed, wide
from .geometry import Epilogue, epilogue


@triton.jit
def window_of(
    h, v, i, j, H, W, OH, OW, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr,
    PW: tl.constexpr,
):  # fmt: skip
    """(row, column and tap of the window, whether there is one) of the unpooled pixel under tap (i, j) at (h, v)."""
    row, column = h + i - 1, v + j - 1
    inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
    row, column = tl.where(inside, row, 0) + PH, tl.where(inside, column, 0) + PW
    oh, ow, r, s = row // SH, column // SW, row % SH, column % SW
    return oh, ow, r * KW + s, inside & (oh < OH) & (ow < OW) & (r < KH) & (s < KW)


@triton.jit
def max_unpool2d_conv2d_fwd_kernel(
    x, offsets, w, scale, bias, y, PIXELS, H, W, OH, OW, C_RUNS, K_RUNS,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    C_VEC: tl.constexpr, K_VEC: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """channels_last: one program makes BLOCK_M pixels x BLOCK_N channels of y (N, H, W, K).

    For each tap of the 3x3 window a pixel takes the pooled value (N, OH, OW, C) whose window it lies in, where the
    offset says that the maximum stood just there, else 0. w: (K, 3, 3, C). Pooled values and offsets come nine times,
    from the caches but for the first; y is written once.
    """
    C, K = C_RUNS * C_VEC, K_RUNS * K_VEC
    program = tl.program_id(0)
    if WIDE:
        C, K, program = tl.cast(C, tl.int64), tl.cast(K, tl.int64), program.to(tl.int64)
    tiles = tl.cdiv(K, BLOCK_N)
    first = program // tiles * BLOCK_M
    n = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m = first + tl.arange(0, BLOCK_M)
    live_m, live_n = m < PIXELS, n < K
    image, h, v = place(first, H, W, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    if program % tiles == 0:  # each window is the own one of a pixel: all offsets are seen
        oh, ow, _, there = window_of(h, v, 1, 1, H, W, OH, OW, KH, KW, SH, SW, PH, PW)
        source = ((image * OH + oh) * OW + ow) * C
        for c0 in range(0, C, BLOCK_R):
            some = (live_m & there)[:, None] & (r < C - c0)[None, :]
            offset = tl.load(offsets + ((source + c0)[:, None] + r[None, :]), mask=some, other=0).to(tl.int32)
            row, column = (oh * SH - PH)[:, None] + offset // KW, (ow * SW - PW)[:, None] + offset % KW
            right = (offset < KH * KW) & (row >= 0) & (row < H) & (column >= 0) & (column < W)
            tl.device_assert(right | ~some, "max_unpool2d_conv2d: found an offset outside its window")
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    tap, c0 = 0, 0
    for _ in range(9 * tl.cdiv(C, BLOCK_R)):
        oh, ow, wanted, there = window_of(h, v, tap // 3, tap % 3, H, W, OH, OW, KH, KW, SH, SW, PH, PW)
        live_r = r < C - c0
        some = (live_m & there)[:, None] & live_r[None, :]
        source = (((image * OH + oh) * OW + ow) * C + c0)[:, None] + r[None, :]
        offset = tl.load(offsets + source, mask=some, other=0).to(tl.int32)
        pixels = tl.load(x + source, mask=some, other=0.0)
        if UPCAST:
            pixels = pixels.to(tl.float32)
        pixels = tl.where(offset == wanted[:, None], pixels, 0.0)
        source = (n * (9 * C) + (tap * C + c0))[None, :] + r[:, None]
        weights = tl.load(w + source, mask=live_r[:, None] & live_n[None, :], other=0.0)
        acc = multiply(pixels, weights, acc, PRECISION, UPCAST)
        c0 += BLOCK_R
        tap = tl.where(c0 < C, tap, tap + 1)
        c0 = tl.where(c0 < C, c0, 0)
    acc = epilogue(acc, scale, bias, n, live_n, SCALE, BIAS, RELU)
    tl.store(y + ((m * K)[:, None] + n[None, :]), acc.to(y.dtype.element_ty), mask=live_m[:, None] & live_n[None, :])


def max_unpool2d_conv2d_fwd(
    x: Tensor,
    offsets: Tensor,
    weight: Tensor,
    after: Epilogue,
    y: Tensor,
    geometry: PoolGeometry,
    channels_last: bool,
) -> None:
    """Write y (N, K, H, W) from x and offsets (N, C, OH, OW) and weight (K, C, 3, 3).

    y lies as the windows say, every other tensor in NCHW or in channels_last. Offsets outside their windows are an
    error where kernels are compiled for debugging, and never an address.
    """
    tiling = Tiling(geometry, channels_last)
    if y.numel() == 0:
        return
    x, offsets, weight = (transposed(t, torch.channels_last) for t in (x, offsets, weight))
    target = y if tiling.channels_last else torch.empty_like(y, memory_format=torch.channels_last)
    (c, oh, ow), (n, k, h, w) = x.shape[1:], y.shape
    tiles = blocks(n * h * w, k, c, x) | {"num_warps": 8}  # a tile of values and offsets lies in registers
    c_vec, k_vec = vector_width(x.element_size(), c), vector_width(x.element_size(), k)
    launch(
        max_unpool2d_conv2d_fwd_kernel, programs(n * h * w, k, tiles),
        x, offsets, weight, *after.pointers(y), target, n * h * w, h, w, oh, ow, c // c_vec, k // k_vec,
        C_VEC=c_vec, K_VEC=k_vec, **after.constants(), PRECISION=precision(x), UPCAST=INTERPRETED,
        WIDE=wide(x, weight, y), **tiling.window_constants(), **tiles, debug=True, sanitize_overflow=False,
    )  # fmt: skip
    if target is not y:
        transpose_into(target, y, to_channels_last=False)
