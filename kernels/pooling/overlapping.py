"""Windows that overlap, seen from the image: each pixel gathers from the windows that hold it, in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch, vector_width
from .tiling import BLOCK, UNROLLED, Windows, group, image_offset, kind, wide


@triton.jit
def _see_window(
    found, x, positions, step, plane, h, w, run, live, W, OH, OW, RUNS,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, POSITIONS: tl.constexpr,
    ADD: tl.constexpr, CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Window number `step`, in row-major order, of the DOWN x ACROSS that can hold each pixel."""
    oh = (h + PH) // SH - (DOWN - 1) + step // ACROSS
    ow = (w + PW) // SW - (ACROSS - 1) + step % ACROSS
    i, j = h + PH - oh * SH, w + PW - ow * SW  # where the pixel lies in the window: never negative
    held = live & (oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW) & (i < KH * DH) & (j < KW * DW)
    if DH > 1:
        held &= i % DH == 0
    if DW > 1:
        held &= j % DW == 0
    source = image_offset(plane, oh, ow, run, OH, OW, RUNS, VEC, CHANNELS_LAST)
    position = tl.load(positions + source, mask=held, other=0)
    value = tl.load(x + source, mask=held, other=0.0).to(found.dtype)
    if POSITIONS == "offsets":
        hit = held & (position.to(tl.int32) == i // DH * KW + j // DW)
    else:
        hit = held & (position == h.to(tl.int64) * W + w)
    if ADD:
        return tl.where(hit, found + value, found)
    else:
        return tl.where(hit, value, found)


@triton.jit
def _see_run(
    left, right, x, positions, plane, h, run, oh, live, W, OH, OW, RUNS, q: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    POSITIONS: tl.constexpr, ADD: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Window column / 2 + q of window row oh, for VEC even columns (left) and the odd ones behind them (right)."""
    pair = run * VEC + tl.arange(0, VEC)[None, :]
    ow, i = pair + q, h + PH - oh * SH
    held = live & (oh >= 0) & (oh < OH) & (i < KH)
    if q != 0:
        held = held & (ow >= 0) & (ow < OW)
    # OW is RUNS * VEC, which says to the compiler that the loads are aligned where q is 0.
    source = ((plane * OH + oh) * RUNS + run) * VEC + tl.arange(0, VEC)[None, :] + q
    position = tl.load(positions + source, mask=held, other=0)
    value = tl.load(x + source, mask=held, other=0.0).to(left.dtype)
    tap: tl.constexpr = PW - 2 * q  # of the even column; the odd one's is the next
    if POSITIONS == "offsets":
        ahead = position.to(tl.int32) - (i * KW + tap)
    else:
        ahead = position - (h.to(tl.int64) * W + 2 * pair)
    if tap >= 0 and tap < KW:
        left = tl.where(held & (ahead == 0), left + value if ADD else value, left)
    if tap + 1 >= 0 and tap + 1 < KW:
        right = tl.where(held & (ahead == 1), right + value if ADD else value, right)
    return left, right


@triton.jit
def _report_strays(
    positions, foreign, o, POOLED, RUNS, H, W, OH, OW,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    POSITIONS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Positions outside their own windows or the plane: an offset is an error, an index sets *foreign to 1."""
    live = (o < POOLED)[:, None]
    _, oh, ow, _ = group(o, OH, RUNS, OW, 1, CHANNELS_LAST)
    position = tl.load(positions + o[:, None], mask=live, other=0)
    h0, w0 = oh * SH - PH, ow * SW - PW
    if POSITIONS == "offsets":
        tap = position.to(tl.int32)
        h, w = h0 + tap // KW, w0 + tap % KW
        stray = (tap >= KH * KW) | (h < 0) | (h >= H) | (w < 0) | (w >= W)
        tl.device_assert((stray & live) == 0, "max_unpool2d_with_offsets: found an offset outside its window")
    else:
        h, w = position // W, position % W
        stray = (position < 0) | (h >= H) | (h < h0) | (h >= h0 + KH) | (w < w0) | (w >= w0 + KW)
        tl.store(foreign + tl.zeros_like(h), 1, mask=stray & live)


@triton.jit
def window_gather_kernel(
    x, positions, y, foreign, GROUPS, RUNS, POOLED, POOLED_RUNS, H, W, OH, OW,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, POSITIONS: tl.constexpr,
    ADD: tl.constexpr, REPORT: tl.constexpr, WHOLE_ROWS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK groups of VEC pixels of y, with WHOLE_ROWS of VEC pairs of pixels.

    Each is what the windows whose maximum stood there hold in x: with ADD the sum (the gradient of a pool), else the
    last in row-major order (unpooling). y is written once; values and positions are read for each pixel that their
    window holds, through the cache. REPORT: the programs also look over the positions, BLOCK * VEC each, since a
    window may hold no pixel at all.
    """
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    o = program * BLOCK + tl.arange(0, BLOCK)
    live = (o < GROUPS)[:, None]
    plane, h, w, run = group(o, H, RUNS, W, VEC, CHANNELS_LAST)
    found = tl.zeros((BLOCK, VEC), tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32)
    if WHOLE_ROWS:
        right = found
        for step in tl.static_range(DOWN):
            oh = (h + PH) // SH - (DOWN - 1) + step
            for q in tl.static_range(-((KW - 1 - PW) // 2), (PW + 1) // 2 + 1):
                found, right = _see_run(
                    found, right, x, positions, plane, h, run, oh, live, W, OH, OW, RUNS, q,
                    KH, KW, SH, PH, PW, POSITIONS, ADD, VEC,
                )  # fmt: skip
        row = tl.reshape(tl.join(found, right), (BLOCK, 2 * VEC)).to(y.dtype.element_ty)
        tl.store(y + o[:, None] * (2 * VEC) + tl.arange(0, 2 * VEC)[None, :], row, mask=live)
    else:
        if DOWN * ACROSS <= UNROLLED:
            for step in tl.static_range(DOWN * ACROSS):
                found = _see_window(
                    found, x, positions, step, plane, h, w, run, live, W, OH, OW, RUNS,
                    KH, KW, SH, SW, PH, PW, DH, DW, DOWN, ACROSS, POSITIONS, ADD, CHANNELS_LAST, VEC,
                )  # fmt: skip
        else:
            for step in range(DOWN * ACROSS):
                found = _see_window(
                    found, x, positions, step, plane, h, w, run, live, W, OH, OW, RUNS,
                    KH, KW, SH, SW, PH, PW, DH, DW, DOWN, ACROSS, POSITIONS, ADD, CHANNELS_LAST, VEC,
                )  # fmt: skip
        out = o[:, None] * VEC + tl.arange(0, VEC)[None, :]
        tl.store(y + out, found.to(y.dtype.element_ty), mask=live)
    if REPORT:
        pooled = program * (BLOCK * VEC) + tl.arange(0, BLOCK * VEC)
        _report_strays(
            positions, foreign, pooled, POOLED, POOLED_RUNS, H, W, OH, OW,
            KH, KW, SH, SW, PH, PW, POSITIONS, CHANNELS_LAST,
        )  # fmt: skip


def window_gather(
    x: Tensor, positions: Tensor, y: Tensor, windows: Windows, *, add: bool, foreign: Tensor | None = None,
    report: bool = False,
) -> None:  # fmt: skip
    """Gather y (N, C, H, W) from x (N, C, OH, OW) at the positions, whatever the windows.

    report: look for positions outside their windows; of indices, set foreign[0] to 1 where there is one.
    """
    c, h, w = y.shape[1:]
    oh, ow = x.shape[-2:]
    down, across = (triton.cdiv(e, s) for e, s in zip(windows.extent, windows.stride, strict=True))
    whole_rows = windows.runs(y, x) and windows.dilation[0] == 1 and down * across <= UNROLLED.value
    pixels = 2 if whole_rows else 1
    lanes, pooled_lanes = (c, c) if windows.channels_last else (w // pixels, ow)
    vec = vector_width(y.element_size(), lanes)
    units = y.numel() // pixels
    launch(
        window_gather_kernel, triton.cdiv(max(units, x.numel() if report else 0), BLOCK),
        x, positions, y, y if foreign is None else foreign,
        units // vec, lanes // vec, x.numel(), pooled_lanes, h, w, oh, ow,
        **windows.taps(), **windows.gaps(), DOWN=down, ACROSS=across, POSITIONS=kind(positions), ADD=add,
        REPORT=report, WHOLE_ROWS=whole_rows, CHANNELS_LAST=windows.channels_last, VEC=vec, BLOCK=BLOCK // vec,
        WIDE=wide(x, y), debug=report, sanitize_overflow=False,
    )  # fmt: skip
