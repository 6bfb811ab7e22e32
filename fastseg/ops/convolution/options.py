"""What the convolution operators share: their option objects, the layout of results, and which maps are supported."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.convolution.options import ConvTransposeGeometry, Epilogue
from ..arguments import FLOAT_DTYPES, INT32_MAX, MAX_FLOAT_SIDE, IntOrPair, as_pair
from ..operator import dense, memory_format, register_options

register_options(
    ConvTransposeGeometry, "int[2] stride, int[2] padding, int[2] output_padding, int groups, int[2] dilation"
)
register_options(Epilogue, "Tensor? bias, Tensor? scale, bool relu")
NO_EPILOGUE = Epilogue()


def conv_transpose_geometry(
    stride: IntOrPair, padding: IntOrPair, output_padding: IntOrPair, groups: int, dilation: IntOrPair
) -> ConvTransposeGeometry:
    """The geometry that conv_transpose2d's arguments describe. Raises TypeError or RuntimeError as torch does."""
    name = "conv_transpose2d"
    return ConvTransposeGeometry(
        as_pair(stride, name, "stride", 1),
        as_pair(padding, name, "padding", 0),
        as_pair(output_padding, name, "output_padding", 0),
        groups,
        as_pair(dilation, name, "dilation", 1),
    )


def layout_of(input: Tensor, weight: Tensor) -> torch.memory_format:
    """The memory format of the result and the input's gradient: channels_last if input or weight is, as in torch."""
    either = torch.channels_last in (memory_format(input), memory_format(weight))
    return torch.channels_last if either else torch.contiguous_format


def dense_in_any_layout(x: Tensor, layout: torch.memory_format) -> Tensor:
    """x itself if it is dense in either memory format, because launchers choose how to read it; else a copy."""
    either = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    return x if either else dense(x, layout)


def unsupported_map(input: Tensor, size: Sequence[int]) -> str | None:
    """What of a call on maps of this height and width the kernels do not support, in words, or None."""
    if input.dtype not in FLOAT_DTYPES:
        return f"dtype {input.dtype}"
    if max(size) > MAX_FLOAT_SIDE:
        return f"maps of more than {MAX_FLOAT_SIDE} rows or columns"
    if size[0] * size[1] > INT32_MAX:
        return f"maps of more than {INT32_MAX} pixels"
    return None
