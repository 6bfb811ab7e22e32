"""Backward of transposed convolution with kernel = stride: each pixel of x has a rectangle of grad_y to itself.

So the gradients are two products of plain matrices with the columns (k, rh, rw), in NCHW, or (rh, rw, k), in
channels_last, in which order the weight's rows lie too:

    grad_x (pixels, C) = grad_y (pixels, columns) @ weight (C, columns)^T
    grad_weight (C, columns) = x (pixels, C)^T @ grad_y (pixels, columns)

In NCHW grad_y is read in rows and shuffled in registers, so that nothing is copied to channels_last. Where C and the
columns fit one block, as in the widest maps of a U-Net, one kernel reads x and grad_y once and makes both, and the
bias's gradient. ReLU's mask is applied on the way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import INTERPRETED, launch, roomy, vector_width
from .gemm import blocks, multiply, place, precision, programs, split, sum_shares, transposed, wide
from .geometry import Geometry

MOST_COLUMNS = 256  # of the weight, for one kernel to make both gradients: it holds its sums in registers
FEW_COLUMNS = 32  # so few are left to the other kernels
MOST_CHANNELS = 256  # of x in NCHW: beyond, grad_y would be shuffled so often that it had better be copied once
LEAST_PIXELS = 256  # of a share: fewer are not worth its partial sums
MOST_STRIDE, MOST_AREA = 16, 64  # a block of columns holds whole rows, and for the bias whole rectangles


@triton.jit
def rectangles(
    grad_y, y, first, column, PIXELS, H, W, COLUMNS,
    SH: tl.constexpr, SW: tl.constexpr, W_VEC: tl.constexpr, RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M pixels from `first`, BLOCK_N columns from `column`) of grad_y, zero where RELU and y is not above 0."""
    if CHANNELS_LAST:
        image, h, v = place(first, H, W, BLOCK_M)
        n = column + tl.arange(0, BLOCK_N)
        run = COLUMNS // SH  # columns of a row: neighbours in memory
        rows = ((image * H + h) * (SH * W) + v) * run
        source = rows[:, None] + (n // run * (W * run) + n % run)[None, :]
        live = (first + tl.arange(0, BLOCK_M) < PIXELS)[:, None] & (n < COLUMNS)[None, :]
    else:
        image, h, ow = place(first * SW, H, W * SW, BLOCK_M * SW)
        u = column // SW + tl.arange(0, BLOCK_N // SW)
        rows = (image * (COLUMNS // SW) * H + h * SH) * (SW * W) + ow
        rows = tl.max_contiguous(tl.multiple_of(rows, W_VEC), W_VEC)
        source = rows[:, None] + ((u // SH * H * SH + u % SH) * (SW * W))[None, :]
        live = tl.max_constancy(first * SW + tl.arange(0, BLOCK_M * SW) < PIXELS * SW, W_VEC)
        live = live[:, None] & (u * SW < COLUMNS)[None, :]
    grads = tl.load(grad_y + source, mask=live, other=0.0)
    if RELU:
        grads = tl.where(tl.load(y + source, mask=live, other=0.0).to(tl.float32) <= 0, 0.0, grads.to(tl.float32))
        grads = grads.to(grad_y.dtype.element_ty)
    if not CHANNELS_LAST and SW > 1:
        grads = tl.permute(tl.reshape(grads, (BLOCK_M, SW, BLOCK_N // SW)), (0, 2, 1))
        grads = tl.reshape(grads, (BLOCK_M, BLOCK_N))
    return grads


@triton.jit
def image_offsets(m, image, h, v, c, C, H, W, W_VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Of pixels m, at rows h and columns v of images, and channels c in x and in grad_x."""
    if CHANNELS_LAST:
        return (m * C)[:, None] + c[None, :]
    pixel = tl.max_contiguous(tl.multiple_of((image * C * H + h) * W + v, W_VEC), W_VEC)
    return pixel[:, None] + (c * (H * W))[None, :]


@triton.jit
def conv_transpose2d_bwd_input_shuffle_kernel(
    grad_y, y, w, grad_x, PIXELS, H, W_RUNS, C, COLUMN_RUNS,
    SH: tl.constexpr, SW: tl.constexpr, W_VEC: tl.constexpr, COLUMN_VEC: tl.constexpr, RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program makes BLOCK_M pixels x BLOCK_N channels of grad_x. Reads grad_y once for each BLOCK_N channels."""
    W, COLUMNS = W_RUNS * W_VEC, COLUMN_RUNS * COLUMN_VEC
    program = tl.program_id(0)
    if WIDE:
        C, COLUMNS, program = tl.cast(C, tl.int64), tl.cast(COLUMNS, tl.int64), program.to(tl.int64)
    tiles = tl.cdiv(C, BLOCK_N)
    first = program // tiles * BLOCK_M
    c = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for n in range(0, COLUMNS, BLOCK_R):
        grads = rectangles(
            grad_y, y, first, n, PIXELS, H, W, COLUMNS, SH, SW, W_VEC, RELU, CHANNELS_LAST, BLOCK_M, BLOCK_R
        )
        live = (c < C)[None, :] & (n + r < COLUMNS)[:, None]
        weights = tl.load(w + ((c * COLUMNS)[None, :] + (n + r)[:, None]), mask=live, other=0.0)
        acc = multiply(grads, weights, acc, PRECISION, UPCAST)
    m = first + tl.arange(0, BLOCK_M)
    live = tl.max_constancy(m < PIXELS, W_VEC)[:, None] & (c < C)[None, :]
    image, h, v = place(first, H, W, BLOCK_M)
    out = image_offsets(m, image, h, v, c, C, H, W, W_VEC, CHANNELS_LAST)
    tl.store(grad_x + out, acc.to(grad_x.dtype.element_ty), mask=live)


@triton.jit
def conv_transpose2d_bwd_shuffle_kernel(
    x, grad_y, y, w, grad_x, partials, bias_partials, PIXELS, STEPS, SHARE, H, W_RUNS, C_RUNS, COLUMN_RUNS,
    SH: tl.constexpr, SW: tl.constexpr, W_VEC: tl.constexpr, C_VEC: tl.constexpr, COLUMN_VEC: tl.constexpr,
    INPUT: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program sums BLOCK_M channels c x BLOCK_N columns over SHARE blocks of BLOCK_R pixels.

    INPUT: all columns are one block, and these channels of grad_x are made on the way. BIAS: the programs of the first
    channels sum the columns too. Reads x once for each BLOCK_N columns and grad_y once for each BLOCK_M channels;
    writes partials (shares, C, columns) and bias_partials (shares, columns), in NCHW (shares, K).
    """
    C, W, COLUMNS = C_RUNS * C_VEC, W_RUNS * W_VEC, COLUMN_RUNS * COLUMN_VEC
    program = tl.program_id(0)
    if WIDE:
        C, COLUMNS, program = tl.cast(C, tl.int64), tl.cast(COLUMNS, tl.int64), program.to(tl.int64)
    tiles_m, tiles_n = tl.cdiv(C, BLOCK_M), tl.cdiv(COLUMNS, BLOCK_N)
    share = program // (tiles_m * tiles_n)
    tile = program % (tiles_m * tiles_n)
    column = tile % tiles_n * BLOCK_N
    c, n = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    live_w = (c < C)[:, None] & (n < COLUMNS)[None, :]
    o_w = (c * COLUMNS)[:, None] + n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums = tl.zeros((BLOCK_N,), tl.float32)
    step = share * SHARE
    for s in range(0, tl.minimum(SHARE, STEPS - step)):
        first = (step + s) * BLOCK_R
        m = first + tl.arange(0, BLOCK_R)
        live = tl.max_constancy(m < PIXELS, W_VEC)[:, None] & tl.max_constancy(c < C, C_VEC)[None, :]
        image, h, v = place(first, H, W, BLOCK_R)
        source = image_offsets(m, image, h, v, c, C, H, W, W_VEC, CHANNELS_LAST)
        pixels = tl.load(x + source, mask=live, other=0.0)
        grads = rectangles(
            grad_y, y, first, column, PIXELS, H, W, COLUMNS, SH, SW, W_VEC, RELU, CHANNELS_LAST, BLOCK_R, BLOCK_N
        )
        acc = multiply(tl.trans(pixels), grads, acc, PRECISION, UPCAST)
        if BIAS:
            sums += tl.sum(grads.to(tl.float32), axis=0)
        if INPUT:
            weights = tl.load(w + o_w, mask=live_w, other=0.0)
            made = multiply(weights, tl.trans(grads), tl.zeros((BLOCK_M, BLOCK_R), tl.float32), PRECISION, UPCAST)
            tl.store(grad_x + source, tl.trans(made.to(grad_x.dtype.element_ty)), mask=live)
    tl.store(partials + (share * C * COLUMNS + o_w), acc, mask=live_w)
    if BIAS and tile < tiles_n:
        area: tl.constexpr = 1 if CHANNELS_LAST else SH * SW  # neighbours of one k
        k = column // area + tl.arange(0, BLOCK_N // area)
        of_k = sums if CHANNELS_LAST else tl.sum(tl.reshape(sums, (BLOCK_N // area, area)), axis=1)
        tl.store(bias_partials + (share * (COLUMNS // area) + k), of_k, mask=k * area < COLUMNS)


def applies(x: Tensor, grad_y: Tensor, weight: Tensor, geometry: Geometry, both: bool) -> bool:
    """Whether these kernels make the gradients of input and weight, or, unless `both`, the one that is asked for.

    In channels_last, where nothing need be copied, only where one kernel makes both.
    """
    sizes = x.shape[-2:], grad_y.shape[-2:]
    if both and one_kernel(*sizes, weight, x.dtype, geometry):
        return True
    return not geometry.channels_last and _covers(*sizes, weight, x.dtype, geometry)


def one_kernel(
    image: Sequence[int], output: Sequence[int], weight: Tensor, dtype: torch.dtype, geometry: Geometry
) -> bool:
    """Whether one kernel makes both gradients: the columns are one block of a product."""
    return _columns(weight) <= MOST_COLUMNS and _covers(image, output, weight, dtype, geometry)


def _covers(
    image: Sequence[int], output: Sequence[int], weight: Tensor, dtype: torch.dtype, geometry: Geometry
) -> bool:
    """Not in float32, whose products outlast a copy of grad_y, nor where rows are not whole vectors.

    Nor for few columns: Triton's compiler fails where shuffled rows are shorter than the swizzle of shared memory.
    """
    area, half = weight[0, 0].numel(), dtype in (torch.float16, torch.bfloat16)
    if not half or geometry.groups > 1 or weight.shape[0] > MOST_CHANNELS or weight[0].numel() <= FEW_COLUMNS:
        return False
    rows = (weight.shape[0], geometry.stride[1] * weight.shape[1]) if geometry.channels_last else (image[1],)
    if vector_width(2, *rows) < 8:
        return False
    return area <= MOST_AREA and geometry.stride[1] <= MOST_STRIDE and geometry.shuffles(image, output)


def _columns(weight: Tensor) -> int:
    return max(16, triton.next_power_of_2(weight[0].numel()))


def bwd(
    grad_y: Tensor, y: Tensor | None, x: Tensor, weight: Tensor, grad_x: Tensor | None, grad_weight: Tensor | None,
    grad_bias: Tensor | None, geometry: Geometry,
) -> None:  # fmt: skip
    """Write the gradients that are not None; grad_bias only beside grad_weight. y: where its ReLU masks grad_y."""
    layout = torch.channels_last if geometry.channels_last else torch.contiguous_format
    grad_y, x, weight = (transposed(t, layout) for t in (grad_y, x, weight))
    (n, c, h, w), columns = x.shape, weight[0].numel()
    c_vec, w_vec, column_vec = (vector_width(x.element_size(), size) for size in (c, w, columns))
    sizes = (h, w // w_vec)
    constants = {
        "SH": geometry.stride[0], "SW": geometry.stride[1], "W_VEC": w_vec, "COLUMN_VEC": column_vec,
        "RELU": y is not None, "CHANNELS_LAST": geometry.channels_last, "PRECISION": precision(x),
        "UPCAST": INTERPRETED, "WIDE": wide(x, weight, grad_y),
    }  # fmt: skip
    masking = grad_y if y is None else y
    together = grad_x is not None and grad_weight is not None and _columns(weight) <= MOST_COLUMNS
    if grad_x is not None and not together:
        tiles = blocks(n * h * w, c, columns, x)
        launch(
            conv_transpose2d_bwd_input_shuffle_kernel, programs(n * h * w, c, tiles),
            grad_y, masking, weight, grad_x, n * h * w, *sizes, c, columns // column_vec, **constants, **tiles,
        )  # fmt: skip
    if grad_weight is None:
        return
    tiles = blocks(c, columns, n * h * w, x, fill=False)
    if together:
        most, stages = (64, 3) if roomy(x) else (32, 2)  # so that nothing spills
        tiles |= {"BLOCK_M": min(most, tiles["BLOCK_M"]), "BLOCK_N": _columns(weight), "BLOCK_R": 32}
        tiles |= {"num_warps": 8, "num_stages": stages}
    steps, products = triton.cdiv(n * h * w, tiles["BLOCK_R"]), programs(c, columns, tiles)
    each, shares = split(steps, products, most=max(1, n * h * w // LEAST_PIXELS))
    partials = x.new_empty(shares, grad_weight.numel(), dtype=torch.float32)
    bias_rows = shares * (weight[0, 0].numel() if geometry.channels_last else 1)
    bias_partials = x.new_empty(bias_rows if grad_bias is not None else 0, weight.shape[1], dtype=torch.float32)
    launch(
        conv_transpose2d_bwd_shuffle_kernel, shares * products,
        x, grad_y, masking, weight, grad_x if together else x, partials, bias_partials, n * h * w, steps, each, *sizes,
        c // c_vec, columns // column_vec, C_VEC=c_vec, INPUT=together, BIAS=grad_bias is not None, **constants,
        **tiles,
    )  # fmt: skip
    if geometry.channels_last:
        sum_shares(partials, grad_weight, weight.shape[1])
    else:
        sum_shares(partials, grad_weight.view(-1), 1)
    if grad_bias is not None:
        sum_shares(bias_partials, grad_bias, 1)
