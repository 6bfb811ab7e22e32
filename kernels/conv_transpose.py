"""Transposed convolution forward: implicit matrix products on the tensor cores, in NCHW and in channels_last.

    y[n, k, oh, ow] = bias[k] + sum over c and taps (i, j) of x[n, c, h, w] * weight[c, k, i, j],
    for each tap where h = (oh + PH - i) / SH and w = (ow + PW - j) / SW are whole and inside the image.

With t = oh + PH = SH * q + r, the phase r takes the taps i = r + SH * a, and tap a reads h = q - a. So a *cell* q of
the padded output holds SH phases, and each phase is a small stride-1 correlation over the input: nothing is
multiplied by inserted zeros, and each output element is written once, without taps (SH > KH) as the bias or zero.
Of a kernel KH = A * SH + B the first B phases have A + 1 taps and the others A: phases with equal taps read the same
pixels, so they stand side by side as columns of one product.

A channels_last weight is [C][KH][KW][K] in memory: for a tap the columns (rw, k) are contiguous, and it is read as it
lies. Every other operand that is not channels_last is copied once (read and written once), except where kernel =
stride in NCHW, which reads and writes all three tensors in place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED, launch, vector_width
from .products import blocks, multiply, place, precision, programs, quotient, transpose_into, transposed, wide


@triton.jit
def correlate(
    acc, x, w, live_m, o_x, h0, w0, o_w, live_n, H, W, C, K, taps_h, taps_w,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + sum over taps (a, b) and channels of x at (h0 - a, w0 - b), at offset o_x for a = b = 0, times weight o_w.

    One flat loop, so that the loads of the next taps are in flight during the product of this one.
    """
    r = tl.arange(0, BLOCK_R)
    a, b, c0 = 0, 0, 0
    for _ in range(taps_h * taps_w * tl.cdiv(C, BLOCK_R)):
        h, v = h0 - a, w0 - b
        inside = live_m & (h >= 0) & (h < H) & (v >= 0) & (v < W)
        live_r = r < C - c0
        source = o_x + (c0 - (a * W + b) * C)
        pixels = tl.load(x + (source[:, None] + r[None, :]), mask=inside[:, None] & live_r[None, :], other=0.0)
        source = o_w + (a * (SH * KW) + b * SW + c0 * (KH * KW)) * K
        weights = tl.load(
            w + (source[None, :] + (r * (KH * KW) * K)[:, None]), mask=live_r[:, None] & live_n[None, :], other=0.0
        )
        acc = multiply(pixels, weights, acc, PRECISION, UPCAST)
        c0 += BLOCK_R
        b = tl.where(c0 < C, b, b + 1)
        c0 = tl.where(c0 < C, c0, 0)
        a = tl.where(b < taps_w, a, a + 1)
        b = tl.where(b < taps_w, b, 0)
    return acc


@triton.jit
def conv_transpose2d_fwd_kernel(
    x, w, bias, y, CELLS, QH, QW, H, W, OH, OW, C_RUNS, K_RUNS,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    C_VEC: tl.constexpr, K_VEC: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """channels_last: one program makes BLOCK_M cells x BLOCK_K channels of BLOCK_N / BLOCK_K phases with equal taps.

    Up to four such rectangles of phases stand one behind the other in the grid, those with the most taps first, and
    all columns of a block of cells are neighbours. Reads a block of x once for each BLOCK_N columns and tap, from the
    L2 but for the first; writes y once.
    """
    C, K = C_RUNS * C_VEC, K_RUNS * K_VEC
    program = tl.program_id(0)
    if WIDE:
        C, K, program = tl.cast(C, tl.int64), tl.cast(K, tl.int64), program.to(tl.int64)
    more_h: tl.constexpr = KH % SH
    more_w: tl.constexpr = KW % SW
    share: tl.constexpr = BLOCK_N // BLOCK_K
    tiles_k = tl.cast(tl.cdiv(K, BLOCK_K), tl.int32)
    tiles_00 = (more_h * more_w + share - 1) // share * tiles_k
    tiles_01 = (more_h * (SW - more_w) + share - 1) // share * tiles_k
    tiles_10 = ((SH - more_h) * more_w + share - 1) // share * tiles_k
    tiles_11 = ((SH - more_h) * (SW - more_w) + share - 1) // share * tiles_k
    tiles = tiles_00 + tiles_01 + tiles_10 + tiles_11
    tile = (program % tiles).to(tl.int32)
    # The rectangle of phases [rh0, SH or more_h) x [rw0, ...), and its taps.
    few_h = tile >= tiles_00 + tiles_01
    tile = tl.where(few_h, tile - tiles_00 - tiles_01, tile)
    before = tl.where(few_h, tiles_10, tiles_00)
    few_w = tile >= before
    tile = tl.where(few_w, tile - before, tile)
    rh0, taps_h = tl.where(few_h, more_h, 0), tl.where(few_h, KH // SH, KH // SH + 1)
    rw0, taps_w = tl.where(few_w, more_w, 0), tl.where(few_w, KW // SW, KW // SW + 1)
    phases_h, phases_w = tl.where(few_h, SH - more_h, more_h), tl.where(few_w, SW - more_w, more_w)

    phase = tile // tiles_k * share
    n = tl.arange(0, BLOCK_N)
    k = tile % tiles_k * BLOCK_K + n % BLOCK_K
    if share > 1:
        phase += n // BLOCK_K
        rh = quotient(phase, phases_w)
    else:
        rh = phase // phases_w
    rw, rh = rw0 + phase - rh * phases_w, rh0 + rh
    live_n = tl.max_constancy((k < K) & (rh < rh0 + phases_h), K_VEC)
    first = program // tiles * BLOCK_M
    live_m = first + tl.arange(0, BLOCK_M) < CELLS
    image, qh, qw = place(first, QH, QW, BLOCK_M)
    qh, qw = qh + PH // SH, qw + PW // SW
    o_w = tl.max_contiguous(tl.multiple_of((rh * KW + rw) * K + k, K_VEC), K_VEC)
    acc = correlate(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32), x, w, live_m, ((image * H + qh) * W + qw) * C, qh, qw, o_w, live_n,
        H, W, C, K, taps_h, taps_w, KH, KW, SH, SW, PRECISION, UPCAST, BLOCK_R,
    )  # fmt: skip
    if BIAS:
        acc += tl.load(bias + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    oh, ow = qh * SH - PH, qw * SW - PW
    corner = ((image * OH + oh) * OW + ow) * K
    column = tl.max_contiguous(tl.multiple_of((rh * OW + rw) * K + k, K_VEC), K_VEC)
    rows, columns = oh[:, None], ow[:, None]
    if share > 1:
        rows, columns = rows + rh[None, :], columns + rw[None, :]
    else:
        rows, columns = rows + rh, columns + rw
    inside = (rows >= 0) & (rows < OH) & (columns >= 0) & (columns < OW) & live_m[:, None] & live_n[None, :]
    inside = tl.max_constancy(inside, (1, K_VEC))
    tl.store(y + (corner[:, None] + column[None, :]), acc.to(y.dtype.element_ty), mask=inside)


@triton.jit
def conv_transpose2d_fwd_rows_kernel(
    x, w, bias, y, CELLS, QH, ROW_RUNS, H, W, OH, OW_RUNS, C_RUNS, K_RUNS,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    C_VEC: tl.constexpr, K_VEC: tl.constexpr, ROW_VEC: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """NCHW with SW 1 or 2, from channels_last x and w: one program makes BLOCK_M cells of a phase rh x BLOCK_N maps.

    Both phases of a row are made by one program and joined in registers, so that y's rows are stored whole. To that
    end cells start at ow = 0, wherever the padding puts the phases. Writes y once.
    """
    C, K, OW, ROW = C_RUNS * C_VEC, K_RUNS * K_VEC, OW_RUNS * ROW_VEC, ROW_RUNS * ROW_VEC
    program = tl.program_id(0)
    if WIDE:
        C, K, program = tl.cast(C, tl.int64), tl.cast(K, tl.int64), program.to(tl.int64)
    tiles = tl.cdiv(K, BLOCK_N)
    rh = (program // tiles % SH).to(tl.int32)
    taps_h = (KH - rh + SH - 1) // SH
    k = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    live_k = k < K
    first = program // tiles // SH * BLOCK_M
    live_m = first + tl.arange(0, BLOCK_M) < CELLS
    image, qh, q = place(first, QH, ROW // SW, BLOCK_M)
    qh = qh + PH // SH
    o_x = ((image * H + qh) * W + q) * C

    shift: tl.constexpr = PW // SW
    phase: tl.constexpr = PW % SW
    acc = correlate(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32), x, w, live_m, o_x + shift * C, qh, q + shift,
        (rh * KW + phase) * K + k, live_k, H, W, C, K, taps_h, (KW - phase + SW - 1) // SW,
        KH, KW, SH, SW, PRECISION, UPCAST, BLOCK_R,
    )  # fmt: skip
    if BIAS:
        acc += tl.load(bias + k, mask=live_k, other=0.0).to(tl.float32)[None, :]
    rows = acc.to(y.dtype.element_ty)
    if SW == 2:
        next_shift: tl.constexpr = (PW + 1) // SW
        next_phase: tl.constexpr = (PW + 1) % SW
        acc = correlate(
            tl.zeros((BLOCK_M, BLOCK_N), tl.float32), x, w, live_m, o_x + next_shift * C, qh, q + next_shift,
            (rh * KW + next_phase) * K + k, live_k, H, W, C, K, taps_h, (KW - next_phase + SW - 1) // SW,
            KH, KW, SH, SW, PRECISION, UPCAST, BLOCK_R,
        )  # fmt: skip
        if BIAS:
            acc += tl.load(bias + k, mask=live_k, other=0.0).to(tl.float32)[None, :]
        both = tl.join(rows, acc.to(y.dtype.element_ty))
        rows = tl.reshape(tl.permute(both, (0, 2, 1)), (BLOCK_M * SW, BLOCK_N))
    image, qh, ow = place(first * SW, QH, ROW, BLOCK_M * SW)
    oh = (qh + PH // SH) * SH + rh - PH
    inside = (first * SW + tl.arange(0, BLOCK_M * SW) < CELLS * SW) & (oh >= 0) & (oh < OH) & (ow < OW)
    inside = tl.max_constancy(inside, ROW_VEC)
    out = tl.max_contiguous(tl.multiple_of((image * K * OH + oh) * OW + ow, ROW_VEC), ROW_VEC)
    tl.store(y + (out[:, None] + (k * OH * OW)[None, :]), rows, mask=inside[:, None] & live_k[None, :])


@triton.jit
def conv_transpose2d_fwd_shuffle_kernel(
    x, w, bias, y, PIXELS, H, W_RUNS, C, COLUMN_RUNS,
    SH: tl.constexpr, SW: tl.constexpr, W_VEC: tl.constexpr, COLUMN_VEC: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """NCHW with kernel = stride, a power of two: one program makes BLOCK_M pixels x BLOCK_N columns (k, rh, rw).

    x is read along its pixels, w as the matrix (C, K * SH * SW) that it is, and the product is shuffled in registers
    to rows of y. Reads x once for each BLOCK_N columns; writes y once; copies nothing.
    """
    W, COLUMNS = W_RUNS * W_VEC, COLUMN_RUNS * COLUMN_VEC
    program = tl.program_id(0)
    if WIDE:
        C, COLUMNS, program = tl.cast(C, tl.int64), tl.cast(COLUMNS, tl.int64), program.to(tl.int64)
    tiles = tl.cdiv(COLUMNS, BLOCK_N)
    column = program % tiles * BLOCK_N
    n = column + tl.arange(0, BLOCK_N)
    live_n = n < COLUMNS
    first = program // tiles * BLOCK_M
    live_m = tl.max_constancy(first + tl.arange(0, BLOCK_M) < PIXELS, W_VEC)
    image, h, v = place(first, H, W, BLOCK_M)
    o_x = tl.max_contiguous(tl.multiple_of((image * C * H + h) * W + v, W_VEC), W_VEC)
    r = tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for c0 in range(0, C, BLOCK_R):
        c = c0 + r
        source = o_x[:, None] + (c * (H * W))[None, :]
        pixels = tl.load(x + source, mask=live_m[:, None] & (c < C)[None, :], other=0.0)
        source = (c * COLUMNS)[:, None] + n[None, :]
        weights = tl.load(w + source, mask=(c < C)[:, None] & live_n[None, :], other=0.0)
        acc = multiply(pixels, weights, acc, PRECISION, UPCAST)
    if BIAS:
        acc += tl.load(bias + n // (SH * SW), mask=live_n, other=0.0).to(tl.float32)[None, :]
    shuffled = tl.permute(tl.reshape(acc.to(y.dtype.element_ty), (BLOCK_M, BLOCK_N // SW, SW)), (0, 2, 1))
    rows = tl.reshape(shuffled, (BLOCK_M * SW, BLOCK_N // SW))
    live_z = tl.max_constancy(first * SW + tl.arange(0, BLOCK_M * SW) < PIXELS * SW, W_VEC)
    image, h, ow = place(first * SW, H, W * SW, BLOCK_M * SW)
    u = column // SW + tl.arange(0, BLOCK_N // SW)
    K = COLUMNS // (SH * SW)
    out = tl.max_contiguous(tl.multiple_of((image * K * H + h) * (SH * SW) * W + ow, W_VEC), W_VEC)
    rows_of_u = (u // SH * H * SH + u % SH) * (SW * W)
    tl.store(y + (out[:, None] + rows_of_u[None, :]), rows, mask=live_z[:, None] & (u * SW < COLUMNS)[None, :])


class Geometry(NamedTuple):
    """(height, width) each of kernel, stride and padding, and the layout of the images."""

    kernel: list[int]
    stride: list[int]
    padding: list[int]
    channels_last: bool

    def tightened(self, image: Tensor, output: Tensor) -> Geometry:
        """The same convolution, where the image is one pixel high or wide: one cell, and no tap past the image."""
        stride = [
            s if image.shape[i] > 1 else max(k, output.shape[i] + p)
            for i, k, s, p in zip((-2, -1), self.kernel, self.stride, self.padding, strict=True)
        ]
        return self._replace(stride=stride)

    def cells(self, output: Tensor) -> list[int]:
        """Height and width of the map of cells that cover the output."""
        sizes = zip(output.shape[-2:], self.stride, self.padding, strict=True)
        return [triton.cdiv(size + p, s) - p // s for size, s, p in sizes]

    def shuffles(self, x: Tensor, y: Tensor) -> bool:
        """Whether each pixel of x makes a rectangle of its own in y, with sides that are powers of two."""
        whole = list(y.shape[-2:]) == [size * s for size, s in zip(x.shape[-2:], self.stride, strict=True)]
        powers_of_two = not any(s & (s - 1) for s in self.stride)
        return whole and powers_of_two and self.kernel == self.stride and not any(self.padding)

    def constants(self) -> dict[str, int]:
        (kh, kw), (sh, sw), (ph, pw) = self.kernel, self.stride, self.padding
        return {"KH": kh, "KW": kw, "SH": sh, "SW": sw, "PH": ph, "PW": pw}


def channel_block(k: int, most: int) -> int:
    """The largest block that pads k channels by an eighth at most; else that which pads them least."""
    if k <= 16:
        return triton.next_power_of_2(k)
    choices = [block for block in (128, 64, 32, 16) if block <= most]
    padded = {block: triton.cdiv(k, block) * block for block in choices}
    return next((block for block in choices if 8 * padded[block] <= 9 * k), min(choices, key=padded.__getitem__))


def conv_transpose2d_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, geometry: Geometry) -> None:
    """Write y (N, K, OH, OW) from x (N, C, H, W) and weight (C, K, KH, KW)."""
    if y.numel() == 0:
        return
    geometry = geometry.tightened(x, y)
    common: dict[str, Any] = {
        "BIAS": bias is not None, "PRECISION": precision(x), "UPCAST": INTERPRETED, "WIDE": wide(x, weight, y),
    }  # fmt: skip
    bias = y if bias is None else bias
    if geometry.channels_last:
        x, weight = transposed(x, torch.channels_last), transposed(weight, torch.channels_last)
        _fwd_cells(x, weight, bias, y, geometry, common)
    elif geometry.shuffles(x, y):
        _fwd_shuffle(x, transposed(weight, torch.contiguous_format), bias, y, geometry, common)
    elif geometry.stride[1] <= 2:
        x, weight = transposed(x, torch.channels_last), transposed(weight, torch.channels_last)
        _fwd_rows(x, weight, bias, y, geometry, common)
    else:
        x, weight = transposed(x, torch.channels_last), transposed(weight, torch.channels_last)
        scratch = torch.empty_like(y, memory_format=torch.channels_last)
        _fwd_cells(x, weight, bias, scratch, geometry, common)
        transpose_into(scratch, y, to_channels_last=False)


def _fwd_cells(x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, geometry: Geometry, common: dict[str, Any]) -> None:
    (n, c, h, w), (k, oh, ow) = x.shape, y.shape[1:]
    qh, qw = geometry.cells(y)
    rows, columns = ((taps % s, s - taps % s) for taps, s in zip(geometry.kernel, geometry.stride, strict=True))
    phases = [a * b for a in rows for b in columns]
    tiles = blocks(n * qh * qw, max(phases) * k, c, x)
    block_k = channel_block(k, tiles["BLOCK_N"])
    share = tiles["BLOCK_N"] // block_k
    grid = triton.cdiv(n * qh * qw, tiles["BLOCK_M"]) * triton.cdiv(k, block_k)
    c_vec, k_vec = vector_width(x.element_size(), c), vector_width(x.element_size(), k, block_k)
    launch(
        conv_transpose2d_fwd_kernel, grid * sum(triton.cdiv(count, share) for count in phases),
        x, weight, bias, y, n * qh * qw, qh, qw, h, w, oh, ow, c // c_vec, k // k_vec,
        C_VEC=c_vec, K_VEC=k_vec, BLOCK_K=block_k, **geometry.constants(), **common, **tiles,
    )  # fmt: skip


def _fwd_rows(x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, geometry: Geometry, common: dict[str, Any]) -> None:
    (n, c, h, w), (k, oh, ow) = x.shape, y.shape[1:]
    sh, sw = geometry.stride
    qh, qw = geometry.cells(y)[0], triton.cdiv(ow, sw)
    cells = n * qh * qw
    tiles = blocks(cells, min(k, 128 // sw), c, x)
    if sw == 2:
        tiles["num_warps"] *= 2  # two accumulators
    c_vec, k_vec = vector_width(x.element_size(), c), vector_width(x.element_size(), k)
    row_vec = vector_width(x.element_size(), ow, sw * qw)
    launch(
        conv_transpose2d_fwd_rows_kernel, sh * programs(cells, k, tiles),
        x, weight, bias, y, cells, qh, sw * qw // row_vec, h, w, oh, ow // row_vec, c // c_vec, k // k_vec,
        C_VEC=c_vec, K_VEC=k_vec, ROW_VEC=row_vec, **geometry.constants(), **common, **tiles,
    )  # fmt: skip


def _fwd_shuffle(
    x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, geometry: Geometry, common: dict[str, Any]
) -> None:
    n, c, h, w = x.shape
    sh, sw = geometry.stride
    columns = y.shape[1] * sh * sw
    tiles = blocks(n * h * w, columns, c, x)
    w_vec, column_vec = vector_width(x.element_size(), w), vector_width(x.element_size(), columns)
    launch(
        conv_transpose2d_fwd_shuffle_kernel, programs(n * h * w, columns, tiles),
        x, weight, bias, y, n * h * w, h, w // w_vec, c, columns // column_vec,
        SH=sh, SW=sw, W_VEC=w_vec, COLUMN_VEC=column_vec, **common, **tiles,
    )  # fmt: skip
