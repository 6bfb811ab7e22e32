"""The geometry of pooling windows, for every backend. No triton here: the other kernels run where it is missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

MAX_CELL = 64  # pixels: the largest cell (a window and the gap after it) whose pixels kernels write out one by one


class PoolGeometry(NamedTuple):
    """The windows of a pooling or unpooling, each field as (height, width)."""

    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int] = (1, 1)

    @property
    def taps(self) -> int:
        """The number of elements of a window."""
        return self.kernel_size[0] * self.kernel_size[1]

    @property
    def extent(self) -> list[int]:
        """Height and width of a window including the gaps of its dilation."""
        return [(k - 1) * d + 1 for k, d in zip(self.kernel_size, self.dilation, strict=True)]

    @property
    def overlaps(self) -> bool:
        """Whether two windows can share a pixel."""
        return any(extent > s for extent, s in zip(self.extent, self.stride, strict=True))

    @property
    def has_cells(self) -> bool:
        """Whether the image divides into cells, one per window: no overlap, no dilation, at most MAX_CELL pixels."""
        small = self.stride[0] * self.stride[1] <= MAX_CELL
        return small and not self.overlaps and tuple(self.dilation) == (1, 1)
