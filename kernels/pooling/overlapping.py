"""Overlapping windows: each pixel of the image gathers from the windows that hold it, in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch, registers, vector_width
from .tiling import BLOCK, UNROLLED, Tiling, group, image_offset, needs_int64, position_kind


@triton.jit
def _see_window(
    found, x, positions, step, plane, h, w, run, m_live, W, OH, OW, RUNS,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, POSITIONS: tl.constexpr,
    ADD: tl.constexpr, CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Take window number `step`, in row-major order, of the DOWN x ACROSS windows that can hold each pixel."""
    oh = (h + PH) // SH - (DOWN - 1) + step // ACROSS
    ow = (w + PW) // SW - (ACROSS - 1) + step % ACROSS
    i, j = h + PH - oh * SH, w + PW - ow * SW  # the pixel's place in the window, never negative
    m_held = m_live & (oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW) & (i < KH * DH) & (j < KW * DW)
    if DH > 1:
        m_held &= i % DH == 0
    if DW > 1:
        m_held &= j % DW == 0
    o_pooled = image_offset(plane, oh, ow, run, OH, OW, RUNS, VEC, CHANNELS_LAST)
    position = tl.load(positions + o_pooled, mask=m_held, other=0)
    value = tl.load(x + o_pooled, mask=m_held, other=0.0).to(found.dtype)
    if POSITIONS == "offsets":
        hit = m_held & (position.to(tl.int32) == i // DH * KW + j // DW)
    else:
        hit = m_held & (position == h.to(tl.int64) * W + w)
    if ADD:
        return tl.where(hit, found + value, found)
    else:
        return tl.where(hit, value, found)


@triton.jit
def _see_run(
    left, right, x, positions, plane, h, run, oh, m_live, W, OH, OW, RUNS, q: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    POSITIONS: tl.constexpr, ADD: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Take window column / 2 + q of row `oh`, for VEC even columns (left) and the odd ones after them (right)."""
    pair = run * VEC + tl.arange(0, VEC)[None, :]
    ow, i = pair + q, h + PH - oh * SH
    m_held = m_live & (oh >= 0) & (oh < OH) & (i < KH)
    if q != 0:
        m_held = m_held & (ow >= 0) & (ow < OW)
    # OW is RUNS * VEC: written so, the compiler sees that the loads are aligned if q is 0.
    o_pooled = ((plane * OH + oh) * RUNS + run) * VEC + tl.arange(0, VEC)[None, :] + q
    position = tl.load(positions + o_pooled, mask=m_held, other=0)
    value = tl.load(x + o_pooled, mask=m_held, other=0.0).to(left.dtype)
    tap: tl.constexpr = PW - 2 * q  # the window element in the even column; the odd column has the next
    if POSITIONS == "offsets":
        ahead = position.to(tl.int32) - (i * KW + tap)
    else:
        ahead = position - (h.to(tl.int64) * W + 2 * pair)
    if tap >= 0 and tap < KW:
        left = tl.where(m_held & (ahead == 0), left + value if ADD else value, left)
    if tap + 1 >= 0 and tap + 1 < KW:
        right = tl.where(m_held & (ahead == 1), right + value if ADD else value, right)
    return left, right


@triton.jit
def _report_out_of_window(
    positions, out_of_window, o_positions, POOLED, RUNS, H, W, OH, OW,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    POSITIONS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """An offset outside its own window or the plane is an error; an index outside sets *out_of_window to 1."""
    m_live = (o_positions < POOLED)[:, None]
    _, oh, ow, _ = group(o_positions, OH, RUNS, OW, 1, CHANNELS_LAST)
    position = tl.load(positions + o_positions[:, None], mask=m_live, other=0)
    h0, w0 = oh * SH - PH, ow * SW - PW
    if POSITIONS == "offsets":
        tap = position.to(tl.int32)
        h, w = h0 + tap // KW, w0 + tap % KW
        m_outside = (tap >= KH * KW) | (h < 0) | (h >= H) | (w < 0) | (w >= W)
        tl.device_assert((m_outside & m_live) == 0, "max_unpool2d_with_offsets: found an offset outside its window")
    else:
        h, w = position // W, position % W
        m_outside = (position < 0) | (h >= H) | (h < h0) | (h >= h0 + KH) | (w < w0) | (w >= w0 + KW)
        tl.store(out_of_window + tl.zeros_like(h), 1, mask=m_outside & m_live)


@triton.jit
def window_gather_kernel(
    x, positions, y, out_of_window, GROUPS, RUNS, POOLED, POOLED_RUNS, H, W, OH, OW,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, POSITIONS: tl.constexpr,
    ADD: tl.constexpr, REPORT: tl.constexpr, WHOLE_ROWS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK groups of VEC pixels of y, or of VEC pairs of pixels with WHOLE_ROWS.

    A pixel takes the values in x of the windows whose position points to it: their sum with ADD (the gradient of a
    pool), else the last in row-major order (unpooling). y is written once; values and positions are read once for each
    pixel of their window, from the cache. REPORT: each program also checks BLOCK * VEC positions, because a window
    may hold no pixel at all.
    """
    # 1. Which pixels
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    o = program * BLOCK + tl.arange(0, BLOCK)
    m_live = (o < GROUPS)[:, None]
    plane, h, w, run = group(o, H, RUNS, W, VEC, CHANNELS_LAST)

    # 2. Gather from their windows, and store
    found = tl.zeros((BLOCK, VEC), tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32)
    if WHOLE_ROWS:
        right = found
        for step in tl.static_range(DOWN):
            oh = (h + PH) // SH - (DOWN - 1) + step
            for q in tl.static_range(-((KW - 1 - PW) // 2), (PW + 1) // 2 + 1):
                found, right = _see_run(
                    found, right, x, positions, plane, h, run, oh, m_live, W, OH, OW, RUNS, q,
                    KH, KW, SH, PH, PW, POSITIONS, ADD, VEC,
                )  # fmt: skip
        row = tl.reshape(tl.join(found, right), (BLOCK, 2 * VEC)).to(y.dtype.element_ty)
        tl.store(y + o[:, None] * (2 * VEC) + tl.arange(0, 2 * VEC)[None, :], row, mask=m_live)
    else:
        if DOWN * ACROSS <= UNROLLED:
            for step in tl.static_range(DOWN * ACROSS):
                found = _see_window(
                    found, x, positions, step, plane, h, w, run, m_live, W, OH, OW, RUNS,
                    KH, KW, SH, SW, PH, PW, DH, DW, DOWN, ACROSS, POSITIONS, ADD, CHANNELS_LAST, VEC,
                )  # fmt: skip
        else:
            for step in range(DOWN * ACROSS):
                found = _see_window(
                    found, x, positions, step, plane, h, w, run, m_live, W, OH, OW, RUNS,
                    KH, KW, SH, SW, PH, PW, DH, DW, DOWN, ACROSS, POSITIONS, ADD, CHANNELS_LAST, VEC,
                )  # fmt: skip
        o_y = o[:, None] * VEC + tl.arange(0, VEC)[None, :]
        tl.store(y + o_y, found.to(y.dtype.element_ty), mask=m_live)

    # 3. Check the positions
    if REPORT:
        o_positions = program * (BLOCK * VEC) + tl.arange(0, BLOCK * VEC)
        _report_out_of_window(
            positions, out_of_window, o_positions, POOLED, POOLED_RUNS, H, W, OH, OW,
            KH, KW, SH, SW, PH, PW, POSITIONS, CHANNELS_LAST,
        )  # fmt: skip


def window_gather(
    x: Tensor, positions: Tensor, y: Tensor, tiling: Tiling, *, add: bool, out_of_window: Tensor | None = None,
    report: bool = False,
) -> None:  # fmt: skip
    """Gather y (N, C, H, W) from x (N, C, OH, OW) at the positions, for windows of any geometry.

    report: check for positions outside their windows. If an index is, out_of_window[0] becomes 1.
    """
    geometry = tiling.geometry
    c, h, w = y.shape[1:]
    oh, ow = x.shape[-2:]
    down, across = (triton.cdiv(e, s) for e, s in zip(geometry.extent, geometry.stride, strict=True))
    whole_rows = tiling.has_runs(y, x) and geometry.dilation[0] == 1 and down * across <= UNROLLED.value
    pixels = 2 if whole_rows else 1
    lanes, pooled_lanes = (c, c) if tiling.channels_last else (w // pixels, ow)
    vec = vector_width(y.element_size(), lanes)
    units = y.numel() // pixels
    kind = position_kind(positions)
    limit = registers(y, {(3, 8, 90): 56}) if whole_rows and kind == "offsets" else {}
    launch(
        window_gather_kernel, triton.cdiv(max(units, x.numel() if report else 0), BLOCK),
        x, positions, y, y if out_of_window is None else out_of_window,
        units // vec, lanes // vec, x.numel(), pooled_lanes, h, w, oh, ow,
        **tiling.window_constants(), **tiling.dilation_constants(), DOWN=down, ACROSS=across,
        POSITIONS=kind, ADD=add, REPORT=report, WHOLE_ROWS=whole_rows,
        CHANNELS_LAST=tiling.channels_last, VEC=vec, BLOCK=BLOCK // vec, WIDE=needs_int64(x, y),
        debug=report, sanitize_overflow=False, **limit,
    )  # fmt: skip
