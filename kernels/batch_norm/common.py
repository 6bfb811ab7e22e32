"""What the batch-norm kernels share: how the map is divided, the arithmetic of one element, and sums over the pixels.

    centered = (x - mean) + shift,   y = relu(centered * weight / sqrt(var + eps) + bias)

NormArguments says why the mean has two terms.

Each program owns a channel tile and a chunk of the map, which it processes in tiles of ROWS x LANES elements. In NCHW a
channel tile is one channel, and a row is a run: LANES = VEC neighboring columns. In channels_last a channel tile has
LANES neighboring channels, and a row is one pixel. A program therefore loads its channels' vectors only once.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..launch import INT32_MAX, launch, vector_width
from ..pooling.tiling import Tiling, run_offset
from .arguments import NormArguments

LANES = 64  # most channels of a program in channels_last
STEPS = 4  # tiles of a program that writes a map
REDUCING_STEPS = 8  # fewest tiles of a program that reduces: it writes 8 bytes of partial sums per channel
REDUCING_PROGRAMS = 512  # enough programs to fill a GPU
MERGED_CHUNKS, MERGED_CHANNELS = 256, 16  # the tile of a program that merges partial results


# --- which elements --------------------------------------------------------------------------------------------------


@triton.jit
def channel_tile_and_chunk(CHANNEL_TILES, WIDE: tl.constexpr):
    """(channel tile, chunk) of this program. WIDE: offsets need 64 bits."""
    program = tl.program_id(0)
    tile = program % CHANNEL_TILES
    chunk = program // CHANNEL_TILES
    if WIDE:
        chunk = chunk.to(tl.int64)
    return tile, chunk


@triton.jit
def channels_in(tile, C, LANES: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """(channels, mask) of a channel tile: of shape [1, LANES] in channels_last, [1, 1] in NCHW."""
    if CHANNELS_LAST:
        c = tile * LANES + tl.arange(0, LANES)[None, :]
        return c, c < C
    else:
        c = tile + tl.zeros((1, 1), tl.int32)
        return c, c < C


@triton.jit
def flat_offset(o, tile, c, C, RUNS, LANES: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """The memory offsets of row `o` of a tile, if rows and columns of the map do not matter."""
    if CHANNELS_LAST:
        return o[:, None] * (RUNS * VEC) + c
    else:
        return (((o // RUNS) * C + tile) * RUNS + o % RUNS)[:, None] * VEC + tl.arange(0, LANES)[None, :]


@triton.jit
def image_position(o, SIZE_H, SIZE_W, RUNS, LANES: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """(image, row, column, run) of row `o` of a tile. `column` has LANES entries in NCHW and one in channels_last."""
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
    """The memory offsets of pixel (h, w). ALIGNED, in NCHW: it is run `run` of a row that has RUNS runs of VEC."""
    if CHANNELS_LAST:
        return ((image * SIZE_H + h) * SIZE_W + w) * (RUNS * VEC) + c
    elif ALIGNED:
        return (((image * C + tile) * SIZE_H + h) * RUNS + run) * VEC + tl.arange(0, VEC)[None, :]
    else:
        return ((image * C + tile) * SIZE_H + h) * SIZE_W + w


# --- the vectors of C ------------------------------------------------------------------------------------------------


@triton.jit
def inverse_root(x):
    """1 / sqrt(x), with a correctly rounded square root."""
    if x.dtype == tl.float64:
        return 1.0 / tl.sqrt(x)
    else:
        return 1.0 / tl.sqrt_rn(x)


@triton.jit
def load_statistics(mean, shift, var, c, m_c, EPS: tl.constexpr, SHIFTED: tl.constexpr):
    """(mean, shift, 1 / sqrt(var + eps)) of channels. EPS is a constexpr: an argument is rounded to float32."""
    mean_c = tl.load(mean + c, mask=m_c, other=0.0)
    var_c = tl.load(var + c, mask=m_c, other=1.0)
    T: tl.constexpr = tl.float64 if var.dtype.element_ty == tl.float64 else tl.float32
    shift_c = tl.load(shift + c, mask=m_c, other=0.0).to(T) if SHIFTED else tl.zeros_like(mean_c).to(T)
    return mean_c.to(T), shift_c, inverse_root(var_c.to(T) + EPS)


@triton.jit
def load_affine(weight, bias, rstd, c, m_c, WEIGHTED: tl.constexpr, BIASED: tl.constexpr):
    """(scale, bias) of channels: y = centered * scale + bias. rstd: 1 / sqrt(var + eps)."""
    scale = rstd
    if WEIGHTED:
        scale = rstd * tl.load(weight + c, mask=m_c, other=0.0).to(rstd.dtype)
    bias_c = tl.zeros_like(rstd)
    if BIASED:
        bias_c = tl.load(bias + c, mask=m_c, other=0.0).to(rstd.dtype)
    return scale, bias_c


@triton.jit
def load_gradient_means(means, c, m_c, C, rstd, BATCH_STATS: tl.constexpr):
    """(mean of grad, mean of grad * x_hat times rstd) of channels; zeros without BATCH_STATS.

    x also moves the batch statistics, so the gradient loses the first term, and centered times the second one.
    """
    if BATCH_STATS:
        mean_grad = tl.load(means + c, mask=m_c, other=0.0)
        return mean_grad, tl.load(means + C + c, mask=m_c, other=0.0) * rstd
    else:
        return tl.zeros_like(rstd), tl.zeros_like(rstd)


# --- the arithmetic of an element ------------------------------------------------------------------------------------


@triton.jit
def normalize(centered, scale, bias_c, RELU: tl.constexpr, DTYPE: tl.constexpr):
    """The output, rounded to DTYPE, the dtype that it is stored in. NaN stays NaN, as in torch's ReLU."""
    y = (centered * scale + bias_c).to(DTYPE).to(scale.dtype)
    if RELU:
        y = tl.where(y <= 0, 0.0, y)
    return y


@triton.jit
def relu_gradient(grad, centered, scale, bias_c, RELU: tl.constexpr, DTYPE: tl.constexpr):
    """The gradient of the ReLU's input. The ReLU's mask is recomputed from x."""
    if RELU:
        return tl.where(normalize(centered, scale, bias_c, False, DTYPE) <= 0, 0.0, grad)
    else:
        return grad


@triton.jit
def gather_from_windows(
    x, position, m_live, image, h0, w0, run, tile, c, C, H, W, RUNS, DTYPE: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, WHOLE_ROWS: tl.constexpr, CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr,
    LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The elements at the offsets `position` of the windows that start at (h0, w0). Reads whole windows, each once."""
    value = tl.zeros((ROWS, LANES), DTYPE)
    for i in tl.static_range(KH):
        h = h0 + i
        if WHOLE_ROWS:
            o_x = run_offset(image * C + tile, h, run, H, RUNS, LANES)
            row = tl.load(x + o_x, mask=m_live & (h >= 0) & (h < H), other=0.0).to(DTYPE)
            left, right = tl.split(tl.reshape(row, (ROWS, LANES, 2)))
            value = tl.where(position == i * KW, left, value)
            if KW == 2:
                value = tl.where(position == i * KW + 1, right, value)
        else:
            for j in tl.static_range(KW):
                w = w0 + j
                m_inside = m_live & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                o_x = pixel_offset(image, h, w, run, tile, c, C, H, W, RUNS, VEC, CHANNELS_LAST, False)
                tap = tl.load(x + o_x, mask=m_inside, other=0.0).to(DTYPE)
                value = tl.where(position == i * KW + j, tap, value)
    return value


# --- sums over the pixels --------------------------------------------------------------------------------------------


@triton.jit
def store_sums(partials, chunk, CHUNKS, c, m_c, C, sum_grad, sum_grad_x, CHANNELS_LAST: tl.constexpr):
    """Reduce a program's tile of sums to its channels and store them in partials (2, CHUNKS, C)."""
    if CHANNELS_LAST:
        first, second = tl.sum(sum_grad, axis=0)[None, :], tl.sum(sum_grad_x, axis=0)[None, :]
    else:
        first, second = tl.sum(sum_grad) + tl.zeros_like(c), tl.sum(sum_grad_x) + tl.zeros_like(c)
    tl.store(partials + chunk * C + c, first, mask=m_c)
    tl.store(partials + (CHUNKS + chunk) * C + c, second, mask=m_c)


@triton.jit
def batch_norm_relu_sums_merge_kernel(
    partials, var, sums, COUNT, CHUNKS, C, EPS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):
    """One program merges the partial sums (2, CHUNKS, C) of LANES channels, ROWS chunks at a time.

    Writes sums (4, C): the sums of grad and grad * x_hat, and both divided by COUNT.
    """
    # 1. Add up the chunks
    c = tl.program_id(0) * LANES + tl.arange(0, LANES)
    m_c = c < C
    T: tl.constexpr = partials.dtype.element_ty
    sum_grad = tl.zeros((LANES,), T)
    sum_grad_x = tl.zeros((LANES,), T)
    for start in range(0, CHUNKS, ROWS):
        chunk = start + tl.arange(0, ROWS)
        m_live = (chunk < CHUNKS)[:, None] & m_c[None, :]
        sum_grad += tl.sum(tl.load(partials + chunk[:, None] * C + c[None, :], mask=m_live, other=0.0), axis=0)
        sum_grad_x += tl.sum(
            tl.load(partials + (CHUNKS + chunk)[:, None] * C + c[None, :], mask=m_live, other=0.0), axis=0
        )

    # 2. From grad * centered to grad * x_hat, and store
    sum_grad_x *= inverse_root(tl.load(var + c, mask=m_c, other=1.0).to(T) + EPS)
    tl.store(sums + c, sum_grad, mask=m_c)
    tl.store(sums + C + c, sum_grad_x, mask=m_c)
    tl.store(sums + 2 * C + c, sum_grad / COUNT, mask=m_c)
    tl.store(sums + 3 * C + c, sum_grad_x / COUNT, mask=m_c)


# --- launching -------------------------------------------------------------------------------------------------------


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
    """How a map of `rows` x `columns` per image and channel is divided among programs.

    The map is x itself as one row, its pooled map, or its cells. reducing: each program writes partial results, so
    there are only as many programs as fill a GPU.
    """

    def __init__(
        self, x: Tensor, rows: int, columns: int, channels_last: bool, tile: int, reducing: bool = False
    ) -> None:
        n, c = x.shape[:2]
        vec = vector_width(x.element_size(), c if channels_last else columns)
        runs = (c if channels_last else columns) // vec
        lanes = min(triton.next_power_of_2(c), LANES) if channels_last else vec
        self.channel_tiles = triton.cdiv(c, lanes) if channels_last else c
        self.pixels_per_row = 1 if channels_last else vec
        m = n * rows * columns // self.pixels_per_row
        self.tile_rows = min(tile // lanes, triton.next_power_of_2(m))
        tiles = triton.cdiv(m, self.tile_rows)
        reducing_steps = max(triton.cdiv(tiles * self.channel_tiles, REDUCING_PROGRAMS), REDUCING_STEPS)
        self.steps = min(reducing_steps if reducing else STEPS, tiles)
        self.chunks = triton.cdiv(tiles, self.steps)
        self.programs = self.channel_tiles * self.chunks
        self.sizes = (m, c, runs, self.channel_tiles)
        self.constants: dict[str, Any] = {
            "CHANNELS_LAST": channels_last, "VEC": vec, "LANES": lanes, "ROWS": self.tile_rows,
            "WIDE": x.numel() > INT32_MAX - 4 * tile * c * STEPS,
        }  # fmt: skip

    @classmethod
    def flat(cls, x: Tensor, channels_last: bool, tile: int, reducing: bool = False) -> Partition:
        """The partition of x itself for kernels that do not need rows and columns."""
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
    """The geometry, and WHOLE_ROWS: in NCHW each window of a row owns two consecutive pixels of the image's row."""
    taps = tiling.window_constants()
    whole_rows = not tiling.channels_last and taps["SW"] == 2 and taps["KW"] <= 2 and taps["PW"] == 0
    return {**taps, "WHOLE_ROWS": whole_rows and image.shape[-1] == 2 * pooled.shape[-1]}


def cells(image: Tensor, pooled: Tensor, tiling: Tiling) -> tuple[int, int]:
    """Rows and columns of the cells that tile the image. A cell is a window and the gap after it."""
    sizes = zip(image.shape[-2:], pooled.shape[-2:], tiling.geometry.stride, tiling.geometry.padding, strict=True)
    rows, columns = (max(triton.cdiv(size + p, s), o) for size, o, s, p in sizes)
    return rows, columns
