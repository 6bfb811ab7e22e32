"""Max-pooling and its gradient, in NCHW and channels_last."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .geometry import PoolGeometry
from .overlapping import window_gather
from .tiling import BLOCK, UNROLLED, Tiling, group, image_offset, position_kind, run_offset
from .unpool import max_unpool2d_fwd


@triton.jit
def keep_larger(best, at, value, tap):
    """torch's rule: a strictly larger value replaces `best`, so the first of equal values stays; NaN always does.

    Elements outside the image are -inf, which never replaces anything.
    """
    wins = (value > best) | (value != value)
    return tl.where(wins, value, best), tl.where(wins, tap, at)


@triton.jit
def _see_tap(
    best, at, x, tap, plane, h0, w0, run, m_live, H, W, RUNS,
    KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, PARTIAL: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr,
):  # fmt: skip
    """Compare one element (tap) of each window with the best so far. Overlapping windows reread it from the cache."""
    h, w = h0 + tap // KW * DH, w0 + tap % KW * DW
    m_inside = m_live
    if PARTIAL:
        m_inside = m_live & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    o_x = image_offset(plane, h, w, run, H, W, RUNS, VEC, CHANNELS_LAST)
    value = tl.load(x + o_x, mask=m_inside, other=float("-inf")).to(best.dtype)
    return keep_larger(best, at, value, tap)


@triton.jit
def max_pool2d_fwd_kernel(
    x, y, positions, GROUPS, RUNS, H, W, OH, OW,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, POSITIONS: tl.constexpr, PARTIAL: tl.constexpr, WHOLE_ROWS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program pools BLOCK groups of VEC windows. Writes the output and the positions once.

    Reads each element of the input once; if windows overlap, once for each window that holds it, from the cache.
    """
    # 1. Which windows
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    o = program * BLOCK + tl.arange(0, BLOCK)
    m_live = (o < GROUPS)[:, None]
    plane, oh, ow, run = group(o, OH, RUNS, OW, VEC, CHANNELS_LAST)
    h0, w0 = oh * SH - PH, ow * SW - PW

    # 2. The maximum of each window; if no value is above -inf, the first element inside the image
    best = tl.full((BLOCK, VEC), float("-inf"), tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32)
    first = (tl.maximum(-h0, 0) + DH - 1) // DH * KW + (tl.maximum(-w0, 0) + DW - 1) // DW
    at = first.to(tl.int32) + tl.zeros((BLOCK, VEC), tl.int32)
    if WHOLE_ROWS:
        for i in tl.static_range(KH):
            h = h0 + i * DH
            for q in tl.static_range(-((PW + 1) // 2), (KW - 1 - PW) // 2 + 1):  # window columns 2q + PW and the next
                m_inside = m_live
                if PARTIAL:
                    m_inside = m_live & (h >= 0) & (h < H)
                if q != 0:
                    w = run * (2 * VEC) + 2 * q + tl.arange(0, 2 * VEC)[None, :]
                    m_inside = m_inside & (w >= 0) & (w < W)
                row = tl.load(x + run_offset(plane, h, run, H, RUNS, VEC) + 2 * q, mask=m_inside, other=float("-inf"))
                left, right = tl.split(tl.reshape(row.to(best.dtype), (BLOCK, VEC, 2)))
                if 2 * q + PW >= 0:
                    best, at = keep_larger(best, at, left, i * KW + 2 * q + PW)
                if 2 * q + PW + 1 < KW:
                    best, at = keep_larger(best, at, right, i * KW + 2 * q + PW + 1)
    elif KH * KW <= UNROLLED:
        for tap in tl.static_range(KH * KW):
            best, at = _see_tap(
                best, at, x, tap, plane, h0, w0, run, m_live, H, W, RUNS, KW, DH, DW, PARTIAL, CHANNELS_LAST, VEC
            )
    else:
        for tap in range(KH * KW):
            best, at = _see_tap(
                best, at, x, tap, plane, h0, w0, run, m_live, H, W, RUNS, KW, DH, DW, PARTIAL, CHANNELS_LAST, VEC
            )

    # 3. Store
    o_y = o[:, None] * VEC + tl.arange(0, VEC)[None, :]
    tl.store(y + o_y, best.to(y.dtype.element_ty), mask=m_live)
    if POSITIONS == "offsets":
        tl.store(positions + o_y, at.to(tl.uint8), mask=m_live)
    if POSITIONS == "indices":
        index = (h0 + at // KW * DH).to(tl.int64) * W + (w0 + at % KW * DW)
        tl.store(positions + o_y, index, mask=m_live)


def max_pool2d_fwd(x: Tensor, y: Tensor, positions: Tensor | None, geometry: PoolGeometry, channels_last: bool) -> None:
    """Pool x (N, C, H, W) into y (N, C, OH, OW). positions: of y's shape, uint8 or int64, or None."""
    tiling = Tiling(geometry, channels_last)
    (h, w), (oh, ow) = x.shape[-2:], y.shape[-2:]
    vec, runs = tiling.groups(y.shape[1], ow, x.element_size())
    groups = y.numel() // vec
    whole_rows = tiling.has_runs(x, y) and geometry.taps <= UNROLLED.value
    launch(
        max_pool2d_fwd_kernel, triton.cdiv(groups, BLOCK // vec),
        x, y, y if positions is None else positions, groups, runs, h, w, oh, ow,
        **tiling.constants(x, y, vec) | {"WHOLE_ROWS": whole_rows}, **tiling.dilation_constants(),
        POSITIONS=position_kind(positions), PARTIAL=not tiling.windows_are_inside(x, y),
    )  # fmt: skip


def max_pool2d_bwd(
    grad_y: Tensor, positions: Tensor, grad_x: Tensor, geometry: PoolGeometry, channels_last: bool
) -> None:
    """Write the gradient grad_x (N, C, H, W) of a pool with these positions, each element once.

    Without overlap this is an unpooling. With overlap each pixel sums the gradients of the windows that chose it.
    """
    if geometry.has_cells:
        max_unpool2d_fwd(grad_y, positions, grad_x, geometry, channels_last, trusted=True)
    else:
        window_gather(grad_y, positions, grad_x, Tiling(geometry, channels_last), add=True)
