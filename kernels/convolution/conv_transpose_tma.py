"""Transposed convolution and its gradients in channels_last through tensor descriptors: NVIDIA GPUs from sm_90 on.

The same products as in conv_transpose.py and conv_transpose_bwd.py, where one thread of a program has the copy engine
fetch whole tiles: pixels outside the image arrive as zeros, so no lane computes an address or a mask in the loop. To
that end a program's pixels are a box of images x rows x columns in place of a flat run.

The gradients see grad_y as (N, OH / SH, SH, OW / SW, SW * K): the pixels under one tap of all windows are a box of it.

Where the windows of a row lie side by side (KW = SW, no padding), a row of y is W pixels of SW * K channels and a row
of the weight's taps one tap of as many: `folded` has such a convolution look like one of stride 1 along the row.
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
from .gemm import affordable_shares, blocks, channel_block, multiply, precision, split, sum_shares, wide
from .geometry import Epilogue, Geometry, epilogue, rectangle

SPARE = 1.1  # boxes may cover so many times the pixels there are; a flat run of pixels is better beyond


@triton.jit
def box(tile, TILES_H, TILES_W, BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """First (image, row, column) of a box of pixels, and those of each of its pixels."""
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
    """One program makes a box of cells x BLOCK_N channels of one phase; x: (N, H, W, C), w: (C, KH * KW, K).

    A program has one phase alone, so that cells may start at oh = 0 whatever the padding: each phase has its own first
    row and column of x, and there are no cells that the padding cuts. FOLD pixels of y stand side by side as K
    channels; SPREAD columns are one channel of scale and bias. Writes y once.
    """
    K = K_RUNS * K_VEC
    tiles_k = tl.cdiv(K, BLOCK_N)
    tile = tl.program_id(0) % TILES
    before, rh, _, taps_h, rw, phases_w, taps_w = rectangle(tile, tiles_k, KH, KW, SH, SW, 1)
    phase = (tile - before) // tiles_k
    rh, rw = rh + phase // phases_w, rw + phase % phases_w
    k0 = (tile - before) % tiles_k * BLOCK_N
    first_i, h0, w0, image, qh, qw = box(tl.program_id(0) // TILES, TILES_H, TILES_W, BLOCK_I, BLOCK_H, BLOCK_W)
    oh0, ow0 = (rh + (PH * SH - PH)) % SH, (rw + (PW * SW - PW)) % SW  # of cell 0; rh = (oh0 + PH) % SH
    from_h, from_w = h0 + (oh0 + PH) // SH, w0 + (ow0 + PW) // SW
    acc = tl.zeros((BLOCK_I * BLOCK_H * BLOCK_W, BLOCK_N), tl.float32)
    a, b, c0 = 0, 0, 0
    for _ in range(taps_h * taps_w * tl.cdiv(C, BLOCK_R)):
        pixels = x.load([first_i, from_h - a * DH, from_w - b * DW, c0])
        weights = w.load([c0, (rh + a * SH) * KW + rw + b * SW, k0])
        pixels = pixels.reshape(BLOCK_I * BLOCK_H * BLOCK_W, BLOCK_R)
        acc = multiply(pixels, weights.reshape(BLOCK_R, BLOCK_N), acc, PRECISION, UPCAST)
        c0 += BLOCK_R
        b = tl.where(c0 < C, b, b + 1)
        c0 = tl.where(c0 < C, c0, 0)
        a = tl.where(b < taps_w, a, a + 1)
        b = tl.where(b < taps_w, b, 0)
    k = k0 + tl.arange(0, BLOCK_N)
    live_n = tl.max_constancy(k < K, K_VEC)
    acc = epilogue(acc, scale, bias, k % (K // FOLD) // SPREAD, live_n, SCALE, BIAS, RELU)
    oh, ow = qh * SH + oh0, qw * SW + ow0
    live_m = (image < N) & (oh < OH) & (ow < OW)
    if WIDE:
        image, K = image.to(tl.int64), tl.cast(K, tl.int64)
    out = ((image * OH + oh) * OW + ow) * K
    tl.store(y + (out[:, None] + k[None, :]), acc.to(y.dtype.element_ty), mask=live_m[:, None] & live_n[None, :])


@triton.jit
def conv_transpose2d_bwd_input_tma_kernel(
    grad_y, w, out, SHARE, N, H, W_RUNS, TILES_I, TILES_H, TILES_W, C_RUNS, K,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, C_VEC: tl.constexpr, W_VEC: tl.constexpr, SPLIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program makes a box of pixels x BLOCK_N channels of grad_x; w: (C, KH * KW, K), and K is blocks of BLOCK_R.

    out: grad_x, channels_last or not; if SPLIT, partials (shares, N, H, W, C), each the sum over SHARE blocks of
    BLOCK_R. Writes it once.
    """
    C, W = C_RUNS * C_VEC, W_RUNS * W_VEC
    tiles = tl.cdiv(C, BLOCK_N)
    n0 = tl.program_id(0) % tiles * BLOCK_N
    tile, share = tl.program_id(0) // tiles, 0
    if SPLIT:
        boxes = TILES_I * TILES_H * TILES_W
        tile, share = tile % boxes, tile // boxes
    first_i, h0, w0, image, h, v = box(tile, TILES_H, TILES_W, BLOCK_I, BLOCK_H, BLOCK_W)
    before_h: tl.constexpr = (PH + SH - 1) // SH  # so that what is divided is not negative
    before_w: tl.constexpr = (PW + SW - 1) // SW
    acc = tl.zeros((BLOCK_I * BLOCK_H * BLOCK_W, BLOCK_N), tl.float32)
    i, j, r0 = 0, 0, 0
    steps = KH * KW * (K // BLOCK_R)
    if SPLIT:
        step = share * SHARE
        tap, r0 = step // (K // BLOCK_R), step % (K // BLOCK_R) * BLOCK_R
        i, j = tap // KW, tap % KW
        steps = tl.minimum(SHARE, steps - step)
    for _ in range(steps):
        t, u = i * DH - PH + before_h * SH, j * DW - PW + before_w * SW
        place = [first_i, h0 + t // SH - before_h, t % SH, w0 + u // SW - before_w, u % SW * K + r0]
        grads = grad_y.load(place).reshape(BLOCK_I * BLOCK_H * BLOCK_W, BLOCK_R)
        weights = w.load([n0, i * KW + j, r0]).reshape(BLOCK_N, BLOCK_R)
        acc = multiply(grads, tl.trans(weights), acc, PRECISION, UPCAST)
        r0 += BLOCK_R
        j = tl.where(r0 < K, j, j + 1)
        r0 = tl.where(r0 < K, r0, 0)
        i = tl.where(j < KW, i, i + 1)
        j = tl.where(j < KW, j, 0)
    n = n0 + tl.arange(0, BLOCK_N)
    live_m = tl.max_constancy((image < N) & (h < H) & (v < W), W_VEC)
    live_n = tl.max_constancy(n < C, C_VEC)
    if WIDE:
        image, C = image.to(tl.int64), tl.cast(C, tl.int64)
    if CHANNELS_LAST:
        to = ((((share * N + image) * H + h) * W + v) * C)[:, None] + n[None, :]
    else:
        pixel = tl.max_contiguous(tl.multiple_of((image * C * H + h) * W + v, W_VEC), W_VEC)
        to = pixel[:, None] + (n * (H * W))[None, :]
    tl.store(out + to, acc.to(out.dtype.element_ty), mask=live_m[:, None] & live_n[None, :])


@triton.jit
def conv_transpose2d_bwd_weight_tma_kernel(
    x, grad_y, partials, STEPS, SHARE, TILES_H, TILES_W, C, K_RUNS,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, K_VEC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program sums BLOCK_M channels c x BLOCK_N channels k of one tap over SHARE boxes of pixels of x (N, H, W, C).

    Reads x once for each tap and BLOCK_N channels, grad_y once for each BLOCK_M; writes partials (shares, C, taps, K).
    """
    K = K_RUNS * K_VEC
    tiles_m, tiles_k = tl.cdiv(C, BLOCK_M), tl.cdiv(K, BLOCK_N)
    tiles_n = KH * KW * tiles_k
    share = tl.program_id(0) // (tiles_m * tiles_n)
    tile = tl.program_id(0) % (tiles_m * tiles_n)
    c0, tap, k0 = tile // tiles_n * BLOCK_M, tile % tiles_n // tiles_k, tile % tiles_k * BLOCK_N
    before_h: tl.constexpr = (PH + SH - 1) // SH
    before_w: tl.constexpr = (PW + SW - 1) // SW
    t, u = tap // KW * DH - PH + before_h * SH, tap % KW * DW - PW + before_w * SW
    to_h, to_w = t // SH - before_h, u // SW - before_w
    step = share * SHARE
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for s in range(step, tl.minimum(step + SHARE, STEPS)):
        w0, h0 = s % TILES_W * BLOCK_W, s // TILES_W % TILES_H * BLOCK_H
        i0 = s // (TILES_W * TILES_H) * BLOCK_I
        pixels = x.load([i0, h0, w0, c0]).reshape(BLOCK_I * BLOCK_H * BLOCK_W, BLOCK_M)
        grads = grad_y.load([i0, h0 + to_h, t % SH, w0 + to_w, u % SW * K + k0])
        acc = multiply(tl.trans(pixels), grads.reshape(BLOCK_I * BLOCK_H * BLOCK_W, BLOCK_N), acc, PRECISION, UPCAST)
    c, k = c0 + tl.arange(0, BLOCK_M), k0 + tl.arange(0, BLOCK_N)
    live_k = tl.max_constancy(k < K, K_VEC)
    if WIDE:
        share = share.to(tl.int64)
    out = (((share * C + c) * (KH * KW) + tap) * K)[:, None] + k[None, :]
    tl.store(partials + out, acc.to(partials.dtype.element_ty), mask=(c < C)[:, None] & live_k[None, :])


class Box(NamedTuple):
    """Images, rows and columns of a program's pixels: powers of two."""

    images: int
    rows: int
    columns: int

    def tiles(self, n: int, h: int, w: int) -> tuple[int, int, int]:
        """How many boxes cover n maps of h x w, in each direction."""
        return triton.cdiv(n, self.images), triton.cdiv(h, self.rows), triton.cdiv(w, self.columns)

    def covered(self, n: int, h: int, w: int) -> int:
        return math.prod(self.tiles(n, h, w)) * math.prod(self)

    def constants(self) -> dict[str, int]:
        return {"BLOCK_I": self.images, "BLOCK_H": self.rows, "BLOCK_W": self.columns}


def best_box(n: int, h: int, w: int, pixels: int) -> Box:
    """Of all boxes of so many pixels the one that covers n maps of h x w with the least to spare, and is squarest."""
    powers = [1 << p for p in range(pixels.bit_length())]
    boxes = [Box(pixels // (a * b), a, b) for a, b in itertools.product(powers, powers) if a * b <= pixels]
    return min(boxes, key=lambda found: (found.covered(n, h, w), found.images, max(found[1:])))


class Folded(NamedTuple):
    """A convolution with rows of windows that lie side by side as one of stride 1 along the row, others as they are."""

    geometry: Geometry
    columns: int  # of y
    channels: int  # of y
    fold: int

    @classmethod
    def of(cls, geometry: Geometry, x: Tensor, y: Tensor) -> Folded:
        (kernel, stride, padding), (k, _, ow) = (pair[1] for pair in geometry[:3]), y.shape[1:]
        if kernel == stride and padding == 0 and ow == stride * x.shape[-1]:
            flat = geometry._replace(kernel=[geometry.kernel[0], 1], stride=[geometry.stride[0], 1])
            return cls(flat, ow // stride, k * stride, stride)
        return cls(geometry, ow, k, 1)

    def constants(self) -> dict[str, int]:
        return {name: value for name, value in self.geometry.constants().items() if name != "GROUPS"}

    def weight(self, weight: Tensor, block: list[int]) -> TensorDescriptor:
        """(C, taps, K) of a channels_last weight."""
        kh, kw = self.geometry.kernel
        shape = [weight.shape[0], kh * kw, self.channels]
        return TensorDescriptor(weight, shape, [kh * kw * self.channels, self.channels, 1], block)

    def windows(self, grad_y: Tensor, box: Box, channels: int) -> TensorDescriptor:
        """(N, OH / SH, SH, OW / SW, SW * K) of a channels_last grad_y."""
        (n, _, oh, _), (sh, sw) = grad_y.shape, self.geometry.stride
        row = self.columns * self.channels
        shape = [n, oh // sh, sh, self.columns // sw, sw * self.channels]
        strides = [oh * row, sh * row, row, sw * self.channels, 1]
        return TensorDescriptor(grad_y, shape, strides, [box.images, box.rows, 1, box.columns, channels])


def pixels_of(x: Tensor, box: Box, channels: int) -> TensorDescriptor:
    """(N, H, W, C) of a channels_last image."""
    n, c, h, w = x.shape
    return TensorDescriptor(x, [n, h, w, c], [h * w * c, w * c, c, 1], [*box, channels])


def fetches(geometry: Geometry, x: Tensor, y: Tensor, *others: Tensor) -> bool:
    """Whether the GPU has a copy engine, and it can read these tensors: rows and bases of whole 16 bytes, no groups."""
    vectors = (vector_width(x.element_size(), c) * x.element_size() for c in (x.shape[1], y.shape[1]))
    aligned = all(t.data_ptr() % 16 == 0 for t in (x, y, *others))
    return capability(x) >= 90 and geometry.groups == 1 and min(vectors) == 16 and aligned and x.numel() > 0


def fwd(x: Tensor, weight: Tensor, after: Epilogue, y: Tensor, geometry: Geometry) -> bool:
    """Write y from channels_last x and weight, if boxes of cells suit the image."""
    (n, c, h, w), (oh, _) = x.shape, y.shape[-2:]
    geometry, ow, k, fold = folded = Folded.of(geometry, x, y)
    qh, qw = (triton.cdiv(size, s) for size, s in zip((oh, ow), geometry.stride, strict=True))
    tiles = blocks(n * qh * qw, k, c, x)
    block_n = channel_block(k, tiles["BLOCK_N"])
    cells = best_box(n, qh, qw, tiles.pop("BLOCK_M"))
    if cells.covered(n, qh, qw) > SPARE * n * h * w:
        return False
    counts, k_vec = cells.tiles(n, qh, qw), vector_width(x.element_size(), k, block_n)
    columns = triton.cdiv(k, block_n) * math.prod(geometry.stride)
    launch(
        conv_transpose2d_fwd_tma_kernel, math.prod(counts) * columns,
        pixels_of(x, cells, tiles["BLOCK_R"]), folded.weight(weight, [tiles["BLOCK_R"], 1, block_n]),
        *after.pointers(y), y, n, *counts[1:], columns, oh, ow, c, k // k_vec,
        FOLD=fold, SPREAD=after.spread, K_VEC=k_vec, PRECISION=precision(x), UPCAST=INTERPRETED,
        WIDE=wide(x, weight, y), **folded.constants(), **after.constants(), **cells.constants(),
        **tiles | {"BLOCK_N": block_n},
    )  # fmt: skip
    return True


def bwd_input(grad_y: Tensor, weight: Tensor, grad_x: Tensor, geometry: Geometry) -> bool:
    """Write grad_x from channels_last grad_y and weight, if boxes of pixels suit the images."""
    n, c, h, w = grad_x.shape
    folded = Folded.of(geometry, grad_x, grad_y)
    tiles = blocks(n * h * w, c, folded.channels, grad_x)
    pixels = best_box(n, h, w, tiles.pop("BLOCK_M"))
    if not _whole(folded, grad_y) or pixels.covered(n, h, w) > SPARE * n * h * w:
        return False
    while folded.channels % tiles["BLOCK_R"]:
        tiles["BLOCK_R"] //= 2
    if tiles["BLOCK_R"] < 16:
        return False
    counts = pixels.tiles(n, h, w)
    products = math.prod(counts) * triton.cdiv(c, tiles["BLOCK_N"])
    steps = weight[0].numel() // tiles["BLOCK_R"]
    each, shares = split(steps, products, affordable_shares(grad_x, grad_y, weight))
    out = grad_x if shares == 1 else grad_x.new_empty(shares, grad_x.numel(), dtype=torch.float32)
    c_vec, w_vec = vector_width(grad_x.element_size(), c), vector_width(grad_x.element_size(), w, pixels.columns)
    weights = folded.weight(weight, [tiles["BLOCK_N"], 1, tiles["BLOCK_R"]])
    launch(
        conv_transpose2d_bwd_input_tma_kernel, shares * products,
        folded.windows(grad_y, pixels, tiles["BLOCK_R"]), weights, out, each, n, h, w // w_vec, *counts, c // c_vec,
        folded.channels, C_VEC=c_vec, W_VEC=w_vec, SPLIT=shares > 1,
        CHANNELS_LAST=geometry.channels_last or shares > 1, PRECISION=precision(grad_x), UPCAST=INTERPRETED,
        WIDE=wide(out, grad_y), **folded.constants(), **pixels.constants(), **tiles,
    )  # fmt: skip
    if shares > 1:
        sum_shares(out, grad_x, c)
    return True


def bwd_weight(grad_y: Tensor, x: Tensor, grad_weight: Tensor, geometry: Geometry) -> bool:
    """Write grad_weight from channels_last x and grad_y, if boxes of pixels suit the images."""
    n, c, h, w = x.shape
    folded = Folded.of(geometry, x, grad_y)
    k, taps = folded.channels, math.prod(folded.geometry.kernel)
    tiles = blocks(c, k, n * h * w, x, fill=False)
    pixels = best_box(n, h, w, tiles.pop("BLOCK_R"))
    if not _whole(folded, grad_y) or pixels.covered(n, h, w) > SPARE * n * h * w or x.element_size() != 2:
        return False
    tiles["BLOCK_N"] = channel_block(k, tiles["BLOCK_N"])
    counts = pixels.tiles(n, h, w)
    products = triton.cdiv(c, tiles["BLOCK_M"]) * taps * triton.cdiv(k, tiles["BLOCK_N"])
    each, shares = split(math.prod(counts), products)
    in_place = shares == 1 and grad_weight.is_contiguous(memory_format=torch.channels_last)
    partials = grad_weight if in_place else x.new_empty(shares, grad_weight.numel(), dtype=torch.float32)
    k_vec = vector_width(partials.element_size(), k)
    launch(
        conv_transpose2d_bwd_weight_tma_kernel, shares * products,
        pixels_of(x, pixels, tiles["BLOCK_M"]), folded.windows(grad_y, pixels, tiles["BLOCK_N"]), partials,
        math.prod(counts), each, *counts[1:], c, k // k_vec, K_VEC=k_vec, PRECISION=precision(x), UPCAST=INTERPRETED,
        WIDE=wide(partials), **folded.constants(), **pixels.constants(), **tiles,
    )  # fmt: skip
    if not in_place:
        sum_shares(partials, grad_weight, grad_weight.shape[1])
    return True


def _whole(folded: Folded, grad_y: Tensor) -> bool:
    """Whether grad_y is whole windows' steps high and wide, so that the view of `windows` is all of it."""
    sh, sw = folded.geometry.stride
    return grad_y.shape[-2] % sh == 0 and folded.columns % sw == 0
