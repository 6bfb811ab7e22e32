"""What implicit matrix products share: tl.dot, where rows lie, block sizes, sums in shares, changes of layout."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import INT32_MAX, launch, vector_width

ROOM = 1 << 22  # elements by which a masked lane's offset may pass the last one
PROGRAMS = 132  # with fewer programs than an H100 has multiprocessors, blocks are halved
LEAST_STEPS = 4  # blocks of a sum that are worth a share of their own
COPY_BLOCK = 64
SUM_BLOCK = 1024  # partial sums that a program loads at once; four times as many where there is no second program


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a @ b. UPCAST: the interpreter would multiply bf16 by its bits."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def quotient(a, b):
    """a // b, in four instructions in place of some twenty-five. Exact for 0 <= a < 2^20, and some 2^10 beyond."""
    return ((a.to(tl.float32) + 0.5) * (1.0 / b)).to(tl.int32)


@triton.jit
def place(first, ROWS, COLUMNS, BLOCK: tl.constexpr):
    """(image, row, column) of each of BLOCK neighbours from the flat index `first` on."""
    row, column = first // COLUMNS, (first % COLUMNS).to(tl.int32) + tl.arange(0, BLOCK)
    image, row = row // ROWS, (row % ROWS).to(tl.int32)
    below = quotient(column, COLUMNS)
    row += below
    behind = quotient(row, ROWS)
    return image + behind, row - behind * ROWS, column - below * COLUMNS


@triton.jit
def transpose_kernel(
    source, target, R_RUNS, S_RUNS, R_VEC: tl.constexpr, S_VEC: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program copies a BLOCK_R x BLOCK_S tile of (batch, R, S) to (batch, S, R). Reads and writes once."""
    R, S = R_RUNS * R_VEC, S_RUNS * S_VEC
    tiles_r, tiles_s = tl.cdiv(R, BLOCK_R), tl.cdiv(S, BLOCK_S)
    program = tl.program_id(0)
    tile = program % (tiles_r * tiles_s)
    batch = program // (tiles_r * tiles_s)
    if WIDE:
        batch, R, S = batch.to(tl.int64), tl.cast(R, tl.int64), tl.cast(S, tl.int64)
    r = tile // tiles_s * BLOCK_R + tl.arange(0, BLOCK_R)
    s = tile % tiles_s * BLOCK_S + tl.arange(0, BLOCK_S)
    live = (r < R)[:, None] & (s < S)[None, :]
    matrix = batch * S * R
    value = tl.load(source + (matrix + (r * S)[:, None] + s[None, :]), mask=live, other=0.0)
    tl.store(target + (matrix + r[:, None] + (s * R)[None, :]), value, mask=live)


@triton.jit
def sum_shares_kernel(
    partials, out, SHARES, SIZE, TAPS, K, PERMUTED: tl.constexpr, WIDE: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program adds the SHARES values of each of BLOCK elements, BLOCK_S at a time, which are in flight together.

    PERMUTED: the partials are (C, taps, K) and out is (C, K, taps). Reads the partials and writes out once.
    """
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = o < SIZE
    to = o
    if PERMUTED:
        to = (o // (TAPS * K) * K + o % K) * TAPS + o // K % TAPS
    if WIDE:
        SIZE = tl.cast(SIZE, tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, SHARES, BLOCK_S):
        share = first + tl.arange(0, BLOCK_S)
        source = (share * SIZE)[:, None] + o[None, :]
        values = tl.load(partials + source, mask=(share < SHARES)[:, None] & live[None, :], other=0.0)
        total += tl.sum(values, axis=0)
    tl.store(out + to, total.to(out.dtype.element_ty), mask=live)


def wide(*tensors: Tensor) -> bool:
    """Whether an offset into one of the tensors may need 64 bits."""
    return max(t.numel() for t in tensors) > INT32_MAX - ROOM


def precision(x: Tensor) -> str:
    """How tl.dot multiplies float32: rounded to TF32 where torch lets cuDNN's convolutions do so, else exactly."""
    # The switch of convolutions alone: allow_tf32 raises where convolutions and RNNs differ.
    tf32 = x.dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def blocks(m: int, n: int, depth: int, x: Tensor, fill: bool = True, vector: int = 8) -> dict[str, int]:
    """Block sizes of an (m x depth) @ (depth x n) product of x's dtype, and warps.

    128 x 128 x 64 for the tensor cores: two such programs with three stages of loads fit a multiprocessor. Less where
    the product is smaller or, to fill a GPU, where it would make too few programs; half as deep for float32, and
    64 x 64 where that is multiplied exactly, without tensor cores. 64 x 64 x 32 where the narrowest access, of `vector`
    elements, has not the 4 bytes of an asynchronous copy: such are many, and through registers, which more warps have.
    """
    through_registers = vector * x.element_size() < 4
    exact = precision(x) == "ieee" and x.dtype == torch.float32
    most = 64 if exact or through_registers else 128
    block_m, block_n = (min(most, max(16, triton.next_power_of_2(size))) for size in (m, n))
    while fill and max(block_m, block_n) > 64 and triton.cdiv(m, block_m) * triton.cdiv(n, block_n) < PROGRAMS:
        block_m, block_n = (block_m // 2, block_n) if block_m > 64 else (block_m, block_n // 2)
    deepest = 32 if through_registers else 128 // x.element_size()
    block_r = min(deepest, max(16, triton.next_power_of_2(depth)))
    warps = 8 if block_m * block_n > (32 * 64 if through_registers else 64 * 128) else 4
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_R": block_r, "num_warps": warps, "num_stages": 3}


def channel_block(k: int, most: int) -> int:
    """The largest block that pads k channels by an eighth at most; else that which pads them least."""
    if k <= 16:
        return triton.next_power_of_2(k)
    choices = [block for block in (128, 64, 32, 16) if block <= most]
    padded = {block: triton.cdiv(k, block) * block for block in choices}
    return next((block for block in choices if 8 * padded[block] <= 9 * k), min(choices, key=padded.__getitem__))


def programs(m: int, n: int, tiles: dict[str, int]) -> int:
    """How many blocks cover an m x n product."""
    return triton.cdiv(m, tiles["BLOCK_M"]) * triton.cdiv(n, tiles["BLOCK_N"])


def transposed(x: Tensor, layout: torch.memory_format) -> Tensor:
    """x (contiguous or channels_last) in the given layout: itself, or a copy that is read and written once."""
    if x.is_contiguous(memory_format=layout):
        return x
    copy = torch.empty_like(x, memory_format=layout)
    transpose_into(x, copy, to_channels_last=layout == torch.channels_last)
    return copy


def transpose_into(x: Tensor, copy: Tensor, to_channels_last: bool) -> None:
    """Fill `copy` from x, the one in NCHW and the other in channels_last."""
    n, c, h, w = x.shape
    r, s = (c, h * w) if to_channels_last else (h * w, c)
    r_vec, s_vec = vector_width(x.element_size(), r), vector_width(x.element_size(), s)
    block_r, block_s = (min(COPY_BLOCK, triton.next_power_of_2(size)) for size in (r, s))
    launch(
        transpose_kernel, n * triton.cdiv(r, block_r) * triton.cdiv(s, block_s),
        x, copy, r // r_vec, s // s_vec, R_VEC=r_vec, S_VEC=s_vec, BLOCK_R=block_r, BLOCK_S=block_s, WIDE=wide(x),
    )  # fmt: skip


def split(steps: int, tiles: int, most: int = 2 * PROGRAMS) -> tuple[int, int]:
    """(steps of a share, shares): about two programs for each multiprocessor, none of too few steps; at most `most`.

    It depends on the sizes alone, so that a sum is the same on every GPU.
    """
    shares = max(1, min(2 * PROGRAMS // max(tiles, 1), steps // LEAST_STEPS, most))
    each = max(1, triton.cdiv(steps, shares))
    return each, max(1, triton.cdiv(steps, each))


def affordable_shares(out: Tensor, *operands: Tensor) -> int:
    """As many as have float32 partials of `out` that, written and read, are an eighth of the operands' bytes."""
    return sum(t.numel() * t.element_size() for t in operands) // max(1, 8 * 8 * out.numel())


def sum_shares(partials: Tensor, out: Tensor, k: int) -> None:
    """Add up partials (shares, ...) into out: (K,), or a weight or image (C, K, KH, KW) from (shares, C, KH, KW, K)."""
    shares, size = partials.shape[0], out.numel()
    permuted = out.dim() == 4 and not out.is_contiguous(memory_format=torch.channels_last)
    some = triton.next_power_of_2(shares)
    block = SUM_BLOCK // min(16, some)
    if size < block:  # a bias: one program
        block = max(16, triton.next_power_of_2(size))
    block_s = min(some, 4 * SUM_BLOCK // block if size <= block else 16)
    launch(
        sum_shares_kernel, triton.cdiv(size, block),
        partials, out, shares, size, out[0, 0].numel() if permuted else 1, k, PERMUTED=permuted, WIDE=wide(partials),
        BLOCK_S=block_s, BLOCK=block,
    )  # fmt: skip
