"""What the implicit GEMMs share: tl.dot, pixel coordinates, tile sizes, split-K partials, and changes of layout.

A GEMM here multiplies (M x R) by (R x N): R is its reduction dimension, because K stands for output channels. One
program computes a tile of BLOCK_M x BLOCK_N and steps through R in blocks of BLOCK_R. With split-K several programs
share a tile: each sums some of the steps into a float32 partial, and a second kernel adds the partials in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import INT32_MAX, has_tf32, launch, vector_width

ROOM = 1 << 22  # elements by which the offset of a masked lane may pass the last element
MULTIPROCESSORS = 132  # of an H100: tiles are halved while there are fewer of them
LEAST_STEPS = 4  # steps through R that are worth a partial
COPY_BLOCK = 64
SUM_BLOCK = 1024  # partials that a program loads at once; four times as many if there is only one program


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a @ b. UPCAST: in the interpreter, which would multiply bfloat16 by its bits."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def fast_divide(a, b):
    """a // b in 4 instructions instead of about 25. Exact for 0 <= a < 2^20 + 2^10."""
    return ((a.to(tl.float32) + 0.5) * (1.0 / b)).to(tl.int32)


@triton.jit
def pixel_coordinates(first, ROWS, COLUMNS, BLOCK: tl.constexpr):
    """(image, row, column) of each of the BLOCK consecutive pixels from the flat index `first` on."""
    row, column = first // COLUMNS, (first % COLUMNS).to(tl.int32) + tl.arange(0, BLOCK)
    image, row = row // ROWS, (row % ROWS).to(tl.int32)
    rows = fast_divide(column, COLUMNS)
    row += rows
    images = fast_divide(row, ROWS)
    return image + images, row - images * ROWS, column - rows * COLUMNS


@triton.jit
def apply_epilogue(acc, scale, bias, k, m_k, SCALE: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr):
    """relu(acc * scale[k] + bias[k]) in float32, where k is the channel of each column of acc.

    SCALE, BIAS, RELU: which of the three there are.
    """
    if SCALE:
        acc *= tl.load(scale + k, mask=m_k, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        acc += tl.load(bias + k, mask=m_k, other=0.0).to(tl.float32)[None, :]
    if RELU:
        acc = tl.where(acc <= 0, 0.0, acc)  # keeps NaN
    return acc


@triton.jit
def transpose_kernel(
    source, target, R_RUNS, S_RUNS, R_VEC: tl.constexpr, S_VEC: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program copies a BLOCK_R x BLOCK_S tile of (batch, R, S) to (batch, S, R). Reads and writes once."""
    # 1. Which tile
    R, S = R_RUNS * R_VEC, S_RUNS * S_VEC
    tiles_r, tiles_s = tl.cdiv(R, BLOCK_R), tl.cdiv(S, BLOCK_S)
    program = tl.program_id(0)
    tile = program % (tiles_r * tiles_s)
    batch = program // (tiles_r * tiles_s)
    if WIDE:
        batch, R, S = batch.to(tl.int64), tl.cast(R, tl.int64), tl.cast(S, tl.int64)
    r = tile // tiles_s * BLOCK_R + tl.arange(0, BLOCK_R)
    s = tile % tiles_s * BLOCK_S + tl.arange(0, BLOCK_S)

    # 2. Load and store
    m_live = (r < R)[:, None] & (s < S)[None, :]
    o_matrix = batch * S * R
    value = tl.load(source + (o_matrix + (r * S)[:, None] + s[None, :]), mask=m_live, other=0.0)
    tl.store(target + (o_matrix + r[:, None] + (s * R)[None, :]), value, mask=m_live)


@triton.jit
def sum_partials_kernel(
    partials, out, SPLITS, SIZE, TAPS, K, PERMUTED: tl.constexpr, WIDE: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program adds the SPLITS partials of each of BLOCK elements, in order, and loads BLOCK_S of them at a time.

    PERMUTED: the partials are (C, taps, K) and out is (C, K, taps). Reads the partials and writes out once.
    """
    # 1. Which elements
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_live = o < SIZE
    o_out = o
    if PERMUTED:
        o_out = (o // (TAPS * K) * K + o % K) * TAPS + o // K % TAPS
    if WIDE:
        SIZE = tl.cast(SIZE, tl.int64)

    # 2. Add the partials
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, SPLITS, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        o_partials = (split * SIZE)[:, None] + o[None, :]
        values = tl.load(partials + o_partials, mask=(split < SPLITS)[:, None] & m_live[None, :], other=0.0)
        total += tl.sum(values, axis=0)

    # 3. Store
    tl.store(out + o_out, total.to(out.dtype.element_ty), mask=m_live)


def needs_int64_offsets(*tensors: Tensor) -> bool:
    """Whether an offset into one of the tensors may need 64 bits."""
    return max(t.numel() for t in tensors) > INT32_MAX - ROOM


def input_precision(x: Tensor) -> str:
    """How tl.dot multiplies float32: as TF32 if torch allows that for cuDNN's convolutions, else exactly."""
    # The setting of convolutions alone: allow_tf32 raises if those of convolutions and RNNs differ.
    tf32 = x.dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"
    return "tf32" if tf32 and has_tf32(x) else "ieee"


def tile_sizes(m: int, n: int, depth: int, x: Tensor, fill: bool = True, vector: int = 8) -> dict[str, int]:
    """Block sizes, warps and stages for an (m x depth) @ (depth x n) GEMM in x's dtype.

    128 x 128 x 64 on tensor cores: two such programs with three stages of loads fit on a multiprocessor. The tile is
    smaller if the GEMM is smaller or, to fill a GPU (`fill`), if it has too few tiles. BLOCK_R is half as large for
    float32. The tile is 64 x 64 if float32 is multiplied exactly, without tensor cores. It is 64 x 64 x 32 if the
    narrowest access, of `vector` elements, is shorter than the 4 bytes of an asynchronous copy: such accesses are many
    and go through registers, which suffice for a small tile on more warps.
    """
    through_registers = vector * x.element_size() < 4
    exact = input_precision(x) == "ieee" and x.dtype == torch.float32
    most = 64 if exact or through_registers else 128
    block_m, block_n = (min(most, max(16, triton.next_power_of_2(size))) for size in (m, n))
    while fill and max(block_m, block_n) > 64 and triton.cdiv(m, block_m) * triton.cdiv(n, block_n) < MULTIPROCESSORS:
        block_m, block_n = (block_m // 2, block_n) if block_m > 64 else (block_m, block_n // 2)
    deepest = 32 if through_registers else 128 // x.element_size()
    block_r = min(deepest, max(16, triton.next_power_of_2(depth)))
    warps = 8 if block_m * block_n > (32 * 64 if through_registers else 64 * 128) else 4
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_R": block_r, "num_warps": warps, "num_stages": 3}


def channel_block(k: int, most: int) -> int:
    """The largest block, up to `most`, that pads k channels by at most an eighth; else the one that pads them least."""
    if k <= 16:
        return triton.next_power_of_2(k)
    choices = [block for block in (128, 64, 32, 16) if block <= most]
    padded = {block: triton.cdiv(k, block) * block for block in choices}
    return next((block for block in choices if 8 * padded[block] <= 9 * k), min(choices, key=padded.__getitem__))


def tile_count(m: int, n: int, sizes: dict[str, int]) -> int:
    """The number of tiles of an m x n GEMM."""
    return triton.cdiv(m, sizes["BLOCK_M"]) * triton.cdiv(n, sizes["BLOCK_N"])


def to_layout(x: Tensor, layout: torch.memory_format) -> Tensor:
    """x, which is dense in either layout, in the given one: itself, or a copy that is read and written once."""
    if x.is_contiguous(memory_format=layout):
        return x
    copy = torch.empty_like(x, memory_format=layout)
    transpose_into(x, copy, to_channels_last=layout == torch.channels_last)
    return copy


def transpose_into(x: Tensor, copy: Tensor, to_channels_last: bool) -> None:
    """Fill `copy` from x: one of them is NCHW, the other channels_last."""
    n, c, h, w = x.shape
    r, s = (c, h * w) if to_channels_last else (h * w, c)
    r_vec, s_vec = vector_width(x.element_size(), r), vector_width(x.element_size(), s)
    block_r, block_s = (min(COPY_BLOCK, triton.next_power_of_2(size)) for size in (r, s))
    launch(
        transpose_kernel, n * triton.cdiv(r, block_r) * triton.cdiv(s, block_s),
        x, copy, r // r_vec, s // s_vec, R_VEC=r_vec, S_VEC=s_vec, BLOCK_R=block_r, BLOCK_S=block_s,
        WIDE=needs_int64_offsets(x),
    )  # fmt: skip


def split_k(steps: int, tiles: int, most: int = 2 * MULTIPROCESSORS) -> tuple[int, int]:
    """(steps of each split, number of splits, at most `most`) of a reduction in `steps` steps for each tile.

    About two programs for each multiprocessor, none with very few steps. The result depends only on sizes, so that a
    sum is the same on every GPU.
    """
    splits = max(1, min(2 * MULTIPROCESSORS // max(tiles, 1), steps // LEAST_STEPS, most))
    each = max(1, triton.cdiv(steps, splits))
    return each, max(1, triton.cdiv(steps, each))


def affordable_splits(out: Tensor, *operands: Tensor) -> int:
    """The most splits whose float32 partials of `out`, written and read, are an eighth of the operands' bytes."""
    return sum(t.numel() * t.element_size() for t in operands) // max(1, 8 * 8 * out.numel())


def sum_partials(partials: Tensor, out: Tensor, k: int) -> None:
    """Add the partials (splits, ...) into `out`.

    `out` is a vector (K,), or a weight or image (C, K, KH, KW) whose partials are (splits, C, KH, KW, K).
    """
    splits, size = partials.shape[0], out.numel()
    permuted = out.dim() == 4 and not out.is_contiguous(memory_format=torch.channels_last)
    at_once = triton.next_power_of_2(splits)
    block = SUM_BLOCK // min(16, at_once)
    if size < block:  # a bias: one program
        block = max(16, triton.next_power_of_2(size))
    block_s = min(at_once, 4 * SUM_BLOCK // block if size <= block else 16)
    launch(
        sum_partials_kernel, triton.cdiv(size, block),
        partials, out, splits, size, out[0, 0].numel() if permuted else 1, k, PERMUTED=permuted,
        WIDE=needs_int64_offsets(partials), BLOCK_S=block_s, BLOCK=block,
    )  # fmt: skip
