"""Pooling windows as the CUDA C++ kernels take them: see windows.cuh."""

from __future__ import annotations

from torch import Tensor

from ...pooling.geometry import Geometry
from ..launch import vector_width

UNROLLED = 16  # taps that are written out one by one; more run in a loop


class Windows(Geometry):
    """The windows of one call, and how its maps are divided into groups."""

    def rows(self, image: Tensor, pooled: Tensor, widths: tuple[int, ...]) -> bool:
        """NCHW: whether the rows under windows this wide are whole runs of two pixels for each, and aligned."""
        apart = self.stride[1] == 2 and self.kernel[1] in widths and not self.padding[1] and self.dilation[1] == 1
        runs = image.shape[-1] == 2 * pooled.shape[-1] and image.data_ptr() % 16 == 0
        return apart and runs and not self.channels_last

    def groups(self, map: Tensor, wide_rows: bool, *tensors: Tensor) -> tuple[int, int]:
        """(VEC, groups of a row in NCHW or of a pixel in channels_last) of a map, which aligns in the other tensors.

        In NCHW a group is one element unless `wide_rows`.
        """
        length = map.shape[1] if self.channels_last else map.shape[-1]
        vec = vector_width(length, map, *tensors) if self.channels_last or wide_rows else 1
        return vec, length // vec

    def unrolled(self) -> tuple[int, int]:
        """The window's size as parameters of a template: 0 where there are too many taps to write out."""
        return tuple(self.kernel) if self.kernel[0] * self.kernel[1] <= UNROLLED else (0, 0)

    def numbers(self, image: Tensor, pooled: Tensor) -> tuple[int, ...]:
        """What every kernel takes: sizes of the image and of the pooled map, kernel, stride and padding."""
        return (*image.shape[-2:], *pooled.shape[-2:], *self.kernel, *self.stride, *self.padding)
