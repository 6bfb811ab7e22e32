"""Transposed convolution forward: implicit GEMMs on the tensor cores, in NCHW and channels_last.

    y[n, k, oh, ow] = bias[k] + sum over c and taps (i, j) of x[n, c, h, w] * weight[c, k, i, j],
    for each tap for which h = (oh + PH - i) / SH and w = (ow + PW - j) / SW are integers inside the image.

Write t = oh + PH = SH * q + r. Phase r uses the taps i = r + SH * a, and tap a reads h = q - a. So each *cell* q of the
padded output holds SH phases, and each phase is a small stride-1 correlation over the input. No inserted zero is
multiplied, and each output element is written once. A phase without taps (SH > KH) is written as the bias or zero.
Phases with the same number of taps read the same pixels, so they are neighbouring columns of one GEMM. With dilation DH
(and SH 1) tap a reads h = q - a * DH. Each group of channels is a convolution of its own.

A channels_last weight is [C][KH][KW][K] in memory: the columns (rw, k) of a tap are contiguous, and the weight is read
in place. Any other operand that is not channels_last is copied once (read and written once). NCHW needs no copy in two
cases: if the kernel size equals the stride, all three tensors are read and written in place; if one pixel becomes one
window, weight and output are plain matrices in either layout.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import INTERPRETED, launch, vector_width
from . import conv_transpose_depthwise, conv_transpose_tma
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
from .options import ConvTransposeGeometry, Epilogue
from .problem import PLAIN_GEMM, ConvProblem, as_matrix, as_pixels, phase_rectangle


@triton.jit
def correlate(
    acc, x, w, m_m, o_x, h0, w0, o_w, m_n, H, W, C, K, taps_h, taps_w,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    GROUPS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + the sum over taps (a, b) and channels of x at (h0 - a * DH, w0 - b * DW) times weight.

    o_x, o_w: offsets of the group's first channel for a = b = 0. C, K: channels of the group. Taps and channels are one
    flat loop, so that the next loads are in flight during each dot.
    """
    r = tl.arange(0, BLOCK_R)
    a, b, c0 = 0, 0, 0
    for _ in range(taps_h * taps_w * tl.cdiv(C, BLOCK_R)):
        h, v = h0 - a * DH, w0 - b * DW
        m_inside = m_m & (h >= 0) & (h < H) & (v >= 0) & (v < W)
        m_r = r < C - c0
        o_pixels = o_x + (c0 - (a * DH * W + b * DW) * (C * GROUPS))
        pixels = tl.load(x + (o_pixels[:, None] + r[None, :]), mask=m_inside[:, None] & m_r[None, :], other=0.0)
        o_weights = o_w + (a * (SH * KW) + b * SW + c0 * (KH * KW)) * K
        weights = tl.load(
            w + (o_weights[None, :] + (r * (KH * KW) * K)[:, None]), mask=m_r[:, None] & m_n[None, :], other=0.0
        )
        acc = dot(pixels, weights, acc, PRECISION, UPCAST)
        c0 += BLOCK_R
        b = tl.where(c0 < C, b, b + 1)
        c0 = tl.where(c0 < C, c0, 0)
        a = tl.where(b < taps_w, a, a + 1)
        b = tl.where(b < taps_w, b, 0)
    return acc


@triton.jit
def conv_transpose2d_fwd_kernel(
    x, w, scale, bias, y, CELLS, TILES, QH, QW, H, W, OH, OW, C_RUNS, K_RUNS,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, GROUPS: tl.constexpr, ALONE: tl.constexpr, C_VEC: tl.constexpr,
    K_VEC: tl.constexpr, ROW_VEC: tl.constexpr, Y_VEC: tl.constexpr, SPREAD: tl.constexpr, SCALE: tl.constexpr,
    BIAS: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """channels_last: one program computes BLOCK_M cells x BLOCK_N columns (rh, rw, k) of phases with equal taps.

    There are up to four rectangles of such phases. Those with most taps come first in the grid, and all columns of a
    block of cells are consecutive programs. ALONE: a tile has one phase. Cells then begin at oh = 0, and each phase has
    its own first row and column of x. Otherwise cells begin where the padding begins, and some are cut by it. ROW_VEC,
    Y_VEC: columns that are contiguous in w and in y, across phases too. SPREAD columns share one channel of scale and
    bias. A block of x is read once for each BLOCK_N columns and tap, the first time from memory and then from the L2
    cache; y is written once.
    """
    # 1. Which cells
    C, K = C_RUNS * C_VEC, K_RUNS * K_VEC
    columns = K
    program = tl.program_id(0)
    if WIDE:
        C, K, program = tl.cast(C, tl.int64), tl.cast(K, tl.int64), program.to(tl.int64)
    tile = (program % TILES).to(tl.int32)
    group = program // TILES % GROUPS
    first = program // TILES // GROUPS * BLOCK_M
    m_m = first + tl.arange(0, BLOCK_M) < CELLS
    image, qh, qw = pixel_coordinates(first, QH, QW, BLOCK_M)

    # 2. Which phases and channels
    if ALONE:
        tiles_k = tl.cdiv(columns, BLOCK_N)
        first_tile, rh0, _, taps_h, rw0, phases_w, taps_w = phase_rectangle(tile, tiles_k, KH, KW, SH, SW, 1)
        phase, k = (tile - first_tile) // tiles_k, (tile - first_tile) % tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)
        rh, rw = rh0 + phase // phases_w, rw0 + phase % phases_w
        m_n = k < K
        qh, qw = qh + (PH - rh + SH - 1) // SH, qw + (PW - rw + SW - 1) // SW
    else:
        first_tile, rh0, phases_h, taps_h, rw0, phases_w, taps_w = phase_rectangle(
            tile, columns, KH, KW, SH, SW, BLOCK_N
        )
        rh, rw, k = pixel_coordinates((tile - first_tile) * BLOCK_N, phases_w, columns, BLOCK_N)
        m_n = rh < phases_h
        rh, rw = rh0 + rh, rw0 + rw
        qh, qw = qh + PH // SH, qw + PW // SW
    m_n = tl.max_constancy(m_n, ROW_VEC)
    o_w = (group * C * (KH * KW) + rh * KW + rw) * K + k
    o_w = tl.max_contiguous(tl.multiple_of(o_w, ROW_VEC), ROW_VEC)

    # 3. Sum over taps and input channels
    acc = correlate(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32), x, w, m_m,
        (((image * H + qh) * W + qw) * GROUPS + group) * C, qh, qw, o_w, m_n,
        H, W, C, K, taps_h, taps_w, KH, KW, SH, SW, DH, DW, GROUPS, PRECISION, UPCAST, BLOCK_R,
    )  # fmt: skip
    acc = apply_epilogue(acc, scale, bias, (group * K + k) // SPREAD, m_n, SCALE, BIAS, RELU)

    # 4. Store
    oh, ow = qh * SH - PH, qw * SW - PW
    o_corner = tl.multiple_of(((image * OH + oh) * OW + ow) * (K * GROUPS), Y_VEC)
    o_column = tl.max_contiguous(tl.multiple_of(((rh * OW + rw) * GROUPS + group) * K + k, Y_VEC), Y_VEC)
    if ALONE:
        m_inside = (m_m & (oh + rh < OH) & (ow + rw < OW))[:, None] & m_n[None, :]
    else:
        rows, columns = oh[:, None] + rh[None, :], ow[:, None] + rw[None, :]
        m_inside = (rows >= 0) & (rows < OH) & (columns >= 0) & (columns < OW) & m_m[:, None] & m_n[None, :]
        m_inside = tl.max_constancy(m_inside, (1, Y_VEC))
    tl.store(y + (o_corner[:, None] + o_column[None, :]), acc.to(y.dtype.element_ty), mask=m_inside)


@triton.jit
def conv_transpose2d_fwd_rows_kernel(
    x, w, scale, bias, y, CELLS, QH, ROW_RUNS, H, W, OH, OW_RUNS, C_RUNS, K_RUNS,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, GROUPS: tl.constexpr, C_VEC: tl.constexpr, K_VEC: tl.constexpr,
    ROW_VEC: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """NCHW with SW 1 or 2, from channels_last x and w: one program computes BLOCK_M cells of phase rh x BLOCK_N maps.

    One program computes both phases of a row and joins them in registers, so that whole rows of y are stored. Cells
    begin at oh = ow = 0, wherever the padding puts the phases. Writes y once.
    """
    # 1. Which cells, phase and channels
    C, K, OW, ROW = C_RUNS * C_VEC, K_RUNS * K_VEC, OW_RUNS * ROW_VEC, ROW_RUNS * ROW_VEC
    program = tl.program_id(0)
    if WIDE:
        C, K, program = tl.cast(C, tl.int64), tl.cast(K, tl.int64), program.to(tl.int64)
    tiles = tl.cdiv(K, BLOCK_N)
    rh = (program // tiles % SH).to(tl.int32)
    group = program // tiles // SH % GROUPS
    taps_h = (KH - rh + SH - 1) // SH
    k = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m_k = k < K
    first = program // tiles // SH // GROUPS * BLOCK_M
    m_m = first + tl.arange(0, BLOCK_M) < CELLS
    image, qh, q = pixel_coordinates(first, QH, ROW // SW, BLOCK_M)
    from_h = (PH - rh + SH - 1) // SH
    qh += from_h
    o_x = (((image * H + qh) * W + q) * GROUPS + group) * C
    o_w = group * C * (KH * KW)
    plane = group * K + k

    # 2. The phase of the even columns; with SW 1, of all columns
    shift: tl.constexpr = PW // SW
    phase: tl.constexpr = PW % SW
    acc = correlate(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32), x, w, m_m, o_x + shift * (C * GROUPS), qh, q + shift,
        (o_w + rh * KW + phase) * K + k, m_k, H, W, C, K, taps_h, (KW - phase + SW - 1) // SW,
        KH, KW, SH, SW, DH, DW, GROUPS, PRECISION, UPCAST, BLOCK_R,
    )  # fmt: skip
    acc = apply_epilogue(acc, scale, bias, plane, m_k, SCALE, BIAS, RELU)
    rows = acc.to(y.dtype.element_ty)

    # 3. The phase of the odd columns, joined with the even ones
    if SW == 2:
        next_shift: tl.constexpr = (PW + 1) // SW
        next_phase: tl.constexpr = (PW + 1) % SW
        acc = correlate(
            tl.zeros((BLOCK_M, BLOCK_N), tl.float32), x, w, m_m, o_x + next_shift * (C * GROUPS), qh, q + next_shift,
            (o_w + rh * KW + next_phase) * K + k, m_k, H, W, C, K, taps_h, (KW - next_phase + SW - 1) // SW,
            KH, KW, SH, SW, DH, DW, GROUPS, PRECISION, UPCAST, BLOCK_R,
        )  # fmt: skip
        acc = apply_epilogue(acc, scale, bias, plane, m_k, SCALE, BIAS, RELU)
        both = tl.join(rows, acc.to(y.dtype.element_ty))
        rows = tl.reshape(tl.permute(both, (0, 2, 1)), (BLOCK_M * SW, BLOCK_N))

    # 4. Store whole rows
    image, qh, ow = pixel_coordinates(first * SW, QH, ROW, BLOCK_M * SW)
    oh = (qh + from_h) * SH + rh - PH
    m_inside = (first * SW + tl.arange(0, BLOCK_M * SW) < CELLS * SW) & (oh < OH) & (ow < OW)
    m_inside = tl.max_constancy(m_inside, ROW_VEC)
    o_row = tl.max_contiguous(tl.multiple_of((image * (K * GROUPS) * OH + oh) * OW + ow, ROW_VEC), ROW_VEC)
    tl.store(y + (o_row[:, None] + (plane * OH * OW)[None, :]), rows, mask=m_inside[:, None] & m_k[None, :])


@triton.jit
def conv_transpose2d_fwd_shuffle_kernel(
    x, w, scale, bias, y, PIXELS, H, W_RUNS, C, COLUMN_RUNS,
    SH: tl.constexpr, SW: tl.constexpr, GROUPS: tl.constexpr, W_VEC: tl.constexpr, COLUMN_VEC: tl.constexpr,
    SCALE: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """NCHW, kernel size = stride, powers of two: one program computes BLOCK_M pixels x BLOCK_N columns (k, rh, rw).

    x is read along its pixels, w in place as the matrix (C, K * SH * SW), and the tile is shuffled in registers into
    rows of y. Reads x once for each BLOCK_N columns; writes y once; copies nothing.
    """
    # 1. Which pixels and columns
    W, COLUMNS = W_RUNS * W_VEC, COLUMN_RUNS * COLUMN_VEC
    program = tl.program_id(0)
    if WIDE:
        C, COLUMNS, program = tl.cast(C, tl.int64), tl.cast(COLUMNS, tl.int64), program.to(tl.int64)
    tiles = tl.cdiv(COLUMNS, BLOCK_N)
    column = program % tiles * BLOCK_N
    n = column + tl.arange(0, BLOCK_N)
    m_n = n < COLUMNS
    group = program // tiles % GROUPS
    first = program // tiles // GROUPS * BLOCK_M
    m_m = tl.max_constancy(first + tl.arange(0, BLOCK_M) < PIXELS, W_VEC)
    image, h, v = pixel_coordinates(first, H, W, BLOCK_M)
    o_x = tl.max_contiguous(tl.multiple_of(((image * GROUPS + group) * C * H + h) * W + v, W_VEC), W_VEC)

    # 2. Sum over the input channels
    r = tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for c0 in range(0, C, BLOCK_R):
        c = c0 + r
        o_pixels = o_x[:, None] + (c * (H * W))[None, :]
        pixels = tl.load(x + o_pixels, mask=m_m[:, None] & (c < C)[None, :], other=0.0)
        o_weights = ((group * C + c) * COLUMNS)[:, None] + n[None, :]
        weights = tl.load(w + o_weights, mask=(c < C)[:, None] & m_n[None, :], other=0.0)
        acc = dot(pixels, weights, acc, PRECISION, UPCAST)
    K = COLUMNS // (SH * SW)
    acc = apply_epilogue(acc, scale, bias, group * K + n // (SH * SW), m_n, SCALE, BIAS, RELU)

    # 3. Shuffle into rows of y, and store
    shuffled = tl.permute(tl.reshape(acc.to(y.dtype.element_ty), (BLOCK_M, BLOCK_N // SW, SW)), (0, 2, 1))
    rows = tl.reshape(shuffled, (BLOCK_M * SW, BLOCK_N // SW))
    m_rows = tl.max_constancy(first * SW + tl.arange(0, BLOCK_M * SW) < PIXELS * SW, W_VEC)
    image, h, ow = pixel_coordinates(first * SW, H, W * SW, BLOCK_M * SW)
    u = column // SW + tl.arange(0, BLOCK_N // SW)
    o_row = tl.max_contiguous(tl.multiple_of(((image * GROUPS + group) * K * H + h) * (SH * SW) * W + ow, W_VEC), W_VEC)
    o_u = (u // SH * H * SH + u % SH) * (SW * W)
    tl.store(y + (o_row[:, None] + o_u[None, :]), rows, mask=m_rows[:, None] & (u * SW < COLUMNS)[None, :])


def conv_transpose2d_fwd(
    x: Tensor, weight: Tensor, y: Tensor, geometry: ConvTransposeGeometry, epilogue: Epilogue, channels_last: bool
) -> None:
    """Write y (N, K, OH, OW) from x (N, C, H, W) and weight (C, K / groups, KH, KW).

    channels_last: the layout of y. x and weight are dense in either layout.
    """
    if y.numel() == 0:
        return
    problem = ConvProblem.of(weight, geometry, channels_last)
    if problem.is_depthwise(weight):
        return conv_transpose_depthwise.fwd(x, weight, y, problem, epilogue)
    if problem.is_plain_gemm(x, y) and not channels_last:  # channels_last reads the weight in place anyway
        columns_per_channel = weight[0, 0].numel()
        weight = to_layout(weight, torch.contiguous_format)
        x, weight, y = as_pixels(x), as_matrix(weight), as_pixels(y)
        problem = PLAIN_GEMM._replace(columns_per_channel=columns_per_channel)
    problem = problem.for_single_pixels(x, y)
    common: dict[str, Any] = {
        **epilogue.constants(), "PRECISION": input_precision(x), "UPCAST": INTERPRETED,
        "WIDE": needs_int64_offsets(x, weight, y),
    }  # fmt: skip
    if not problem.channels_last and problem.is_pixel_shuffle(x.shape[-2:], y.shape[-2:]):
        return _fwd_shuffle(x, to_layout(weight, torch.contiguous_format), y, problem, epilogue, common)
    x, weight = to_layout(x, torch.channels_last), to_layout(weight, torch.channels_last)
    if problem.channels_last:
        supported = conv_transpose_tma.supported(problem, x, y, weight)
        if not (supported and conv_transpose_tma.fwd(x, weight, y, problem, epilogue)):
            _fwd_cells(x, weight, y, problem, epilogue, common)
    elif problem.stride[1] <= 2:
        _fwd_rows(x, weight, y, problem, epilogue, common)
    else:
        scratch = torch.empty_like(y, memory_format=torch.channels_last)
        _fwd_cells(x, weight, scratch, problem, epilogue, common)
        transpose_into(scratch, y, to_channels_last=False)


def _fwd_cells(
    x: Tensor, weight: Tensor, y: Tensor, problem: ConvProblem, epilogue: Epilogue, common: dict[str, Any]
) -> None:
    (n, _, h, w), (oh, ow), (c, k) = x.shape, y.shape[-2:], problem.channels(weight)
    (sh, sw), pw, size = problem.stride, problem.padding[1], x.element_size()
    qh, qw = triton.cdiv(oh, sh), triton.cdiv(ow, sw)
    phases, more = problem.phase_counts(), problem.kernel_size[1] % sw
    c_vec, k_vec = vector_width(size, c), vector_width(size, k)
    row_vec = vector_width(size, sw * k, more * k)
    y_vec = vector_width(size, row_vec, pw * k, ow * k) if problem.groups == 1 else k_vec
    sizes = tile_sizes(n * qh * qw, max(phases) * k, c, x, vector=min(c_vec, y_vec))
    tiles_k = triton.cdiv(k, sizes["BLOCK_N"])
    alone = max(phases) == 1 or 8 * tiles_k * sizes["BLOCK_N"] <= 9 * k
    if alone:
        tiles, row_vec, y_vec = tiles_k * sh * sw, k_vec, k_vec
    else:
        qh, qw = problem.padded_cells(y.shape[-2:])
        tiles = sum(triton.cdiv(count * k, sizes["BLOCK_N"]) for count in phases)
    launch(
        conv_transpose2d_fwd_kernel, triton.cdiv(n * qh * qw, sizes["BLOCK_M"]) * problem.groups * tiles,
        x, weight, *epilogue.pointers(y), y, n * qh * qw, tiles, qh, qw, h, w, oh, ow, c // c_vec, k // k_vec,
        ALONE=alone, C_VEC=c_vec, K_VEC=k_vec, ROW_VEC=row_vec, Y_VEC=y_vec, SPREAD=problem.columns_per_channel,
        **problem.constants(), **common, **sizes,
    )  # fmt: skip


def _fwd_rows(
    x: Tensor, weight: Tensor, y: Tensor, problem: ConvProblem, epilogue: Epilogue, common: dict[str, Any]
) -> None:
    (n, _, h, w), (oh, ow), (c, k) = x.shape, y.shape[-2:], problem.channels(weight)
    sh, sw = problem.stride
    qh, qw = triton.cdiv(oh, sh), triton.cdiv(ow, sw)
    cells = n * qh * qw
    sizes = tile_sizes(cells, min(k, 128 // sw), c, x)
    if sw == 2:
        sizes["num_warps"] *= 2  # two accumulators
    c_vec, k_vec = vector_width(x.element_size(), c), vector_width(x.element_size(), k)
    row_vec = vector_width(x.element_size(), ow, sw * qw)
    launch(
        conv_transpose2d_fwd_rows_kernel, sh * problem.groups * tile_count(cells, k, sizes),
        x, weight, *epilogue.pointers(y), y, cells, qh, sw * qw // row_vec, h, w, oh, ow // row_vec, c // c_vec,
        k // k_vec, C_VEC=c_vec, K_VEC=k_vec, ROW_VEC=row_vec, **problem.constants(), **common, **sizes,
    )  # fmt: skip


def _fwd_shuffle(
    x: Tensor, weight: Tensor, y: Tensor, problem: ConvProblem, epilogue: Epilogue, common: dict[str, Any]
) -> None:
    (n, _, h, w), (c, k) = x.shape, problem.channels(weight)
    sh, sw = problem.stride
    columns = k * sh * sw
    sizes = tile_sizes(n * h * w, columns, c, x)
    w_vec, column_vec = vector_width(x.element_size(), w), vector_width(x.element_size(), columns)
    launch(
        conv_transpose2d_fwd_shuffle_kernel, problem.groups * tile_count(n * h * w, columns, sizes),
        x, weight, *epilogue.pointers(y), y, n * h * w, h, w // w_vec, c, columns // column_vec,
        SH=sh, SW=sw, GROUPS=problem.groups, W_VEC=w_vec, COLUMN_VEC=column_vec, **common, **sizes,
    )  # fmt: skip
