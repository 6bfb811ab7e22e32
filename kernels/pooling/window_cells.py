"""Overlapping windows of stride 2 and the like: a program owns cells of pixels, and reads each window once for a cell.

A pixel at row u * SH + a can be in the windows of rows u + q alone, at their element i = a + PH - q * SH. Both a and q
are known at compile time, so each pixel is compared with constants, and only with the windows that can hold it: nine
comparisons for the four pixels of a cell of 3x3 windows of stride 2, whose four windows are loaded once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import INT32_MAX, launch
from .tiling import BLOCK, Tiling, group, image_offset, needs_int64, position_kind, run_offset

WINDOWS = 4  # the most windows that a cell reads; their values stay in registers
TAPS = 255  # the most elements of a window: 255 marks an offset that was not read


@triton.jit
def read_window(x, positions, o_window, oh, ow, m_window, W, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr,
                PW: tl.constexpr, DTYPE: tl.constexpr, POSITIONS: tl.constexpr, NARROW: tl.constexpr):  # fmt: skip
    """(value, place) of a group of windows. place: the offset, or the index less that of the window's first element.

    A place is a 32-bit number, and never that of an element if the window was not read. NARROW: so are the indices of
    the plane; then the upper half of an index is 0, and the lower half is enough for the rest.
    """
    value = tl.load(x + o_window, mask=m_window, other=0.0).to(DTYPE)
    if POSITIONS == "offsets":
        place = tl.load(positions + o_window, mask=m_window, other=255).to(tl.int32)
    else:
        index = tl.load(positions + o_window, mask=m_window, other=-1)
        first = (oh * SH - PH).to(tl.int64) * W + (ow * SW - PW)
        if NARROW:
            place = tl.where((index >> 32).to(tl.int32) == 0, index.to(tl.int32) - first.to(tl.int32), -1)
        else:
            ahead = index - first
            place = tl.where((ahead >= 0) & (ahead < 2147483647), ahead, -1).to(tl.int32)
    return value, place


@triton.jit
def is_outside(place, oh, ow, H, W, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
               PH: tl.constexpr, PW: tl.constexpr, POSITIONS: tl.constexpr):  # fmt: skip
    """Whether a place is no element of its window that lies in the image."""
    h0, w0 = oh * SH - PH, ow * SW - PW
    if POSITIONS == "offsets":
        i = place // KW
        h, w = h0 + i, w0 + (place - i * KW)
        return (place >= KH * KW) | (h < 0) | (h >= H) | (w < 0) | (w >= W)
    else:
        found = place != place
        left, right = tl.maximum(-w0, 0), tl.minimum(W - w0, KW)
        for i in tl.static_range(KH):
            j = place - i * W
            found = found | ((h0 + i >= 0) & (h0 + i < H) & (j >= left) & (j < right))
        return found == 0


@triton.jit
def take(pixel, value, place, W, i: tl.constexpr, j: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
         POSITIONS: tl.constexpr, ADD: tl.constexpr):  # fmt: skip
    """A pixel after one window, of which it is the element in row i and column j, if there is such an element."""
    if i >= 0 and i < KH and j >= 0 and j < KW:
        hit = place == (i * KW + j if POSITIONS == "offsets" else i * W + j)
        pixel = tl.where(hit, pixel + value if ADD else value, pixel)
    return pixel


@triton.jit
def window_cells_kernel(
    x, positions, y, out_of_window, GROUPS, RUNS, H, W, CH, CW, OH, OW,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    TOP: tl.constexpr, LEFT: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, POSITIONS: tl.constexpr,
    ADD: tl.constexpr, REPORT: tl.constexpr, WHOLE: tl.constexpr, NARROW: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK groups of VEC cells, SH x SW pixels each, along W in NCHW and along C in channels_last.

    A pixel takes the values in x of the windows whose position points to it: their sum with ADD (the gradient of a
    pool), else the last in row-major order (unpooling). y is written once. Values and positions are read once for each
    of the DOWN x ACROSS cells that their window reaches, from the cache. WHOLE: the cells divide the image, and each
    has one window. REPORT: an offset outside its own window is an error, an index outside sets *out_of_window to 1.
    """
    # 1. Which cells
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    o_group = program * BLOCK + tl.arange(0, BLOCK)
    m_group = (o_group < GROUPS)[:, None]
    plane, u, v, run = group(o_group, CH, RUNS, CW, VEC, CHANNELS_LAST)
    DTYPE: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32

    # 2. Load the values and places of their windows, in row-major order
    values = ()
    places = ()
    for d in tl.static_range(DOWN):
        for e in tl.static_range(ACROSS):
            oh, ow = u + (TOP + d), v + (LEFT + e)
            m_window = m_group
            if TOP + d < 0:
                m_window = m_window & (oh >= 0)
            if TOP + d > 0 or not WHOLE:
                m_window = m_window & (oh < OH)
            if LEFT + e < 0:
                m_window = m_window & (ow >= 0)
            if LEFT + e > 0 or not WHOLE:
                m_window = m_window & (ow < OW)
            if CHANNELS_LAST:
                o_window = image_offset(plane, oh, ow, run, OH, OW, RUNS, VEC, CHANNELS_LAST)
            else:  # OW is RUNS * VEC: written so, the compiler sees which groups are aligned
                o_window = ((plane * OH + oh) * RUNS + run) * VEC + tl.arange(0, VEC)[None, :] + (LEFT + e)
            value, place = read_window(
                x, positions, o_window, oh, ow, m_window, W, SH, SW, PH, PW, DTYPE, POSITIONS, NARROW
            )
            values += (value,)
            places += (place,)
            if REPORT and TOP + d == 0 and LEFT + e == 0:  # each window once, in its own cell
                outside = m_window & is_outside(place, oh, ow, H, W, KH, KW, SH, SW, PH, PW, POSITIONS)
                if POSITIONS == "offsets":
                    tl.device_assert(outside == 0, "max_unpool2d_with_offsets: found an offset outside its window")
                else:
                    found = tl.max(outside.to(tl.int32), axis=1)
                    tl.store(out_of_window + tl.zeros_like(found), 1, mask=found != 0)

    # 3. For each pixel of the cell: gather from the windows that hold it, and store
    for a in tl.static_range(SH):
        pixels = ()
        for b in tl.static_range(SW):
            pixel = tl.zeros((BLOCK, VEC), DTYPE)
            for n in tl.static_range(DOWN * ACROSS):
                pixel = take(
                    pixel, values[n], places[n], W, a + PH - (TOP + n // ACROSS) * SH,
                    b + PW - (LEFT + n % ACROSS) * SW, KH, KW, POSITIONS, ADD,
                )  # fmt: skip
            pixels += (pixel.to(y.dtype.element_ty),)
        h = u * SH + a
        if CHANNELS_LAST:
            for b in tl.static_range(SW):
                w = v * SW + b
                m_pixel = m_group if WHOLE else m_group & (h < H) & (w < W)
                tl.store(y + image_offset(plane, h, w, run, H, W, RUNS, VEC, CHANNELS_LAST), pixels[b], mask=m_pixel)
        else:
            m_row = m_group if WHOLE else m_group & (h < H)
            row = tl.reshape(tl.join(pixels[0], pixels[1]), (BLOCK, 2 * VEC))
            tl.store(y + run_offset(plane, h, run, H, RUNS, VEC), row, mask=m_row)


def _reach(kernel_size: int, stride: int, padding: int) -> range:
    """The windows of a cell along one side, as their distance from the window with the cell's own number."""
    return range(-((kernel_size - 1 - padding) // stride), (stride - 1 + padding) // stride + 1)


def can_gather_cells(x: Tensor, y: Tensor, tiling: Tiling) -> bool:
    """Whether gather_cells supports a call: few windows for a cell, no dilation, and in NCHW whole runs."""
    geometry = tiling.geometry
    down, across = map(_reach, geometry.kernel_size, geometry.stride, geometry.padding)
    few = len(down) * len(across) <= WINDOWS and geometry.taps <= TAPS
    return few and tuple(geometry.dilation) == (1, 1) and (tiling.channels_last or tiling.has_runs(y, x))


def gather_cells(
    x: Tensor, positions: Tensor, y: Tensor, tiling: Tiling, *, add: bool, out_of_window: Tensor, report: bool
) -> None:
    """window_gather for the calls that can_gather_cells supports."""
    geometry = tiling.geometry
    (n, c, h, w), (oh, ow) = y.shape, x.shape[-2:]
    stride = geometry.stride
    ch, cw = max(triton.cdiv(h, stride[0]), oh), max(triton.cdiv(w, stride[1]), ow)
    vec, runs = tiling.groups(c, cw, y.element_size())
    down, across = map(_reach, geometry.kernel_size, stride, geometry.padding)
    groups = n * c * ch * cw // vec
    launch(
        window_cells_kernel, triton.cdiv(groups, BLOCK // vec),
        x, positions, y, out_of_window, groups, runs, h, w, ch, cw, oh, ow,
        **tiling.window_constants(), TOP=down[0], LEFT=across[0], DOWN=len(down), ACROSS=len(across),
        POSITIONS=position_kind(positions), ADD=add, REPORT=report,
        WHOLE=(ch, cw) == (oh, ow) and (h, w) == (ch * stride[0], cw * stride[1]),
        NARROW=h * w <= INT32_MAX, CHANNELS_LAST=tiling.channels_last, VEC=vec, BLOCK=BLOCK // vec,
        WIDE=needs_int64(x, y), debug=report, sanitize_overflow=False,
    )  # fmt: skip
