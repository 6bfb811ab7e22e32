"""Depthwise transposed convolution (each group has one input and one output channel) and its gradients, without GEMMs.

    y[n, c, oh, ow] = sum over taps of x[n, c, h, w] * weight[c, i, j], and the same for the gradients

The kernels work on groups of VEC neighbouring elements (see pooling/tiling.py). In channels_last these are neighbouring
channels, and the weight is read as (taps, C). In NCHW they are neighbours in a row, and the weight is read in place.
An output pixel has at most ceil(KH / SH) * ceil(KW / SW) taps whatever the kernel size: four for FCN's 64 x 64 with
stride 32.

The gradients run in channels_last. In NCHW their images are copied to channels_last and back, read and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch, vector_width
from ..pooling.tiling import BLOCK, group, image_offset
from .gemm import needs_int64_offsets, split_k, sum_partials, to_layout, transpose_into
from .options import Epilogue
from .problem import ConvProblem


@triton.jit
def conv_transpose2d_depthwise_kernel(
    x, w, scale, bias, y, GROUPS, RUNS, C, H, W, X_RUNS, OH, OW,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, GRADIENT: tl.constexpr, CHANNELS_LAST: tl.constexpr, SCALE: tl.constexpr,
    BIAS: tl.constexpr, RELU: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK groups of VEC elements of y (.., OH, OW) from x (.., H, W), both in one layout.

    GRADIENT: x is the gradient of the output and y that of the input, and every tap of the window counts. Reads x once
    for each tap, the first time from memory and then from the caches; writes y once.
    """
    # 1. Which elements
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    o = program * BLOCK + tl.arange(0, BLOCK)
    m_live = (o < GROUPS)[:, None]
    plane, oh, ow, run = group(o, OH, RUNS, OW, VEC, CHANNELS_LAST)
    lane = tl.arange(0, VEC)[None, :]
    c = run * VEC + lane if CHANNELS_LAST else plane % C

    # 2. Sum over the taps
    taps_h: tl.constexpr = KH if GRADIENT else (KH + SH - 1) // SH
    taps_w: tl.constexpr = KW if GRADIENT else (KW + SW - 1) // SW
    acc = tl.zeros((BLOCK, VEC), tl.float32)
    for tap in range(taps_h * taps_w):
        a, b = tap // taps_w, tap % taps_w
        if GRADIENT:
            i, j, h, v = a, b, oh * SH - PH + a * DH, ow * SW - PW + b * DW
            m_inside = m_live & (h >= 0) & (h < H) & (v >= 0) & (v < W)
        else:
            i, j = (oh + PH) % SH + a * SH, (ow + PW) % SW + b * SW
            h, v = (oh + PH) // SH - a * DH, (ow + PW) // SW - b * DW
            m_inside = m_live & (h >= 0) & (h < H) & (v >= 0) & (v < W) & (i < KH) & (j < KW)
        pixel = tl.load(x + image_offset(plane, h, v, run, H, W, X_RUNS, VEC, CHANNELS_LAST), mask=m_inside, other=0.0)
        o_w = (i * KW + j) * C + c if CHANNELS_LAST else c * (KH * KW) + i * KW + j
        acc += pixel.to(tl.float32) * tl.load(w + o_w, mask=m_inside & (c < C), other=0.0).to(tl.float32)

    # 3. Apply the epilogue, and store
    if SCALE:
        acc *= tl.load(scale + c, mask=m_live & (c < C), other=0.0).to(tl.float32)
    if BIAS:
        acc += tl.load(bias + c, mask=m_live & (c < C), other=0.0).to(tl.float32)
    if RELU:
        acc = tl.where(acc <= 0, 0.0, acc)
    tl.store(y + (o[:, None] * VEC + lane), acc.to(y.dtype.element_ty), mask=m_live)


@triton.jit
def conv_transpose2d_depthwise_bwd_weight_kernel(
    x, grad_y, partials, PIXELS, ALL_STEPS, STEPS, C_RUNS, H, W, OH, OW,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """channels_last: one program sums one tap of BLOCK_C channels over STEPS blocks of BLOCK_P pixels of x.

    Reads x once for each tap, the first time from memory and then from the L2 cache; writes partials (splits, C, taps).
    """
    # 1. Which tap, channels and split
    C = C_RUNS * VEC
    tiles = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0)
    tap = program // tiles % (KH * KW)
    split = program // tiles // (KH * KW)
    c = program % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    if WIDE:
        split, C = split.to(tl.int64), tl.cast(C, tl.int64)
    i, j = tap // KW, tap % KW
    step = split * STEPS

    # 2. Sum over the pixels
    sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for s in range(0, tl.minimum(STEPS, ALL_STEPS - step)):
        p = (step + s) * BLOCK_P + tl.arange(0, BLOCK_P)
        oh, ow = p // W % H * SH - PH + i * DH, p % W * SW - PW + j * DW
        m_live = (p < PIXELS) & (oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW)
        m_live = m_live[:, None] & (c < C)[None, :]
        pixels = tl.load(x + ((p * C)[:, None] + c[None, :]), mask=m_live, other=0.0)
        o_grads = ((p // (H * W) * OH + oh) * OW + ow) * C
        grads = tl.load(grad_y + (o_grads[:, None] + c[None, :]), mask=m_live, other=0.0)
        sums += pixels.to(tl.float32) * grads.to(tl.float32)

    # 3. Store the partial
    tl.store(partials + ((split * C + c) * (KH * KW) + tap), tl.sum(sums, axis=0), mask=c < C)


def _by_tap(weight: Tensor) -> Tensor:
    """The weight (C, 1, KH, KW) as (KH * KW, C)."""
    return to_layout(weight.contiguous().view(1, weight.shape[0], -1, 1), torch.channels_last)


def _gather(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    problem: ConvProblem,
    epilogue: Epilogue,
    *,
    channels_last: bool,
    gradient: bool,
) -> None:
    """Launch the kernel on images that are both channels_last, or both NCHW."""
    (_, c, h, w), (oh, ow) = x.shape, y.shape[-2:]
    vec = vector_width(x.element_size(), c if channels_last else ow)
    runs = (c if channels_last else ow) // vec
    launch(
        conv_transpose2d_depthwise_kernel, triton.cdiv(y.numel(), BLOCK),
        x, _by_tap(weight) if channels_last else weight.contiguous(), *epilogue.pointers(y), y,
        y.numel() // vec, runs, c, h, w, c // vec if channels_last else w, oh, ow,
        GRADIENT=gradient, CHANNELS_LAST=channels_last, VEC=vec, BLOCK=BLOCK // vec, WIDE=needs_int64_offsets(x, y),
        **problem.constants_without_groups(), **epilogue.constants(),
    )  # fmt: skip


def fwd(x: Tensor, weight: Tensor, y: Tensor, problem: ConvProblem, epilogue: Epilogue) -> None:
    """Write y (N, C, OH, OW) from x (N, C, H, W) and weight (C, 1, KH, KW)."""
    channels_last = problem.channels_last
    x = to_layout(x, torch.channels_last if channels_last else torch.contiguous_format)
    _gather(x, weight, y, problem, epilogue, channels_last=channels_last, gradient=False)


def bwd_input(grad_y: Tensor, weight: Tensor, grad_x: Tensor, problem: ConvProblem) -> None:
    """Write grad_x from a channels_last grad_y."""
    target = grad_x if problem.channels_last else torch.empty_like(grad_x, memory_format=torch.channels_last)
    _gather(grad_y, weight, target, problem, Epilogue(), channels_last=True, gradient=True)
    if target is not grad_x:
        transpose_into(target, grad_x, to_channels_last=False)


def bwd_weight(grad_y: Tensor, x: Tensor, grad_weight: Tensor, problem: ConvProblem) -> None:
    """Write grad_weight from a channels_last grad_y."""
    x = to_layout(x, torch.channels_last)
    (n, c, h, w), (oh, ow) = x.shape, grad_y.shape[-2:]
    vec, taps = vector_width(x.element_size(), c), grad_weight[0].numel()
    block_c = min(64, triton.next_power_of_2(c))
    block_p = min(BLOCK // block_c, max(1, triton.next_power_of_2(n * h * w)))
    steps, tiles = triton.cdiv(n * h * w, block_p), triton.cdiv(c, block_c) * taps
    each, splits = split_k(steps, tiles)
    partials = x.new_empty(splits, c * taps, dtype=torch.float32)
    launch(
        conv_transpose2d_depthwise_bwd_weight_kernel, splits * tiles,
        x, grad_y, partials, n * h * w, steps, each, c // vec, h, w, oh, ow,
        VEC=vec, WIDE=needs_int64_offsets(x, grad_y, partials), BLOCK_P=block_p, BLOCK_C=block_c,
        **problem.constants_without_groups(),
    )  # fmt: skip
    sum_partials(partials, grad_weight.view(-1) if grad_weight.is_contiguous() else grad_weight, 1)
