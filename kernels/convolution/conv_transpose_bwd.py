"""Transposed convolution backward: gradients of input, weight and bias, deterministic and without atomics.

    grad_x[n, c, h, w]       = sum over k, i, j of grad_y[n, k, h * SH - PH + i, w * SW - PW + j] * weight[c, k, i, j]
    grad_weight[c, k, i, j]  = sum over n, h, w of x[n, c, h, w] * grad_y[n, k, h * SH - PH + i, w * SW - PW + j]
    grad_bias[k]             = sum over n, oh, ow of grad_y[n, k, oh, ow]

In channels_last the window of grad_y that belongs to a pixel of x is KH runs of KW * K consecutive elements, and a row
(c) of the weight is KH * KW * K consecutive elements in the same order (i, j, k). So both GEMMs read whole runs for any
K, and one comparison along the run finds where the padding cuts a window. With groups, or with a dilation along the
row, a run is the K channels of one tap.

One pass over grad_y comes first where it is needed: it applies ReLU's mask, sums the bias's gradient, and writes grad_y
in channels_last for both GEMMs.

The sums over pixels use split-K: each program sums one split in float32, and the partials are added in order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import INTERPRETED, launch, vector_width
from . import conv_transpose_bwd_shuffle, conv_transpose_depthwise, conv_transpose_tma
from .gemm import (
    affordable_splits,
    dot,
    input_precision,
    needs_int64_offsets,
    pixel_coordinates,
    split_k,
    sum_partials,
    tile_count,
    tile_sizes,
    to_layout,
)
from .options import ConvTransposeGeometry, ConvTransposeGradients
from .problem import PLAIN_GEMM, ConvProblem, as_matrix, as_pixels

EPILOGUE_BLOCK = 4096  # elements of grad_y that a program of the epilogue's backward loads at a time


@triton.jit
def conv_transpose2d_bwd_input_kernel(
    grad_y, w, out, STEPS, PIXELS, H, W_RUNS, OH, OW, C_RUNS, K_RUNS,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, GROUPS: tl.constexpr, C_VEC: tl.constexpr, K_VEC: tl.constexpr,
    W_VEC: tl.constexpr, Y_VEC: tl.constexpr, CUT: tl.constexpr, SPLIT: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M pixels x BLOCK_N channels of grad_x, a strided convolution of grad_y.

    grad_y and w are channels_last. out: grad_x, channels_last or not. With SPLIT it is the partials (splits, N, H, W,
    C), each the sum of STEPS steps. CUT: some windows reach beyond the edge of grad_y. The runs of every window begin
    and end at multiples of Y_VEC elements. Reads grad_y and w once for each BLOCK_N channels; writes out once.
    """
    # 1. Which pixels, channels and split
    C, K, W = C_RUNS * C_VEC, K_RUNS * K_VEC, W_RUNS * W_VEC
    program = tl.program_id(0)
    if WIDE:
        C, K, program = tl.cast(C, tl.int64), tl.cast(K, tl.int64), program.to(tl.int64)
    tiles = tl.cdiv(C, BLOCK_N)
    group = program // tiles % GROUPS
    block, split = program // tiles // GROUPS, 0
    if SPLIT:
        block, split = block % tl.cdiv(PIXELS, BLOCK_M), block // tl.cdiv(PIXELS, BLOCK_M)
    first = block * BLOCK_M
    m = first + tl.arange(0, BLOCK_M)
    n = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = tl.max_constancy(m < PIXELS, W_VEC), n < C
    image, h, v = pixel_coordinates(first, H, W, BLOCK_M)

    # 2. Where its runs begin
    JOINED: tl.constexpr = KW if GROUPS == 1 and DW == 1 else 1  # taps of a run
    run, row = JOINED * K, OW * (K * GROUPS)
    oh, o_start = h * SH - PH, (v * SW - PW) * (K * GROUPS)
    o_window = (image * OH + oh) * row + group * K + o_start
    o_w = (group * C + n) * (KH * KW * K)
    r = tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    i, j, r0 = 0, 0, 0
    steps = KH * (KW // JOINED) * tl.cdiv(run, BLOCK_R)
    if SPLIT:
        step = split * STEPS
        tap, r0 = step // tl.cdiv(run, BLOCK_R), step % tl.cdiv(run, BLOCK_R) * BLOCK_R
        i, j = tap // (KW // JOINED), tap % (KW // JOINED) * JOINED
        steps = tl.minimum(STEPS, steps - step)

    # 3. Sum over taps and output channels
    for _ in range(steps):
        m_r = r < run - r0
        m_inside = m_m[:, None] & m_r[None, :]
        if CUT:
            o_along = (o_start + (j * DW * (K * GROUPS) + r0))[:, None] + r[None, :]
            m_inside = m_inside & ((oh + i * DH >= 0) & (oh + i * DH < OH))[:, None] & (o_along >= 0) & (o_along < row)
        o_grads = tl.multiple_of(o_window + (i * DH * row + j * DW * (K * GROUPS) + r0), Y_VEC)[:, None] + r[None, :]
        grads = tl.load(grad_y + o_grads, mask=tl.max_constancy(m_inside, (1, Y_VEC)), other=0.0)
        o_weights = (o_w + ((i * KW + j) * K + r0))[None, :] + r[:, None]
        weights = tl.load(w + o_weights, mask=m_r[:, None] & m_n[None, :], other=0.0)
        acc = dot(grads, weights, acc, PRECISION, UPCAST)
        r0 += BLOCK_R
        j = tl.where(r0 < run, j, j + JOINED)
        r0 = tl.where(r0 < run, r0, 0)
        i = tl.where(j < KW, i, i + 1)
        j = tl.where(j < KW, j, 0)

    # 4. Store
    if CHANNELS_LAST:
        o_out = (((split * PIXELS + m) * GROUPS + group) * C)[:, None] + n[None, :]
    else:
        o_pixel = tl.max_contiguous(tl.multiple_of(((image * GROUPS + group) * C * H + h) * W + v, W_VEC), W_VEC)
        o_out = o_pixel[:, None] + (n * (H * W))[None, :]
    tl.store(out + o_out, acc.to(out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit
def conv_transpose2d_bwd_weight_kernel(
    x, grad_y, partials, ALL_STEPS, STEPS, TILES_H, TILES_W, H, W_RUNS, OH, OW, C_RUNS, K_RUNS,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, GROUPS: tl.constexpr, C_VEC: tl.constexpr, K_VEC: tl.constexpr,
    W_VEC: tl.constexpr, Y_VEC: tl.constexpr, CUT: tl.constexpr, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One program sums BLOCK_M channels c x BLOCK_N columns (i, j, k) over STEPS blocks of BLOCK_R pixels of x.

    A block of pixels is BLOCK_R / BLOCK_W rows of one image, so that no division finds a pixel's coordinates. grad_y is
    channels_last; x is in the layout that CHANNELS_LAST says. Reads x once for each BLOCK_N columns and the windows of
    grad_y once for each BLOCK_M channels; writes partials (splits, C, KH, KW, K).
    """
    # 1. Which channels, columns and split
    C, K, W = C_RUNS * C_VEC, K_RUNS * K_VEC, W_RUNS * W_VEC
    program = tl.program_id(0)
    if WIDE:
        C, K, program = tl.cast(C, tl.int64), tl.cast(K, tl.int64), program.to(tl.int64)
    columns, pixel, row = KH * KW * K, K * GROUPS, OW * (K * GROUPS)
    tiles_m, tiles_n = tl.cdiv(C, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    group = program // (tiles_m * tiles_n) % GROUPS
    split = program // (tiles_m * tiles_n) // GROUPS
    tile = program % (tiles_m * tiles_n)
    c = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_c, m_n = c < C, n < columns
    tap, k = n // K, n % K
    i, j = tap // KW * DH, tap % KW * DW
    o_tap = i * row + (n % (KW * K) if GROUPS == 1 and DW == 1 else j * pixel + k)  # one run, if taps are joined
    o_tap = tl.max_contiguous(tl.multiple_of(o_tap, Y_VEC), Y_VEC)
    r = tl.arange(0, BLOCK_R)
    step = split * STEPS
    tile_w, tile_h = (step % TILES_W).to(tl.int32), (step // TILES_W % TILES_H).to(tl.int32)
    image = step // (TILES_W * TILES_H)

    # 2. Sum over the pixels
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(tl.minimum(STEPS, ALL_STEPS - step)):
        h, v = tile_h * (BLOCK_R // BLOCK_W) + r // BLOCK_W, tile_w * BLOCK_W + r % BLOCK_W
        m_r = (h < H) & (v < W)
        if CHANNELS_LAST:
            o_pixels = ((((image * H + h) * W + v) * GROUPS + group) * C)[:, None] + c[None, :]
        else:
            o_pixels = ((image * GROUPS + group) * C * (H * W) + h * W + v)[:, None] + (c * (H * W))[None, :]
        pixels = tl.load(x + o_pixels, mask=m_r[:, None] & m_c[None, :], other=0.0)
        oh, ow = h * SH - PH, v * SW - PW
        m_inside = m_r[:, None] & m_n[None, :]
        if CUT:
            y_h, y_w = oh[:, None] + i[None, :], ow[:, None] + j[None, :]
            m_inside = m_inside & (y_h >= 0) & (y_h < OH) & (y_w >= 0) & (y_w < OW)
        o_grads = tl.multiple_of((image * OH + oh) * row + ow * pixel + group * K, Y_VEC)[:, None] + o_tap[None, :]
        grads = tl.load(grad_y + o_grads, mask=tl.max_constancy(m_inside, (1, Y_VEC)), other=0.0)
        acc = dot(tl.trans(pixels), grads, acc, PRECISION, UPCAST)
        tile_w += 1
        tile_h = tl.where(tile_w < TILES_W, tile_h, tile_h + 1)
        tile_w = tl.where(tile_w < TILES_W, tile_w, 0)
        image = tl.where(tile_h < TILES_H, image, image + 1)
        tile_h = tl.where(tile_h < TILES_H, tile_h, 0)

    # 3. Store the partial
    o_partials = (((split * GROUPS + group) * C + c) * columns)[:, None] + n[None, :]
    tl.store(partials + o_partials, acc.to(partials.dtype.element_ty), mask=m_c[:, None] & m_n[None, :])


@triton.jit
def conv_transpose2d_bwd_epilogue_kernel(
    grad_y, y, masked, partials, PIXELS, ALL_STEPS, STEPS, PLANE_RUNS, K_RUNS, PLANE_VEC: tl.constexpr,
    K_VEC: tl.constexpr, RELU: tl.constexpr, WRITE: tl.constexpr, SUM: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program takes BLOCK_K maps of grad_y over STEPS blocks of BLOCK_P pixels. RELU: zero where y is not above 0.

    WRITE: the result goes to `masked`, which is channels_last. SUM: its sums over the pixels go to partials (splits,
    K). Reads and writes once.
    """
    # 1. Which maps and split
    PLANE, K = PLANE_RUNS * PLANE_VEC, K_RUNS * K_VEC
    program = tl.program_id(0)
    if WIDE:
        K, program = tl.cast(K, tl.int64), program.to(tl.int64)
    tiles = tl.cdiv(K, BLOCK_K)
    split = program // tiles
    k = program % tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    step = split * STEPS
    sums = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    for s in range(0, tl.minimum(STEPS, ALL_STEPS - step)):
        # 2. Load, and apply the mask
        p = (step + s) * BLOCK_P + tl.arange(0, BLOCK_P)
        if CHANNELS_LAST:
            o_grads = (p * K)[:, None] + k[None, :]
        else:
            o_grads = (p // PLANE * K * PLANE + p % PLANE)[:, None] + (k * PLANE)[None, :]
        m_live = (p < PIXELS)[:, None] & (k < K)[None, :]
        grads = tl.load(grad_y + o_grads, mask=m_live, other=0.0)
        if RELU:
            y_value = tl.load(y + o_grads, mask=m_live, other=0.0).to(tl.float32)
            grads = tl.where(y_value <= 0, 0.0, grads.to(tl.float32))

        # 3. Add to the sums, and store
        if SUM:
            sums += grads.to(tl.float32)
        if WRITE:
            tl.store(masked + ((p * K)[:, None] + k[None, :]), grads.to(masked.dtype.element_ty), mask=m_live)
    if SUM:
        tl.store(partials + split * K + k, tl.sum(sums, axis=0), mask=k < K)


def conv_transpose2d_bwd(
    grad_y: Tensor,
    y: Tensor | None,
    x: Tensor,
    weight: Tensor,
    gradients: ConvTransposeGradients,
    geometry: ConvTransposeGeometry,
    channels_last: bool,
) -> None:
    """Write the gradients that are not None.

    y: the forward's output if its ReLU masks grad_y, in the same layout as grad_y; else None. channels_last: the layout
    of the input's gradient. Every other tensor is dense in either layout.
    """
    grad_x, grad_weight, grad_bias = gradients
    problem = ConvProblem.of(weight, geometry, channels_last)
    gemms = grad_x is not None or grad_weight is not None
    plain_gemm = problem.is_plain_gemm(x, grad_y)
    both = grad_x is not None and grad_weight is not None
    if gemms and not plain_gemm and conv_transpose_bwd_shuffle.supported(x, grad_y, weight, problem, both):
        if grad_bias is not None and grad_weight is None:
            _bwd_epilogue(grad_y, y, grad_bias, write=False)
            gradients = gradients._replace(bias=None)
        return conv_transpose_bwd_shuffle.bwd(grad_y, y, x, weight, gradients, problem)
    if y is not None or grad_bias is not None:
        in_place = plain_gemm or grad_y.is_contiguous(memory_format=torch.channels_last)
        write = gemms and (y is not None or not in_place)
        grad_y = _bwd_epilogue(grad_y, y, grad_bias, write)
    if not gemms:
        return
    if plain_gemm:
        leader = weight if grad_weight is None else grad_weight
        last = leader.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        x, grad_y, weight = as_pixels(x), as_pixels(to_layout(grad_y, layout)), as_matrix(to_layout(weight, layout))
        grad_x = None if grad_x is None else as_pixels(grad_x)
        grad_weight, problem = None if grad_weight is None else as_matrix(grad_weight), PLAIN_GEMM
    grad_y = to_layout(grad_y, torch.channels_last)
    if problem.is_depthwise(weight):
        if grad_x is not None:
            conv_transpose_depthwise.bwd_input(grad_y, weight, grad_x, problem)
        if grad_weight is not None:
            conv_transpose_depthwise.bwd_weight(grad_y, x, grad_weight, problem)
        return
    sizes = zip(x.shape[-2:], problem.kernel_size, problem.stride, problem.padding, problem.dilation, strict=True)
    ends = [(size - 1) * s - p + d * (k - 1) + 1 for size, k, s, p, d in sizes]
    common: dict[str, Any] = {
        "CUT": any(problem.padding) or ends[0] > grad_y.shape[-2] or ends[1] > grad_y.shape[-1],
        "PRECISION": input_precision(x), "UPCAST": INTERPRETED, "WIDE": needs_int64_offsets(x, weight, grad_y),
        **problem.constants(),
    }  # fmt: skip
    if grad_x is not None:
        weight = to_layout(weight, torch.channels_last)
        supported = conv_transpose_tma.supported(problem, grad_x, grad_y, weight)
        if not (supported and conv_transpose_tma.bwd_input(grad_y, weight, grad_x, problem)):
            _bwd_input(grad_y, weight, grad_x, problem, common)
    if grad_weight is not None:
        supported = x.is_contiguous(memory_format=torch.channels_last)
        supported = supported and conv_transpose_tma.supported(problem, x, grad_y)
        if not (supported and conv_transpose_tma.bwd_weight(grad_y, x, grad_weight, problem)):
            _bwd_weight(grad_y, x, grad_weight, problem, common)


def _bwd_input(grad_y: Tensor, weight: Tensor, grad_x: Tensor, problem: ConvProblem, common: dict[str, Any]) -> None:
    (n, _, h, w), (oh, ow), (c, k) = grad_x.shape, grad_y.shape[-2:], problem.channels(weight)
    run = k * weight.shape[-1] if problem.groups == 1 and problem.dilation[1] == 1 else k
    c_vec, k_vec, w_vec = (vector_width(grad_x.element_size(), size) for size in (c, k, w))
    y_vec = _window_vector(grad_y, k, problem)
    sizes = tile_sizes(n * h * w, c, run, grad_x, vector=min(c_vec if problem.channels_last else w_vec, y_vec))
    steps = triton.cdiv(weight[0].numel(), run) * triton.cdiv(run, sizes["BLOCK_R"])
    tiles = problem.groups * tile_count(n * h * w, c, sizes)
    each, splits = split_k(steps, tiles, affordable_splits(grad_x, grad_y, weight))
    out = grad_x if splits == 1 else grad_x.new_empty(splits, grad_x.numel(), dtype=torch.float32)
    launch(
        conv_transpose2d_bwd_input_kernel, splits * tiles,
        grad_y, weight, out, each, n * h * w, h, w // w_vec, oh, ow, c // c_vec, k // k_vec, C_VEC=c_vec, K_VEC=k_vec,
        W_VEC=w_vec, Y_VEC=y_vec, SPLIT=splits > 1, CHANNELS_LAST=problem.channels_last or splits > 1, **common,
        **sizes,
    )  # fmt: skip
    if splits > 1:
        sum_partials(out, grad_x, grad_x.shape[1])


def _bwd_weight(grad_y: Tensor, x: Tensor, grad_weight: Tensor, problem: ConvProblem, common: dict[str, Any]) -> None:
    (n, _, h, w), (oh, ow), (c, k) = x.shape, grad_y.shape[-2:], problem.channels(grad_weight)
    c_vec, k_vec, w_vec = (vector_width(x.element_size(), size) for size in (c, k, w))
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    if not channels_last and w_vec * x.element_size() < 16:
        x, channels_last = to_layout(x, torch.channels_last), True
    columns = grad_weight[0].numel()
    y_vec = _window_vector(grad_y, k, problem)
    sizes = tile_sizes(c, columns, n * h * w, x, fill=False, vector=min(c_vec if channels_last else w_vec, y_vec))
    block_w = min(sizes["BLOCK_R"], triton.next_power_of_2(w))
    tiles_h, tiles_w = triton.cdiv(h, sizes["BLOCK_R"] // block_w), triton.cdiv(w, block_w)
    steps, tiles = n * tiles_h * tiles_w, problem.groups * tile_count(c, columns, sizes)
    each, splits = split_k(steps, tiles)
    in_place = splits == 1 and grad_weight.is_contiguous(memory_format=torch.channels_last)
    partials = grad_weight if in_place else x.new_empty(splits, grad_weight.numel(), dtype=torch.float32)
    launch(
        conv_transpose2d_bwd_weight_kernel, splits * tiles,
        x, grad_y, partials, steps, each, tiles_h, tiles_w, h, w // w_vec, oh, ow, c // c_vec, k // k_vec,
        C_VEC=c_vec, K_VEC=k_vec, W_VEC=w_vec, Y_VEC=y_vec, CHANNELS_LAST=channels_last, BLOCK_W=block_w, **common,
        **sizes,
    )  # fmt: skip
    if not in_place:
        sum_partials(partials, grad_weight, k)


def _window_vector(grad_y: Tensor, k: int, problem: ConvProblem) -> int:
    """The vector width at whose multiples the runs of every window of a channels_last grad_y begin and end."""
    joined = problem.groups == 1 and problem.dilation[1] == 1
    widths = (grad_y.shape[-1], problem.kernel_size[1], problem.stride[1], problem.padding[1])
    return vector_width(grad_y.element_size(), *(pixels * k for pixels in (widths if joined else (1,))))


def _bwd_epilogue(grad_y: Tensor, y: Tensor | None, grad_bias: Tensor | None, write: bool) -> Tensor:
    """grad_y with ReLU's mask in channels_last if `write`, else grad_y itself. Fills grad_bias."""
    n, k, oh, ow = grad_y.shape
    k_vec, plane_vec = (vector_width(grad_y.element_size(), size) for size in (k, oh * ow))
    channels_last = grad_y.is_contiguous(memory_format=torch.channels_last)
    most = 128 if channels_last else 64 if write else 4
    block_k = min(most, triton.next_power_of_2(k))
    block_p = min(EPILOGUE_BLOCK // block_k, max(16, triton.next_power_of_2(n * oh * ow)))
    steps, tiles = triton.cdiv(n * oh * ow, block_p), triton.cdiv(k, block_k)
    each, splits = split_k(steps, tiles)
    partials = grad_y.new_empty(splits, k, dtype=torch.float32) if grad_bias is not None else grad_y
    masked = torch.empty_like(grad_y, memory_format=torch.channels_last) if write else grad_y
    launch(
        conv_transpose2d_bwd_epilogue_kernel, splits * tiles,
        grad_y, grad_y if y is None else y, masked, partials, n * oh * ow, steps, each, oh * ow // plane_vec,
        k // k_vec, PLANE_VEC=plane_vec, K_VEC=k_vec, RELU=y is not None, WRITE=write, SUM=grad_bias is not None,
        CHANNELS_LAST=channels_last, WIDE=needs_int64_offsets(grad_y), BLOCK_P=block_p, BLOCK_K=block_k,
    )  # fmt: skip
    if grad_bias is not None:
        sum_partials(partials, grad_bias, k)
    return masked
