"""Kernels that are right and bad, for the gates to catch."""

import triton
import triton.language as tl


@triton.jit
def strided_copy_kernel(x, y, N, BLOCK: tl.constexpr):
    """Lanes a row of 64 apart: each access is one element wide."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o = o % 64 * (N // 64) + o // 64
    tl.store(y + o, tl.load(x + o, mask=o < N, other=0.0), mask=o < N)


@triton.jit
def padded_copy_kernel(x, y, N, BLOCK: tl.constexpr):
    """Reads every element twice as far apart as it has to, so that half of each sector is wasted."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + 2 * o, mask=o < N, other=0.0), mask=o < N)


@triton.jit
def spilling_kernel(x, w, y, BLOCK: tl.constexpr):
    """One warp holds a product that does not fit its registers."""
    o = tl.arange(0, BLOCK)
    square = o[:, None] * BLOCK + o[None, :]
    tl.store(y + square, tl.dot(tl.load(x + square), tl.load(w + square)).to(y.dtype.element_ty))


@triton.jit
def atomic_sum_kernel(x, y, N, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(y + o % 8, tl.load(x + o, mask=o < N, other=0.0), mask=o < N)


@triton.jit
def scalar_product_kernel(x, w, y, N, BLOCK: tl.constexpr):
    """A product without tl.dot: neither the tensor cores nor the copy engine have a part in it."""
    o = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for r in range(N):
        acc += tl.load(x + o * N + r).to(tl.float32)[:, None] * tl.load(w + r * BLOCK + o).to(tl.float32)[None, :]
    tl.store(y + o[:, None] * BLOCK + o[None, :], acc.to(y.dtype.element_ty))


@triton.jit
def shared_sum_kernel(x, y, N, BLOCK: tl.constexpr):
    """Programs a pair of which write their sums to one place."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + tl.program_id(0) // 2, tl.sum(tl.load(x + o, mask=o < N, other=0.0), axis=0))


@triton.jit
def shifted_in_place_kernel(x, N, BLOCK: tl.constexpr):
    """Each program reads the first element of the next one's block, written or not."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + o, tl.load(x + o + 1, mask=o + 1 < N, other=0.0), mask=o < N)


@triton.jit
def reversed_in_place_kernel(x, y, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    """What one thread stores another one loads."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o))
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + o, tl.load(y + tl.program_id(0) * BLOCK + BLOCK - 1 - tl.arange(0, BLOCK)))


@triton.jit
def doubling_kernel(x, BLOCK: tl.constexpr):
    """In place, each thread for itself."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + o, 2 * tl.load(x + o))


@triton.jit
def scatter_kernel(x, indices, y, BLOCK: tl.constexpr):
    """Where indices repeat, any of the values may stay."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + tl.load(indices + o), tl.load(x + o))


@triton.jit
def two_maps_of_a_workspace_kernel(x, y, N, BLOCK: tl.constexpr):
    """A program's bytes of one type are another program's of the other: y is a view of x."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o).to(y.dtype.element_ty))
