"""Batch normalization and ReLU, in NCHW and in channels_last.

Forward in training: one pass over x for the statistics, and one that writes y. Backward: one pass over x and grad_y for
the two sums over the pixels that the gradient needs, and one that writes grad_x. The ReLU's mask is recomputed from x,
so no tensor of full size is saved except x. With 2-byte dtypes both directions together move 16 bytes per element.

The statistics follow Welford's algorithm, applied to x minus the channel's first element, in each lane separately. The
lanes and programs are merged by Chan's rule, in an order that depends on the shape alone.
"""

from __future__ import annotations

import ctypes

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch, registers
from .arguments import NormArguments, RunningStatistics
from .common import (
    MERGED_CHANNELS,
    MERGED_CHUNKS,
    Partition,
    channel_tile_and_chunk,
    channels_in,
    flat_offset,
    load_affine,
    load_gradient_means,
    load_statistics,
    merge_sums,
    norm_constants,
    norm_pointers,
    normalize,
    relu_gradient,
    store_sums,
)

TILE = 2048  # elements of a tile, which a program holds in registers
REDUCED_TILE = 4096  # the same for kernels that write no map


@triton.jit
def batch_norm_stats_kernel(
    x, partials, M, C, RUNS, CHANNEL_TILES, CHUNKS, STEPS,
    CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program computes the mean and the sum of squared deviations of its channels over its chunk: STEPS tiles.

    Reads x once. Writes partials (2, CHUNKS, C), relative to the pivot, which is the channel's first element.
    """
    # 1. Which channels, and their pivots
    tile, chunk = channel_tile_and_chunk(CHANNEL_TILES, WIDE)
    c, m_c = channels_in(tile, C, LANES, CHANNELS_LAST)
    T: tl.constexpr = partials.dtype.element_ty
    pivot = tl.load(x + c.to(tl.int64) * (1 if CHANNELS_LAST else RUNS * VEC), mask=m_c, other=0.0).to(T)

    # 2. Update the statistics of each lane with one element of each tile
    mean = tl.zeros((ROWS, LANES), T)
    squares = tl.zeros((ROWS, LANES), T)
    count = tl.zeros((ROWS,), T)
    for step in range(STEPS):
        o = (chunk * STEPS + step) * ROWS + tl.arange(0, ROWS)
        m_live = o < M
        count += m_live.to(T)
        o_x = flat_offset(o, tile, c, C, RUNS, LANES, VEC, CHANNELS_LAST)
        value = tl.load(x + o_x, mask=m_live[:, None] & m_c, other=0.0).to(T) - pivot
        weight = tl.where(m_live, 1.0 / tl.maximum(count, 1.0), 0.0)[:, None]
        delta = value - mean
        mean += delta * weight
        squares += tl.where(m_live[:, None], delta * (value - mean), 0.0)

    # 3. Merge the lanes of a channel
    counts = count[:, None]
    if CHANNELS_LAST:
        merged = (tl.sum(counts * mean, axis=0) / tl.sum(count, axis=0))[None, :]
        deviations = tl.sum(squares + counts * (mean - merged) * (mean - merged), axis=0)[None, :]
    else:
        merged = tl.sum(counts * mean) / (tl.sum(count, axis=0) * LANES) + tl.zeros_like(pivot)
        deviations = tl.sum(squares + counts * (mean - merged) * (mean - merged)) + tl.zeros_like(pivot)

    # 4. Store
    tl.store(partials + chunk * C + c, merged, mask=m_c)
    tl.store(partials + (CHUNKS + chunk) * C + c, deviations, mask=m_c)


@triton.jit
def batch_norm_stats_merge_kernel(
    x, partials, input_bias, stats, running_mean, running_var, PIVOT_STRIDE, COUNT, CHUNK, CHUNKS, C, momentum,
    momentum_rest,
    INPUT_BIASED: tl.constexpr, TRACKED: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program merges the partial statistics of LANES channels, ROWS chunks at a time.

    Writes stats (3, C): mean, shift and biased variance. TRACKED: updates the running statistics. Each chunk has CHUNK
    of a channel's COUNT elements, and the last one has the rest.
    """
    # 1. Which channels
    c = tl.program_id(0) * LANES + tl.arange(0, LANES)
    m_c = c < C
    T: tl.constexpr = partials.dtype.element_ty

    # 2. The mean, relative to the pivot
    total = tl.zeros((LANES,), T) + COUNT
    center = tl.zeros((LANES,), T)
    for start in range(0, CHUNKS, ROWS):
        chunk = start + tl.arange(0, ROWS)
        m_live = (chunk < CHUNKS)[:, None] & m_c[None, :]
        size = tl.minimum(COUNT - chunk.to(tl.int64) * CHUNK, CHUNK).to(T)[:, None]
        mean = tl.load(partials + chunk[:, None] * C + c[None, :], mask=m_live, other=0.0)
        center += tl.sum(size * mean, axis=0)
    center /= total

    # 3. The squared deviations from it
    deviations = tl.zeros((LANES,), T)
    for start in range(0, CHUNKS, ROWS):
        chunk = start + tl.arange(0, ROWS)
        m_live = (chunk < CHUNKS)[:, None] & m_c[None, :]
        size = tl.minimum(COUNT - chunk.to(tl.int64) * CHUNK, CHUNK).to(T)[:, None]
        mean = tl.load(partials + chunk[:, None] * C + c[None, :], mask=m_live, other=0.0)
        squares = tl.load(partials + (CHUNKS + chunk)[:, None] * C + c[None, :], mask=m_live, other=0.0)
        delta = mean - center[None, :]
        deviations += tl.sum(tl.where(m_live, squares + size * delta * delta, 0.0), axis=0)

    # 4. Store; shift is the rounding error of the mean
    pivot = tl.load(x + c.to(tl.int64) * PIVOT_STRIDE, mask=m_c, other=0.0).to(T)
    batch_mean = pivot + center
    tl.store(stats + c, batch_mean, mask=m_c)
    tl.store(stats + C + c, (batch_mean - pivot) - center, mask=m_c)
    tl.store(stats + 2 * C + c, deviations / total, mask=m_c)

    # 5. Update the running statistics
    if TRACKED:
        if INPUT_BIASED:
            batch_mean += tl.load(input_bias + c, mask=m_c, other=0.0).to(T)
        old_mean = tl.load(running_mean + c, mask=m_c, other=0.0).to(T)
        old_var = tl.load(running_var + c, mask=m_c, other=0.0).to(T)
        weight = tl.zeros((LANES,), T) + momentum + momentum_rest  # two terms: an argument is rounded to float32
        new_mean = (1 - weight) * old_mean + weight * batch_mean
        new_var = (1 - weight) * old_var + weight * (deviations / (total - 1))
        tl.store(running_mean + c, new_mean.to(running_mean.dtype.element_ty), mask=m_c)
        tl.store(running_var + c, new_var.to(running_var.dtype.element_ty), mask=m_c)


@triton.jit
def batch_norm_relu_fwd_kernel(
    x, mean, shift, var, weight, bias, y, M, C, RUNS, CHANNEL_TILES,
    EPS: tl.constexpr, SHIFTED: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """One program writes its chunk of y, STEPS tiles, for its channels. Reads x once."""
    # 1. Which channels, and their vectors
    tile, chunk = channel_tile_and_chunk(CHANNEL_TILES, WIDE)
    c, m_c = channels_in(tile, C, LANES, CHANNELS_LAST)
    mean_c, shift_c, rstd = load_statistics(mean, shift, var, c, m_c, EPS, SHIFTED)
    scale, bias_c = load_affine(weight, bias, rstd, c, m_c, WEIGHTED, BIASED)

    # 2. Load, normalize and store each tile
    for step in range(STEPS):
        o = (chunk * STEPS + step) * ROWS + tl.arange(0, ROWS)
        m_live = (o < M)[:, None] & m_c
        o_x = flat_offset(o, tile, c, C, RUNS, LANES, VEC, CHANNELS_LAST)
        value = tl.load(x + o_x, mask=m_live, other=0.0).to(rstd.dtype)
        y_value = normalize((value - mean_c) + shift_c, scale, bias_c, RELU, y.dtype.element_ty)
        tl.store(y + o_x, y_value.to(y.dtype.element_ty), mask=m_live)


@triton.jit
def batch_norm_relu_sums_kernel(
    grad_y, x, mean, shift, var, weight, bias, partials, M, C, RUNS, CHANNEL_TILES, CHUNKS, STEPS,
    EPS: tl.constexpr, SHIFTED: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program sums grad and grad * centered of its channels over its chunk: STEPS tiles.

    grad is the gradient of the ReLU's input. Reads x and grad_y once. Writes partials (2, CHUNKS, C).
    """
    # 1. Which channels, and their vectors
    tile, chunk = channel_tile_and_chunk(CHANNEL_TILES, WIDE)
    c, m_c = channels_in(tile, C, LANES, CHANNELS_LAST)
    mean_c, shift_c, rstd = load_statistics(mean, shift, var, c, m_c, EPS, SHIFTED)
    scale, bias_c = load_affine(weight, bias, rstd, c, m_c, WEIGHTED, BIASED)

    # 2. Load each tile and add it up, lane by lane
    sum_grad = tl.zeros((ROWS, LANES), rstd.dtype)
    sum_grad_x = tl.zeros((ROWS, LANES), rstd.dtype)
    for step in range(STEPS):
        o = (chunk * STEPS + step) * ROWS + tl.arange(0, ROWS)
        m_live = (o < M)[:, None] & m_c
        o_x = flat_offset(o, tile, c, C, RUNS, LANES, VEC, CHANNELS_LAST)
        centered = (tl.load(x + o_x, mask=m_live, other=0.0).to(rstd.dtype) - mean_c) + shift_c
        grad = tl.load(grad_y + o_x, mask=m_live, other=0.0).to(rstd.dtype)
        grad = relu_gradient(grad, centered, scale, bias_c, RELU, x.dtype.element_ty)
        sum_grad += grad
        sum_grad_x += tl.where(m_live, grad * centered, 0.0)

    # 3. Reduce the lanes and store
    store_sums(partials, chunk, CHUNKS, c, m_c, C, sum_grad, sum_grad_x, CHANNELS_LAST)


@triton.jit
def batch_norm_relu_bwd_kernel(
    grad_y, x, mean, shift, var, weight, bias, means, grad_x, M, C, RUNS, CHANNEL_TILES,
    EPS: tl.constexpr, BATCH_STATS: tl.constexpr, SHIFTED: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr,
    RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    STEPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program writes its chunk of grad_x, STEPS tiles, for its channels. Reads x and grad_y once.

    means (2, C): those of grad and grad * x_hat. Without BATCH_STATS the statistics are constants.
    """
    # 1. Which channels, and their vectors
    tile, chunk = channel_tile_and_chunk(CHANNEL_TILES, WIDE)
    c, m_c = channels_in(tile, C, LANES, CHANNELS_LAST)
    mean_c, shift_c, rstd = load_statistics(mean, shift, var, c, m_c, EPS, SHIFTED)
    scale, bias_c = load_affine(weight, bias, rstd, c, m_c, WEIGHTED, BIASED)
    mean_grad, slope = load_gradient_means(means, c, m_c, C, rstd, BATCH_STATS)

    # 2. Load each tile, and store its gradient
    for step in range(STEPS):
        o = (chunk * STEPS + step) * ROWS + tl.arange(0, ROWS)
        m_live = (o < M)[:, None] & m_c
        o_x = flat_offset(o, tile, c, C, RUNS, LANES, VEC, CHANNELS_LAST)
        centered = (tl.load(x + o_x, mask=m_live, other=0.0).to(rstd.dtype) - mean_c) + shift_c
        grad = tl.load(grad_y + o_x, mask=m_live, other=0.0).to(rstd.dtype)
        grad = relu_gradient(grad, centered, scale, bias_c, RELU, x.dtype.element_ty)
        grad = scale * (grad - mean_grad - centered * slope)
        tl.store(grad_x + o_x, grad.to(grad_x.dtype.element_ty), mask=m_live)


def batch_norm_stats(
    x: Tensor, input_bias: Tensor | None, running: RunningStatistics | None, stats: Tensor, channels_last: bool
) -> None:
    """Write stats (3, C): mean, shift and biased variance of x. Update the running statistics.

    input_bias: the bias of the preceding convolution, if it has not been added to x; the running mean includes it.
    """
    n, c, h, w = x.shape
    partition = Partition.flat(x, channels_last, REDUCED_TILE, reducing=True)
    partials = torch.empty((2, partition.chunks, c), dtype=stats.dtype, device=x.device)
    launch(
        batch_norm_stats_kernel, partition.programs,
        x, partials, *partition.sizes, partition.chunks, partition.steps, **partition.constants, num_warps=8,
    )  # fmt: skip
    pixels = partition.tile_rows * partition.steps * partition.pixels_per_row
    running_mean, running_var, momentum = running or (stats, stats, 0.0)  # without running statistics never read
    rounded = ctypes.c_float(momentum).value
    launch(
        batch_norm_stats_merge_kernel, triton.cdiv(c, MERGED_CHANNELS),
        x, partials, stats if input_bias is None else input_bias, stats, running_mean, running_var,
        1 if channels_last else h * w, n * h * w, pixels, partition.chunks, c, rounded, momentum - rounded,
        INPUT_BIASED=input_bias is not None, TRACKED=running is not None, ROWS=MERGED_CHUNKS, LANES=MERGED_CHANNELS,
        num_warps=8,  # with four, Triton 3.6 spills registers on sm_80
        **registers(x, {(3, 9, 100): 64}),
    )  # fmt: skip


def batch_norm_relu_fwd(x: Tensor, norm: NormArguments, y: Tensor, channels_last: bool) -> None:
    """Write y = relu(batch norm of x)."""
    partition = Partition.flat(x, channels_last, TILE)
    launch(
        batch_norm_relu_fwd_kernel, partition.programs,
        x, *norm_pointers(norm), y, *partition.sizes,
        **norm_constants(norm), **partition.constants, STEPS=partition.steps,
    )  # fmt: skip


def batch_norm_relu_sums(grad_y: Tensor, x: Tensor, norm: NormArguments, sums: Tensor, channels_last: bool) -> None:
    """Write sums (4, C): the sums of grad and grad * x_hat over the pixels, and their means.

    grad is the gradient of the ReLU's input.
    """
    partition = Partition.flat(x, channels_last, REDUCED_TILE, reducing=True)
    partials = torch.empty((2, partition.chunks, x.shape[1]), dtype=sums.dtype, device=x.device)
    launch(
        batch_norm_relu_sums_kernel, partition.programs,
        grad_y, x, *norm_pointers(norm), partials, *partition.sizes, partition.chunks, partition.steps,
        **norm_constants(norm), **partition.constants, num_warps=8,
    )  # fmt: skip
    merge_sums(partials, norm, sums, x)


def batch_norm_relu_bwd(
    grad_y: Tensor, x: Tensor, norm: NormArguments, means: Tensor | None, grad_x: Tensor, channels_last: bool
) -> None:
    """Write grad_x; means (2, C): of grad and grad * x_hat, or None where the statistics are constants."""
    partition = Partition.flat(x, channels_last, TILE)
    launch(
        batch_norm_relu_bwd_kernel, partition.programs,
        grad_y, x, *norm_pointers(norm), grad_x if means is None else means, grad_x, *partition.sizes,
        BATCH_STATS=means is not None, **norm_constants(norm), **partition.constants, STEPS=partition.steps,
    )  # fmt: skip
