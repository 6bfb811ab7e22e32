"""Batch norm, ReLU and the max-pooling behind them, in one pass over the map.

The map between is never stored: the kernels normalise the elements of a window as they read them. Offsets (uint8) are
all that is kept besides x. Windows do not overlap. In 2-byte types, for windows of 2x2, 4.75 bytes an element forward
in training and 7.5 backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from ..pooling.geometry import PoolGeometry
from ..pooling.pool import keep_larger
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
    through_statistics,
    window_constants,
    window_of,
)

TILE = 1024  # elements of the pooled map, or cells, that a program has in its registers at a time


@triton.jit
def batch_norm_relu_max_pool2d_fwd_kernel(
    x, mean, shift, var, weight, bias, y, offsets, M, C, RUNS, CHANNEL_TILES, H, W, OH, OW,
    EPS: tl.constexpr, SHIFTED: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, RELU: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    PARTIAL: tl.constexpr, WHOLE_ROWS: tl.constexpr, OFFSETS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program writes STEPS tiles of the pooled map. Reads x once.

    Values are compared as the map between would hold them.
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
        image, oh, ow, run = window_of(o, OH, OW, RUNS, LANES, CHANNELS_LAST)
        h0, w0 = oh * SH - PH, ow * SW - PW
        best = tl.full((ROWS, LANES), float("-inf"), T)
        at = tl.maximum(-h0, 0) * KW + tl.maximum(-w0, 0) + tl.zeros((ROWS, LANES), tl.int32)
        for i in tl.static_range(KH):
            h = h0 + i
            if WHOLE_ROWS:
                inside = live
                if PARTIAL:
                    inside = live & (h >= 0) & (h < H)
                offset = run_offset(image * C + tile, h, run, H, RUNS, LANES)
                row = tl.load(x + offset, mask=inside, other=0.0).to(T)
                left, right = tl.split(tl.reshape(row, (ROWS, LANES, 2)))
                left = normalised((left - centre) + low, scale, beta, RELU, D)
                if PARTIAL:
                    left = tl.where(inside, left, float("-inf"))
                best, at = keep_larger(best, at, left, i * KW)
                if KW == 2:
                    right = normalised((right - centre) + low, scale, beta, RELU, D)
                    if PARTIAL:
                        right = tl.where(inside, right, float("-inf"))
                    best, at = keep_larger(best, at, right, i * KW + 1)
            else:
                for j in tl.static_range(KW):
                    w = w0 + j
                    inside = live
                    if PARTIAL:
                        inside = live & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                    offset = pixel_offset(image, h, w, run, tile, c, C, H, W, RUNS, VEC, CHANNELS_LAST, False)
                    value = tl.load(x + offset, mask=inside, other=0.0).to(T)
                    value = normalised((value - centre) + low, scale, beta, RELU, D)
                    if PARTIAL:
                        value = tl.where(inside, value, float("-inf"))
                    best, at = keep_larger(best, at, value, i * KW + j)
        out = pixel_offset(image, oh, ow, run, tile, c, C, OH, OW, RUNS, VEC, CHANNELS_LAST, True)
        tl.store(y + out, best.to(D), mask=live)
        if OFFSETS:
            tl.store(offsets + out, at.to(tl.uint8), mask=live)


@triton.jit
def batch_norm_relu_max_pool2d_sums_kernel(
    grad_y, offsets, x, mean, shift, var, weight, bias, partials, M, C, RUNS, CHANNEL_TILES, CHUNKS, STEPS,
    H, W, OH, OW,
    EPS: tl.constexpr, SHIFTED: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, RELU: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    WHOLE_ROWS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program adds up its channels' two sums over STEPS tiles of the pooled map. Reads grad_y, offsets, x once."""
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
        grad = tl.load(grad_y + out, mask=live, other=0.0).to(T)
        position = tl.load(offsets + out, mask=live, other=0).to(tl.int32)
        value = gathered(
            x, position, live, image, oh * SH - PH, ow * SW - PW, run, tile, c, C, H, W, RUNS, T,
            KH, KW, WHOLE_ROWS, CHANNELS_LAST, VEC, LANES, ROWS,
        )  # fmt: skip
        centred = (value - centre) + low
        grad = masked(grad, centred, scale, beta, RELU, x.dtype.element_ty)
        grads += grad
        products += tl.where(live, grad * centred, 0.0)
    store_sums(partials, chunk, CHUNKS, c, live_c, C, grads, products, CHANNELS_LAST)


@triton.jit
def batch_norm_relu_max_pool2d_bwd_kernel(
    grad_y, offsets, x, mean, shift, var, weight, bias, means, grad_x, M, C, RUNS, CHANNEL_TILES,
    H, W, CH, CW, OH, OW,
    EPS: tl.constexpr, BATCH_STATS: tl.constexpr, SHIFTED: tl.constexpr, WEIGHTED: tl.constexpr,
    BIASED: tl.constexpr, RELU: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    ALIGNED: tl.constexpr, WHOLE_ROWS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program writes STEPS tiles of cells of grad_x, in gaps and behind the windows too. Reads everything once."""
    tile, chunk = program_of(CHANNEL_TILES, WIDE)
    c, live_c = channels_of(tile, C, LANES, CHANNELS_LAST)
    centre, low, inverse = statistics(mean, shift, var, c, live_c, EPS, SHIFTED)
    scale, beta = affine(weight, bias, inverse, c, live_c, WEIGHTED, BIASED)
    through, slope = through_statistics(means, c, live_c, C, inverse, BATCH_STATS)
    T: tl.constexpr = inverse.dtype
    D: tl.constexpr = x.dtype.element_ty
    for step in range(STEPS):
        o = (chunk * STEPS + step) * ROWS + tl.arange(0, ROWS)
        live = (o < M)[:, None] & live_c
        image, ch, cw, run = window_of(o, CH, CW, RUNS, LANES, CHANNELS_LAST)
        h0, w0 = ch * SH - PH, cw * SW - PW
        pooled = live & (ch < OH) & (cw < OW)
        source = pixel_offset(image, ch, cw, run, tile, c, C, OH, OW, RUNS, VEC, CHANNELS_LAST, ALIGNED)
        grad = tl.load(grad_y + source, mask=pooled, other=0.0).to(T)
        position = tl.load(offsets + source, mask=pooled, other=255).to(tl.int32)
        position = tl.where(pooled, position, -1)
        for i in tl.static_range(SH):
            h = h0 + i
            if WHOLE_ROWS:
                inside = live & (h >= 0) & (h < H)
                offset = run_offset(image * C + tile, h, run, H, RUNS, LANES)
                row = tl.load(x + offset, mask=inside, other=0.0).to(T)
                left, right = tl.split(tl.reshape(row, (ROWS, LANES, 2)))
                left, right = (left - centre) + low, (right - centre) + low
                hit = position == (i * KW if i < KH else -2)
                there = tl.where(hit, masked(grad, left, scale, beta, RELU, D), 0.0)
                left = scale * (there - through - left * slope)
                hit = position == (i * KW + 1 if (i < KH and KW == 2) else -2)
                there = tl.where(hit, masked(grad, right, scale, beta, RELU, D), 0.0)
                right = scale * (there - through - right * slope)
                row = tl.reshape(tl.join(left, right), (ROWS, 2 * LANES))
                tl.store(grad_x + offset, row.to(grad_x.dtype.element_ty), mask=inside)
            else:
                for j in tl.static_range(SW):
                    w = w0 + j
                    inside = live & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                    offset = pixel_offset(image, h, w, run, tile, c, C, H, W, RUNS, VEC, CHANNELS_LAST, False)
                    centred = (tl.load(x + offset, mask=inside, other=0.0).to(T) - centre) + low
                    hit = position == (i * KW + j if (i < KH and j < KW) else -2)
                    there = tl.where(hit, masked(grad, centred, scale, beta, RELU, D), 0.0)
                    there = scale * (there - through - centred * slope)
                    tl.store(grad_x + offset, there.to(grad_x.dtype.element_ty), mask=inside)


def batch_norm_relu_max_pool2d_fwd(
    x: Tensor,
    norm: NormArguments,
    y: Tensor,
    offsets: Tensor | None,
    geometry: PoolGeometry,
    channels_last: bool,
) -> None:
    """Write y = max-pool(relu(batch norm of x)) and, where they are wanted, the offsets of the maxima."""
    tiling = Tiling(geometry, channels_last)
    (h, w), (oh, ow) = x.shape[-2:], y.shape[-2:]
    partition = Partition(x, oh, ow, tiling.channels_last, TILE)
    launch(
        batch_norm_relu_max_pool2d_fwd_kernel, partition.programs,
        x, *norm_pointers(norm), y, y if offsets is None else offsets, *partition.sizes, h, w, oh, ow,
        **norm_constants(norm), **partition.constants, **window_constants(x, y, tiling),
        PARTIAL=not tiling.windows_are_inside(x, y), OFFSETS=offsets is not None,
        STEPS=partition.steps,
    )  # fmt: skip


def batch_norm_relu_max_pool2d_sums(
    grad_y: Tensor,
    offsets: Tensor,
    x: Tensor,
    norm: NormArguments,
    sums: Tensor,
    geometry: PoolGeometry,
    channels_last: bool,
) -> None:
    """Write sums (4, C), as batch_norm_relu_sums does, of the gradient that the pooling's maxima get."""
    tiling = Tiling(geometry, channels_last)
    (h, w), (oh, ow) = x.shape[-2:], grad_y.shape[-2:]
    partition = Partition(x, oh, ow, tiling.channels_last, TILE, reducing=True)
    partials = torch.empty((2, partition.chunks, x.shape[1]), dtype=sums.dtype, device=x.device)
    launch(
        batch_norm_relu_max_pool2d_sums_kernel, partition.programs,
        grad_y, offsets, x, *norm_pointers(norm), partials, *partition.sizes, partition.chunks,
        partition.steps, h, w, oh, ow,
        **norm_constants(norm), **partition.constants, **window_constants(x, grad_y, tiling),
    )  # fmt: skip
    merge_sums(partials, norm, sums, x)


def batch_norm_relu_max_pool2d_bwd(
    grad_y: Tensor,
    offsets: Tensor,
    x: Tensor,
    norm: NormArguments,
    means: Tensor | None,
    grad_x: Tensor,
    geometry: PoolGeometry,
    channels_last: bool,
) -> None:
    """Write grad_x; means as in batch_norm_relu_bwd."""
    tiling = Tiling(geometry, channels_last)
    (h, w), (oh, ow) = x.shape[-2:], grad_y.shape[-2:]
    ch, cw = cells(x, grad_y, tiling)
    partition = Partition(x, ch, cw, tiling.channels_last, TILE)
    launch(
        batch_norm_relu_max_pool2d_bwd_kernel, partition.programs,
        grad_y, offsets, x, *norm_pointers(norm), grad_x if means is None else means, grad_x, *partition.sizes,
        h, w, ch, cw, oh, ow,
        **norm_constants(norm), **partition.constants, **window_constants(x, grad_y, tiling),
        BATCH_STATS=means is not None, ALIGNED=cw == ow,
        STEPS=partition.steps,
    )  # fmt: skip
