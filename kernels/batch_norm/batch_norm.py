"""Batch normalisation with the ReLU behind it, in NCHW and in channels_last.

Forward in training: one pass over x for the statistics, one that writes y. Backward: one pass over x and grad_y for
the two sums that the gradient needs, one that writes grad_x. The ReLU's mask is made again from x, so that nothing of
full size is kept but x. In 2-byte types that is 16 bytes an element in all.

The statistics are Welford's, of x minus the channel's first element, each lane for itself; lanes and programs are
merged by Chan's rule, in an order that depends on the shape alone.
"""

from __future__ import annotations

import ctypes

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .arguments import NormArguments, RunningStatistics
from .common import (
    MERGED_CHANNELS,
    MERGED_CHUNKS,
    Partition,
    affine,
    channels_of,
    flat_offset,
    masked,
    merge_sums,
    norm_constants,
    norm_pointers,
    normalised,
    program_of,
    statistics,
    store_sums,
    through_statistics,
)

TILE = 2048  # elements that a program has in its registers at a time
REDUCED_TILE = 4096  # where nothing of full size is written


@triton.jit
def batch_norm_stats_kernel(
    x, partials, M, C, RUNS, CHANNEL_TILES, CHUNKS, STEPS,
    CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program takes mean and squared deviations of its channels over STEPS tiles. Reads x once."""
    tile, chunk = program_of(CHANNEL_TILES, WIDE)
    c, live_c = channels_of(tile, C, LANES, CHANNELS_LAST)
    T: tl.constexpr = partials.dtype.element_ty
    pivot = tl.load(x + c.to(tl.int64) * (1 if CHANNELS_LAST else RUNS * VEC), mask=live_c, other=0.0).to(T)
    mean = tl.zeros((ROWS, LANES), T)
    squares = tl.zeros((ROWS, LANES), T)
    count = tl.zeros((ROWS,), T)
    for step in range(STEPS):
        o = (chunk * STEPS + step) * ROWS + tl.arange(0, ROWS)
        live = o < M
        count += live.to(T)
        offset = flat_offset(o, tile, c, C, RUNS, LANES, VEC, CHANNELS_LAST)
        value = tl.load(x + offset, mask=live[:, None] & live_c, other=0.0).to(T) - pivot
        share = tl.where(live, 1.0 / tl.maximum(count, 1.0), 0.0)[:, None]
        delta = value - mean
        mean += delta * share
        squares += tl.where(live[:, None], delta * (value - mean), 0.0)
    rows = count[:, None]
    if CHANNELS_LAST:
        centre = (tl.sum(rows * mean, axis=0) / tl.sum(count, axis=0))[None, :]
        deviations = tl.sum(squares + rows * (mean - centre) * (mean - centre), axis=0)[None, :]
    else:
        centre = tl.sum(rows * mean) / (tl.sum(count, axis=0) * LANES) + tl.zeros_like(pivot)
        deviations = tl.sum(squares + rows * (mean - centre) * (mean - centre)) + tl.zeros_like(pivot)
    tl.store(partials + chunk * C + c, centre, mask=live_c)
    tl.store(partials + (CHUNKS + chunk) * C + c, deviations, mask=live_c)


@triton.jit
def batch_norm_stats_merge_kernel(
    x, partials, input_bias, stats, running_mean, running_var, PIVOT_STRIDE, COUNT, CHUNK, CHUNKS, C, momentum,
    momentum_rest,
    INPUT_BIASED: tl.constexpr, TRACKED: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program merges the partial statistics of LANES channels and moves the running ones.

    stats: mean, shift and the biased variance. A program's chunk has CHUNK elements a channel, the last one what is
    left of COUNT.
    """
    c = tl.program_id(0) * LANES + tl.arange(0, LANES)
    live_c = c < C
    T: tl.constexpr = partials.dtype.element_ty
    total = tl.zeros((LANES,), T) + COUNT
    centre = tl.zeros((LANES,), T)
    for start in range(0, CHUNKS, ROWS):
        s = start + tl.arange(0, ROWS)
        there = (s < CHUNKS)[:, None] & live_c[None, :]
        size = tl.minimum(COUNT - s.to(tl.int64) * CHUNK, CHUNK).to(T)[:, None]
        mean = tl.load(partials + s[:, None] * C + c[None, :], mask=there, other=0.0)
        centre += tl.sum(size * mean, axis=0)
    centre /= total
    deviations = tl.zeros((LANES,), T)
    for start in range(0, CHUNKS, ROWS):
        s = start + tl.arange(0, ROWS)
        there = (s < CHUNKS)[:, None] & live_c[None, :]
        size = tl.minimum(COUNT - s.to(tl.int64) * CHUNK, CHUNK).to(T)[:, None]
        mean = tl.load(partials + s[:, None] * C + c[None, :], mask=there, other=0.0)
        squares = tl.load(partials + (CHUNKS + s)[:, None] * C + c[None, :], mask=there, other=0.0)
        apart = mean - centre[None, :]
        deviations += tl.sum(tl.where(there, squares + size * apart * apart, 0.0), axis=0)
    pivot = tl.load(x + c.to(tl.int64) * PIVOT_STRIDE, mask=live_c, other=0.0).to(T)
    whole = pivot + centre
    tl.store(stats + c, whole, mask=live_c)
    tl.store(stats + C + c, (whole - pivot) - centre, mask=live_c)
    tl.store(stats + 2 * C + c, deviations / total, mask=live_c)
    if TRACKED:
        if INPUT_BIASED:
            whole += tl.load(input_bias + c, mask=live_c, other=0.0).to(T)
        old_mean = tl.load(running_mean + c, mask=live_c, other=0.0).to(T)
        old_var = tl.load(running_var + c, mask=live_c, other=0.0).to(T)
        share = tl.zeros((LANES,), T) + momentum + momentum_rest  # an argument is rounded to float32
        new_mean = (1 - share) * old_mean + share * whole
        new_var = (1 - share) * old_var + share * (deviations / (total - 1))
        tl.store(running_mean + c, new_mean.to(running_mean.dtype.element_ty), mask=live_c)
        tl.store(running_var + c, new_var.to(running_var.dtype.element_ty), mask=live_c)


@triton.jit
def batch_norm_relu_fwd_kernel(
    x, mean, shift, var, weight, bias, y, M, C, RUNS, CHANNEL_TILES,
    EPS: tl.constexpr, SHIFTED: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """One program writes STEPS tiles of y. Reads x once."""
    tile, chunk = program_of(CHANNEL_TILES, WIDE)
    c, live_c = channels_of(tile, C, LANES, CHANNELS_LAST)
    centre, low, inverse = statistics(mean, shift, var, c, live_c, EPS, SHIFTED)
    scale, beta = affine(weight, bias, inverse, c, live_c, WEIGHTED, BIASED)
    for step in range(STEPS):
        o = (chunk * STEPS + step) * ROWS + tl.arange(0, ROWS)
        live = (o < M)[:, None] & live_c
        offset = flat_offset(o, tile, c, C, RUNS, LANES, VEC, CHANNELS_LAST)
        value = tl.load(x + offset, mask=live, other=0.0).to(inverse.dtype)
        y_value = normalised((value - centre) + low, scale, beta, RELU, y.dtype.element_ty)
        tl.store(y + offset, y_value.to(y.dtype.element_ty), mask=live)


@triton.jit
def batch_norm_relu_sums_kernel(
    grad_y, x, mean, shift, var, weight, bias, partials, M, C, RUNS, CHANNEL_TILES, CHUNKS, STEPS,
    EPS: tl.constexpr, SHIFTED: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program adds up grad and grad * centred of its channels over STEPS tiles. Reads x and grad_y once."""
    tile, chunk = program_of(CHANNEL_TILES, WIDE)
    c, live_c = channels_of(tile, C, LANES, CHANNELS_LAST)
    centre, low, inverse = statistics(mean, shift, var, c, live_c, EPS, SHIFTED)
    scale, beta = affine(weight, bias, inverse, c, live_c, WEIGHTED, BIASED)
    grads = tl.zeros((ROWS, LANES), inverse.dtype)
    products = tl.zeros((ROWS, LANES), inverse.dtype)
    for step in range(STEPS):
        o = (chunk * STEPS + step) * ROWS + tl.arange(0, ROWS)
        live = (o < M)[:, None] & live_c
        offset = flat_offset(o, tile, c, C, RUNS, LANES, VEC, CHANNELS_LAST)
        centred = (tl.load(x + offset, mask=live, other=0.0).to(inverse.dtype) - centre) + low
        grad = tl.load(grad_y + offset, mask=live, other=0.0).to(inverse.dtype)
        grad = masked(grad, centred, scale, beta, RELU, x.dtype.element_ty)
        grads += grad
        products += tl.where(live, grad * centred, 0.0)
    store_sums(partials, chunk, CHUNKS, c, live_c, C, grads, products, CHANNELS_LAST)


@triton.jit
def batch_norm_relu_bwd_kernel(
    grad_y, x, mean, shift, var, weight, bias, means, grad_x, M, C, RUNS, CHANNEL_TILES,
    EPS: tl.constexpr, BATCH_STATS: tl.constexpr, SHIFTED: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr,
    RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    STEPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program writes STEPS tiles of grad_x. Reads x and grad_y once. Without BATCH_STATS the mean is a constant."""
    tile, chunk = program_of(CHANNEL_TILES, WIDE)
    c, live_c = channels_of(tile, C, LANES, CHANNELS_LAST)
    centre, low, inverse = statistics(mean, shift, var, c, live_c, EPS, SHIFTED)
    scale, beta = affine(weight, bias, inverse, c, live_c, WEIGHTED, BIASED)
    through, slope = through_statistics(means, c, live_c, C, inverse, BATCH_STATS)
    for step in range(STEPS):
        o = (chunk * STEPS + step) * ROWS + tl.arange(0, ROWS)
        live = (o < M)[:, None] & live_c
        offset = flat_offset(o, tile, c, C, RUNS, LANES, VEC, CHANNELS_LAST)
        centred = (tl.load(x + offset, mask=live, other=0.0).to(inverse.dtype) - centre) + low
        grad = tl.load(grad_y + offset, mask=live, other=0.0).to(inverse.dtype)
        grad = masked(grad, centred, scale, beta, RELU, x.dtype.element_ty)
        grad = scale * (grad - through - centred * slope)
        tl.store(grad_x + offset, grad.to(grad_x.dtype.element_ty), mask=live)


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
    pixels = partition.tile_rows * partition.steps * partition.pixels_a_row
    running_mean, running_var, momentum = running or (stats, stats, 0.0)  # without running statistics never read
    rounded = ctypes.c_float(momentum).value
    launch(
        batch_norm_stats_merge_kernel, triton.cdiv(c, MERGED_CHANNELS),
        x, partials, stats if input_bias is None else input_bias, stats, running_mean, running_var,
        1 if channels_last else h * w, n * h * w, pixels, partition.chunks, c, rounded, momentum - rounded,
        INPUT_BIASED=input_bias is not None, TRACKED=running is not None, ROWS=MERGED_CHUNKS, LANES=MERGED_CHANNELS,
        num_warps=8,  # with four, Triton 3.6 spills registers on sm_80
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
    """Write sums (4, C): of grad and grad * x_hat over the pixels, where grad is behind the ReLU, and their means."""
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
