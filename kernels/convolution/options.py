"""The option objects of the convolution kernels. No triton here, so that every backend can use them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class ConvTransposeGeometry(NamedTuple):
    """The arguments of a transposed convolution besides its tensors. Each pair is (height, width)."""

    stride: Sequence[int]
    padding: Sequence[int]
    output_padding: Sequence[int]
    groups: int
    dilation: Sequence[int]

    def output_size(self, size: Sequence[int], kernel_size: Sequence[int]) -> list[int]:
        """Height and width of the output for an input of this height and width."""
        sizes = zip(size, kernel_size, self.stride, self.padding, self.output_padding, self.dilation, strict=True)
        return [(length - 1) * s - 2 * p + d * (k - 1) + extra + 1 for length, k, s, p, extra, d in sizes]


class Epilogue(NamedTuple):
    """What a kernel applies to each sum in float32, before it rounds and stores: relu(sum * scale + bias).

    bias and scale are vectors of the K output channels, or None.
    """

    bias: Tensor | None = None
    scale: Tensor | None = None
    relu: bool = False

    def contiguous(self) -> Epilogue:
        """The same with contiguous vectors, as the kernels read them."""
        bias, scale = (None if vector is None else vector.contiguous() for vector in (self.bias, self.scale))
        return Epilogue(bias, scale, self.relu)

    def pointers(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, bias) for a launch. `y` takes the place of a missing vector, which the kernel does not read."""
        return y if self.scale is None else self.scale, y if self.bias is None else self.bias

    def constants(self) -> dict[str, bool]:
        """The compile-time arguments that say what there is to apply."""
        return {"SCALE": self.scale is not None, "BIAS": self.bias is not None, "RELU": self.relu}


class ConvTransposeGradients(NamedTuple):
    """The gradients of a transposed convolution's tensors; None for those that are not needed."""

    input: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
