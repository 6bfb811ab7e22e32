"""Arguments of the operators that a case is made for, without the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

IntOrPair = int | tuple[int, int]


class PoolSpec(NamedTuple):
    """Arguments of a pooling or an unpooling."""

    kernel: IntOrPair = 2
    stride: IntOrPair = 2
    padding: IntOrPair = 0
    ceil_mode: bool = False

    @property
    def geometry(self) -> tuple[IntOrPair, IntOrPair, IntOrPair]:
        """kernel_size, stride and padding, as torch takes them."""
        return self.kernel, self.stride, self.padding

    def words(self) -> list[str]:
        return [f"k{self.kernel} s{self.stride} p{self.padding}", *["ceil"] * self.ceil_mode]


POOL_BY_2 = PoolSpec()


class ConvTransposeSpec(NamedTuple):
    """Arguments of a transposed convolution."""

    out_channels: int
    kernel: IntOrPair
    stride: IntOrPair = 1
    padding: IntOrPair = 0
    output_padding: IntOrPair = 0
    groups: int = 1
    dilation: IntOrPair = 1

    @property
    def geometry(self) -> tuple[Any, ...]:
        """stride, padding, output_padding, groups and dilation, as torch takes them."""
        return self.stride, self.padding, self.output_padding, self.groups, self.dilation

    @property
    def kernel_size(self) -> tuple[int, int]:
        return (self.kernel, self.kernel) if isinstance(self.kernel, int) else self.kernel

    def words(self) -> list[str]:
        sizes = f"to {self.out_channels} k{self.kernel} s{self.stride} p{self.padding} op{self.output_padding}"
        groups, dilation = [f"g{self.groups}"] * (self.groups != 1), [f"d{self.dilation}"] * (self.dilation != 1)
        return [sizes, *groups, *dilation]


class LossSpec(NamedTuple):
    """Options of cross-entropy.

    weighted: with a random weight for each class. probabilities: the target holds class probabilities instead of
    labels. one_pass: make the gradient in the forward (None: fastseg decides). predicted: also return the class with
    the largest logit for each pixel.
    """

    ignore_index: int = 255
    weighted: bool = False
    reduction: str = "mean"
    label_smoothing: float = 0.0
    probabilities: bool = False
    one_pass: bool | None = None
    predicted: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments that torch.nn.functional.cross_entropy takes too."""
        return {
            "ignore_index": self.ignore_index, "reduction": self.reduction, "label_smoothing": self.label_smoothing,
        }  # fmt: skip

    @property
    def smoothing_words(self) -> list[str]:
        return [f"smoothing {self.label_smoothing}"] * bool(self.label_smoothing)


MEAN_LOSS = LossSpec()


class ResizeSpec(NamedTuple):
    """Arguments of torch.nn.functional.interpolate."""

    size: Sequence[int]
    mode: str = "bilinear"
    align_corners: bool | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {"size": list(self.size), "mode": self.mode, "align_corners": self.align_corners}

    def words(self) -> list[str]:
        height, width = self.size
        return [f"to {height}x{width} {self.mode}", *["align_corners"] * bool(self.align_corners)]
