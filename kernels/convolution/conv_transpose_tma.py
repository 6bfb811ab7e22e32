"""Transposed convolution and its gradients in channels_last with TMA, for NVIDIA GPUs from sm_90 on.

The same GEMMs as in conv_transpose.py and conv_transpose_bwd.py, but TMA loads whole tiles through tensor descriptors.
Pixels outside the image arrive as zeros, so the loops compute no addresses and no masks. For this the pixels of a
program are a box of images x rows x columns instead of a flat run.

The gradients see grad_y as (N, OH / SH, SH, OW / SW, SW * K): the pixels under one tap of all windows are a box of it.

If the windows of a row are side by side (KW = SW, no padding), a row of y is W pixels of SW * K channels, and a row of
the weight's taps is one tap with as many channels. FoldedProblem describes such a convolution with stride 1 along the
row.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..launch import INTERPRETED, capability, launch, vector_width
from .gemm import (
    affordable_splits,
    apply_epilogue,
    channel_block,
    dot,
    input_precision,
    needs_int64_offsets,
    split_k,
    sum_partials,
    tile_sizes,
)
from .options import Epilogue
from .problem import ConvProblem, phase_rectangle

MOST_COVER = 1.1  # pixels in all boxes / pixels of the image, at most; with more a flat run of pixels is better


@triton.jit
def box_coordinates(tile, TILES_H, TILES_W, BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """The first image, row and column of a box of pixels, then the images, rows and columns of all its pixels."""
    first_w, first_h = tile % TILES_W * BLOCK_W, tile // TILES_W % TILES_H * BLOCK_H
    first_i = tile // (TILES_W * TILES_H) * BLOCK_I
    m = tl.arange(0, BLOCK_I * BLOCK_H * BLOCK_W)
    images, rows = first_i + m // (BLOCK_H * BLOCK_W), first_h + m // BLOCK_W % BLOCK_H
    return first_i, first_h, first_w, images, rows, first_w + m % BLOCK_W


@triton.jit
def conv_transpose2d_fwd_tma_kernel(
    x, w, scale, bias, y, N, TILES_H, TILES_W, TILES, OH, OW, C, K_RUNS,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, FOLD: tl.constexpr, SPREAD: tl.constexpr, K_VEC: tl.constexpr,
    SCALE: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program computes a box of cells x BLOCK_N channels of one phase. x: (N, H, W, C), w: (C, KH * KW, K).

    Because a program has only one phase, cells can begin at oh = 0 for any padding: each phase has its own first row
    and column of x, and the padding cuts no cell. FOLD pixels of y are treated as one pixel with all their channels, K.
    SPREAD columns share one channel of scale and bias. Writes y once.
    """
    # 1. Which phase, channels and cells
    K = K_RUNS * K_VEC
    tiles_k = tl.cdiv(K, BLOCK_N)
    tile = tl.program_id(0) % TILES
    first_tile, rh, _, taps_h, rw, phases_w, taps_w = phase_rectangle(tile, tiles_k, KH, KW, SH, SW, 1)
    phase = (tile - first_tile) // tiles_k
    rh, rw = rh + phase // phases_w, rw + phase % phases_w
    k0 = (tile - first_tile) % tiles_k * BLOCK_N
    first_i, h0, w0, image, qh, qw = box_coordinates(
        tl.program_id(0) // TILES, TILES_H, TILES_W, BLOCK_I, BLOCK_H, BLOCK_W
    )
    oh0, ow0 = (rh + (PH * SH - PH)) % SH, (rw + (PW * SW - PW)) % SW  # of cell 0; rh = (oh0 + PH) % SH
    from_h, from_w = h0 + (oh0 + PH) // SH, w0 + (ow0 + PW) // SW

    # 2. Sum over taps and input channels
    acc = tl.zeros((BLOCK_I * BLOCK_H * BLOCK_W, BLOCK_N), tl.float32)
    a, b, c0 = 0, 0, 0
    for _ in range(taps_h * taps_w * tl.cdiv(C, BLOCK_R)):
        pixels = x.load([first_i, from_h - a * DH, from_w - b * DW, c0])
        weights = w.load([c0, (rh + a * SH) * KW + rw + b * SW, k0])
        pixels = pixels.reshape(BLOCK_I * BLOCK_H * BLOCK_W, BLOCK_R)
        acc = dot(pixels, weights.reshape(BLOCK_R, BLOCK_N), acc, PRECISION, UPCAST)
        c0 += BLOCK_R
        b = tl.where(c0 < C, b, b + 1)
        c0 = tl.where(c0 < C, c0, 0)
        a = tl.where(b < taps_w, a, a + 1)
        b = tl.where(b < taps_w, b, 0)

    # 3. Apply the epilogue, and store
    k = k0 + tl.arange(0, BLOCK_N)
    m_n = tl.max_constancy(k < K, K_VEC)
    acc = apply_epilogue(acc, scale, bias, k % (K // FOLD) // SPREAD, m_n, SCALE, BIAS, RELU)
    oh, ow = qh * SH + oh0, qw * SW + ow0
    m_m = (image < N) & (oh < OH) & (ow < OW)
    if WIDE:
        image, K = image.to(tl.int64), tl.cast(K, tl.int64)
    o_y = ((image * OH + oh) * OW + ow) * K
    tl.store(y + (o_y[:, None] + k[None, :]), acc.to(y.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit
def conv_transpose2d_bwd_input_tma_kernel(
    grad_y, w, out, STEPS, N, H, W_RUNS, TILES_I, TILES_H, TILES_W, C_RUNS, K,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, C_VEC: tl.constexpr, W_VEC: tl.constexpr, SPLIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program computes a box of pixels x BLOCK_N channels of grad_x. w: (C, KH * KW, K); BLOCK_R divides K.

    out: grad_x, channels_last or not. With SPLIT it is the partials (splits, N, H, W, C), each the sum of STEPS steps.
    Writes out once.
    """
    # 1. Which channels, pixels and split
    C, W = C_RUNS * C_VEC, W_RUNS * W_VEC
    tiles = tl.cdiv(C, BLOCK_N)
    n0 = tl.program_id(0) % tiles * BLOCK_N
    tile, split = tl.program_id(0) // tiles, 0
    if SPLIT:
        boxes = TILES_I * TILES_H * TILES_W
        tile, split = tile % boxes, tile // boxes
    first_i, h0, w0, image, h, v = box_coordinates(tile, TILES_H, TILES_W, BLOCK_I, BLOCK_H, BLOCK_W)
    added_h: tl.constexpr = (PH + SH - 1) // SH  # strides, so that no dividend is negative
    added_w: tl.constexpr = (PW + SW - 1) // SW
    acc = tl.zeros((BLOCK_I * BLOCK_H * BLOCK_W, BLOCK_N), tl.float32)
    i, j, r0 = 0, 0, 0
    steps = KH * KW * (K // BLOCK_R)
    if SPLIT:
        step = split * STEPS
        tap, r0 = step // (K // BLOCK_R), step % (K // BLOCK_R) * BLOCK_R
        i, j = tap // KW, tap % KW
        steps = tl.minimum(STEPS, steps - step)

    # 2. Sum over taps and output channels
    for _ in range(steps):
        t, u = i * DH - PH + added_h * SH, j * DW - PW + added_w * SW
        corner = [first_i, h0 + t // SH - added_h, t % SH, w0 + u // SW - added_w, u % SW * K + r0]
        grads = grad_y.load(corner).reshape(BLOCK_I * BLOCK_H * BLOCK_W, BLOCK_R)
        weights = w.load([n0, i * KW + j, r0]).reshape(BLOCK_N, BLOCK_R)
        acc = dot(grads, tl.trans(weights), acc, PRECISION, UPCAST)
        r0 += BLOCK_R
        j = tl.where(r0 < K, j, j + 1)
        r0 = tl.where(r0 < K, r0, 0)
        i = tl.where(j < KW, i, i + 1)
        j = tl.where(j < KW, j, 0)

    # 3. Store
    n = n0 + tl.arange(0, BLOCK_N)
    m_m = tl.max_constancy((image < N) & (h < H) & (v < W), W_VEC)
    m_n = tl.max_constancy(n < C, C_VEC)
    if WIDE:
        image, C = image.to(tl.int64), tl.cast(C, tl.int64)
    if CHANNELS_LAST:
        o_out = ((((split * N + image) * H + h) * W + v) * C)[:, None] + n[None, :]
    else:
        o_pixel = tl.max_contiguous(tl.multiple_of((image * C * H + h) * W + v, W_VEC), W_VEC)
        o_out = o_pixel[:, None] + (n * (H * W))[None, :]
    tl.store(out + o_out, acc.to(out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit
def conv_transpose2d_bwd_weight_tma_kernel(
    x, grad_y, partials, ALL_STEPS, STEPS, TILES_H, TILES_W, C, K_RUNS,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, K_VEC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program sums BLOCK_M channels c x BLOCK_N channels k of one tap over STEPS boxes of pixels of x (N, H, W, C).

    Reads x once for each tap and BLOCK_N channels, grad_y once for each BLOCK_M channels; writes partials (splits, C,
    taps, K).
    """
    # 1. Which channels, tap and split
    K = K_RUNS * K_VEC
    tiles_m, tiles_k = tl.cdiv(C, BLOCK_M), tl.cdiv(K, BLOCK_N)
    tiles_n = KH * KW * tiles_k
    split = tl.program_id(0) // (tiles_m * tiles_n)
    tile = tl.program_id(0) % (tiles_m * tiles_n)
    c0, tap, k0 = tile // tiles_n * BLOCK_M, tile % tiles_n // tiles_k, tile % tiles_k * BLOCK_N
    added_h: tl.constexpr = (PH + SH - 1) // SH  # strides, so that no dividend is negative
    added_w: tl.constexpr = (PW + SW - 1) // SW
    t, u = tap // KW * DH - PH + added_h * SH, tap % KW * DW - PW + added_w * SW
    to_h, to_w = t // SH - added_h, u // SW - added_w
    step = split * STEPS

    # 2. Sum over the boxes of pixels
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for s in range(step, tl.minimum(step + STEPS, ALL_STEPS)):
        w0, h0 = s % TILES_W * BLOCK_W, s // TILES_W % TILES_H * BLOCK_H
        i0 = s // (TILES_W * TILES_H) * BLOCK_I
        pixels = x.load([i0, h0, w0, c0]).reshape(BLOCK_I * BLOCK_H * BLOCK_W, BLOCK_M)
        grads = grad_y.load([i0, h0 + to_h, t % SH, w0 + to_w, u % SW * K + k0])
        acc = dot(tl.trans(pixels), grads.reshape(BLOCK_I * BLOCK_H * BLOCK_W, BLOCK_N), acc, PRECISION, UPCAST)

    # 3. Store the partial
    c, k = c0 + tl.arange(0, BLOCK_M), k0 + tl.arange(0, BLOCK_N)
    m_k = tl.max_constancy(k < K, K_VEC)
    if WIDE:
        split = split.to(tl.int64)
    o_partials = (((split * C + c) * (KH * KW) + tap) * K)[:, None] + k[None, :]
    tl.store(partials + o_partials, acc.to(partials.dtype.element_ty), mask=(c < C)[:, None] & m_k[None, :])


class PixelBox(NamedTuple):
    """The images, rows and columns of a program's pixels: powers of two."""

    images: int
    rows: int
    columns: int

    def counts(self, n: int, h: int, w: int) -> tuple[int, int, int]:
        """How many boxes cover n maps of h x w, in each direction."""
        return triton.cdiv(n, self.images), triton.cdiv(h, self.rows), triton.cdiv(w, self.columns)

    def covered(self, n: int, h: int, w: int) -> int:
        """The pixels in all boxes that cover n maps of h x w, those outside the maps included."""
        return math.prod(self.counts(n, h, w)) * math.prod(self)

    def constants(self) -> dict[str, int]:
        """The sides of the box as compile-time arguments."""
        return {"BLOCK_I": self.images, "BLOCK_H": self.rows, "BLOCK_W": self.columns}


def best_box(n: int, h: int, w: int, pixels: int) -> PixelBox:
    """The box of `pixels` pixels that covers n maps of h x w with the fewest pixels outside; then the squarest."""
    powers = [1 << p for p in range(pixels.bit_length())]
    boxes = [PixelBox(pixels // (a * b), a, b) for a, b in itertools.product(powers, powers) if a * b <= pixels]
    return min(boxes, key=lambda found: (found.covered(n, h, w), found.images, max(found.rows, found.columns)))


class FoldedProblem(NamedTuple):
    """A problem whose windows are folded along the row if they are side by side; any other problem as it is.

    columns, channels: of y. fold: how many pixels of y have become one.
    """

    problem: ConvProblem
    columns: int
    channels: int
    fold: int

    @classmethod
    def of(cls, problem: ConvProblem, x: Tensor, y: Tensor) -> FoldedProblem:
        """The folded form of a convolution from x to y."""
        kernel, stride, padding = problem.kernel_size[1], problem.stride[1], problem.padding[1]
        k, _, ow = y.shape[1:]
        if kernel == stride and padding == 0 and ow == stride * x.shape[-1]:
            kernel_size, strides = [problem.kernel_size[0], 1], [problem.stride[0], 1]
            folded = problem._replace(kernel_size=kernel_size, stride=strides)
            return cls(folded, ow // stride, k * stride, stride)
        return cls(problem, ow, k, 1)

    def weight(self, weight: Tensor, block: list[int]) -> TensorDescriptor:
        """(C, taps, K) of a channels_last weight."""
        kh, kw = self.problem.kernel_size
        shape = [weight.shape[0], kh * kw, self.channels]
        return TensorDescriptor(weight, shape, [kh * kw * self.channels, self.channels, 1], block)

    def windows(self, grad_y: Tensor, box: PixelBox, channels: int) -> TensorDescriptor:
        """(N, OH / SH, SH, OW / SW, SW * K) of a channels_last grad_y."""
        (n, _, oh, _), (sh, sw) = grad_y.shape, self.problem.stride
        row = self.columns * self.channels
        shape = [n, oh // sh, sh, self.columns // sw, sw * self.channels]
        strides = [oh * row, sh * row, row, sw * self.channels, 1]
        return TensorDescriptor(grad_y, shape, strides, [box.images, box.rows, 1, box.columns, channels])


def pixels_of(x: Tensor, box: PixelBox, channels: int) -> TensorDescriptor:
    """(N, H, W, C) of a channels_last image."""
    n, c, h, w = x.shape
    return TensorDescriptor(x, [n, h, w, c], [h * w * c, w * c, c, 1], [*box, channels])


def supported(problem: ConvProblem, x: Tensor, y: Tensor, *others: Tensor) -> bool:
    """Whether the GPU has TMA, and TMA can read these tensors: 16-byte aligned rows and addresses, one group."""
    vectors = (vector_width(x.element_size(), c) * x.element_size() for c in (x.shape[1], y.shape[1]))
    aligned = all(t.data_ptr() % 16 == 0 for t in (x, y, *others))
    return capability(x) >= 90 and problem.groups == 1 and min(vectors) == 16 and aligned and x.numel() > 0


def fwd(x: Tensor, weight: Tensor, y: Tensor, problem: ConvProblem, epilogue: Epilogue) -> bool:
    """Write y from channels_last x and weight. False, and nothing written, if boxes of cells do not fit the image."""
    (n, c, h, w), oh = x.shape, y.shape[-2]
    folded = FoldedProblem.of(problem, x, y)
    ow, k = folded.columns, folded.channels
    qh, qw = (triton.cdiv(size, s) for size, s in zip((oh, ow), folded.problem.stride, strict=True))
    sizes = tile_sizes(n * qh * qw, k, c, x)
    block_n = channel_block(k, sizes["BLOCK_N"])
    cells = best_box(n, qh, qw, sizes.pop("BLOCK_M"))
    if cells.covered(n, qh, qw) > MOST_COVER * n * h * w:
        return False
    counts, k_vec = cells.counts(n, qh, qw), vector_width(x.element_size(), k, block_n)
    tiles = triton.cdiv(k, block_n) * math.prod(folded.problem.stride)
    launch(
        conv_transpose2d_fwd_tma_kernel, math.prod(counts) * tiles,
        pixels_of(x, cells, sizes["BLOCK_R"]), folded.weight(weight, [sizes["BLOCK_R"], 1, block_n]),
        *epilogue.pointers(y), y, n, *counts[1:], tiles, oh, ow, c, k // k_vec,
        FOLD=folded.fold, SPREAD=problem.columns_per_channel, K_VEC=k_vec, PRECISION=input_precision(x),
        UPCAST=INTERPRETED, WIDE=needs_int64_offsets(x, weight, y), **folded.problem.constants_without_groups(),
        **epilogue.constants(), **cells.constants(), **sizes | {"BLOCK_N": block_n},
    )  # fmt: skip
    return True


def bwd_input(grad_y: Tensor, weight: Tensor, grad_x: Tensor, problem: ConvProblem) -> bool:
    """Write grad_x from channels_last grad_y and weight. False, and nothing written, if boxes do not fit the images."""
    n, c, h, w = grad_x.shape
    folded = FoldedProblem.of(problem, grad_x, grad_y)
    sizes = tile_sizes(n * h * w, c, folded.channels, grad_x)
    pixels = best_box(n, h, w, sizes.pop("BLOCK_M"))
    if not _has_whole_strides(folded, grad_y) or pixels.covered(n, h, w) > MOST_COVER * n * h * w:
        return False
    while folded.channels % sizes["BLOCK_R"]:
        sizes["BLOCK_R"] //= 2
    if sizes["BLOCK_R"] < 16:
        return False
    counts = pixels.counts(n, h, w)
    tiles = math.prod(counts) * triton.cdiv(c, sizes["BLOCK_N"])
    steps = weight[0].numel() // sizes["BLOCK_R"]
    each, splits = split_k(steps, tiles, affordable_splits(grad_x, grad_y, weight))
    out = grad_x if splits == 1 else grad_x.new_empty(splits, grad_x.numel(), dtype=torch.float32)
    c_vec, w_vec = vector_width(grad_x.element_size(), c), vector_width(grad_x.element_size(), w, pixels.columns)
    weights = folded.weight(weight, [sizes["BLOCK_N"], 1, sizes["BLOCK_R"]])
    launch(
        conv_transpose2d_bwd_input_tma_kernel, splits * tiles,
        folded.windows(grad_y, pixels, sizes["BLOCK_R"]), weights, out, each, n, h, w // w_vec, *counts, c // c_vec,
        folded.channels, C_VEC=c_vec, W_VEC=w_vec, SPLIT=splits > 1,
        CHANNELS_LAST=problem.channels_last or splits > 1, PRECISION=input_precision(grad_x), UPCAST=INTERPRETED,
        WIDE=needs_int64_offsets(out, grad_y), **folded.problem.constants_without_groups(), **pixels.constants(),
        **sizes,
    )  # fmt: skip
    if splits > 1:
        sum_partials(out, grad_x, c)
    return True


def bwd_weight(grad_y: Tensor, x: Tensor, grad_weight: Tensor, problem: ConvProblem) -> bool:
    """Write grad_weight from channels_last x and grad_y. False, and nothing written, if boxes do not fit the images."""
    n, c, h, w = x.shape
    folded = FoldedProblem.of(problem, x, grad_y)
    k, taps = folded.channels, math.prod(folded.problem.kernel_size)
    sizes = tile_sizes(c, k, n * h * w, x, fill=False)
    pixels = best_box(n, h, w, sizes.pop("BLOCK_R"))
    fits = pixels.covered(n, h, w) <= MOST_COVER * n * h * w
    if not (_has_whole_strides(folded, grad_y) and fits) or x.element_size() != 2:
        return False
    sizes["BLOCK_N"] = channel_block(k, sizes["BLOCK_N"])
    counts = pixels.counts(n, h, w)
    tiles = triton.cdiv(c, sizes["BLOCK_M"]) * taps * triton.cdiv(k, sizes["BLOCK_N"])
    each, splits = split_k(math.prod(counts), tiles)
    in_place = splits == 1 and grad_weight.is_contiguous(memory_format=torch.channels_last)
    partials = grad_weight if in_place else x.new_empty(splits, grad_weight.numel(), dtype=torch.float32)
    k_vec = vector_width(partials.element_size(), k)
    launch(
        conv_transpose2d_bwd_weight_tma_kernel, splits * tiles,
        pixels_of(x, pixels, sizes["BLOCK_M"]), folded.windows(grad_y, pixels, sizes["BLOCK_N"]), partials,
        math.prod(counts), each, *counts[1:], c, k // k_vec, K_VEC=k_vec, PRECISION=input_precision(x),
        UPCAST=INTERPRETED, WIDE=needs_int64_offsets(partials), **folded.problem.constants_without_groups(),
        **pixels.constants(), **sizes,
    )  # fmt: skip
    if not in_place:
        sum_partials(partials, grad_weight, grad_weight.shape[1])
    return True


def _has_whole_strides(folded: FoldedProblem, grad_y: Tensor) -> bool:
    """Whether height and width of grad_y are multiples of the stride, so that the view of `windows` is all of it."""
    sh, sw = folded.problem.stride
    return grad_y.shape[-2] % sh == 0 and folded.columns % sw == 0
