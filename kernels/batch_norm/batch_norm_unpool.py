"""Batch norm, ReLU and the max-unpooling behind them, in one pass over the map.

The map between is never stored: an element is normalised as it is read and put in its place. Windows do not overlap.
In 2-byte types, for windows of 2x2, 13 bytes a pooled element forward in training.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from ..pooling.geometry import PoolGeometry
from ..pooling.tiling import Tiling, run_offset
from .arguments import NormArguments
from .common import (
    Partition,
    affine,
    cells,
    channels_of,
    gathered,
    masked,
    merge_sums,
    norm_constants,
    norm_pointers,
    normalised,
    pixel_offset,
    program_of,
    statistics,
    store_sums,
    window_constants,
    window_of,
)

TILE = 1024  # elements of the pooled map, or cells, that a program has in its registers at a time


@triton.jit
def batch_norm_relu_max_unpool2d_fwd_kernel(
    x, offsets, mean, shift, var, weight, bias, y, M, C, RUNS, CHANNEL_TILES, H, W, CH, CW, OH, OW,
    EPS: tl.constexpr, SHIFTED: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, RELU: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    ALIGNED: tl.constexpr, WHOLE_ROWS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program writes STEPS tiles of cells of y: a window's value at its offset, 0 elsewhere. Reads x, offsets once.

    An offset outside its window is an error.
    """
    tile, chunk = program_of(CHANNEL_TILES, WIDE)
    c, live_c = channels_of(tile, C, LANES, CHANNELS_LAST)
    centre, low, inverse = statistics(mean, shift, var, c, live_c, EPS, SHIFTED)
    scale, beta = affine(weight, bias, inverse, c, live_c, WEIGHTED, BIASED)
    T: tl.constexpr = inverse.dtype
    D: tl.constexpr = y.dtype.element_ty
    for step in range(STEPS):
        o = (chunk * STEPS + step) * ROWS + tl.arange(0, ROWS)
        live = (o < M)[:, None] & live_c
        image, ch, cw, run = window_of(o, CH, CW, RUNS, LANES, CHANNELS_LAST)
        h0, w0 = ch * SH - PH, cw * SW - PW
        pooled = live & (ch < OH) & (cw < OW)
        source = pixel_offset(image, ch, cw, run, tile, c, C, OH, OW, RUNS, VEC, CHANNELS_LAST, ALIGNED)
        value = tl.load(x + source, mask=pooled, other=0.0).to(T)
        value = normalised((value - centre) + low, scale, beta, RELU, D)
        position = tl.load(offsets + source, mask=pooled, other=0).to(tl.int32)
        position = tl.where(pooled, position, -1)
        hits = tl.zeros((ROWS, LANES), tl.int32)
        for i in tl.static_range(SH):
            h = h0 + i
            if WHOLE_ROWS:
                inside = live & (h >= 0) & (h < H)
                first = inside & (position == (i * KW if i < KH else -2))
                second = inside & (position == (i * KW + 1 if (i < KH and KW == 2) else -2))
                hits += first.to(tl.int32) + second.to(tl.int32)
                row = tl.join(tl.where(first, value, 0.0), tl.where(second, value, 0.0))
                row = tl.reshape(row, (ROWS, 2 * LANES))
                tl.store(y + run_offset(image * C + tile, h, run, H, RUNS, LANES), row.to(D), mask=inside)
            else:
                for j in tl.static_range(SW):
                    w = w0 + j
                    inside = live & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                    hit = inside & (position == (i * KW + j if (i < KH and j < KW) else -2))
                    hits += hit.to(tl.int32)
                    offset = pixel_offset(image, h, w, run, tile, c, C, H, W, RUNS, VEC, CHANNELS_LAST, False)
                    tl.store(y + offset, tl.where(hit, value, 0.0).to(D), mask=inside)
        stray = pooled & (hits == 0)
        tl.device_assert(stray == 0, "batch_norm_relu_max_unpool2d: found an offset outside its window")


@triton.jit
def batch_norm_relu_max_unpool2d_sums_kernel(
    grad_y, offsets, x, mean, shift, var, weight, bias, grads_x, partials, M, C, RUNS, CHANNEL_TILES, CHUNKS, STEPS,
    H, W, OH, OW,
    EPS: tl.constexpr, SHIFTED: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, RELU: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    WHOLE_ROWS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program gathers grad_y at the offsets of STEPS tiles, keeps it behind the ReLU, and adds up the two sums.

    Reads grad_y, offsets and x once.
    """
    tile, chunk = program_of(CHANNEL_TILES, WIDE)
    c, live_c = channels_of(tile, C, LANES, CHANNELS_LAST)
    centre, low, inverse = statistics(mean, shift, var, c, live_c, EPS, SHIFTED)
    scale, beta = affine(weight, bias, inverse, c, live_c, WEIGHTED, BIASED)
    T: tl.constexpr = inverse.dtype
    grads = tl.zeros((ROWS, LANES), T)
    products = tl.zeros((ROWS, LANES), T)
    for step in range(STEPS):
        o = (chunk * STEPS + step) * ROWS + tl.arange(0, ROWS)
        live = (o < M)[:, None] & live_c
        image, oh, ow, run = window_of(o, OH, OW, RUNS, LANES, CHANNELS_LAST)
        out = pixel_offset(image, oh, ow, run, tile, c, C, OH, OW, RUNS, VEC, CHANNELS_LAST, True)
        centred = (tl.load(x + out, mask=live, other=0.0).to(T) - centre) + low
        position = tl.load(offsets + out, mask=live, other=0).to(tl.int32)
        grad = gathered(
            grad_y, position, live, image, oh * SH - PH, ow * SW - PW, run, tile, c, C, H, W, RUNS, T,
            KH, KW, WHOLE_ROWS, CHANNELS_LAST, VEC, LANES, ROWS,
        )  # fmt: skip
        grad = masked(grad, centred, scale, beta, RELU, x.dtype.element_ty)
        tl.store(grads_x + out, grad.to(grads_x.dtype.element_ty), mask=live)
        grads += grad
        products += tl.where(live, grad * centred, 0.0)
    store_sums(partials, chunk, CHUNKS, c, live_c, C, grads, products, CHANNELS_LAST)


def batch_norm_relu_max_unpool2d_fwd(
    x: Tensor,
    offsets: Tensor,
    norm: NormArguments,
    y: Tensor,
    geometry: PoolGeometry,
    channels_last: bool,
) -> None:
    """Write y (N, C, H, W) = max-unpool(relu(batch norm of x)), every element of it."""
    tiling = Tiling(geometry, channels_last)
    (h, w), (oh, ow) = y.shape[-2:], x.shape[-2:]
    ch, cw = cells(y, x, tiling)
    partition = Partition(y, ch, cw, tiling.channels_last, TILE)
    launch(
        batch_norm_relu_max_unpool2d_fwd_kernel, partition.programs,
        x, offsets, *norm_pointers(norm), y, *partition.sizes, h, w, ch, cw, oh, ow,
        **norm_constants(norm), **partition.constants, **window_constants(y, x, tiling), ALIGNED=cw == ow,
        STEPS=partition.steps, debug=True, sanitize_overflow=False,
    )  # fmt: skip


def batch_norm_relu_max_unpool2d_sums(
    grad_y: Tensor,
    offsets: Tensor,
    x: Tensor,
    norm: NormArguments,
    grads: Tensor,
    sums: Tensor,
    geometry: PoolGeometry,
    channels_last: bool,
) -> None:
    """Write grads, like x, what reaches the batch norm behind the ReLU, and sums (4, C), as batch_norm_relu_sums does.

    The gradient of x is then batch_norm_relu_bwd's of grads.
    """
    tiling = Tiling(geometry, channels_last)
    (h, w), (oh, ow) = grad_y.shape[-2:], x.shape[-2:]
    partition = Partition(grad_y, oh, ow, tiling.channels_last, TILE, reducing=True)
    partials = torch.empty((2, partition.chunks, x.shape[1]), dtype=sums.dtype, device=x.device)
    launch(
        batch_norm_relu_max_unpool2d_sums_kernel, partition.programs,
        grad_y, offsets, x, *norm_pointers(norm), grads, partials, *partition.sizes, partition.chunks, partition.steps,
        h, w, oh, ow,
        **norm_constants(norm), **partition.constants, **window_constants(grad_y, x, tiling),
    )  # fmt: skip
    merge_sums(partials, norm, sums, x)
