"""MaxPool2d and MaxUnpool2d, and a pool that returns offsets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import dispatch
from .. import functional as F
from .scripting import refuse_script


class MaxPool2d(nn.MaxPool2d):
    """2-D max-pooling on :func:`fastseg.functional.max_pool2d`.

    The same values, indices, ties, NaN handling and errors as :class:`torch.nn.MaxPool2d`. On the kernels, training
    without `return_indices` saves one byte per pooled element for the backward, where torch saves eight.

    Args:
        kernel_size: height and width of the window, or one number for both.
        stride: step of the window. Default: kernel_size.
        padding: implicit -inf values on each side, at most half of kernel_size.
        dilation: step between the elements of a window.
        return_indices: also return the int64 positions of the maxima, for :class:`MaxUnpool2d`.
        ceil_mode: round the output size up instead of down.

    Shape:
        - Input: (N, C, H, W) or (C, H, W), any floating-point dtype.
        - Output: (N, C, OH, OW) or (C, OH, OW) with
          OH = floor((H + 2 * padding - dilation * (kernel_size - 1) - 1) / stride + 1), ceil with `ceil_mode`. It has
          the dtype and memory format of the input.
        - Indices: the shape of the output, h * W + w in the plane of the input.

    Example:
        >>> import torch, fastseg
        >>> pool = fastseg.nn.MaxPool2d(2, return_indices=True)
        >>> output, indices = pool(torch.arange(16.0).view(1, 1, 4, 4))
        >>> output.flatten().tolist(), indices.flatten().tolist()
        ([5.0, 7.0, 13.0, 15.0], [5, 7, 13, 15])

    Note:
        Deterministic, the gradient too.

    Source:
        torch.nn.MaxPool2d
    """

    __prepare_scriptable__ = refuse_script

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if dispatch.left_to_torch("max_pool2d", input):
            # Not super().forward: a bound `forward` that was saved must still work after a swap is undone.
            return nn.MaxPool2d.forward(self, input)
        return F.max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class MaxPool2dWithOffsets(MaxPool2d):
    """2-D max-pooling that returns uint8 offsets where :class:`MaxPool2d` returns int64 indices.

    An offset is the row-major position of the maximum in its window, and takes an eighth of the memory. A
    :class:`MaxUnpool2d` with the same kernel_size, stride and padding takes the offsets; dilation must be 1 for that.
    Runs on :func:`fastseg.functional.max_pool2d_with_offsets`.

    Args:
        kernel_size, stride, padding, dilation, ceil_mode: as in :class:`MaxPool2d`; windows of at most 256 elements.
        return_indices: return the offsets too. Without it the module is a MaxPool2d.

    Shape:
        - Input and output: as in :class:`MaxPool2d`.
        - Offsets: uint8, the shape of the output.

    Example:
        >>> import torch, fastseg
        >>> pool = fastseg.nn.MaxPool2dWithOffsets(2, return_indices=True)
        >>> output, offsets = pool(torch.arange(16.0).view(1, 1, 4, 4))
        >>> output.flatten().tolist(), offsets.flatten().tolist(), offsets.dtype
        ([5.0, 7.0, 13.0, 15.0], [3, 3, 3, 3], torch.uint8)
    """

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if not self.return_indices:
            return MaxPool2d.forward(self, input)
        return F.max_pool2d_with_offsets(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode
        )


class MaxUnpool2d(nn.MaxUnpool2d):
    """2-D max-unpooling on :func:`fastseg.functional.max_unpool2d`.

    Writes each element of the input to the position that a pool took it from, and zero elsewhere. The same values and
    errors as :class:`torch.nn.MaxUnpool2d`. Also takes the uint8 offsets of :class:`MaxPool2dWithOffsets`
    (:func:`fastseg.functional.max_unpool2d_with_offsets`).

    Args:
        kernel_size, stride, padding: those of the pool.

    Shape:
        - Input: (N, C, H, W) or (C, H, W), any floating-point dtype.
        - Indices: the shape of the input; int64 indices, or uint8 offsets.
        - output_size: an optional argument of the call, with two to four entries; the last two are the height and
          width of the output. Default: (H - 1) * stride - 2 * padding + kernel_size.
        - Output: (N, C, OH, OW) or (C, OH, OW).

    Example:
        >>> import torch, fastseg
        >>> output, indices = torch.nn.functional.max_pool2d(
        ...     torch.arange(16.0).view(1, 1, 4, 4), 2, return_indices=True
        ... )
        >>> fastseg.nn.MaxUnpool2d(2)(output, indices)[0, 0, 1].tolist()
        [0.0, 5.0, 0.0, 7.0]

    Note:
        Deterministic: where indices repeat, the last element in row-major order is written. It also runs under
        torch.use_deterministic_algorithms(True).

    Source:
        torch.nn.MaxUnpool2d
    """

    __prepare_scriptable__ = refuse_script

    def forward(self, input: Tensor, indices: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        if isinstance(indices, Tensor) and indices.dtype == torch.uint8:
            return F.max_unpool2d_with_offsets(input, indices, self.kernel_size, self.stride, self.padding, output_size)
        return F.max_unpool2d(input, indices, self.kernel_size, self.stride, self.padding, output_size)
