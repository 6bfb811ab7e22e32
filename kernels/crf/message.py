"""mean_field_message: what each pixel hears from its neighbours, weighted by a Gaussian of position and colour.

With the distance d_ij of two pixels in whole pixels, their colours c and the values q of a class,

    message_i = sum over j with d_ij^2 <= FARTHEST of exp(-d_ij^2 / (2 sigma^2) - |c_i - c_j|^2 / 2) * q_j

The weights are a matrix with an entry for every two pixels, which is never stored. As in attention, a program keeps a
tile of the result, walks over the tiles of neighbours, computes the weights between the two and multiplies. The matrix
is symmetric, so the gradient is the message of the gradient.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import INT32_MAX, launch
from .options import Neighbourhood

HEIGHT, WIDTH = 8, 16  # pixels of a tile of the result
ROWS, COLUMNS = 4, 8  # pixels of a tile of neighbours; more cost more registers than a thread has
CLASSES = 32  # the most classes of a program


@triton.jit
def _pixels(top, left, H, W, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """(y, x, offset, whether it exists) of the pixels of a tile, row by row."""
    pixel = tl.arange(0, BLOCK_H * BLOCK_W)
    y, x = top + pixel // BLOCK_W, left + pixel % BLOCK_W
    return y, x, y * W + x, (y < H) & (x < W)


@triton.jit
def _colour(colours, o, m_live, PLANE):
    """The three channels of the colour of each pixel."""
    first = tl.load(colours + o, mask=m_live, other=0.0)
    second = tl.load(colours + PLANE + o, mask=m_live, other=0.0)
    return first, second, tl.load(colours + 2 * PLANE + o, mask=m_live, other=0.0)


@triton.jit
def mean_field_message_kernel(
    values, colours, out, H, W, K, STRIDE_K, STRIDE_P, FARTHEST, REACH, SCALE,
    COLOURED: tl.constexpr, SELF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, CLASSES: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program computes the messages of CLASSES classes to a tile of BLOCK_H x BLOCK_W pixels of one image.

    values and out are (N, K, H, W) with strides STRIDE_K and STRIDE_P between classes and pixels; colours (N, 3, H, W)
    are divided by their standard deviation. Reads the values and colours in the tile's neighbourhood once, from the
    cache except the first time, and writes the messages once.
    """
    # 1. Which tile, which classes
    PLANE, tiles, steps = H * W, tl.cdiv(H, BLOCK_H) * tl.cdiv(W, BLOCK_W), tl.cdiv(K, CLASSES)
    image, tile = tl.program_id(0) // (tiles * steps), tl.program_id(0) % tiles
    k = tl.program_id(0) // tiles % steps * CLASSES + tl.arange(0, CLASSES)
    top, left = tile // tl.cdiv(W, BLOCK_W) * BLOCK_H, tile % tl.cdiv(W, BLOCK_W) * BLOCK_W
    if WIDE:
        image, k, PLANE = image.to(tl.int64), k.to(tl.int64), tl.cast(PLANE, tl.int64)
        STRIDE_P = tl.cast(STRIDE_P, tl.int64)
    values += image * K * PLANE
    colours += image * 3 * PLANE
    y, x, o, m_live = _pixels(top, left, H, W, BLOCK_H, BLOCK_W)
    if COLOURED:
        red, green, blue = _colour(colours, o, m_live, PLANE)

    # 2. Add what each tile of neighbours says
    total = tl.zeros((BLOCK_H * BLOCK_W, CLASSES), tl.float32)
    for first in range(tl.maximum(top - REACH, 0), tl.minimum(top + BLOCK_H + REACH, H), ROWS):
        between = tl.maximum(tl.maximum(top - first - ROWS + 1, first - top - BLOCK_H + 1), 0)  # rows, at least
        reach = tl.sqrt(tl.maximum(FARTHEST - between * between, 0).to(tl.float32)).to(tl.int32) + 1
        for start in range(tl.maximum(left - reach, 0), tl.minimum(left + BLOCK_W + reach, W), COLUMNS):
            # 2a. Load the neighbours
            y_other, x_other, o_other, m_other = _pixels(first, start, H, W, ROWS, COLUMNS)
            m_values = m_other[:, None] & (k < K)[None, :]
            o_values = o_other[:, None] * STRIDE_P + k[None, :] * STRIDE_K
            said = tl.load(values + o_values, mask=m_values, other=0.0).to(tl.float32)
            # 2b. Weights: the distance is computed in integers, so that its limit is exact
            down, right = y[:, None] - y_other[None, :], x[:, None] - x_other[None, :]
            squared = down * down + right * right
            near = squared <= FARTHEST
            if not SELF:
                near = near & (squared > 0)
            exponent = squared.to(tl.float32) * SCALE
            if COLOURED:
                other_red, other_green, other_blue = _colour(colours, o_other, m_other, PLANE)
                red_step = red[:, None] - other_red[None, :]
                green_step = green[:, None] - other_green[None, :]
                blue_step = blue[:, None] - other_blue[None, :]
                # exp(-d / 2) = exp2(-d * log2(e) / 2)
                colour = red_step * red_step + green_step * green_step + blue_step * blue_step
                exponent += colour * 0.7213475204444817
            weight = tl.where(near, tl.exp2(-exponent), 0.0)
            # 2c. Multiply
            total = tl.dot(weight, said, total, input_precision=PRECISION)

    # 3. Store
    out += image * K * PLANE
    o_out = o[:, None] * STRIDE_P + k[None, :] * STRIDE_K
    tl.store(out + o_out, total.to(out.dtype.element_ty), mask=m_live[:, None] & (k < K)[None, :])


def mean_field_message(
    values: Tensor, colours: Tensor | None, neighbourhood: Neighbourhood, channels_last: bool, out: Tensor
) -> None:
    """Write the messages of the dense values (N, K, H, W), which are channels_last or contiguous, into `out`.

    colours: contiguous float32 (N, 3, H, W), divided by their standard deviation; None for weights of distance alone.
    """
    images, classes, height, width = values.shape
    block = min(CLASSES, max(16, triton.next_power_of_2(classes)))
    programs = images * triton.cdiv(height, HEIGHT) * triton.cdiv(width, WIDTH) * triton.cdiv(classes, block)
    plane = height * width
    margin = (HEIGHT + ROWS) * (width + WIDTH) * max(classes, 3)  # offsets of masked lanes
    launch(
        mean_field_message_kernel, programs,
        values, values if colours is None else colours, out, height, width, classes,
        *((1, classes) if channels_last else (plane, 1)),
        min(neighbourhood.farthest, height**2 + width**2), neighbourhood.reach(height, width),
        math.log2(math.e) / (2 * neighbourhood.sigma**2),
        COLOURED=colours is not None, SELF=neighbourhood.self_term, BLOCK_H=HEIGHT, BLOCK_W=WIDTH, ROWS=ROWS,
        COLUMNS=COLUMNS, CLASSES=block, PRECISION="ieee" if torch.version.hip else "tf32x3",
        WIDE=images * (classes + block + 3) * plane + margin > INT32_MAX, num_warps=8,
    )  # fmt: skip
