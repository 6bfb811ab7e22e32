"""What the kernels of transposed convolution share: the geometry of a call, its phases, and its epilogue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LEAST_BLOCK = 64  # columns of a product of which there are so many


@triton.jit
def rectangle(
    tile, columns, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, BLOCK: tl.constexpr
):
    """(first tile, rh0, phases_h, taps_h, rw0, phases_w, taps_w) of the rectangle of phases that a tile belongs to.

    Of a kernel KH = A * SH + B the first B phases have A + 1 taps, the others A: up to four rectangles with equal taps,
    those with the most taps first. A phase has so many columns, and a tile is BLOCK of those of one rectangle.
    """  # fmt: skip
    more_h: tl.constexpr = KH % SH
    more_w: tl.constexpr = KW % SW
    tiles_00 = (more_h * more_w * columns + BLOCK - 1) // BLOCK
    tiles_01 = (more_h * (SW - more_w) * columns + BLOCK - 1) // BLOCK
    tiles_10 = ((SH - more_h) * more_w * columns + BLOCK - 1) // BLOCK
    few_h = tile >= tiles_00 + tiles_01
    first = tl.where(few_h, tiles_00 + tiles_01, 0)
    before = tl.where(few_h, tiles_10, tiles_00)
    few_w = tile - first >= before
    first = tl.where(few_w, first + before, first)
    rh0, taps_h = tl.where(few_h, more_h, 0), tl.where(few_h, KH // SH, KH // SH + 1)
    rw0, taps_w = tl.where(few_w, more_w, 0), tl.where(few_w, KW // SW, KW // SW + 1)
    phases_h, phases_w = tl.where(few_h, SH - more_h, more_h), tl.where(few_w, SW - more_w, more_w)
    return first, rh0, phases_h, taps_h, rw0, phases_w, taps_w


@triton.jit
def epilogue(acc, scale, bias, k, live_k, SCALE: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr):
    """relu(acc * scale[k] + bias[k]) in float32, of which SCALE, BIAS and RELU say what there is; k of the columns."""
    if SCALE:
        acc *= tl.load(scale + k, mask=live_k, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        acc += tl.load(bias + k, mask=live_k, other=0.0).to(tl.float32)[None, :]
    if RELU:
        acc = tl.where(acc <= 0, 0.0, acc)  # NaN stays
    return acc


class Epilogue(NamedTuple):
    """What follows the sum before its one rounding: relu(sum * scale + bias); scale and bias are (K,) or None.

    Of a product of matrices `spread` columns side by side are one of those K channels.
    """

    scale: Tensor | None
    bias: Tensor | None
    relu: bool
    spread: int = 1

    def pointers(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, bias) for a launch; y stands for what there is not, and is not read."""
        return y if self.scale is None else self.scale, y if self.bias is None else self.bias

    def constants(self) -> dict[str, bool]:
        return {"SCALE": self.scale is not None, "BIAS": self.bias is not None, "RELU": self.relu}


class Geometry(NamedTuple):
    """(height, width) each of kernel, stride, padding and dilation, the groups, and the layout of the images.

    Where the dilation is more than 1, the stride or the kernel is 1.
    """

    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    channels_last: bool

    def tightened(self, image: Tensor, output: Tensor) -> Geometry:
        """The same convolution, where the image is one pixel high or wide: one cell, and no tap past the image."""
        sizes = zip((-2, -1), self.kernel, self.stride, self.padding, self.dilation, strict=True)
        stride = [
            s if image.shape[i] > 1 or d > 1 else max(k, output.shape[i] + p) for i, k, s, p, d in sizes
        ]  # fmt: skip
        return self._replace(stride=stride)

    def cells(self, output: Sequence[int]) -> list[int]:
        """Height and width of the map of cells that cover an output of this size from its padding on."""
        sizes = zip(output, self.stride, self.padding, strict=True)
        return [triton.cdiv(size + p, s) - p // s for size, s, p in sizes]

    def phases(self) -> list[int]:
        """How many phases each rectangle with equal taps holds."""
        rows, columns = ((taps % s, s - taps % s) for taps, s in zip(self.kernel, self.stride, strict=True))
        return [a * b for a in rows for b in columns]

    def depthwise(self, weight: Tensor) -> bool:
        """Whether every group is one channel in and one out."""
        return self.groups > 1 and self.channels(weight) == (1, 1)

    def shuffles(self, image: Sequence[int], output: Sequence[int]) -> bool:
        """Whether each pixel of an image of this height and width makes a rectangle of its own in the output.

        Its sides are powers of two, and a row of it fits a block of a product.
        """
        whole = list(output) == [size * s for size, s in zip(image, self.stride, strict=True)]
        powers_of_two = not any(s & (s - 1) for s in self.stride)
        whole = whole and self.kernel == self.stride and not any(self.padding)
        return whole and powers_of_two and self.stride[1] <= LEAST_BLOCK

    def multiplies_matrices(self, image: Tensor, output: Tensor) -> bool:
        """Whether one pixel becomes one window: output (N, K * KH * KW) = image (N, C) @ weight (C, K * KH * KW)."""
        whole = list(output.shape[-2:]) == self.kernel and not any(self.padding)
        return whole and image.shape[-2:] == (1, 1) and self.groups == 1

    def channels(self, weight: Tensor) -> tuple[int, int]:
        """Of one group: (input's, output's)."""
        return weight.shape[0] // self.groups, weight.shape[1]

    def constants(self) -> dict[str, int]:
        (kh, kw), (sh, sw), (ph, pw), (dh, dw) = self.kernel, self.stride, self.padding, self.dilation
        return {
            "KH": kh, "KW": kw, "SH": sh, "SW": sw, "PH": ph, "PW": pw, "DH": dh, "DW": dw, "GROUPS": self.groups,
        }  # fmt: skip


MATRICES = Geometry([1, 1], [1, 1], [0, 0], [1, 1], 1, channels_last=True)


def as_matrix(t: Tensor) -> Tensor:
    """(N, C, H, W) in NCHW or in channels_last as (N, C * H * W, 1, 1): a view, in the order in memory."""
    channels_last = t.is_contiguous(memory_format=torch.channels_last)
    return (t.permute(0, 2, 3, 1) if channels_last else t).flatten(1)[:, :, None, None]


def as_pixels(t: Tensor) -> Tensor:
    """The same matrix as a channels_last image (1, C * H * W, 1, N), of which each row is a pixel."""
    return as_matrix(t).permute(2, 1, 3, 0)
