"""Batch norm, ReLU and max-unpooling in one pass over the map.

The ReLU's output is never stored: an element is normalized as it is read, and written to its position. Windows do not
overlap. With 2-byte dtypes and windows of 2x2 the forward moves 13 bytes per pooled element in training.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch, registers
from ..pooling.geometry import PoolGeometry
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
def batch_norm_relu_max_unpool2d_fwd_kernel(
    x, offsets, mean, shift, var, weight, bias, y, M, C, RUNS, CHANNEL_TILES, H, W, CH, CW, OH, OW,
    EPS: tl.constexpr, SHIFTED: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, RELU: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    ALIGNED: tl.constexpr, WHOLE_ROWS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program writes its chunk of y, STEPS tiles of cells, for its channels. Reads x and offsets once.

    A cell is a window and the gap after it: the window's value at its offset, zero elsewhere. The cells tile the image,
    so every element of y is written once. An offset outside its window fails a device-side assertion.
    """
    # 1. Which channels, and their vectors
    tile, chunk = channel_tile_and_chunk(CHANNEL_TILES, WIDE)
    c, m_c = channels_in(tile, C, LANES, CHANNELS_LAST)
    mean_c, shift_c, rstd = load_statistics(mean, shift, var, c, m_c, EPS, SHIFTED)
    scale, bias_c = load_affine(weight, bias, rstd, c, m_c, WEIGHTED, BIASED)
    T: tl.constexpr = rstd.dtype
    D: tl.constexpr = y.dtype.element_ty

    for step in range(STEPS):
        # 2. Which cells, and the value and offset of each one's window; -1 if the cell has no window
        o = (chunk * STEPS + step) * ROWS + tl.arange(0, ROWS)
        m_live = (o < M)[:, None] & m_c
        image, ch, cw, run = image_position(o, CH, CW, RUNS, LANES, CHANNELS_LAST)
        h0, w0 = ch * SH - PH, cw * SW - PW
        m_pooled = m_live & (ch < OH) & (cw < OW)
        o_x = pixel_offset(image, ch, cw, run, tile, c, C, OH, OW, RUNS, VEC, CHANNELS_LAST, ALIGNED)
        value = tl.load(x + o_x, mask=m_pooled, other=0.0).to(T)
        value = normalize((value - mean_c) + shift_c, scale, bias_c, RELU, D)
        position = tl.load(offsets + o_x, mask=m_pooled, other=0).to(tl.int32)
        position = tl.where(m_pooled, position, -1)
        hits = tl.zeros((ROWS, LANES), tl.int32)

        # 3. Store each pixel of the cells
        for i in tl.static_range(SH):
            h = h0 + i
            if WHOLE_ROWS:
                m_inside = m_live & (h >= 0) & (h < H)
                first = m_inside & (position == (i * KW if i < KH else -2))
                second = m_inside & (position == (i * KW + 1 if (i < KH and KW == 2) else -2))
                hits += first.to(tl.int32) + second.to(tl.int32)
                row = tl.join(tl.where(first, value, 0.0), tl.where(second, value, 0.0))
                row = tl.reshape(row, (ROWS, 2 * LANES))
                tl.store(y + run_offset(image * C + tile, h, run, H, RUNS, LANES), row.to(D), mask=m_inside)
            else:
                for j in tl.static_range(SW):
                    w = w0 + j
                    m_inside = m_live & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                    hit = m_inside & (position == (i * KW + j if (i < KH and j < KW) else -2))
                    hits += hit.to(tl.int32)
                    o_y = pixel_offset(image, h, w, run, tile, c, C, H, W, RUNS, VEC, CHANNELS_LAST, False)
                    tl.store(y + o_y, tl.where(hit, value, 0.0).to(D), mask=m_inside)

        # 4. Report offsets outside their windows
        m_outside = m_pooled & (hits == 0)
        tl.device_assert(m_outside == 0, "batch_norm_relu_max_unpool2d: found an offset outside its window")


@triton.jit
def batch_norm_relu_max_unpool2d_sums_kernel(
    grad_y, offsets, x, mean, shift, var, weight, bias, grad_relu_input, partials, M, C, RUNS, CHANNEL_TILES,
    CHUNKS, STEPS, H, W, OH, OW,
    EPS: tl.constexpr, SHIFTED: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, RELU: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    WHOLE_ROWS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program writes its chunk of grad_relu_input, STEPS tiles, for its channels.

    It is grad_y, gathered at the offsets, where the ReLU lets it pass. The program also sums it and its product with
    centered, and writes partials (2, CHUNKS, C). Reads grad_y, offsets and x once.
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
        # 2. Load x and gather grad_y at the offsets
        o = (chunk * STEPS + step) * ROWS + tl.arange(0, ROWS)
        m_live = (o < M)[:, None] & m_c
        image, oh, ow, run = image_position(o, OH, OW, RUNS, LANES, CHANNELS_LAST)
        o_x = pixel_offset(image, oh, ow, run, tile, c, C, OH, OW, RUNS, VEC, CHANNELS_LAST, True)
        centered = (tl.load(x + o_x, mask=m_live, other=0.0).to(T) - mean_c) + shift_c
        position = tl.load(offsets + o_x, mask=m_live, other=0).to(tl.int32)
        grad = gather_from_windows(
            grad_y, position, m_live, image, oh * SH - PH, ow * SW - PW, run, tile, c, C, H, W, RUNS, T,
            KH, KW, WHOLE_ROWS, CHANNELS_LAST, VEC, LANES, ROWS,
        )  # fmt: skip

        # 3. Store the gradient, and add it up, lane by lane
        grad = relu_gradient(grad, centered, scale, bias_c, RELU, x.dtype.element_ty)
        tl.store(grad_relu_input + o_x, grad.to(grad_relu_input.dtype.element_ty), mask=m_live)
        sum_grad += grad
        sum_grad_x += tl.where(m_live, grad * centered, 0.0)

    # 4. Reduce the lanes and store the sums
    store_sums(partials, chunk, CHUNKS, c, m_c, C, sum_grad, sum_grad_x, CHANNELS_LAST)


def batch_norm_relu_max_unpool2d_fwd(
    x: Tensor,
    offsets: Tensor,
    norm: NormArguments,
    y: Tensor,
    geometry: PoolGeometry,
    channels_last: bool,
) -> None:
    """Write every element of y (N, C, H, W) = max-unpool(relu(batch norm of x))."""
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
    grad_relu_input: Tensor,
    sums: Tensor,
    geometry: PoolGeometry,
    channels_last: bool,
) -> None:
    """Write grad_relu_input, of x's shape, and its sums (4, C) as batch_norm_relu_sums does.

    batch_norm_relu_bwd computes the gradient of x from it: applying the ReLU's mask again changes nothing.
    """
    tiling = Tiling(geometry, channels_last)
    (h, w), (oh, ow) = grad_y.shape[-2:], x.shape[-2:]
    partition = Partition(grad_y, oh, ow, tiling.channels_last, TILE, reducing=True)
    partials = torch.empty((2, partition.chunks, x.shape[1]), dtype=sums.dtype, device=x.device)
    limit = registers(x, {(3, 8, 90): 96} if channels_last else {(3, 9, 90): 72})
    launch(
        batch_norm_relu_max_unpool2d_sums_kernel, partition.programs,
        grad_y, offsets, x, *norm_pointers(norm), grad_relu_input, partials, *partition.sizes, partition.chunks,
        partition.steps, h, w, oh, ow,
        **norm_constants(norm), **partition.constants, **window_constants(grad_y, x, tiling), **limit,
    )  # fmt: skip
    merge_sums(partials, norm, sums, x)
