"""Backward of a transposed convolution whose kernel size equals its stride: each pixel of x owns a rectangle of grad_y.

So the gradients are two GEMMs of plain matrices. Their columns are (k, rh, rw) in NCHW and (rh, rw, k) in
channels_last, the order of the weight's rows in memory:

    grad_x (pixels, C) = grad_y (pixels, columns) @ weight (C, columns)^T
    grad_weight (C, columns) = x (pixels, C)^T @ grad_y (pixels, columns)

In NCHW grad_y is read in rows and shuffled in registers, so that nothing is copied to channels_last. If C and the
columns fit one tile, as in the widest maps of a U-Net, one kernel reads x and grad_y once and computes both gradients,
and the bias's. ReLU's mask is applied on the way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import INTERPRETED, launch, roomy, vector_width
from .gemm import (
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
from .options import ConvTransposeGradients
from .problem import ConvProblem

MOST_COLUMNS = 256  # of the weight, for one kernel that computes both gradients: its sums are held in registers
FEW_COLUMNS = 32  # up to this number the other kernels run
MOST_CHANNELS = 256  # of x in NCHW: with more, grad_y would be shuffled so often that one copy of it is cheaper
LEAST_PIXELS = 256  # of a split: fewer are not worth its partials
MOST_STRIDE, MOST_AREA = 16, 64  # a block of columns holds whole rows and, for the bias, whole rectangles


@triton.jit
def load_rectangles(
    grad_y, y, first, column, PIXELS, H, W, COLUMNS,
    SH: tl.constexpr, SW: tl.constexpr, W_VEC: tl.constexpr, RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_y as a (BLOCK_M pixels, BLOCK_N columns) tile from pixel `first` and `column` on.

    RELU: zero where y is not above 0.
    """
    if CHANNELS_LAST:
        image, h, v = pixel_coordinates(first, H, W, BLOCK_M)
        n = column + tl.arange(0, BLOCK_N)
        run = COLUMNS // SH  # columns of a row: contiguous in memory
        o_rows = ((image * H + h) * (SH * W) + v) * run
        o_grads = o_rows[:, None] + (n // run * (W * run) + n % run)[None, :]
        m_live = (first + tl.arange(0, BLOCK_M) < PIXELS)[:, None] & (n < COLUMNS)[None, :]
    else:
        image, h, ow = pixel_coordinates(first * SW, H, W * SW, BLOCK_M * SW)
        u = column // SW + tl.arange(0, BLOCK_N // SW)
        o_rows = (image * (COLUMNS // SW) * H + h * SH) * (SW * W) + ow
        o_rows = tl.max_contiguous(tl.multiple_of(o_rows, W_VEC), W_VEC)
        o_grads = o_rows[:, None] + ((u // SH * H * SH + u % SH) * (SW * W))[None, :]
        m_live = tl.max_constancy(first * SW + tl.arange(0, BLOCK_M * SW) < PIXELS * SW, W_VEC)
        m_live = m_live[:, None] & (u * SW < COLUMNS)[None, :]
    grads = tl.load(grad_y + o_grads, mask=m_live, other=0.0)
    if RELU:
        grads = tl.where(tl.load(y + o_grads, mask=m_live, other=0.0).to(tl.float32) <= 0, 0.0, grads.to(tl.float32))
        grads = grads.to(grad_y.dtype.element_ty)
    if not CHANNELS_LAST and SW > 1:
        grads = tl.permute(tl.reshape(grads, (BLOCK_M, SW, BLOCK_N // SW)), (0, 2, 1))
        grads = tl.reshape(grads, (BLOCK_M, BLOCK_N))
    return grads


@triton.jit
def image_offsets(m, image, h, v, c, C, H, W, W_VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """The memory offsets in x and grad_x of pixels m, which are (image, h, v), and channels c."""
    if CHANNELS_LAST:
        return (m * C)[:, None] + c[None, :]
    o_pixel = tl.max_contiguous(tl.multiple_of((image * C * H + h) * W + v, W_VEC), W_VEC)
    return o_pixel[:, None] + (c * (H * W))[None, :]


@triton.jit
def conv_transpose2d_bwd_input_shuffle_kernel(
    grad_y, y, w, grad_x, PIXELS, H, W_RUNS, C, COLUMN_RUNS,
    SH: tl.constexpr, SW: tl.constexpr, W_VEC: tl.constexpr, COLUMN_VEC: tl.constexpr, RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M pixels x BLOCK_N channels of grad_x.

    Reads grad_y once for each BLOCK_N channels; writes grad_x once.
    """
    # 1. Which pixels and channels
    W, COLUMNS = W_RUNS * W_VEC, COLUMN_RUNS * COLUMN_VEC
    program = tl.program_id(0)
    if WIDE:
        C, COLUMNS, program = tl.cast(C, tl.int64), tl.cast(COLUMNS, tl.int64), program.to(tl.int64)
    tiles = tl.cdiv(C, BLOCK_N)
    first = program // tiles * BLOCK_M
    c = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)

    # 2. Sum over the columns
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for n in range(0, COLUMNS, BLOCK_R):
        grads = load_rectangles(
            grad_y, y, first, n, PIXELS, H, W, COLUMNS, SH, SW, W_VEC, RELU, CHANNELS_LAST, BLOCK_M, BLOCK_R
        )
        m_w = (c < C)[None, :] & (n + r < COLUMNS)[:, None]
        weights = tl.load(w + ((c * COLUMNS)[None, :] + (n + r)[:, None]), mask=m_w, other=0.0)
        acc = dot(grads, weights, acc, PRECISION, UPCAST)

    # 3. Store
    m = first + tl.arange(0, BLOCK_M)
    m_x = tl.max_constancy(m < PIXELS, W_VEC)[:, None] & (c < C)[None, :]
    image, h, v = pixel_coordinates(first, H, W, BLOCK_M)
    o_x = image_offsets(m, image, h, v, c, C, H, W, W_VEC, CHANNELS_LAST)
    tl.store(grad_x + o_x, acc.to(grad_x.dtype.element_ty), mask=m_x)


@triton.jit
def conv_transpose2d_bwd_shuffle_kernel(
    x, grad_y, y, w, grad_x, partials, bias_partials, PIXELS, ALL_STEPS, STEPS, H, W_RUNS, C_RUNS, COLUMN_RUNS,
    SH: tl.constexpr, SW: tl.constexpr, W_VEC: tl.constexpr, C_VEC: tl.constexpr, COLUMN_VEC: tl.constexpr,
    INPUT: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program sums BLOCK_M channels c x BLOCK_N columns of grad_weight over STEPS blocks of BLOCK_R pixels.

    INPUT: all columns fit one block, and the program computes its channels of grad_x too. BIAS: the programs of the
    first channels sum the columns too. Reads x once for each BLOCK_N columns and grad_y once for each BLOCK_M channels;
    writes partials (splits, C, columns), and bias_partials (splits, columns), in NCHW (splits, K).
    """
    # 1. Which channels, columns and split
    C, W, COLUMNS = C_RUNS * C_VEC, W_RUNS * W_VEC, COLUMN_RUNS * COLUMN_VEC
    program = tl.program_id(0)
    if WIDE:
        C, COLUMNS, program = tl.cast(C, tl.int64), tl.cast(COLUMNS, tl.int64), program.to(tl.int64)
    tiles_m, tiles_n = tl.cdiv(C, BLOCK_M), tl.cdiv(COLUMNS, BLOCK_N)
    split = program // (tiles_m * tiles_n)
    tile = program % (tiles_m * tiles_n)
    column = tile % tiles_n * BLOCK_N
    c, n = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    m_w = (c < C)[:, None] & (n < COLUMNS)[None, :]
    o_w = (c * COLUMNS)[:, None] + n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums = tl.zeros((BLOCK_N,), tl.float32)
    step = split * STEPS
    for s in range(0, tl.minimum(STEPS, ALL_STEPS - step)):
        # 2. Load x and grad_y, and add to grad_weight and the bias's sums
        first = (step + s) * BLOCK_R
        m = first + tl.arange(0, BLOCK_R)
        m_x = tl.max_constancy(m < PIXELS, W_VEC)[:, None] & tl.max_constancy(c < C, C_VEC)[None, :]
        image, h, v = pixel_coordinates(first, H, W, BLOCK_R)
        o_x = image_offsets(m, image, h, v, c, C, H, W, W_VEC, CHANNELS_LAST)
        pixels = tl.load(x + o_x, mask=m_x, other=0.0)
        grads = load_rectangles(
            grad_y, y, first, column, PIXELS, H, W, COLUMNS, SH, SW, W_VEC, RELU, CHANNELS_LAST, BLOCK_R, BLOCK_N
        )
        acc = dot(tl.trans(pixels), grads, acc, PRECISION, UPCAST)
        if BIAS:
            sums += tl.sum(grads.to(tl.float32), axis=0)

        # 3. Compute and store grad_x
        if INPUT:
            weights = tl.load(w + o_w, mask=m_w, other=0.0)
            grad = dot(weights, tl.trans(grads), tl.zeros((BLOCK_M, BLOCK_R), tl.float32), PRECISION, UPCAST)
            tl.store(grad_x + o_x, tl.trans(grad.to(grad_x.dtype.element_ty)), mask=m_x)

    # 4. Store the partials
    tl.store(partials + (split * C * COLUMNS + o_w), acc, mask=m_w)
    if BIAS and tile < tiles_n:
        area: tl.constexpr = 1 if CHANNELS_LAST else SH * SW  # neighbouring columns of one k
        k = column // area + tl.arange(0, BLOCK_N // area)
        of_k = sums if CHANNELS_LAST else tl.sum(tl.reshape(sums, (BLOCK_N // area, area)), axis=1)
        tl.store(bias_partials + (split * (COLUMNS // area) + k), of_k, mask=k * area < COLUMNS)


def supported(x: Tensor, grad_y: Tensor, weight: Tensor, problem: ConvProblem, both: bool) -> bool:
    """Whether these kernels are to compute the gradients of input and weight or, unless `both`, one of them.

    In channels_last, which needs no copy anyway, only if one kernel computes both.
    """
    sizes = x.shape[-2:], grad_y.shape[-2:]
    if both and one_kernel_makes_both(*sizes, weight, x.dtype, problem):
        return True
    return not problem.channels_last and _supported(*sizes, weight, x.dtype, problem)


def one_kernel_makes_both(
    image: Sequence[int], output: Sequence[int], weight: Tensor, dtype: torch.dtype, problem: ConvProblem
) -> bool:
    """Whether one kernel computes both gradients: the columns fit one tile. image, output: (height, width)."""
    return _column_block(weight) <= MOST_COLUMNS and _supported(image, output, weight, dtype, problem)


def _supported(
    image: Sequence[int], output: Sequence[int], weight: Tensor, dtype: torch.dtype, problem: ConvProblem
) -> bool:
    """Whether the sizes and the dtype are supported.

    float32 is not: its GEMMs take longer than a copy of grad_y. Rows must be a multiple of 16 bytes. There must be more
    than FEW_COLUMNS, because Triton's compiler fails if shuffled rows are shorter than the swizzle of shared memory.
    """
    area, half = weight[0, 0].numel(), dtype in (torch.float16, torch.bfloat16)
    if not half or problem.groups > 1 or weight.shape[0] > MOST_CHANNELS or weight[0].numel() <= FEW_COLUMNS:
        return False
    rows = (weight.shape[0], problem.stride[1] * weight.shape[1]) if problem.channels_last else (image[1],)
    if vector_width(2, *rows) < 8:
        return False
    return area <= MOST_AREA and problem.stride[1] <= MOST_STRIDE and problem.is_pixel_shuffle(image, output)


def _column_block(weight: Tensor) -> int:
    """The block that holds all columns."""
    return max(16, triton.next_power_of_2(weight[0].numel()))


def bwd(
    grad_y: Tensor,
    y: Tensor | None,
    x: Tensor,
    weight: Tensor,
    gradients: ConvTransposeGradients,
    problem: ConvProblem,
) -> None:
    """Write the gradients that are not None; the bias's only together with the weight's.

    y: the forward's output if its ReLU masks grad_y, else None.
    """
    grad_x, grad_weight, grad_bias = gradients
    layout = torch.channels_last if problem.channels_last else torch.contiguous_format
    grad_y, x, weight = (to_layout(t, layout) for t in (grad_y, x, weight))
    (n, c, h, w), columns = x.shape, weight[0].numel()
    c_vec, w_vec, column_vec = (vector_width(x.element_size(), size) for size in (c, w, columns))
    image = (h, w // w_vec)
    constants = {
        "SH": problem.stride[0], "SW": problem.stride[1], "W_VEC": w_vec, "COLUMN_VEC": column_vec,
        "RELU": y is not None, "CHANNELS_LAST": problem.channels_last, "PRECISION": input_precision(x),
        "UPCAST": INTERPRETED, "WIDE": needs_int64_offsets(x, weight, grad_y),
    }  # fmt: skip
    mask = grad_y if y is None else y
    together = grad_x is not None and grad_weight is not None and _column_block(weight) <= MOST_COLUMNS
    if grad_x is not None and not together:
        sizes = tile_sizes(n * h * w, c, columns, x)
        launch(
            conv_transpose2d_bwd_input_shuffle_kernel, tile_count(n * h * w, c, sizes),
            grad_y, mask, weight, grad_x, n * h * w, *image, c, columns // column_vec, **constants, **sizes,
        )  # fmt: skip
    if grad_weight is None:
        return
    sizes = tile_sizes(c, columns, n * h * w, x, fill=False)
    if together:
        most, stages = (64, 3) if roomy(x) else (32, 2)  # so that nothing spills
        sizes |= {"BLOCK_M": min(most, sizes["BLOCK_M"]), "BLOCK_N": _column_block(weight), "BLOCK_R": 32}
        sizes |= {"num_warps": 8, "num_stages": stages}
    steps, tiles = triton.cdiv(n * h * w, sizes["BLOCK_R"]), tile_count(c, columns, sizes)
    each, splits = split_k(steps, tiles, most=max(1, n * h * w // LEAST_PIXELS))
    partials = x.new_empty(splits, grad_weight.numel(), dtype=torch.float32)
    bias_rows = splits * (weight[0, 0].numel() if problem.channels_last else 1)
    bias_partials = x.new_empty(bias_rows if grad_bias is not None else 0, weight.shape[1], dtype=torch.float32)
    launch(
        conv_transpose2d_bwd_shuffle_kernel, splits * tiles,
        x, grad_y, mask, weight, grad_x if together else x, partials, bias_partials, n * h * w, steps, each, *image,
        c // c_vec, columns // column_vec, C_VEC=c_vec, INPUT=together, BIAS=grad_bias is not None, **constants,
        **sizes,
    )  # fmt: skip
    if problem.channels_last:
        sum_partials(partials, grad_weight, weight.shape[1])
    else:
        sum_partials(partials, grad_weight.view(-1), 1)
    if grad_bias is not None:
        sum_partials(bias_partials, grad_bias, 1)
