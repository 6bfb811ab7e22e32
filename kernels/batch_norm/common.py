"""What the batch-norm kernels share: programs and tiles, the arithmetic of one element, sums over pixels.

    centred = x - mean,   y = relu(centred * weight / sqrt(var + eps) + bias)

A mean far from zero loses no digits: it is kept in two terms, and centred = (x - mean) + shift. In evaluation mean is
the running one and shift the bias of the convolution before, which nobody has added.

Every program has some channels and a chunk of the map, which it walks through in tiles of ROWS x LANES elements. In
NCHW it has one channel, and a row is LANES = VEC neighbouring columns; in channels_last a row is one pixel and its
LANES neighbouring channels. So the vectors of C are read once a program.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..launch import INT32_MAX, launch, vector_width
from ..pooling.tiling import Tiling, run_offset
from .arguments import NormArguments

LANES = 64  # channels of a program in channels_last
STEPS = 4  # tiles of a program that writes
REDUCING_STEPS = 8  # at least, of a program that reduces: its partial results are 8 bytes a channel
REDUCING_PROGRAMS = 512  # what fills a GPU
MERGED_CHUNKS, MERGED_CHANNELS = 256, 16


@triton.jit
def program_of(CHANNEL_TILES, WIDE: tl.constexpr):
    """(channel tile, chunk) of this program."""
    program = tl.program_id(0)
    tile = program % CHANNEL_TILES
    chunk = program // CHANNEL_TILES
    if WIDE:
        chunk = chunk.to(tl.int64)
    return tile, chunk


@triton.jit
def channels_of(tile, C, LANES: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """(channels, which of them there are) of a tile: [1, LANES] in channels_last, one of them in NCHW."""
    if CHANNELS_LAST:
        c = tile * LANES + tl.arange(0, LANES)[None, :]
        return c, c < C
    else:
        c = tile + tl.zeros((1, 1), tl.int32)
        return c, c < C


@triton.jit
def flat_offset(o, tile, c, C, RUNS, LANES: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Where row `o` of a channel tile lies: pixel o of the batch, or run o of VEC pixels of the channel's planes."""
    if CHANNELS_LAST:
        return o[:, None] * (RUNS * VEC) + c
    else:
        return (((o // RUNS) * C + tile) * RUNS + o % RUNS)[:, None] * VEC + tl.arange(0, LANES)[None, :]


@triton.jit
def inverse_root(x):
    """1 / sqrt(x), correctly rounded root."""
    if x.dtype == tl.float64:
        return 1.0 / tl.sqrt(x)
    else:
        return 1.0 / tl.sqrt_rn(x)


@triton.jit
def statistics(mean, shift, var, c, live_c, EPS: tl.constexpr, SHIFTED: tl.constexpr):
    """(mean, shift, 1 / sqrt(var + eps)) of channels. EPS is a constant, since arguments are rounded to float32."""
    centre = tl.load(mean + c, mask=live_c, other=0.0)
    spread = tl.load(var + c, mask=live_c, other=1.0)
    T: tl.constexpr = tl.float64 if var.dtype.element_ty == tl.float64 else tl.float32
    low = tl.load(shift + c, mask=live_c, other=0.0).to(T) if SHIFTED else tl.zeros_like(centre).to(T)
    return centre.to(T), low, inverse_root(spread.to(T) + EPS)


@triton.jit
def affine(weight, bias, inverse, c, live_c, WEIGHTED: tl.constexpr, BIASED: tl.constexpr):
    """(scale, bias) of channels: y = centred * scale + bias."""
    scale = inverse
    if WEIGHTED:
        scale = inverse * tl.load(weight + c, mask=live_c, other=0.0).to(inverse.dtype)
    beta = tl.zeros_like(inverse)
    if BIASED:
        beta = tl.load(bias + c, mask=live_c, other=0.0).to(inverse.dtype)
    return scale, beta


@triton.jit
def normalised(centred, scale, beta, RELU: tl.constexpr, DTYPE: tl.constexpr):
    """The output, with the digits that DTYPE stores. NaN stays, as in torch's ReLU."""
    y = (centred * scale + beta).to(DTYPE).to(scale.dtype)
    if RELU:
        y = tl.where(y <= 0, 0.0, y)
    return y


@triton.jit
def masked(grad, centred, scale, beta, RELU: tl.constexpr, DTYPE: tl.constexpr):
    """The gradient behind the ReLU, at the elements that it let through."""
    if RELU:
        return tl.where(normalised(centred, scale, beta, False, DTYPE) <= 0, 0.0, grad)
    else:
        return grad


@triton.jit
def store_sums(partials, chunk, CHUNKS, c, live_c, C, grads, products, CHANNELS_LAST: tl.constexpr):
    """A program's two sums for each channel, from its tile's."""
    if CHANNELS_LAST:
        first, second = tl.sum(grads, axis=0)[None, :], tl.sum(products, axis=0)[None, :]
    else:
        first, second = tl.sum(grads) + tl.zeros_like(c), tl.sum(products) + tl.zeros_like(c)
    tl.store(partials + chunk * C + c, first, mask=live_c)
    tl.store(partials + (CHUNKS + chunk) * C + c, second, mask=live_c)


@triton.jit
def through_statistics(means, c, live_c, C, inverse, BATCH_STATS: tl.constexpr):
    """What the gradient loses because x moves the statistics too: a constant, and a multiple of centred."""
    if BATCH_STATS:
        constant = tl.load(means + c, mask=live_c, other=0.0)
        return constant, tl.load(means + C + c, mask=live_c, other=0.0) * inverse
    else:
        return tl.zeros_like(inverse), tl.zeros_like(inverse)


@triton.jit
def window_of(o, SIZE_H, SIZE_W, RUNS, LANES: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """(image, row, column, run) of row `o` of a tile: columns are one a row, or LANES side by side in NCHW."""
    if CHANNELS_LAST:
        rows, run = o // SIZE_W, o % SIZE_W
        column = run[:, None]
    else:
        rows, run = o // RUNS, o % RUNS
        column = run[:, None] * LANES + tl.arange(0, LANES)[None, :]
    return (rows // SIZE_H)[:, None], (rows % SIZE_H)[:, None], column, run[:, None]


@triton.jit
def pixel_offset(
    image, h, w, run, tile, c, C, SIZE_H, SIZE_W, RUNS, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Where pixel (h, w) lies. ALIGNED, in NCHW: the map's rows are RUNS runs of VEC columns, and this is one."""
    if CHANNELS_LAST:
        return ((image * SIZE_H + h) * SIZE_W + w) * (RUNS * VEC) + c
    elif ALIGNED:
        return (((image * C + tile) * SIZE_H + h) * RUNS + run) * VEC + tl.arange(0, VEC)[None, :]
    else:
        return ((image * C + tile) * SIZE_H + h) * SIZE_W + w


@triton.jit
def gathered(
    plane, position, live, image, h0, w0, run, tile, c, C, H, W, RUNS, DTYPE: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, WHOLE_ROWS: tl.constexpr, CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr,
    LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The elements at the taps `position` of the windows that begin at h0, w0. Reads whole windows, each once."""
    value = tl.zeros((ROWS, LANES), DTYPE)
    for i in tl.static_range(KH):
        h = h0 + i
        if WHOLE_ROWS:
            offset = run_offset(image * C + tile, h, run, H, RUNS, LANES)
            row = tl.load(plane + offset, mask=live & (h >= 0) & (h < H), other=0.0).to(DTYPE)
            left, right = tl.split(tl.reshape(row, (ROWS, LANES, 2)))
            value = tl.where(position == i * KW, left, value)
            if KW == 2:
                value = tl.where(position == i * KW + 1, right, value)
        else:
            for j in tl.static_range(KW):
                w = w0 + j
                inside = live & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                offset = pixel_offset(image, h, w, run, tile, c, C, H, W, RUNS, VEC, CHANNELS_LAST, False)
                tap = tl.load(plane + offset, mask=inside, other=0.0).to(DTYPE)
                value = tl.where(position == i * KW + j, tap, value)
    return value


@triton.jit
def batch_norm_relu_sums_merge_kernel(
    partials, var, sums, COUNT, CHUNKS, C, EPS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):
    """One program merges the partial sums of LANES channels: sums of grad and of grad * x_hat, and both over COUNT."""
    c = tl.program_id(0) * LANES + tl.arange(0, LANES)
    live_c = c < C
    T: tl.constexpr = partials.dtype.element_ty
    grads = tl.zeros((LANES,), T)
    products = tl.zeros((LANES,), T)
    for start in range(0, CHUNKS, ROWS):
        s = start + tl.arange(0, ROWS)
        there = (s < CHUNKS)[:, None] & live_c[None, :]
        grads += tl.sum(tl.load(partials + s[:, None] * C + c[None, :], mask=there, other=0.0), axis=0)
        products += tl.sum(tl.load(partials + (CHUNKS + s)[:, None] * C + c[None, :], mask=there, other=0.0), axis=0)
    products *= inverse_root(tl.load(var + c, mask=live_c, other=1.0).to(T) + EPS)
    tl.store(sums + c, grads, mask=live_c)
    tl.store(sums + C + c, products, mask=live_c)
    tl.store(sums + 2 * C + c, grads / COUNT, mask=live_c)
    tl.store(sums + 3 * C + c, products / COUNT, mask=live_c)


def norm_pointers(norm: NormArguments) -> tuple[Tensor, ...]:
    """The pointers that every kernel takes. `mean` stands in for a missing vector, which is never read."""
    mean, shift, var, weight, bias, _, _ = norm
    return mean, *(mean if t is None else t for t in (shift, var, weight, bias))


def norm_constants(norm: NormArguments) -> dict[str, Any]:
    """The compile-time arguments that every kernel takes."""
    return {
        "SHIFTED": norm.shift is not None, "WEIGHTED": norm.weight is not None, "BIASED": norm.bias is not None,
        "EPS": norm.eps, "RELU": norm.relu,
    }  # fmt: skip


class Partition:
    """How a map of `rows` x `columns` for each image and channel is divided among programs.

    The map may be that of `x`, which is then one row, or its pooled map, or its cells. reducing: programs write a
    partial result each, so that there are only as many as fill a GPU.
    """

    def __init__(
        self, x: Tensor, rows: int, columns: int, channels_last: bool, tile: int, reducing: bool = False
    ) -> None:
        n, c = x.shape[:2]
        vec = vector_width(x.element_size(), c if channels_last else columns)
        runs = (c if channels_last else columns) // vec
        lanes = min(triton.next_power_of_2(c), LANES) if channels_last else vec
        self.channel_tiles = triton.cdiv(c, lanes) if channels_last else c
        self.pixels_a_row = 1 if channels_last else vec
        m = n * rows * columns // self.pixels_a_row
        self.tile_rows = min(tile // lanes, triton.next_power_of_2(m))
        tiles = triton.cdiv(m, self.tile_rows)
        enough = max(triton.cdiv(tiles * self.channel_tiles, REDUCING_PROGRAMS), REDUCING_STEPS)
        self.steps = min(enough if reducing else STEPS, tiles)
        self.chunks = triton.cdiv(tiles, self.steps)
        self.programs = self.channel_tiles * self.chunks
        self.sizes = (m, c, runs, self.channel_tiles)
        self.constants: dict[str, Any] = {
            "CHANNELS_LAST": channels_last, "VEC": vec, "LANES": lanes, "ROWS": self.tile_rows,
            "WIDE": x.numel() > INT32_MAX - 4 * tile * c * STEPS,
        }  # fmt: skip

    @classmethod
    def flat(cls, x: Tensor, channels_last: bool, tile: int, reducing: bool = False) -> Partition:
        """Of x itself, whose rows and columns do not matter."""
        return cls(x, 1, x.shape[2] * x.shape[3], channels_last, tile, reducing)


def merge_sums(partials: Tensor, norm: NormArguments, sums: Tensor, x: Tensor) -> None:
    """Write sums (4, C) from partials (2, chunks, C)."""
    n, c, h, w = x.shape
    launch(
        batch_norm_relu_sums_merge_kernel, triton.cdiv(c, MERGED_CHANNELS),
        partials, norm.var, sums, n * h * w, partials.shape[1], c, EPS=norm.eps,
        ROWS=MERGED_CHUNKS, LANES=MERGED_CHANNELS,
    )  # fmt: skip


def window_constants(image: Tensor, pooled: Tensor, tiling: Tiling) -> dict[str, Any]:
    """The geometry, and whether in NCHW the two columns under each window are a run of the image's row."""
    taps = tiling.window_constants()
    whole_rows = not tiling.channels_last and taps["SW"] == 2 and taps["KW"] <= 2 and taps["PW"] == 0
    return {**taps, "WHOLE_ROWS": whole_rows and image.shape[-1] == 2 * pooled.shape[-1]}


def cells(image: Tensor, pooled: Tensor, tiling: Tiling) -> tuple[int, int]:
    """Rows and columns of cells that tile the image: a cell is a window and the gap behind it."""
    sizes = zip(image.shape[-2:], pooled.shape[-2:], tiling.geometry.stride, tiling.geometry.padding, strict=True)
    rows, columns = (max(triton.cdiv(size + p, s), o) for size, o, s, p in sizes)
    return rows, columns
