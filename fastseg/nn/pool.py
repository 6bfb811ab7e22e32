"""MaxPool2d and MaxUnpool2d."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .. import functional as F


class MaxPool2d(nn.MaxPool2d):
    """torch.nn.MaxPool2d on fastseg.functional.max_pool2d: same arguments, shapes, ties, errors.

    forward(input (N, C, H, W) or (C, H, W)) gives the pooled map, and int64 indices too where `return_indices` is set.
    Training without indices keeps one byte for each pooled element. Deterministic.
    """

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return F.max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class MaxUnpool2d(nn.MaxUnpool2d):
    """torch.nn.MaxUnpool2d on fastseg.functional.max_unpool2d: same arguments, shapes, errors, and deterministic.

    forward(input, indices, output_size=None): indices int64 of input's shape, output_size of 2 to 4 entries, the last
    two of which are height and width.
    """

    def forward(self, input: Tensor, indices: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        return F.max_unpool2d(input, indices, self.kernel_size, self.stride, self.padding, output_size)
