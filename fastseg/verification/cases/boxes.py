"""Cases of pasting the maps of boxes into a canvas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional
from .case import Case, Placement, describe


def paste_boxes(
    at: Placement, shape: Sequence[int], size: Sequence[int], reduce: str = "max", again: bool = False
) -> Iterator[Case]:
    """Boxes that enlarge and shrink their maps, overlap and leave the canvas. again: onto an earlier canvas."""
    count, classes, _, _ = shape
    height, width = size
    boxes = [
        (n * width // count - 3, n % 3 * height // 3 - 2, 4 + 3 * n % width, 3 + 2 * n % height) for n in range(count)
    ]
    inputs = {"maps": at.tensor(*shape)}
    if again:
        inputs["start"] = at.tensor(classes, *size)

    def ours(maps: Tensor, start: Tensor | None = None) -> Tensor:
        return functional.paste_boxes(maps, boxes, size, reduce, start=start)

    def theirs(maps: Tensor, start: Tensor | None = None) -> Tensor:
        wide = torch.float64 if maps.dtype == torch.float64 else torch.float32
        canvas = maps.new_zeros(classes, *size, dtype=wide) if start is None else start.detach().to(wide)
        for one, (left, top, across, down) in zip(maps.detach().to(wide), boxes, strict=True):
            large = F.interpolate(one[None], (down, across), mode="bilinear", antialias=True)[0]
            whole = F.pad(large, (left, width - left - across, top, height - top - down))  # negative padding cuts
            inside = F.pad(torch.ones_like(large), (left, width - left - across, top, height - top - down)) > 0
            joined = torch.maximum(canvas, whole) if reduce == "max" else canvas + whole
            canvas = joined.where(inside, canvas)
        return canvas / count if reduce == "mean" else canvas

    words = describe(shape, f"to {height}x{width} {reduce}", *["again"] * again)
    yield Case("paste_boxes", words, ours, theirs, inputs)
