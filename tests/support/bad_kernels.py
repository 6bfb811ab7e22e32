"""Kernels with right results that the gates on machine code, traffic and races must reject."""

import triton
import triton.language as tl


@triton.jit
def strided_copy_kernel(x, y, N, BLOCK: tl.constexpr):
    """Neighboring lanes are a row of 64 elements apart, so each access is one element wide."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o = o % 64 * (N // 64) + o // 64
    tl.store(y + o, tl.load(x + o, mask=o < N, other=0.0), mask=o < N)


@triton.jit
def padded_copy_kernel(x, y, N, BLOCK: tl.constexpr):
    """Reads every second element, so half of each sector is wasted."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + 2 * o, mask=o < N, other=0.0), mask=o < N)


@triton.jit
def spilling_kernel(x, w, y, BLOCK: tl.constexpr):
    """One warp holds a matrix product that does not fit its registers."""
    o = tl.arange(0, BLOCK)
    square = o[:, None] * BLOCK + o[None, :]
    tl.store(y + square, tl.dot(tl.load(x + square), tl.load(w + square)).to(y.dtype.element_ty))


@triton.jit
def atomic_sum_kernel(x, y, N, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(y + o % 8, tl.load(x + o, mask=o < N, other=0.0), mask=o < N)


@triton.jit
def scalar_product_kernel(x, w, y, N, BLOCK: tl.constexpr):
    """A matrix product without tl.dot: it uses neither tensor cores nor TMA."""
    o = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for r in range(N):
        acc += tl.load(x + o * N + r).to(tl.float32)[:, None] * tl.load(w + r * BLOCK + o).to(tl.float32)[None, :]
    tl.store(y + o[:, None] * BLOCK + o[None, :], acc.to(y.dtype.element_ty))


@triton.jit
def shared_sum_kernel(x, y, N, BLOCK: tl.constexpr):
    """Each two programs write their sums to the same address."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + tl.program_id(0) // 2, tl.sum(tl.load(x + o, mask=o < N, other=0.0), axis=0))


@triton.jit
def shifted_in_place_kernel(x, N, BLOCK: tl.constexpr):
    """Each program reads the first element of the next program's block, which may be written already."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + o, tl.load(x + o + 1, mask=o + 1 < N, other=0.0), mask=o < N)


@triton.jit
def reversed_in_place_kernel(x, y, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    """One thread loads what another thread stores."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o))
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + o, tl.load(y + tl.program_id(0) * BLOCK + BLOCK - 1 - tl.arange(0, BLOCK)))


@triton.jit
def doubling_kernel(x, BLOCK: tl.constexpr):
    """In place: each thread loads and stores its own elements."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + o, 2 * tl.load(x + o))


@triton.jit
def scatter_kernel(x, indices, y, BLOCK: tl.constexpr):
    """If indices repeat, any one of the values may remain."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + tl.load(indices + o), tl.load(x + o))


@triton.jit
def two_types_of_a_workspace_kernel(x, y, N, BLOCK: tl.constexpr):
    """y is a view of x in another type: one program's bytes of x are another program's bytes of y."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o).to(y.dtype.element_ty))
