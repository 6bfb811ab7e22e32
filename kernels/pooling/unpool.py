"""Max-unpooling and its gradient, in NCHW and channels_last."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .geometry import PoolGeometry
from .overlapping import window_gather
from .tiling import BLOCK, Tiling, group, image_offset, position_kind, run_offset

SCATTER_BLOCK = 64  # pooled elements that the ordered scatter compares at a time
SCATTER_PROGRAMS = 1024
WHOLE_WINDOWS = 16  # elements: the largest window that the gradient reads whole to get one of them


@triton.jit
def max_unpool2d_fwd_kernel(
    x, positions, y, out_of_window, CELLS, RUNS, H, W, CH, CW, OH, OW,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    POSITIONS: tl.constexpr, PARTIAL: tl.constexpr, WHOLE_ROWS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    REPORT: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK groups of VEC cells. A cell is a window and the gap after it, SH x SW pixels.

    Each element of y is in one cell and written once: the window's value at its position, zero elsewhere. Values and
    positions are read once. REPORT: an offset outside its own window is an error, an index outside sets
    *out_of_window to 1. This is also the gradient of max_pool2d, with the gradient of the pooled map as x.
    """
    # 1. Which cells
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    o = program * BLOCK + tl.arange(0, BLOCK)
    m_live = (o < CELLS)[:, None]
    plane, ch, cw, run = group(o, CH, RUNS, CW, VEC, CHANNELS_LAST)
    h0, w0 = ch * SH - PH, cw * SW - PW
    m_pooled = m_live
    if PARTIAL:
        m_pooled = m_live & (ch < OH) & (cw < OW)
        o_x = image_offset(plane, ch, cw, run, OH, OW, RUNS, VEC, CHANNELS_LAST)
    else:
        o_x = o[:, None] * VEC + tl.arange(0, VEC)[None, :]

    # 2. Load the value and position of each window
    value = tl.load(x + o_x, mask=m_pooled, other=0.0)
    value = value.to(tl.float64 if value.dtype == tl.float64 else tl.float32)
    position = tl.load(positions + o_x, mask=m_pooled, other=0).to(tl.int32 if POSITIONS == "offsets" else tl.int64)
    hits = m_live != m_live

    # 3. Store the pixels of each cell
    for i in tl.static_range(SH):
        h = h0 + i
        if WHOLE_ROWS:
            left = tl.zeros((BLOCK, VEC), value.dtype)
            right = tl.zeros((BLOCK, VEC), value.dtype)
            m_inside = m_live
            if PARTIAL:
                m_inside = m_live & (h >= 0) & (h < H)
            if i < KH:
                hit = m_inside & (position == (i * KW if POSITIONS == "offsets" else h.to(tl.int64) * W + w0))
                left = tl.where(hit, value, 0.0)
                hits = hits | hit
                if KW == 2:
                    hit = m_inside & (
                        position == (i * KW + 1 if POSITIONS == "offsets" else h.to(tl.int64) * W + w0 + 1)
                    )
                    right = tl.where(hit, value, 0.0)
                    hits = hits | hit
            row = tl.reshape(tl.join(left, right), (BLOCK, 2 * VEC)).to(y.dtype.element_ty)
            tl.store(y + run_offset(plane, h, run, H, RUNS, VEC), row, mask=m_inside)
        else:
            for j in tl.static_range(SW):
                w = w0 + j
                m_inside = m_live
                if PARTIAL:
                    m_inside = m_live & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                tap = tl.zeros((BLOCK, VEC), value.dtype)
                if i < KH and j < KW:
                    hit = m_inside & (position == (i * KW + j if POSITIONS == "offsets" else h.to(tl.int64) * W + w))
                    tap = tl.where(hit, value, 0.0)
                    hits = hits | hit
                o_y = image_offset(plane, h, w, run, H, W, RUNS, VEC, CHANNELS_LAST)
                tl.store(y + o_y, tap.to(y.dtype.element_ty), mask=m_inside)

    # 4. Report windows whose position is none of their pixels
    if REPORT:
        m_outside = m_pooled & (hits == 0)
        if POSITIONS == "offsets":
            tl.device_assert(m_outside == 0, "max_unpool2d_with_offsets: found an offset outside its window")
        else:
            found = tl.max(m_outside.to(tl.int32), axis=1)
            tl.store(out_of_window + tl.zeros_like(found), 1, mask=found != 0)


@triton.jit
def max_unpool2d_scatter_kernel(
    x, indices, y, out_of_window, PLANES, PROGRAMS, C, HW, OHW, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr
):
    """Unpool from any valid indices: one program writes whole planes, in order. Needed only if *out_of_window is 1.

    y already holds zeros, and the values whose index is in their own window; all values are written again. If several
    pooled elements share an index, the last in row-major order stays, as in torch on a CPU. Compares BLOCK x BLOCK
    indices at a time: slow, but free of races.
    """
    if tl.load(out_of_window) != 0:
        # 1. Which planes
        plane = tl.program_id(0).to(tl.int64)
        while plane < PLANES:
            step = C if CHANNELS_LAST else 1
            y_plane = y + (plane // C * C * HW + plane % C if CHANNELS_LAST else plane * HW)
            o_x = plane // C * C * OHW + plane % C if CHANNELS_LAST else plane * OHW
            for start in range(0, OHW, BLOCK):
                # 2. Load the indices and values of a block
                o = start + tl.arange(0, BLOCK).to(tl.int64)
                index = tl.load(indices + o_x + o * step, mask=o < OHW, other=-1)
                value = tl.load(x + o_x + o * step, mask=o < OHW, other=0.0)
                m_valid = (index >= 0) & (index < HW)
                tl.device_assert(m_valid | (o >= OHW), "max_unpool2d: found an invalid max index")

                # 3. Store the last value of each index
                same = (index[:, None] == index[None, :]) & (o[None, :] > o[:, None])
                m_last = tl.sum(same.to(tl.int32), axis=1) == 0
                tl.store(y_plane + index * step, value, mask=m_valid & m_last)
                tl.debug_barrier()
            plane += PROGRAMS


@triton.jit
def max_unpool2d_bwd_kernel(
    grad_y, positions, grad_x, GROUPS, RUNS, H, W, HW, OH, OW,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    POSITIONS: tl.constexpr, PARTIAL: tl.constexpr, WHOLE_WINDOWS: tl.constexpr, WHOLE_ROWS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program gathers BLOCK groups of VEC pooled elements: each takes the element of grad_y at its position.

    WHOLE_WINDOWS reads whole windows of grad_y, because one element alone also costs a 32-byte sector. Without it, and
    for an index outside its own window, each position is read by itself if it is inside the plane.
    """
    # 1. Which windows, and their positions
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    o = program * BLOCK + tl.arange(0, BLOCK)
    m_live = (o < GROUPS)[:, None]
    plane, oh, ow, run = group(o, OH, RUNS, OW, VEC, CHANNELS_LAST)
    h0, w0 = oh * SH - PH, ow * SW - PW
    o_grad_x = o[:, None] * VEC + tl.arange(0, VEC)[None, :]
    position = tl.load(positions + o_grad_x, mask=m_live, other=0).to(tl.int32 if POSITIONS == "offsets" else tl.int64)

    # 2. Pick from the whole windows
    grad = tl.zeros((BLOCK, VEC), tl.float64 if grad_y.dtype.element_ty == tl.float64 else tl.float32)
    hits = m_live != m_live
    for i in tl.static_range(KH if WHOLE_WINDOWS else 0):
        h = h0 + i
        if WHOLE_ROWS:
            m_inside = m_live
            if PARTIAL:
                m_inside = m_live & (h >= 0) & (h < H)
            row = tl.load(grad_y + run_offset(plane, h, run, H, RUNS, VEC), mask=m_inside, other=0.0)
            left, right = tl.split(tl.reshape(row.to(grad.dtype), (BLOCK, VEC, 2)))
            hit = m_inside & (position == (i * KW if POSITIONS == "offsets" else h.to(tl.int64) * W + w0))
            grad = tl.where(hit, left, grad)
            hits = hits | hit
            if KW == 2:
                hit = m_inside & (position == (i * KW + 1 if POSITIONS == "offsets" else h.to(tl.int64) * W + w0 + 1))
                grad = tl.where(hit, right, grad)
                hits = hits | hit
        else:
            for j in tl.static_range(KW):
                w = w0 + j
                m_inside = m_live
                if PARTIAL:
                    m_inside = m_live & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                o_grad_y = image_offset(plane, h, w, run, H, W, RUNS, VEC, CHANNELS_LAST)
                value = tl.load(grad_y + o_grad_y, mask=m_inside, other=0.0).to(grad.dtype)
                hit = m_inside & (position == (i * KW + j if POSITIONS == "offsets" else h.to(tl.int64) * W + w))
                grad = tl.where(hit, value, grad)
                hits = hits | hit

    # 3. Read single elements at the remaining positions
    if POSITIONS == "indices" or not WHOLE_WINDOWS:
        if POSITIONS == "indices":
            m_lost = m_live & (hits == 0) & (position >= 0) & (position < HW)
            o_grad_y = plane * HW + position  # an index is h * W + w: nothing is divided
            if CHANNELS_LAST:
                o_grad_y = (o_grad_y * RUNS + run) * VEC + tl.arange(0, VEC)[None, :]
        else:
            h, w = h0 + position // KW, w0 + position % KW
            m_lost = m_live & (position < KH * KW) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            o_grad_y = image_offset(plane, h, w, run, H, W, RUNS, VEC, CHANNELS_LAST)
        grad = tl.where(m_lost, tl.load(grad_y + o_grad_y, mask=m_lost, other=0.0).to(grad.dtype), grad)

    # 4. Store
    tl.store(grad_x + o_grad_x, grad.to(grad_x.dtype.element_ty), mask=m_live)


def max_unpool2d_fwd(
    x: Tensor, positions: Tensor, y: Tensor, geometry: PoolGeometry, channels_last: bool, *, trusted: bool
) -> None:
    """Unpool x (N, C, OH, OW) into y (N, C, H, W); every element of y is written.

    trusted: the positions come from a pool of this geometry, so each is in its own window.
    """
    tiling = Tiling(geometry, channels_last)
    search = not trusted and positions.dtype == torch.int64
    out_of_window = torch.zeros(1, dtype=torch.int32, device=x.device) if search else y
    if geometry.has_cells:
        _unpool_cells(x, positions, y, out_of_window, tiling, trusted)
    else:
        window_gather(x, positions, y, tiling, add=False, out_of_window=out_of_window, report=not trusted)
    if search:
        n, c, h, w = y.shape
        programs = min(n * c, SCATTER_PROGRAMS)
        launch(
            max_unpool2d_scatter_kernel, programs,
            x, positions, y, out_of_window, n * c, programs, c, h * w, x.shape[2] * x.shape[3],
            CHANNELS_LAST=channels_last, BLOCK=SCATTER_BLOCK, debug=True, sanitize_overflow=False,
        )  # fmt: skip


def _unpool_cells(
    x: Tensor, positions: Tensor, y: Tensor, out_of_window: Tensor, tiling: Tiling, trusted: bool
) -> None:
    (n, c, h, w), (oh, ow) = y.shape, x.shape[-2:]
    stride, padding = tiling.geometry.stride, tiling.geometry.padding
    ch = max(triton.cdiv(h + padding[0], stride[0]), oh)
    cw = max(triton.cdiv(w + padding[1], stride[1]), ow)
    vec, runs = tiling.groups(c, cw, x.element_size())
    cells = n * c * ch * cw // vec
    whole = (h, w) == (oh * stride[0], ow * stride[1]) and not any(padding)
    launch(
        max_unpool2d_fwd_kernel, triton.cdiv(cells, BLOCK // vec),
        x, positions, y, out_of_window, cells, runs, h, w, ch, cw, oh, ow,
        **tiling.constants(y, x, vec), POSITIONS=position_kind(positions), PARTIAL=not whole, REPORT=not trusted,
        debug=not trusted, sanitize_overflow=False,
    )  # fmt: skip


def max_unpool2d_bwd(
    grad_y: Tensor, positions: Tensor, grad_x: Tensor, geometry: PoolGeometry, channels_last: bool
) -> None:
    """Gather grad_x (N, C, OH, OW) from grad_y (N, C, H, W) at the positions."""
    tiling = Tiling(geometry, channels_last)
    (h, w), (oh, ow) = grad_y.shape[-2:], grad_x.shape[-2:]
    vec, runs = tiling.groups(grad_x.shape[1], ow, grad_y.element_size())
    groups = grad_x.numel() // vec
    launch(
        max_unpool2d_bwd_kernel, triton.cdiv(groups, BLOCK // vec),
        grad_y, positions, grad_x, groups, runs, h, w, h * w, oh, ow,
        **tiling.constants(grad_y, grad_x, vec), POSITIONS=position_kind(positions),
        PARTIAL=not tiling.windows_are_inside(grad_y, grad_x),
        WHOLE_WINDOWS=geometry.has_cells and geometry.taps <= WHOLE_WINDOWS,
    )  # fmt: skip
