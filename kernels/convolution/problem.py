"""The convolution that one launch computes: its phases, its cells, and which kernels can run it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .options import ConvTransposeGeometry

LEAST_BLOCK = 64  # columns: the narrowest tile of a GEMM with many columns


@triton.jit
def phase_rectangle(
    tile, columns, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, BLOCK: tl.constexpr
):
    """The rectangle of phases that a tile belongs to: (first tile, rh0, phases_h, taps_h, rw0, phases_w, taps_w).

    With a kernel height of A * SH + B the first B phases have A + 1 taps and the others A; the same along the width.
    That makes up to four rectangles of phases with equal taps, numbered with the most taps first. Each phase has
    `columns` columns, and a tile is BLOCK columns of one rectangle.
    """  # fmt: skip
    more_h: tl.constexpr = KH % SH
    more_w: tl.constexpr = KW % SW
    tiles_00 = (more_h * more_w * columns + BLOCK - 1) // BLOCK
    tiles_01 = (more_h * (SW - more_w) * columns + BLOCK - 1) // BLOCK
    tiles_10 = ((SH - more_h) * more_w * columns + BLOCK - 1) // BLOCK
    few_h = tile >= tiles_00 + tiles_01
    first = tl.where(few_h, tiles_00 + tiles_01, 0)
    tiles = tl.where(few_h, tiles_10, tiles_00)
    few_w = tile - first >= tiles
    first = tl.where(few_w, first + tiles, first)
    rh0, taps_h = tl.where(few_h, more_h, 0), tl.where(few_h, KH // SH, KH // SH + 1)
    rw0, taps_w = tl.where(few_w, more_w, 0), tl.where(few_w, KW // SW, KW // SW + 1)
    phases_h, phases_w = tl.where(few_h, SH - more_h, more_h), tl.where(few_w, SW - more_w, more_w)
    return first, rh0, phases_h, taps_h, rw0, phases_w, taps_w


class ConvProblem(NamedTuple):
    """A transposed convolution as the kernels see it. Each pair is (height, width).

    In a dimension whose dilation is more than 1, the stride or the kernel size is 1. columns_per_channel: how many
    neighbouring columns of the GEMM share one entry of the epilogue's vectors.
    """

    kernel_size: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    channels_last: bool
    columns_per_channel: int = 1

    @classmethod
    def of(cls, weight: Tensor, geometry: ConvTransposeGeometry, channels_last: bool) -> ConvProblem:
        """The problem of a call with this weight. channels_last: the layout of its output and input gradient."""
        pairs = (list(weight.shape[-2:]), list(geometry.stride), list(geometry.padding), list(geometry.dilation))
        return cls(*pairs, geometry.groups, channels_last)

    def for_single_pixels(self, image: Tensor, output: Tensor) -> ConvProblem:
        """The same convolution with one cell in each dimension in which the image has one pixel.

        The stride there becomes so large that one cell covers the output; no tap then falls outside the image.
        """
        sizes = zip((-2, -1), self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        stride = [
            s if image.shape[i] > 1 or d > 1 else max(k, output.shape[i] + p) for i, k, s, p, d in sizes
        ]  # fmt: skip
        return self._replace(stride=stride)

    def padded_cells(self, output: Sequence[int]) -> list[int]:
        """Height and width of the map of cells that covers an output of this size if cells begin in the padding."""
        sizes = zip(output, self.stride, self.padding, strict=True)
        return [triton.cdiv(size + p, s) - p // s for size, s, p in sizes]

    def phase_counts(self) -> list[int]:
        """The number of phases in each of the four rectangles of phases with equal taps."""
        rows, columns = ((taps % s, s - taps % s) for taps, s in zip(self.kernel_size, self.stride, strict=True))
        return [a * b for a in rows for b in columns]

    def is_depthwise(self, weight: Tensor) -> bool:
        """Whether every group has one input channel and one output channel."""
        return self.groups > 1 and self.channels(weight) == (1, 1)

    def is_pixel_shuffle(self, image: Sequence[int], output: Sequence[int]) -> bool:
        """Whether the output is one GEMM whose columns are shuffled into rectangles, one for each pixel of the image.

        image, output: (height, width). The kernel size equals the stride and consists of powers of two, and a row of a
        rectangle fits a tile.
        """
        whole = list(output) == [size * s for size, s in zip(image, self.stride, strict=True)]
        powers_of_two = not any(s & (s - 1) for s in self.stride)
        whole = whole and self.kernel_size == self.stride and not any(self.padding)
        return whole and powers_of_two and self.stride[1] <= LEAST_BLOCK

    def is_plain_gemm(self, image: Tensor, output: Tensor) -> bool:
        """Whether one pixel becomes one window: output (N, K * KH * KW) = image (N, C) @ weight (C, K * KH * KW)."""
        whole = list(output.shape[-2:]) == self.kernel_size and not any(self.padding)
        return whole and image.shape[-2:] == (1, 1) and self.groups == 1

    def channels(self, weight: Tensor) -> tuple[int, int]:
        """The numbers of input and output channels of one group."""
        return weight.shape[0] // self.groups, weight.shape[1]

    def constants(self) -> dict[str, int]:
        """Kernel size, stride, padding, dilation and groups as compile-time arguments."""
        (kh, kw), (sh, sw), (ph, pw), (dh, dw) = self.kernel_size, self.stride, self.padding, self.dilation
        return {
            "KH": kh, "KW": kw, "SH": sh, "SW": sw, "PH": ph, "PW": pw, "DH": dh, "DW": dw, "GROUPS": self.groups,
        }  # fmt: skip

    def constants_without_groups(self) -> dict[str, int]:
        """The same for kernels that have no groups."""
        return {name: value for name, value in self.constants().items() if name != "GROUPS"}


PLAIN_GEMM = ConvProblem([1, 1], [1, 1], [0, 0], [1, 1], 1, channels_last=True)


def as_matrix(t: Tensor) -> Tensor:
    """(N, C, H, W) in either dense layout as the matrix (N, C * H * W, 1, 1): a view, in the order in memory."""
    channels_last = t.is_contiguous(memory_format=torch.channels_last)
    return (t.permute(0, 2, 3, 1) if channels_last else t).flatten(1)[:, :, None, None]


def as_pixels(t: Tensor) -> Tensor:
    """The same matrix as a channels_last image (1, C * H * W, 1, N): each row of the matrix is one pixel."""
    return as_matrix(t).permute(2, 1, 3, 0)
