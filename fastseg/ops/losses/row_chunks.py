"""Resized logits in torch, a chunk of rows at a time, so that the large map is never stored."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.losses.options import Resizing
from ..arguments import accumulator
from .chunked_reference import elements

LEAST_CLASSES = 8  # a chunk is sized for at least these: labels and losses need memory too, as much as some classes
FEW_CLASSES = 16  # with fewer classes chunks are in NCHW, else in channels_last, which is faster then


@dataclass(frozen=True)
class RowChunks:
    """The resized map of one image, a chunk of rows at a time: (1, C, rows, W), in float32 or float64.

    torch's own operator resizes along x. Along y each row of a chunk is a weighted mean of two rows of the small map.
    """

    shape: tuple[int, int, int]  # C, h, w
    size: tuple[int, int]  # H, W
    resizing: Resizing
    dtype: torch.dtype
    taps: Tensor  # (2, H): the two rows of the small map for each row of the large one
    weights: Tensor  # (2, H): their weights

    @classmethod
    def of(cls, input: Tensor, size: Sequence[int], resizing: Resizing) -> RowChunks:
        """The chunks of logits (N, C, h, w) resized to `size`."""
        dtype, scales = accumulator(input.dtype), resizing.scales
        _, c, h, w = input.shape
        rows = torch.arange(size[0], device=input.device)
        if resizing.mode == "nearest":
            # torch rounds in float32, and ignores the scales for these two sizes.
            step = torch.tensor(h / size[0] if scales is None or size[0] in (h, 2 * h) else 1 / scales[0])
            first = (rows * step.float()).long().clamp(max=h - 1)
            second_weight = torch.zeros(size[0], dtype=dtype, device=input.device)
        else:
            if resizing.align_corners:
                at = rows.double() * ((h - 1) / (size[0] - 1) if size[0] > 1 else 0.0)
            else:
                # torch copies a side whose size stays, and ignores the scales then.
                step = h / size[0] if scales is None or size[0] == h else 1 / scales[0]
                at = ((rows + 0.5).double() * step - 0.5).clamp(min=0)
            first = at.long().clamp(max=h - 1)
            second_weight = (at - first).clamp(max=1).to(dtype)
        taps = torch.stack((first, (first + 1).clamp(max=h - 1)))
        weights = torch.stack((1 - second_weight, second_weight))
        return cls((c, h, w), (size[0], size[1]), resizing, dtype, taps, weights)

    def __iter__(self) -> Iterator[slice]:
        """The rows of each chunk, from the top."""
        rows = max(1, elements() // (self.size[1] * max(self.shape[0], LEAST_CLASSES)))
        for start in range(0, self.size[0], rows):
            yield slice(start, min(start + rows, self.size[0]))

    def empty(self, rows: int, columns: int) -> Tensor:
        """An uninitialized map (1, C, rows, columns) in the memory format of the chunks."""
        layout = torch.contiguous_format if self.shape[0] < FEW_CLASSES else torch.channels_last
        shape = (1, self.shape[0], rows, columns)
        return torch.empty(shape, dtype=self.dtype, device=self.taps.device, memory_format=layout)

    def buffer(self) -> Tensor:
        """Memory for a chunk, to be reused for each: a new allocation of this size is slow."""
        return self.empty(next(iter(self)).stop, self.size[1])

    def reach(self, rows: slice) -> tuple[int, int]:
        """The rows of the small map that a chunk reads, or some more: computed from the sizes to avoid a host sync."""
        h = self.shape[1]
        scales = self.resizing.scales
        ratio = h / self.size[0] if scales is None or self.resizing.align_corners else 1 / scales[0]
        return max(0, min(h - 1, math.floor(rows.start * ratio) - 1)), min(h, math.ceil(rows.stop * ratio) + 2)

    def values(self, image: Tensor, rows: slice, buffer: Tensor) -> Tensor:
        """The chunk of an image (C, h, w), written into the buffer."""
        (first, second), (first_weight, second_weight) = self.taps[:, rows], self.weights[:, rows, None]
        small = self.empty(rows.stop - rows.start, self.shape[2])
        small[0] = image.index_select(1, first)
        if self.resizing.mode == "bilinear":
            small.mul_(first_weight).addcmul_(image.index_select(1, second)[None].to(self.dtype), second_weight)
        out = buffer[:, :, : small.shape[2]]
        return self._operator("").out(small, [*out.shape[2:]], *self._along_x(), out=out)

    def add_gradient(self, gradient: Tensor, rows: slice, small: Tensor) -> None:
        """Add the gradient of the small map, from that of a chunk, to `small`, a tensor that `empty` returned."""
        start, stop = self.reach(rows)
        near = torch.arange(start, stop, device=gradient.device)[:, None]
        matrix = sum(
            (near == tap) * weight for tap, weight in zip(self.taps[:, rows], self.weights[:, rows], strict=True)
        )
        c, _, w = self.shape
        high = self.empty(stop - start, self.size[1])
        if high.is_contiguous():
            torch.matmul(matrix, gradient, out=high)
        else:
            torch.matmul(matrix, gradient.permute(0, 2, 3, 1).flatten(2), out=high.permute(0, 2, 3, 1).flatten(2))
        sizes = ([stop - start, self.size[1]], [1, c, stop - start, w])
        back = self.empty(stop - start, w)
        self._operator("_backward").grad_input(high, *sizes, *self._along_x(), grad_input=back)
        small[:, :, start:stop] += back

    def _along_x(self) -> tuple[Any, ...]:
        scales = self.resizing.scales
        corners = () if self.resizing.mode == "nearest" else (self.resizing.align_corners,)
        return (*corners, None, None if scales is None else scales[1])

    def _operator(self, direction: str) -> Any:
        return getattr(torch.ops.aten, f"upsample_{self.resizing.mode}2d{direction}")
