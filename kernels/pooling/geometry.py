"""Pooling windows, whatever runs them. No triton here: the CUDA C++ kernels run where it is missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

CELL = 64  # pixels of a window and the gap behind it that are written out one by one


class Geometry(NamedTuple):
    """The windows of one call, (height, width) each, and the layout of its tensors."""

    kernel: list[int]
    stride: list[int]
    padding: list[int]
    channels_last: bool
    dilation: Sequence[int] = (1, 1)

    @property
    def extent(self) -> list[int]:
        """Height and width of a window with the gaps between its taps."""
        return [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]

    @property
    def tile(self) -> bool:
        """Whether no two windows overlap, and a window with the gap behind it is of CELL pixels at most."""
        apart = all(extent <= s for extent, s in zip(self.extent, self.stride, strict=True))
        return apart and self.stride[0] * self.stride[1] <= CELL and tuple(self.dilation) == (1, 1)
