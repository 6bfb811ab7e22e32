"""Batch norm, ReLU and max-pooling in one pass over the map.

The ReLU's output is never stored: the kernels normalize the elements of a window as they read them. Besides x only the
uint8 offsets are saved. Windows do not overlap. With 2-byte dtypes and windows of 2x2 the forward moves 4.75 bytes per
element in training, and the backward 7.5.
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
    cells,
    channel_tile_and_chunk,
    channels_in,
    gather_from_windows,
    image_position,
    load_affine,
    load_gradient_means,
    load_statistics,
    merge_sums,
    norm_constants,
    norm_pointers,
    normalize,
    pixel_offset,
    relu_gradient,
    store_sums,
    window_constants,
)

TILE = 1024  # elements of a tile, which a program holds in registers: pooled elements or cells


@triton.jit
def batch_norm_relu_max_pool2d_fwd_kernel(
    x, mean, shift, var, weight, bias, y, offsets, M, C, RUNS, CHANNEL_TILES, H, W, OH, OW,
    EPS: tl.constexpr, SHIFTED: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, RELU: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    PARTIAL: tl.constexpr, WHOLE_ROWS: tl.constexpr, OFFSETS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program writes its chunk of the pooled map, STEPS tiles, for its channels. Reads x once.

    Values are rounded to the output's dtype before they are compared, as if the ReLU's output had been stored.
    """
    # 1. Which channels, and their vectors
    tile, chunk = channel_tile_and_chunk(CHANNEL_TILES, WIDE)
    c, m_c = channels_in(tile, C, LANES, CHANNELS_LAST)
    mean_c, shift_c, rstd = load_statistics(mean, shift, var, c, m_c, EPS, SHIFTED)
    scale, bias_c = load_affine(weight, bias, rstd, c, m_c, WEIGHTED, BIASED)
    T: tl.constexpr = rstd.dtype
    D: tl.constexpr = y.dtype.element_ty

    for step in range(STEPS):
        # 2. Which windows; if no value is above -inf, the first element inside the image is the maximum
        o = (chunk * STEPS + step) * ROWS + tl.arange(0, ROWS)
        m_live = (o < M)[:, None] & m_c
        image, oh, ow, run = image_position(o, OH, OW, RUNS, LANES, CHANNELS_LAST)
        h0, w0 = oh * SH - PH, ow * SW - PW
        best = tl.full((ROWS, LANES), float("-inf"), T)
        at = tl.maximum(-h0, 0) * KW + tl.maximum(-w0, 0) + tl.zeros((ROWS, LANES), tl.int32)

        # 3. Load the windows' elements, normalize them and keep the largest
        for i in tl.static_range(KH):
            h = h0 + i
            if WHOLE_ROWS:
                m_inside = m_live
                if PARTIAL:
                    m_inside = m_live & (h >= 0) & (h < H)
                o_x = run_offset(image * C + tile, h, run, H, RUNS, LANES)
                row = tl.load(x + o_x, mask=m_inside, other=0.0).to(T)
                left, right = tl.split(tl.reshape(row, (ROWS, LANES, 2)))
                left = normalize((left - mean_c) + shift_c, scale, bias_c, RELU, D)
                if PARTIAL:
                    left = tl.where(m_inside, left, float("-inf"))
                best, at = keep_larger(best, at, left, i * KW)
                if KW == 2:
                    right = normalize((right - mean_c) + shift_c, scale, bias_c, RELU, D)
                    if PARTIAL:
                        right = tl.where(m_inside, right, float("-inf"))
                    best, at = keep_larger(best, at, right, i * KW + 1)
            else:
                for j in tl.static_range(KW):
                    w = w0 + j
                    m_inside = m_live
                    if PARTIAL:
                        m_inside = m_live & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                    o_x = pixel_offset(image, h, w, run, tile, c, C, H, W, RUNS, VEC, CHANNELS_LAST, False)
                    value = tl.load(x + o_x, mask=m_inside, other=0.0).to(T)
                    value = normalize((value - mean_c) + shift_c, scale, bias_c, RELU, D)
                    if PARTIAL:
                        value = tl.where(m_inside, value, float("-inf"))
                    best, at = keep_larger(best, at, value, i * KW + j)

        # 4. Store
        o_y = pixel_offset(image, oh, ow, run, tile, c, C, OH, OW, RUNS, VEC, CHANNELS_LAST, True)
        tl.store(y + o_y, best.to(D), mask=m_live)
        if OFFSETS:
            tl.store(offsets + o_y, at.to(tl.uint8), mask=m_live)


@triton.jit
def batch_norm_relu_max_pool2d_sums_kernel(
    grad_y, offsets, x, mean, shift, var, weight, bias, partials, M, C, RUNS, CHANNEL_TILES, CHUNKS, STEPS,
    H, W, OH, OW,
    EPS: tl.constexpr, SHIFTED: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, RELU: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    WHOLE_ROWS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program sums grad and grad * centered of its channels over its chunk of the pooled map: STEPS tiles.

    grad is the gradient of the ReLU's input. Only the maxima have one, so the sums are taken over the windows. Reads
    grad_y, offsets and x once. Writes partials (2, CHUNKS, C).
    """
    # 1. Which channels, and their vectors
    tile, chunk = channel_tile_and_chunk(CHANNEL_TILES, WIDE)
    c, m_c = channels_in(tile, C, LANES, CHANNELS_LAST)
    mean_c, shift_c, rstd = load_statistics(mean, shift, var, c, m_c, EPS, SHIFTED)
    scale, bias_c = load_affine(weight, bias, rstd, c, m_c, WEIGHTED, BIASED)
    T: tl.constexpr = rstd.dtype
    sum_grad = tl.zeros((ROWS, LANES), T)
    sum_grad_x = tl.zeros((ROWS, LANES), T)

    for step in range(STEPS):
        # 2. Load the gradients and offsets of the windows, and the maxima
        o = (chunk * STEPS + step) * ROWS + tl.arange(0, ROWS)
        m_live = (o < M)[:, None] & m_c
        image, oh, ow, run = image_position(o, OH, OW, RUNS, LANES, CHANNELS_LAST)
        o_grad_y = pixel_offset(image, oh, ow, run, tile, c, C, OH, OW, RUNS, VEC, CHANNELS_LAST, True)
        grad = tl.load(grad_y + o_grad_y, mask=m_live, other=0.0).to(T)
        position = tl.load(offsets + o_grad_y, mask=m_live, other=0).to(tl.int32)
        value = gather_from_windows(
            x, position, m_live, image, oh * SH - PH, ow * SW - PW, run, tile, c, C, H, W, RUNS, T,
            KH, KW, WHOLE_ROWS, CHANNELS_LAST, VEC, LANES, ROWS,
        )  # fmt: skip

        # 3. Add up, lane by lane
        centered = (value - mean_c) + shift_c
        grad = relu_gradient(grad, centered, scale, bias_c, RELU, x.dtype.element_ty)
        sum_grad += grad
        sum_grad_x += tl.where(m_live, grad * centered, 0.0)

    # 4. Reduce the lanes and store
    store_sums(partials, chunk, CHUNKS, c, m_c, C, sum_grad, sum_grad_x, CHANNELS_LAST)


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
    """One program writes its chunk of grad_x, STEPS tiles of cells, for its channels. Reads every input once.

    A cell is a window and the gap after it. The cells tile the image, so every element of grad_x is written once.
    means (2, C): those of grad and grad * x_hat. Without BATCH_STATS the statistics are constants.
    """
    # 1. Which channels, and their vectors
    tile, chunk = channel_tile_and_chunk(CHANNEL_TILES, WIDE)
    c, m_c = channels_in(tile, C, LANES, CHANNELS_LAST)
    mean_c, shift_c, rstd = load_statistics(mean, shift, var, c, m_c, EPS, SHIFTED)
    scale, bias_c = load_affine(weight, bias, rstd, c, m_c, WEIGHTED, BIASED)
    mean_grad, slope = load_gradient_means(means, c, m_c, C, rstd, BATCH_STATS)
    T: tl.constexpr = rstd.dtype
    D: tl.constexpr = x.dtype.element_ty

    for step in range(STEPS):
        # 2. Which cells, and the gradient and offset of each one's window; -1 if the cell has no window
        o = (chunk * STEPS + step) * ROWS + tl.arange(0, ROWS)
        m_live = (o < M)[:, None] & m_c
        image, ch, cw, run = image_position(o, CH, CW, RUNS, LANES, CHANNELS_LAST)
        h0, w0 = ch * SH - PH, cw * SW - PW
        m_pooled = m_live & (ch < OH) & (cw < OW)
        o_grad_y = pixel_offset(image, ch, cw, run, tile, c, C, OH, OW, RUNS, VEC, CHANNELS_LAST, ALIGNED)
        grad = tl.load(grad_y + o_grad_y, mask=m_pooled, other=0.0).to(T)
        position = tl.load(offsets + o_grad_y, mask=m_pooled, other=255).to(tl.int32)
        position = tl.where(m_pooled, position, -1)

        # 3. Load each pixel of the cells, and store its gradient
        for i in tl.static_range(SH):
            h = h0 + i
            if WHOLE_ROWS:
                m_inside = m_live & (h >= 0) & (h < H)
                o_x = run_offset(image * C + tile, h, run, H, RUNS, LANES)
                row = tl.load(x + o_x, mask=m_inside, other=0.0).to(T)
                left, right = tl.split(tl.reshape(row, (ROWS, LANES, 2)))
                left, right = (left - mean_c) + shift_c, (right - mean_c) + shift_c
                hit = position == (i * KW if i < KH else -2)
                pixel_grad = tl.where(hit, relu_gradient(grad, left, scale, bias_c, RELU, D), 0.0)
                left = scale * (pixel_grad - mean_grad - left * slope)
                hit = position == (i * KW + 1 if (i < KH and KW == 2) else -2)
                pixel_grad = tl.where(hit, relu_gradient(grad, right, scale, bias_c, RELU, D), 0.0)
                right = scale * (pixel_grad - mean_grad - right * slope)
                row = tl.reshape(tl.join(left, right), (ROWS, 2 * LANES))
                tl.store(grad_x + o_x, row.to(grad_x.dtype.element_ty), mask=m_inside)
            else:
                for j in tl.static_range(SW):
                    w = w0 + j
                    m_inside = m_live & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                    o_x = pixel_offset(image, h, w, run, tile, c, C, H, W, RUNS, VEC, CHANNELS_LAST, False)
                    centered = (tl.load(x + o_x, mask=m_inside, other=0.0).to(T) - mean_c) + shift_c
                    hit = position == (i * KW + j if (i < KH and j < KW) else -2)
                    pixel_grad = tl.where(hit, relu_gradient(grad, centered, scale, bias_c, RELU, D), 0.0)
                    pixel_grad = scale * (pixel_grad - mean_grad - centered * slope)
                    tl.store(grad_x + o_x, pixel_grad.to(grad_x.dtype.element_ty), mask=m_inside)


def batch_norm_relu_max_pool2d_fwd(
    x: Tensor,
    norm: NormArguments,
    y: Tensor,
    offsets: Tensor | None,
    geometry: PoolGeometry,
    channels_last: bool,
) -> None:
    """Write y = max-pool(relu(batch norm of x)) and, unless `offsets` is None, the offsets of the maxima."""
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
    """Write sums (4, C) as batch_norm_relu_sums does, for the gradient of the pooling's input."""
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
    """Write grad_x. means as in batch_norm_relu_bwd."""
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
