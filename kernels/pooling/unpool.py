"""Max-unpooling in NCHW and in channels_last: scatter from windows, its gather, and the scatter from any indices."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .overlapping import window_gather
from .tiling import BLOCK, Windows, group, image_offset, kind, run_offset

FOREIGN_BLOCK = 64  # pooled elements that the ordered scatter compares at a time
FOREIGN_PROGRAMS = 1024
WHOLE_WINDOWS = 16  # taps of a window that is read whole for the one element in it


@triton.jit
def max_unpool2d_fwd_kernel(
    x, positions, y, foreign, CELLS, RUNS, H, W, CH, CW, OH, OW,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    POSITIONS: tl.constexpr, PARTIAL: tl.constexpr, WHOLE_ROWS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    REPORT: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK groups of VEC cells of the image: a cell is a window and the gap behind it, SH x SW.

    Cells tile the image, so each element of y is written once: the window's value at its position, zero elsewhere.
    Reads the values and positions once. REPORT, for a position outside its own window: an offset is an error, an
    index sets *foreign to 1. It is the gradient of max_pool2d too, where x is the gradient of the pooled map.
    """
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    o = program * BLOCK + tl.arange(0, BLOCK)
    live = (o < CELLS)[:, None]
    plane, ch, cw, run = group(o, CH, RUNS, CW, VEC, CHANNELS_LAST)
    h0, w0 = ch * SH - PH, cw * SW - PW
    pooled = live
    if PARTIAL:
        pooled = live & (ch < OH) & (cw < OW)
        source = image_offset(plane, ch, cw, run, OH, OW, RUNS, VEC, CHANNELS_LAST)
    else:
        source = o[:, None] * VEC + tl.arange(0, VEC)[None, :]
    value = tl.load(x + source, mask=pooled, other=0.0)
    value = value.to(tl.float64 if value.dtype == tl.float64 else tl.float32)
    position = tl.load(positions + source, mask=pooled, other=0).to(tl.int32 if POSITIONS == "offsets" else tl.int64)
    hits = tl.zeros((BLOCK, VEC), tl.int32)
    for i in tl.static_range(SH):
        h = h0 + i
        if WHOLE_ROWS:
            left = tl.zeros((BLOCK, VEC), value.dtype)
            right = tl.zeros((BLOCK, VEC), value.dtype)
            inside = live
            if PARTIAL:
                inside = live & (h >= 0) & (h < H)
            if i < KH:
                hit = inside & (position == (i * KW if POSITIONS == "offsets" else h.to(tl.int64) * W + w0))
                left = tl.where(hit, value, 0.0)
                hits += hit.to(tl.int32)
                if KW == 2:
                    hit = inside & (position == (i * KW + 1 if POSITIONS == "offsets" else h.to(tl.int64) * W + w0 + 1))
                    right = tl.where(hit, value, 0.0)
                    hits += hit.to(tl.int32)
            row = tl.reshape(tl.join(left, right), (BLOCK, 2 * VEC)).to(y.dtype.element_ty)
            tl.store(y + run_offset(plane, h, run, H, RUNS, VEC), row, mask=inside)
        else:
            for j in tl.static_range(SW):
                w = w0 + j
                inside = live
                if PARTIAL:
                    inside = live & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                tap = tl.zeros((BLOCK, VEC), value.dtype)
                if i < KH and j < KW:
                    hit = inside & (position == (i * KW + j if POSITIONS == "offsets" else h.to(tl.int64) * W + w))
                    tap = tl.where(hit, value, 0.0)
                    hits += hit.to(tl.int32)
                offset = image_offset(plane, h, w, run, H, W, RUNS, VEC, CHANNELS_LAST)
                tl.store(y + offset, tap.to(y.dtype.element_ty), mask=inside)
    if REPORT:
        astray = pooled & (hits == 0)
        if POSITIONS == "offsets":
            tl.device_assert(astray == 0, "max_unpool2d_with_offsets: found an offset outside its window")
        else:
            tl.store(foreign + tl.zeros((BLOCK, VEC), tl.int32), 1, mask=astray)


@triton.jit
def max_unpool2d_foreign_kernel(
    x, indices, y, foreign, PLANES, PROGRAMS, C, HW, OHW, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr
):
    """Unpooling from any valid indices, run only when *foreign is 1: one program writes whole planes, in order.

    y holds zeros already, and values where an index lies in its own window; all are written again. Of several pooled
    elements with one index the last in row-major order stays, as in torch on a CPU. Compares BLOCK x BLOCK indices at
    a time; slow, and never a race.
    """
    if tl.load(foreign) != 0:
        plane = tl.program_id(0).to(tl.int64)
        while plane < PLANES:
            step = C if CHANNELS_LAST else 1
            to = y + (plane // C * C * HW + plane % C if CHANNELS_LAST else plane * HW)
            source = plane // C * C * OHW + plane % C if CHANNELS_LAST else plane * OHW
            for start in range(0, OHW, BLOCK):
                o = start + tl.arange(0, BLOCK).to(tl.int64)
                index = tl.load(indices + source + o * step, mask=o < OHW, other=-1)
                value = tl.load(x + source + o * step, mask=o < OHW, other=0.0)
                valid = (index >= 0) & (index < HW)
                tl.device_assert(valid | (o >= OHW), "max_unpool2d: found an invalid max index")
                same = (index[:, None] == index[None, :]) & (o[None, :] > o[:, None])
                last = tl.sum(same.to(tl.int32), axis=1) == 0
                tl.store(to + index * step, value, mask=valid & last)
                tl.debug_barrier()
            plane += PROGRAMS


@triton.jit
def max_unpool2d_bwd_kernel(
    grad_y, positions, grad_x, GROUPS, RUNS, H, W, HW, OH, OW,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    POSITIONS: tl.constexpr, PARTIAL: tl.constexpr, WHOLE_WINDOWS: tl.constexpr, WHOLE_ROWS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program gathers BLOCK groups of VEC pooled elements: each takes grad_y at its position.

    WHOLE_WINDOWS reads the windows of grad_y as they lie, since a lone element costs its 32-byte sector anyway; else,
    and for an index outside its own window, positions are followed one by one, where they are inside the plane.
    """
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    o = program * BLOCK + tl.arange(0, BLOCK)
    live = (o < GROUPS)[:, None]
    plane, oh, ow, run = group(o, OH, RUNS, OW, VEC, CHANNELS_LAST)
    h0, w0 = oh * SH - PH, ow * SW - PW
    out = o[:, None] * VEC + tl.arange(0, VEC)[None, :]
    position = tl.load(positions + out, mask=live, other=0).to(tl.int32 if POSITIONS == "offsets" else tl.int64)
    grad = tl.zeros((BLOCK, VEC), tl.float64 if grad_y.dtype.element_ty == tl.float64 else tl.float32)
    hits = tl.zeros((BLOCK, VEC), tl.int32)
    for i in tl.static_range(KH if WHOLE_WINDOWS else 0):
        h = h0 + i
        if WHOLE_ROWS:
            inside = live
            if PARTIAL:
                inside = live & (h >= 0) & (h < H)
            row = tl.load(grad_y + run_offset(plane, h, run, H, RUNS, VEC), mask=inside, other=0.0)
            left, right = tl.split(tl.reshape(row.to(grad.dtype), (BLOCK, VEC, 2)))
            hit = inside & (position == (i * KW if POSITIONS == "offsets" else h.to(tl.int64) * W + w0))
            grad = tl.where(hit, left, grad)
            hits += hit.to(tl.int32)
            if KW == 2:
                hit = inside & (position == (i * KW + 1 if POSITIONS == "offsets" else h.to(tl.int64) * W + w0 + 1))
                grad = tl.where(hit, right, grad)
                hits += hit.to(tl.int32)
        else:
            for j in tl.static_range(KW):
                w = w0 + j
                inside = live
                if PARTIAL:
                    inside = live & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                offset = image_offset(plane, h, w, run, H, W, RUNS, VEC, CHANNELS_LAST)
                value = tl.load(grad_y + offset, mask=inside, other=0.0).to(grad.dtype)
                hit = inside & (position == (i * KW + j if POSITIONS == "offsets" else h.to(tl.int64) * W + w))
                grad = tl.where(hit, value, grad)
                hits += hit.to(tl.int32)
    if POSITIONS == "indices" or not WHOLE_WINDOWS:
        if POSITIONS == "indices":
            h, w = position // W, position % W
            lost = live & (hits == 0) & (position >= 0) & (position < HW)
        else:
            h, w = h0 + position // KW, w0 + position % KW
            lost = live & (position < KH * KW) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        offset = image_offset(plane, h, w, run, H, W, RUNS, VEC, CHANNELS_LAST)
        grad = tl.where(lost, tl.load(grad_y + offset, mask=lost, other=0.0).to(grad.dtype), grad)
    tl.store(grad_x + out, grad.to(grad_x.dtype.element_ty), mask=live)


def max_unpool2d_fwd(x: Tensor, positions: Tensor, y: Tensor, windows: Windows, trusted: bool) -> None:
    """Unpool x (N, C, OH, OW) into y (N, C, H, W), every element of which is written.

    trusted: the positions come from a pool of this geometry, so that each lies in its own window.
    """
    search = not trusted and positions.dtype == torch.int64
    foreign = torch.zeros(1, dtype=torch.int32, device=x.device) if search else y
    if windows.tile:
        _unpool_cells(x, positions, y, foreign, windows, trusted)
    else:
        window_gather(x, positions, y, windows, add=False, foreign=foreign, report=not trusted)
    if search:
        n, c, h, w = y.shape
        programs = min(n * c, FOREIGN_PROGRAMS)
        launch(
            max_unpool2d_foreign_kernel, programs,
            x, positions, y, foreign, n * c, programs, c, h * w, x.shape[2] * x.shape[3],
            CHANNELS_LAST=windows.channels_last, BLOCK=FOREIGN_BLOCK, debug=True, sanitize_overflow=False,
        )  # fmt: skip


def _unpool_cells(x: Tensor, positions: Tensor, y: Tensor, foreign: Tensor, windows: Windows, trusted: bool) -> None:
    n, c, h, w = y.shape
    oh, ow = x.shape[-2:]
    ch = max(triton.cdiv(h + windows.padding[0], windows.stride[0]), oh)
    cw = max(triton.cdiv(w + windows.padding[1], windows.stride[1]), ow)
    vec, runs = windows.groups(c, cw, x.element_size())
    cells = n * c * ch * cw // vec
    whole = (h, w) == (oh * windows.stride[0], ow * windows.stride[1]) and not any(windows.padding)
    launch(
        max_unpool2d_fwd_kernel, triton.cdiv(cells, BLOCK // vec),
        x, positions, y, foreign, cells, runs, h, w, ch, cw, oh, ow,
        **windows.constants(y, x, vec), POSITIONS=kind(positions), PARTIAL=not whole, REPORT=not trusted,
        debug=not trusted, sanitize_overflow=False,
    )  # fmt: skip


def max_unpool2d_bwd(grad_y: Tensor, positions: Tensor, grad_x: Tensor, windows: Windows) -> None:
    """Gather grad_x (N, C, OH, OW) from grad_y (N, C, H, W) at the positions."""
    (h, w), (oh, ow) = grad_y.shape[-2:], grad_x.shape[-2:]
    vec, runs = windows.groups(grad_x.shape[1], ow, grad_y.element_size())
    groups = grad_x.numel() // vec
    launch(
        max_unpool2d_bwd_kernel, triton.cdiv(groups, BLOCK // vec),
        grad_y, positions, grad_x, groups, runs, h, w, h * w, oh, ow,
        **windows.constants(grad_y, grad_x, vec), POSITIONS=kind(positions),
        PARTIAL=not windows.inside(grad_y, grad_x),
        WHOLE_WINDOWS=windows.tile and windows.kernel[0] * windows.kernel[1] <= WHOLE_WINDOWS,
    )  # fmt: skip
