"""MaxPool2d and MaxUnpool2d, and the pool that hands out offsets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import dispatch
from .. import functional as F
from .scripting import refuse_script


class MaxPool2d(nn.MaxPool2d):
    """torch.nn.MaxPool2d on fastseg.functional.max_pool2d: same arguments, shapes, ties, errors.

    forward(input (N, C, H, W) or (C, H, W)) gives the pooled map, and int64 indices too where `return_indices` is set.
    Training without indices keeps one byte for each pooled element. Deterministic.
    """

    __prepare_scriptable__ = refuse_script

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if dispatch.left_to_torch("max_pool2d", input):
            return nn.MaxPool2d.forward(self, input)  # not super(): a bound forward works after a swap is undone
        return F.max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class MaxPool2dWithOffsets(MaxPool2d):
    """MaxPool2d whose indices, where `return_indices` is set, are the uint8 offsets of max_pool2d_with_offsets.

    MaxUnpool2d of the same kernel_size, stride and padding takes them; dilation must be 1 for that.
    """

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if not self.return_indices:
            return MaxPool2d.forward(self, input)
        return F.max_pool2d_with_offsets(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode
        )


class MaxUnpool2d(nn.MaxUnpool2d):
    """torch.nn.MaxUnpool2d on fastseg.functional.max_unpool2d: same arguments, shapes, errors, and deterministic.

    forward(input, indices, output_size=None): indices int64 of input's shape, or uint8, which are offsets
    (max_unpool2d_with_offsets); output_size of 2 to 4 entries, the last two of which are height and width.
    """

    __prepare_scriptable__ = refuse_script

    def forward(self, input: Tensor, indices: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        if isinstance(indices, Tensor) and indices.dtype == torch.uint8:
            return F.max_unpool2d_with_offsets(input, indices, self.kernel_size, self.stride, self.padding, output_size)
        return F.max_unpool2d(input, indices, self.kernel_size, self.stride, self.padding, output_size)
