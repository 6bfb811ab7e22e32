"""Pooling windows on a GPU: how programs, groups and lanes map to images.

Every kernel works on groups: VEC neighbouring elements of the pooled map (along W in NCHW, along C in channels_last),
so that one access is 16 bytes wide. A group never crosses a row or a pixel. The position of a maximum is kept either
as `offsets`, the tap inside the window (row-major, uint8), or as `indices`, torch's flat h * W + w (int64).

In NCHW with stride 2 a group's VEC windows start in one run of 2 * VEC elements of the image's row: where such runs
tile the row (WHOLE_ROWS) a run is loaded or stored in one piece and split or joined in registers. Taps before and
behind it lie in the run shifted by two elements.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import INT32_MAX, vector_width
from .geometry import Geometry

BLOCK = 1024  # elements of the pooled map a program owns
UNROLLED = tl.constexpr(16)  # taps or windows that are written out one by one; more run in a loop, for the registers


@triton.jit
def group(o, SIZE_H, RUNS, SIZE_W, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """(plane or image, row, column, run) of group `o`; a column holds VEC entries in NCHW, one in channels_last."""
    lane = tl.arange(0, VEC)[None, :]
    run = (o % RUNS)[:, None]
    if CHANNELS_LAST:
        pixel = o // RUNS
        column = (pixel % SIZE_W)[:, None]
        rows = pixel // SIZE_W
    else:
        column = run * VEC + lane
        rows = o // RUNS
    return (rows // SIZE_H)[:, None], (rows % SIZE_H)[:, None], column, run


@triton.jit
def image_offset(plane, h, w, run, H, W, RUNS, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Where pixel (h, w) of the image lies: one element per entry of a group."""
    if CHANNELS_LAST:
        return (((plane * H + h) * W + w) * RUNS + run) * VEC + tl.arange(0, VEC)[None, :]
    else:
        return (plane * H + h) * W + w


@triton.jit
def run_offset(plane, h, run, H, RUNS, VEC: tl.constexpr):
    """Where the 2 * VEC pixels under a group's windows lie in row h (NCHW, WHOLE_ROWS)."""
    return ((plane * H + h) * RUNS + run) * (2 * VEC) + tl.arange(0, 2 * VEC)[None, :]


class Windows(Geometry):
    """The windows of one call as the Triton kernels take them."""

    def inside(self, image: Tensor, pooled: Tensor) -> bool:
        """Whether every window of the pooled map lies in the image as a whole."""
        ends = [(o - 1) * s + e for o, s, e in zip(pooled.shape[-2:], self.stride, self.extent, strict=True)]
        return not any(self.padding) and ends[0] <= image.shape[-2] and ends[1] <= image.shape[-1]

    def runs(self, image: Tensor, pooled: Tensor) -> bool:
        """Whether the image's rows are runs of two elements for each window, in NCHW."""
        two = self.stride[1] == 2 and self.dilation[1] == 1 and image.shape[-1] == 2 * pooled.shape[-1]
        return two and not self.channels_last

    def groups(self, channels: int, columns: int, element_size: int) -> tuple[int, int]:
        """(VEC, RUNS): elements of a group, and groups of one row (NCHW) or of one pixel (channels_last)."""
        length = channels if self.channels_last else columns
        vec = vector_width(element_size, length)
        return vec, length // vec

    def constants(self, image: Tensor, pooled: Tensor, vec: int) -> dict[str, Any]:
        """The compile-time arguments that every kernel takes."""
        whole_rows = self.runs(image, pooled) and self.kernel[1] <= 2 and self.padding[1] == 0
        return {
            **self.taps(), "WHOLE_ROWS": whole_rows,
            "CHANNELS_LAST": self.channels_last, "VEC": vec, "BLOCK": BLOCK // vec,
            "WIDE": wide(image, pooled),
        }  # fmt: skip

    def taps(self) -> dict[str, int]:
        """Kernel, stride and padding as compile-time arguments."""
        (kh, kw), (sh, sw), (ph, pw) = self.kernel, self.stride, self.padding
        return {"KH": kh, "KW": kw, "SH": sh, "SW": sw, "PH": ph, "PW": pw}

    def gaps(self) -> dict[str, int]:
        """The dilation as compile-time arguments, for the kernels that have one."""
        return {"DH": self.dilation[0], "DW": self.dilation[1]}


def wide(*tensors: Tensor) -> bool:
    """Whether offsets into the tensors need 64 bits."""
    return max(tensor.numel() for tensor in tensors) > INT32_MAX - 16 * BLOCK


def kind(positions: Tensor | None) -> str:
    """How positions are kept: "offsets" (uint8), "indices" (int64) or "none"."""
    if positions is None:
        return "none"
    return "offsets" if positions.dtype == torch.uint8 else "indices"
