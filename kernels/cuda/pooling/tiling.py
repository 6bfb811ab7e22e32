"""How threads of the CUDA C++ kernels map to the images of a pooling: see tiling.cuh."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...pooling.geometry import PoolGeometry
from ..launch import vector_width

UNROLLED = 16  # at most so many window elements are unrolled; more run in a loop


class Tiling(NamedTuple):
    """The windows of one call and the layout of its tensors, and how its maps divide into groups."""

    geometry: PoolGeometry
    channels_last: bool

    def has_whole_rows(self, image: Tensor, pooled: Tensor, widths: tuple[int, ...]) -> bool:
        """NCHW: whether each window of a row, of one of these widths, owns two aligned pixels of the image's row."""
        geometry = self.geometry
        fits = geometry.stride[1] == 2 and geometry.kernel_size[1] in widths and not geometry.padding[1]
        runs = image.shape[-1] == 2 * pooled.shape[-1] and image.data_ptr() % 16 == 0
        return fits and geometry.dilation[1] == 1 and runs and not self.channels_last

    def groups(self, map: Tensor, whole_rows: bool, *tensors: Tensor) -> tuple[int, int]:
        """(VEC, groups of a row in NCHW or of a pixel in channels_last) of a map; groups align in the other tensors.

        In NCHW a group is one element unless `whole_rows`.
        """
        length = map.shape[1] if self.channels_last else map.shape[-1]
        vec = vector_width(length, map, *tensors) if self.channels_last or whole_rows else 1
        return vec, length // vec

    def unrolled_kernel_size(self) -> tuple[int, int]:
        """The kernel size as template parameters: (0, 0) if it has too many elements to unroll."""
        return tuple(self.geometry.kernel_size) if self.geometry.taps <= UNROLLED else (0, 0)

    def sizes(self, image: Tensor, pooled: Tensor) -> tuple[int, ...]:
        """What every kernel takes: sizes of the image and of the pooled map, kernel size, stride and padding."""
        kernel_size, stride, padding, _ = self.geometry
        return (*image.shape[-2:], *pooled.shape[-2:], *kernel_size, *stride, *padding)
