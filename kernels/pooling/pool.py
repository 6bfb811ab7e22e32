"""Max-pooling and its gradient in NCHW and in channels_last."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .overlapping import window_gather
from .tiling import BLOCK, UNROLLED, Windows, group, image_offset, kind, run_offset
from .unpool import max_unpool2d_fwd


@triton.jit
def keep_larger(best, at, value, tap):
    """torch's rule: a strictly larger value wins, so the first of equals stays; NaN always wins.

    Taps outside the image are -inf, which never wins.
    """
    wins = (value > best) | (value != value)
    return tl.where(wins, value, best), tl.where(wins, tap, at)


@triton.jit
def _see_tap(
    best, at, x, tap, plane, h0, w0, run, live, H, W, RUNS,
    KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, PARTIAL: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr,
):  # fmt: skip
    """One tap of each window, read where it lies: neighbours that overlap find it in the cache."""
    h, w = h0 + tap // KW * DH, w0 + tap % KW * DW
    inside = live
    if PARTIAL:
        inside = live & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    offset = image_offset(plane, h, w, run, H, W, RUNS, VEC, CHANNELS_LAST)
    value = tl.load(x + offset, mask=inside, other=float("-inf")).to(best.dtype)
    return keep_larger(best, at, value, tap)


@triton.jit
def max_pool2d_fwd_kernel(
    x, y, positions, GROUPS, RUNS, H, W, OH, OW,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, POSITIONS: tl.constexpr, PARTIAL: tl.constexpr, WHOLE_ROWS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program pools BLOCK groups of VEC windows. Writes the output and the positions once.

    Reads each element of the input once where windows tile it, else as often as windows hold it, through the cache.
    """
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    o = program * BLOCK + tl.arange(0, BLOCK)
    live = (o < GROUPS)[:, None]
    plane, oh, ow, run = group(o, OH, RUNS, OW, VEC, CHANNELS_LAST)
    h0, w0 = oh * SH - PH, ow * SW - PW
    best = tl.full((BLOCK, VEC), float("-inf"), tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32)
    # The first tap inside the image stands where nothing is larger than -inf.
    first = (tl.maximum(-h0, 0) + DH - 1) // DH * KW + (tl.maximum(-w0, 0) + DW - 1) // DW
    at = first.to(tl.int32) + tl.zeros((BLOCK, VEC), tl.int32)
    if WHOLE_ROWS:
        for i in tl.static_range(KH):
            h = h0 + i * DH
            for q in tl.static_range(-((PW + 1) // 2), (KW - 1 - PW) // 2 + 1):  # taps 2q + PW and the next
                inside = live
                if PARTIAL:
                    inside = live & (h >= 0) & (h < H)
                if q != 0:
                    w = run * (2 * VEC) + 2 * q + tl.arange(0, 2 * VEC)[None, :]
                    inside = inside & (w >= 0) & (w < W)
                row = tl.load(x + run_offset(plane, h, run, H, RUNS, VEC) + 2 * q, mask=inside, other=float("-inf"))
                left, right = tl.split(tl.reshape(row.to(best.dtype), (BLOCK, VEC, 2)))
                if 2 * q + PW >= 0:
                    best, at = keep_larger(best, at, left, i * KW + 2 * q + PW)
                if 2 * q + PW + 1 < KW:
                    best, at = keep_larger(best, at, right, i * KW + 2 * q + PW + 1)
    elif KH * KW <= UNROLLED:
        for tap in tl.static_range(KH * KW):
            best, at = _see_tap(
                best, at, x, tap, plane, h0, w0, run, live, H, W, RUNS, KW, DH, DW, PARTIAL, CHANNELS_LAST, VEC
            )
    else:
        for tap in range(KH * KW):
            best, at = _see_tap(
                best, at, x, tap, plane, h0, w0, run, live, H, W, RUNS, KW, DH, DW, PARTIAL, CHANNELS_LAST, VEC
            )
    out = o[:, None] * VEC + tl.arange(0, VEC)[None, :]
    tl.store(y + out, best.to(y.dtype.element_ty), mask=live)
    if POSITIONS == "offsets":
        tl.store(positions + out, at.to(tl.uint8), mask=live)
    if POSITIONS == "indices":
        index = (h0 + at // KW * DH).to(tl.int64) * W + (w0 + at % KW * DW)
        tl.store(positions + out, index, mask=live)


def max_pool2d_fwd(x: Tensor, y: Tensor, positions: Tensor | None, windows: Windows) -> None:
    """Pool x (N, C, H, W) into y (N, C, OH, OW); positions like y, uint8 or int64, or None."""
    (h, w), (oh, ow) = x.shape[-2:], y.shape[-2:]
    vec, runs = windows.groups(y.shape[1], ow, x.element_size())
    groups = y.numel() // vec
    whole_rows = windows.runs(x, y) and windows.kernel[0] * windows.kernel[1] <= UNROLLED.value
    launch(
        max_pool2d_fwd_kernel, triton.cdiv(groups, BLOCK // vec),
        x, y, y if positions is None else positions, groups, runs, h, w, oh, ow,
        **windows.constants(x, y, vec) | {"WHOLE_ROWS": whole_rows}, **windows.gaps(),
        POSITIONS=kind(positions), PARTIAL=not windows.inside(x, y),
    )  # fmt: skip


def max_pool2d_bwd(grad_y: Tensor, positions: Tensor, grad_x: Tensor, windows: Windows) -> None:
    """The gradient grad_x (N, C, H, W) of a pool that kept `positions`; every element of it is written once.

    Where windows tile the image it is an unpooling; where they overlap each pixel adds up what its windows give it.
    """
    if windows.tile:
        max_unpool2d_fwd(grad_y, positions, grad_x, windows, trusted=True)
    else:
        window_gather(grad_y, positions, grad_x, windows, add=True)
