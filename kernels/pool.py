"""Max-pooling over windows that do not overlap, in NCHW and in channels_last."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .windows import BLOCK, Windows, group, image_offset, kind, run_offset


@triton.jit
def keep_larger(best, at, value, tap, inside):
    """torch's rule: a strictly larger value wins, so the first of equals stays; NaN always wins."""
    wins = inside & ((value > best) | (value != value))
    return tl.where(wins, value, best), tl.where(wins, tap, at)


@triton.jit
def max_pool2d_fwd_kernel(
    x, y, positions, GROUPS, RUNS, H, W, OH, OW,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    POSITIONS: tl.constexpr, PARTIAL: tl.constexpr, WHOLE_ROWS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program pools BLOCK groups of VEC windows. Reads the input once; writes the output and the positions."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    o = program * BLOCK + tl.arange(0, BLOCK)
    live = (o < GROUPS)[:, None]
    plane, oh, ow, run = group(o, OH, RUNS, OW, VEC, CHANNELS_LAST)
    h0, w0 = oh * SH - PH, ow * SW - PW
    best = tl.full((BLOCK, VEC), float("-inf"), tl.float32)
    # The first tap inside the image stands where nothing is larger than -inf.
    at = tl.maximum(-h0, 0) * KW + tl.maximum(-w0, 0) + tl.zeros((BLOCK, VEC), tl.int32)
    for i in tl.static_range(KH):
        if WHOLE_ROWS:
            inside = live
            if PARTIAL:
                inside = live & (h0 + i >= 0) & (h0 + i < H)
            row = tl.load(x + run_offset(plane, h0 + i, run, H, RUNS, VEC), mask=inside, other=float("-inf"))
            left, right = tl.split(tl.reshape(row.to(tl.float32), (BLOCK, VEC, 2)))
            best, at = keep_larger(best, at, left, i * KW, inside)
            if KW == 2:
                best, at = keep_larger(best, at, right, i * KW + 1, inside)
        else:
            for j in tl.static_range(KW):
                h, w = h0 + i, w0 + j
                inside = live
                if PARTIAL:
                    inside = live & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                offset = image_offset(plane, h, w, run, H, W, RUNS, VEC, CHANNELS_LAST)
                value = tl.load(x + offset, mask=inside, other=float("-inf")).to(tl.float32)
                best, at = keep_larger(best, at, value, i * KW + j, inside)
    out = o[:, None] * VEC + tl.arange(0, VEC)[None, :]
    tl.store(y + out, best.to(y.dtype.element_ty), mask=live)
    if POSITIONS == "offsets":
        tl.store(positions + out, at.to(tl.uint8), mask=live)
    if POSITIONS == "indices":
        index = (h0 + at // KW).to(tl.int64) * W + (w0 + at % KW)
        tl.store(positions + out, index, mask=live)


def max_pool2d_fwd(x: Tensor, y: Tensor, positions: Tensor | None, windows: Windows) -> None:
    """Pool x (N, C, H, W) into y (N, C, OH, OW); positions like y, uint8 or int64, or None."""
    (h, w), (oh, ow) = x.shape[-2:], y.shape[-2:]
    vec, runs = windows.groups(y.shape[1], ow, x.element_size())
    groups = y.numel() // vec
    launch(
        max_pool2d_fwd_kernel, triton.cdiv(groups, BLOCK // vec),
        x, y, y if positions is None else positions, groups, runs, h, w, oh, ow,
        **windows.constants(x, y, vec), POSITIONS=kind(positions), PARTIAL=not windows.inside(x, y),
    )  # fmt: skip
