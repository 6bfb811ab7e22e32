"""How programs, groups and lanes of the Triton kernels map to the images of a pooling.

Every kernel works on groups: VEC neighbouring elements of the pooled map (along W in NCHW, along C in channels_last),
so that one access is 16 bytes wide. A group never crosses a row (NCHW) or a pixel (channels_last). The position of a
maximum is either an offset, the element's number inside the window (row-major, uint8), or torch's index, h * W + w in
the plane (int64).

In NCHW with stride 2 the VEC windows of a group start in 2 * VEC consecutive elements of an image row, called a run.
If whole runs divide the row (WHOLE_ROWS), each run is loaded or stored in one access, and split or joined in registers.
Elements of the windows to the left and right of the run are in the same run shifted by a multiple of two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import INT32_MAX, vector_width
from .geometry import PoolGeometry

BLOCK = 1024  # elements of the pooled map that a program owns
UNROLLED = tl.constexpr(16)  # at most so many window elements or windows are unrolled; more run in a loop


@triton.jit
def group(o, SIZE_H, RUNS, SIZE_W, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """(plane or image, row, column, run) of group `o`; `column` has VEC entries in NCHW and one in channels_last."""
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
    """The memory offsets of pixel (h, w) of the image, one per element of a group."""
    if CHANNELS_LAST:
        return (((plane * H + h) * W + w) * RUNS + run) * VEC + tl.arange(0, VEC)[None, :]
    else:
        return (plane * H + h) * W + w


@triton.jit
def run_offset(plane, h, run, H, RUNS, VEC: tl.constexpr):
    """The memory offsets of the 2 * VEC pixels of row h that belong to a group's windows (NCHW, WHOLE_ROWS)."""
    return ((plane * H + h) * RUNS + run) * (2 * VEC) + tl.arange(0, 2 * VEC)[None, :]


class Tiling(NamedTuple):
    """The windows of one call and the layout of its tensors, as the Triton kernels need them."""

    geometry: PoolGeometry
    channels_last: bool

    def windows_are_inside(self, image: Tensor, pooled: Tensor) -> bool:
        """Whether every window of the pooled map lies completely inside the image."""
        geometry = self.geometry
        sides = zip(pooled.shape[-2:], geometry.stride, geometry.extent, strict=True)
        ends = [(o - 1) * s + extent for o, s, extent in sides]
        return not any(geometry.padding) and ends[0] <= image.shape[-2] and ends[1] <= image.shape[-1]

    def has_runs(self, image: Tensor, pooled: Tensor) -> bool:
        """NCHW: whether each window of a row owns two consecutive elements of the image's row."""
        two = self.geometry.stride[1] == 2 and self.geometry.dilation[1] == 1
        return two and image.shape[-1] == 2 * pooled.shape[-1] and not self.channels_last

    def groups(self, channels: int, columns: int, element_size: int) -> tuple[int, int]:
        """(VEC, RUNS): the elements of a group, and the groups of one row (NCHW) or of one pixel (channels_last)."""
        length = channels if self.channels_last else columns
        vec = vector_width(element_size, length)
        return vec, length // vec

    def constants(self, image: Tensor, pooled: Tensor, vec: int) -> dict[str, Any]:
        """The compile-time arguments that every kernel takes."""
        geometry = self.geometry
        whole_rows = self.has_runs(image, pooled) and geometry.kernel_size[1] <= 2 and geometry.padding[1] == 0
        return {
            **self.window_constants(), "WHOLE_ROWS": whole_rows,
            "CHANNELS_LAST": self.channels_last, "VEC": vec, "BLOCK": BLOCK // vec,
            "WIDE": needs_int64(image, pooled),
        }  # fmt: skip

    def window_constants(self) -> dict[str, int]:
        """Kernel size, stride and padding as compile-time arguments."""
        (kh, kw), (sh, sw), (ph, pw), _ = self.geometry
        return {"KH": kh, "KW": kw, "SH": sh, "SW": sw, "PH": ph, "PW": pw}

    def dilation_constants(self) -> dict[str, int]:
        """The dilation as compile-time arguments, for the kernels that support one."""
        return {"DH": self.geometry.dilation[0], "DW": self.geometry.dilation[1]}


def needs_int64(*tensors: Tensor) -> bool:
    """Whether offsets into the tensors need 64 bits."""
    return max(tensor.numel() for tensor in tensors) > INT32_MAX - 16 * BLOCK


def position_kind(positions: Tensor | None) -> str:
    """How positions are stored: "offsets" (uint8), "indices" (int64) or "none"."""
    if positions is None:
        return "none"
    return "offsets" if positions.dtype == torch.uint8 else "indices"
