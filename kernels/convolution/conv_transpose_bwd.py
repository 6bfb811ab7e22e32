"""Transposed convolution backward: gradients of input, weight and bias, deterministic and without atomics.

    grad_x[n, c, h, w]       = sum over k, i, j of grad_y[n, k, h * SH - PH + i, w * SW - PW + j] * weight[c, k, i, j]
    grad_weight[c, k, i, j]  = sum over n, h, w of x[n, c, h, w] * grad_y[n, k, h * SH - PH + i, w * SW - PW + j]
    grad_bias[k]             = sum over n, oh, ow of grad_y[n, k, oh, ow]

In channels_last the window of grad_y under a pixel of x is KH runs of KW * K neighbours in memory, and a row (c) of
the weight is KH * KW * K neighbours in the same order (i, j, k). So both products take whole runs, whatever K is, and
where the padding cuts a window is one comparison along the run. With groups, or dilation along the row, a run is the K
channels of one tap.

One pass over grad_y undoes the epilogue: it applies ReLU's mask, sums for the bias, and lays grad_y out in
channels_last for both products; where it has nothing of that to do it is left out.

The sums over pixels are split: each share is summed in float32 by one program, and the shares are added in order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import INTERPRETED, launch, vector_width
from . import conv_transpose_bwd_shuffle, conv_transpose_depthwise, conv_transpose_tma
from .gemm import affordable_shares, blocks, multiply, place, precision, programs, split, sum_shares, transposed, wide
from .geometry import MATRICES, Geometry, as_matrix, as_pixels

EPILOGUE_BLOCK = 4096  # elements of grad_y that a program of that pass takes at a time


@triton.jit
def conv_transpose2d_bwd_input_kernel(
    grad_y, w, out, SHARE, PIXELS, H, W_RUNS, OH, OW, C_RUNS, K_RUNS,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, GROUPS: tl.constexpr, C_VEC: tl.constexpr, K_VEC: tl.constexpr,
    W_VEC: tl.constexpr, Y_VEC: tl.constexpr, CUT: tl.constexpr, SPLIT: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program makes BLOCK_M pixels x BLOCK_N channels of grad_x, a strided convolution of grad_y.

    grad_y and w are channels_last. out: grad_x, channels_last or not; if SPLIT, partials (shares, N, H, W, C), each the
    sum over SHARE blocks of BLOCK_R. CUT: some windows pass the edge of grad_y. Their runs begin and end at whole Y_VEC
    elements. Reads them once for each BLOCK_N channels; writes out once.
    """
    C, K, W = C_RUNS * C_VEC, K_RUNS * K_VEC, W_RUNS * W_VEC
    program = tl.program_id(0)
    if WIDE:
        C, K, program = tl.cast(C, tl.int64), tl.cast(K, tl.int64), program.to(tl.int64)
    tiles = tl.cdiv(C, BLOCK_N)
    group = program // tiles % GROUPS
    block, share = program // tiles // GROUPS, 0
    if SPLIT:
        block, share = block % tl.cdiv(PIXELS, BLOCK_M), block // tl.cdiv(PIXELS, BLOCK_M)
    first = block * BLOCK_M
    m = first + tl.arange(0, BLOCK_M)
    n = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    live_m, live_n = tl.max_constancy(m < PIXELS, W_VEC), n < C
    image, h, v = place(first, H, W, BLOCK_M)
    JOINED: tl.constexpr = KW if GROUPS == 1 and DW == 1 else 1  # taps of a run
    run, row = JOINED * K, OW * (K * GROUPS)
    oh, start = h * SH - PH, (v * SW - PW) * (K * GROUPS)
    o_grad = (image * OH + oh) * row + group * K + start
    o_w = (group * C + n) * (KH * KW * K)
    r = tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    i, j, r0 = 0, 0, 0
    steps = KH * (KW // JOINED) * tl.cdiv(run, BLOCK_R)
    if SPLIT:
        step = share * SHARE
        tap, r0 = step // tl.cdiv(run, BLOCK_R), step % tl.cdiv(run, BLOCK_R) * BLOCK_R
        i, j = tap // (KW // JOINED), tap % (KW // JOINED) * JOINED
        steps = tl.minimum(SHARE, steps - step)
    for _ in range(steps):
        live_r = r < run - r0
        inside = live_m[:, None] & live_r[None, :]
        if CUT:
            along = (start + (j * DW * (K * GROUPS) + r0))[:, None] + r[None, :]
            inside = inside & ((oh + i * DH >= 0) & (oh + i * DH < OH))[:, None] & (along >= 0) & (along < row)
        source = tl.multiple_of(o_grad + (i * DH * row + j * DW * (K * GROUPS) + r0), Y_VEC)[:, None] + r[None, :]
        grads = tl.load(grad_y + source, mask=tl.max_constancy(inside, (1, Y_VEC)), other=0.0)
        source = (o_w + ((i * KW + j) * K + r0))[None, :] + r[:, None]
        weights = tl.load(w + source, mask=live_r[:, None] & live_n[None, :], other=0.0)
        acc = multiply(grads, weights, acc, PRECISION, UPCAST)
        r0 += BLOCK_R
        j = tl.where(r0 < run, j, j + JOINED)
        r0 = tl.where(r0 < run, r0, 0)
        i = tl.where(j < KW, i, i + 1)
        j = tl.where(j < KW, j, 0)
    if CHANNELS_LAST:
        to = (((share * PIXELS + m) * GROUPS + group) * C)[:, None] + n[None, :]
    else:
        pixel = tl.max_contiguous(tl.multiple_of(((image * GROUPS + group) * C * H + h) * W + v, W_VEC), W_VEC)
        to = pixel[:, None] + (n * (H * W))[None, :]
    tl.store(out + to, acc.to(out.dtype.element_ty), mask=live_m[:, None] & live_n[None, :])


@triton.jit
def conv_transpose2d_bwd_weight_kernel(
    x, grad_y, partials, STEPS, SHARE, TILES_H, TILES_W, H, W_RUNS, OH, OW, C_RUNS, K_RUNS,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, GROUPS: tl.constexpr, C_VEC: tl.constexpr, K_VEC: tl.constexpr,
    W_VEC: tl.constexpr, Y_VEC: tl.constexpr, CUT: tl.constexpr, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One program sums BLOCK_M channels c x BLOCK_N columns (i, j, k) over SHARE blocks of BLOCK_R pixels of x.

    A block of pixels is BLOCK_R / BLOCK_W rows of one image, so that no pixel's place needs a division. grad_y is
    channels_last, x is it or not. Reads x once for each BLOCK_N columns and the windows of grad_y once for each
    BLOCK_M channels; writes partials (shares, C, KH, KW, K).
    """
    C, K, W = C_RUNS * C_VEC, K_RUNS * K_VEC, W_RUNS * W_VEC
    program = tl.program_id(0)
    if WIDE:
        C, K, program = tl.cast(C, tl.int64), tl.cast(K, tl.int64), program.to(tl.int64)
    columns, pixel, row = KH * KW * K, K * GROUPS, OW * (K * GROUPS)
    tiles_m, tiles_n = tl.cdiv(C, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    group = program // (tiles_m * tiles_n) % GROUPS
    share = program // (tiles_m * tiles_n) // GROUPS
    tile = program % (tiles_m * tiles_n)
    c = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    live_c, live_n = c < C, n < columns
    tap, k = n // K, n % K
    i, j = tap // KW * DH, tap % KW * DW
    o_tap = i * row + (n % (KW * K) if GROUPS == 1 and DW == 1 else j * pixel + k)  # a run, where there is one
    o_tap = tl.max_contiguous(tl.multiple_of(o_tap, Y_VEC), Y_VEC)
    r = tl.arange(0, BLOCK_R)
    step = share * SHARE
    tile_w, tile_h = (step % TILES_W).to(tl.int32), (step // TILES_W % TILES_H).to(tl.int32)
    image = step // (TILES_W * TILES_H)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(tl.minimum(SHARE, STEPS - step)):
        h, v = tile_h * (BLOCK_R // BLOCK_W) + r // BLOCK_W, tile_w * BLOCK_W + r % BLOCK_W
        live_r = (h < H) & (v < W)
        if CHANNELS_LAST:
            source = ((((image * H + h) * W + v) * GROUPS + group) * C)[:, None] + c[None, :]
        else:
            source = ((image * GROUPS + group) * C * (H * W) + h * W + v)[:, None] + (c * (H * W))[None, :]
        pixels = tl.load(x + source, mask=live_r[:, None] & live_c[None, :], other=0.0)
        oh, ow = h * SH - PH, v * SW - PW
        inside = live_r[:, None] & live_n[None, :]
        if CUT:
            y_h, y_w = oh[:, None] + i[None, :], ow[:, None] + j[None, :]
            inside = inside & (y_h >= 0) & (y_h < OH) & (y_w >= 0) & (y_w < OW)
        source = tl.multiple_of((image * OH + oh) * row + ow * pixel + group * K, Y_VEC)[:, None] + o_tap[None, :]
        grads = tl.load(grad_y + source, mask=tl.max_constancy(inside, (1, Y_VEC)), other=0.0)
        acc = multiply(tl.trans(pixels), grads, acc, PRECISION, UPCAST)
        tile_w += 1
        tile_h = tl.where(tile_w < TILES_W, tile_h, tile_h + 1)
        tile_w = tl.where(tile_w < TILES_W, tile_w, 0)
        image = tl.where(tile_h < TILES_H, image, image + 1)
        tile_h = tl.where(tile_h < TILES_H, tile_h, 0)
    out = (((share * GROUPS + group) * C + c) * columns)[:, None] + n[None, :]
    tl.store(partials + out, acc.to(partials.dtype.element_ty), mask=live_c[:, None] & live_n[None, :])


@triton.jit
def conv_transpose2d_bwd_epilogue_kernel(
    grad_y, y, masked, partials, PIXELS, STEPS, SHARE, PLANE_RUNS, K_RUNS, PLANE_VEC: tl.constexpr, K_VEC: tl.constexpr,
    RELU: tl.constexpr, WRITE: tl.constexpr, SUM: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program takes BLOCK_K maps of grad_y over SHARE blocks of BLOCK_P pixels: 0 where RELU and y is not above 0.

    WRITE: to `masked`, which is channels_last; SUM: over its pixels to partials (shares, K). Reads and writes once.
    """
    PLANE, K = PLANE_RUNS * PLANE_VEC, K_RUNS * K_VEC
    program = tl.program_id(0)
    if WIDE:
        K, program = tl.cast(K, tl.int64), program.to(tl.int64)
    tiles = tl.cdiv(K, BLOCK_K)
    share = program // tiles
    k = program % tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    step = share * SHARE
    sums = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    for s in range(0, tl.minimum(SHARE, STEPS - step)):
        p = (step + s) * BLOCK_P + tl.arange(0, BLOCK_P)
        if CHANNELS_LAST:
            source = (p * K)[:, None] + k[None, :]
        else:
            source = (p // PLANE * K * PLANE + p % PLANE)[:, None] + (k * PLANE)[None, :]
        live = (p < PIXELS)[:, None] & (k < K)[None, :]
        grads = tl.load(grad_y + source, mask=live, other=0.0)
        if RELU:
            grads = tl.where(tl.load(y + source, mask=live, other=0.0).to(tl.float32) <= 0, 0.0, grads.to(tl.float32))
        if SUM:
            sums += grads.to(tl.float32)
        if WRITE:
            tl.store(masked + ((p * K)[:, None] + k[None, :]), grads.to(masked.dtype.element_ty), mask=live)
    if SUM:
        tl.store(partials + share * K + k, tl.sum(sums, axis=0), mask=k < K)


def conv_transpose2d_bwd(
    grad_y: Tensor, y: Tensor | None, x: Tensor, weight: Tensor, grad_x: Tensor | None, grad_weight: Tensor | None,
    grad_bias: Tensor | None, geometry: Geometry,
) -> None:  # fmt: skip
    """Write the gradients that are not None. y: the output where its ReLU masks grad_y, as which it lies.

    grad_x lies as the geometry says, every other tensor in NCHW or in channels_last.
    """
    products = grad_x is not None or grad_weight is not None
    matrices = geometry.multiplies_matrices(x, grad_y)
    both = grad_x is not None and grad_weight is not None
    if products and not matrices and conv_transpose_bwd_shuffle.applies(x, grad_y, weight, geometry, both):
        if grad_bias is not None and grad_weight is None:
            _bwd_epilogue(grad_y, y, grad_bias, write=False)
            grad_bias = None
        return conv_transpose_bwd_shuffle.bwd(grad_y, y, x, weight, grad_x, grad_weight, grad_bias, geometry)
    if y is not None or grad_bias is not None:
        as_it_lies = matrices or grad_y.is_contiguous(memory_format=torch.channels_last)
        write = products and (y is not None or not as_it_lies)
        grad_y = _bwd_epilogue(grad_y, y, grad_bias, write)
    if not products:
        return
    if matrices:
        leader = weight if grad_weight is None else grad_weight
        last = leader.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        x, grad_y, weight = as_pixels(x), as_pixels(transposed(grad_y, layout)), as_matrix(transposed(weight, layout))
        grad_x = None if grad_x is None else as_pixels(grad_x)
        grad_weight, geometry = None if grad_weight is None else as_matrix(grad_weight), MATRICES
    grad_y = transposed(grad_y, torch.channels_last)
    if geometry.depthwise(weight):
        if grad_x is not None:
            conv_transpose_depthwise.bwd_input(grad_y, weight, grad_x, geometry)
        if grad_weight is not None:
            conv_transpose_depthwise.bwd_weight(grad_y, x, grad_weight, geometry)
        return
    sizes = zip(x.shape[-2:], *geometry[:4], strict=True)
    ends = [(size - 1) * s - p + d * (k - 1) + 1 for size, k, s, p, d in sizes]
    common: dict[str, Any] = {
        "CUT": any(geometry.padding) or ends[0] > grad_y.shape[-2] or ends[1] > grad_y.shape[-1],
        "PRECISION": precision(x), "UPCAST": INTERPRETED, "WIDE": wide(x, weight, grad_y),
        **geometry.constants(),
    }  # fmt: skip
    if grad_x is not None:
        weight = transposed(weight, torch.channels_last)
        fetched = conv_transpose_tma.fetches(geometry, grad_x, grad_y, weight)
        if not (fetched and conv_transpose_tma.bwd_input(grad_y, weight, grad_x, geometry)):
            _bwd_input(grad_y, weight, grad_x, geometry, common)
    if grad_weight is not None:
        fetched = x.is_contiguous(memory_format=torch.channels_last) and conv_transpose_tma.fetches(geometry, x, grad_y)
        if not (fetched and conv_transpose_tma.bwd_weight(grad_y, x, grad_weight, geometry)):
            _bwd_weight(grad_y, x, grad_weight, geometry, common)


def _bwd_input(grad_y: Tensor, weight: Tensor, grad_x: Tensor, geometry: Geometry, common: dict[str, Any]) -> None:
    (n, _, h, w), (oh, ow), (c, k) = grad_x.shape, grad_y.shape[-2:], geometry.channels(weight)
    run = k * weight.shape[-1] if geometry.groups == 1 and geometry.dilation[1] == 1 else k
    c_vec, k_vec, w_vec = (vector_width(grad_x.element_size(), size) for size in (c, k, w))
    y_vec = _window_vector(grad_y, k, geometry)
    tiles = blocks(n * h * w, c, run, grad_x, vector=min(c_vec if geometry.channels_last else w_vec, y_vec))
    steps = triton.cdiv(weight[0].numel(), run) * triton.cdiv(run, tiles["BLOCK_R"])
    products = geometry.groups * programs(n * h * w, c, tiles)
    each, shares = split(steps, products, affordable_shares(grad_x, grad_y, weight))
    out = grad_x if shares == 1 else grad_x.new_empty(shares, grad_x.numel(), dtype=torch.float32)
    launch(
        conv_transpose2d_bwd_input_kernel, shares * products,
        grad_y, weight, out, each, n * h * w, h, w // w_vec, oh, ow, c // c_vec, k // k_vec, C_VEC=c_vec, K_VEC=k_vec,
        W_VEC=w_vec, Y_VEC=y_vec, SPLIT=shares > 1, CHANNELS_LAST=geometry.channels_last or shares > 1, **common,
        **tiles,
    )  # fmt: skip
    if shares > 1:
        sum_shares(out, grad_x, grad_x.shape[1])


def _bwd_weight(grad_y: Tensor, x: Tensor, grad_weight: Tensor, geometry: Geometry, common: dict[str, Any]) -> None:
    (n, _, h, w), (oh, ow), (c, k) = x.shape, grad_y.shape[-2:], geometry.channels(grad_weight)
    c_vec, k_vec, w_vec = (vector_width(x.element_size(), size) for size in (c, k, w))
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    if not channels_last and w_vec * x.element_size() < 16:
        x, channels_last = transposed(x, torch.channels_last), True
    columns = grad_weight[0].numel()
    y_vec = _window_vector(grad_y, k, geometry)
    tiles = blocks(c, columns, n * h * w, x, fill=False, vector=min(c_vec if channels_last else w_vec, y_vec))
    block_w = min(tiles["BLOCK_R"], triton.next_power_of_2(w))
    tiles_h, tiles_w = triton.cdiv(h, tiles["BLOCK_R"] // block_w), triton.cdiv(w, block_w)
    steps, products = n * tiles_h * tiles_w, geometry.groups * programs(c, columns, tiles)
    each, shares = split(steps, products)
    in_place = shares == 1 and grad_weight.is_contiguous(memory_format=torch.channels_last)
    partials = grad_weight if in_place else x.new_empty(shares, grad_weight.numel(), dtype=torch.float32)
    launch(
        conv_transpose2d_bwd_weight_kernel, shares * products,
        x, grad_y, partials, steps, each, tiles_h, tiles_w, h, w // w_vec, oh, ow, c // c_vec, k // k_vec,
        C_VEC=c_vec, K_VEC=k_vec, W_VEC=w_vec, Y_VEC=y_vec, CHANNELS_LAST=channels_last, BLOCK_W=block_w, **common,
        **tiles,
    )  # fmt: skip
    if not in_place:
        sum_shares(partials, grad_weight, k)


def _window_vector(grad_y: Tensor, k: int, geometry: Geometry) -> int:
    """Elements at whole multiples of which the runs of every window of a channels_last grad_y begin and end."""
    joined = geometry.groups == 1 and geometry.dilation[1] == 1
    pixels = [grad_y.shape[-1], *(pair[1] for pair in geometry[:3])] if joined else [1]
    return vector_width(grad_y.element_size(), *(count * k for count in pixels))


def _bwd_epilogue(grad_y: Tensor, y: Tensor | None, grad_bias: Tensor | None, write: bool) -> Tensor:
    """grad_y with ReLU's mask, in channels_last, if `write`; else grad_y as it is. Fills grad_bias."""
    n, k, oh, ow = grad_y.shape
    k_vec, plane_vec = (vector_width(grad_y.element_size(), size) for size in (k, oh * ow))
    channels_last = grad_y.is_contiguous(memory_format=torch.channels_last)
    most = 128 if channels_last else 64 if write else 4
    block_k = min(most, triton.next_power_of_2(k))
    block_p = min(EPILOGUE_BLOCK // block_k, max(16, triton.next_power_of_2(n * oh * ow)))
    steps, tiles = triton.cdiv(n * oh * ow, block_p), triton.cdiv(k, block_k)
    each, shares = split(steps, tiles)
    partials = grad_y.new_empty(shares, k, dtype=torch.float32) if grad_bias is not None else grad_y
    masked = torch.empty_like(grad_y, memory_format=torch.channels_last) if write else grad_y
    launch(
        conv_transpose2d_bwd_epilogue_kernel, shares * tiles,
        grad_y, grad_y if y is None else y, masked, partials, n * oh * ow, steps, each, oh * ow // plane_vec,
        k // k_vec, PLANE_VEC=plane_vec, K_VEC=k_vec, RELU=y is not None, WRITE=write, SUM=grad_bias is not None,
        CHANNELS_LAST=channels_last, WIDE=wide(grad_y), BLOCK_P=block_p, BLOCK_K=block_k,
    )  # fmt: skip
    if grad_bias is not None:
        sum_shares(partials, grad_bias, k)
    return masked
