"""Instance-wise prediction: a network that sees one object proposal at a time, and its scores put together.

Noh, Hong and Han, "Learning Deconvolution Network for Semantic Segmentation", ICCV 2015, and the authors' inference
code: proposals are cut out, stretched to the size the network was trained at, and scored; the scores are stretched back
to the proposal and the largest of each pixel is kept. Objects of any size are so seen at one size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

COMBINE = ("max", "mean")
ENSEMBLES = ("code", "paper")
LEAST_SIDE, MOST_BOXES = 112, 50  # the authors', for pictures of about 500 pixels


class Box(NamedTuple):
    """A proposal in pixels; it may reach beyond the picture, where there are zeros."""

    left: int
    top: int
    width: int
    height: int


@torch.no_grad()
def instance_scores(
    scores: Callable[[Tensor], Tensor],
    image: Tensor,
    boxes: Sequence[Box],
    size: tuple[int, int] = (224, 224),
    combine: str = "max",
    least: int = LEAST_SIDE,
    most: int = MOST_BOXES,
    batch_size: int = 8,
    watch: Callable[[Sequence[Sequence[Box]]], Iterable[Sequence[Box]]] = iter,
) -> Tensor:
    """Class scores (K, H, W) of a picture, float32, from those of its proposals.

    scores: what the network makes of pictures (N, C, *size): (N, K, *size). image: (C, H, W), as it was before its mean
    was taken off, so that beyond the picture there is black. boxes: walked in their order, in the paper that of
    decreasing size; those whose shorter side is below `least` are left out, and no more than `most` taken. combine:
    "max", the largest score of each pixel among its proposals and 0, as the authors' code has it; "mean", which the
    paper speaks of too: the sum of the proposals' scores, 0 outside of each, by their number. watch: goes between the
    batches and who walks them, for a progress bar.

    Raises ValueError for another `combine`, a box without pixels, or where no box is left.
    """
    if combine not in COMBINE:
        raise ValueError(f"combine must be one of {', '.join(COMBINE)}, not {combine!r}")
    for box in boxes:
        if min(box.width, box.height) < 1:
            raise ValueError(f"boxes must be at least 1 pixel wide and high, but there is {box}")
    taken = [box for box in boxes if min(box.width, box.height) >= least][:most]
    if not taken:
        raise ValueError(f"boxes must hold one with a shorter side of at least {least}, but of {len(boxes)} none has")
    (height, width), margin = image.shape[-2:], _margin(image, taken)
    padded = F.pad(image, (margin,) * 4)
    total: Tensor | None = None
    for batch in watch([taken[k : k + batch_size] for k in range(0, len(taken), batch_size)]):
        cuts = [_cut(padded, box, margin)[None].float() for box in batch]
        seen = [F.interpolate(cut, size, mode="bilinear", antialias=True) for cut in cuts]
        for box, found in zip(batch, scores(torch.cat(seen)).float(), strict=True):
            if total is None:
                total = found.new_zeros(len(found), *padded.shape[-2:])
            place = _cut(total, box, margin)
            own = F.interpolate(found[None], (box.height, box.width), mode="bilinear")[0]
            place.copy_(torch.maximum(place, own)) if combine == "max" else place.add_(own)
    assert total is not None
    if combine == "mean":
        total /= len(taken)
    return _cut(total, Box(0, 0, width, height), margin)


def ensemble(fcn: Tensor, deconvnet: Tensor, mode: str = "code") -> Tensor:
    """EDeconvNet's scores from two networks' scores (K, H, W): "code", max(0, fcn) * deconvnet; "paper", their mean."""
    if mode not in ENSEMBLES:
        raise ValueError(f"mode must be one of {', '.join(ENSEMBLES)}, not {mode!r}")
    return fcn.clamp(min=0) * deconvnet if mode == "code" else (fcn + deconvnet) / 2


def windows(height: int, width: int, least: int = LEAST_SIDE) -> list[Box]:
    """Proposals for who has none: the whole picture, then squares that overlap by half, each size half the last.

    The first squares are as high as the picture's shorter side, the last not below `least`.
    """
    found, side = [Box(0, 0, width, height)], min(height, width)
    while side >= least:
        found += [Box(x, y, side, side) for y in _starts(height, side) for x in _starts(width, side)]
        side //= 2
    return list(dict.fromkeys(found))


def read_boxes(path: str | Path) -> list[Box]:
    """Boxes of a text file, a line each: left, top, width and height in pixels, by commas or blanks; others ignored.

    Raises ValueError, with the line's number, for what is no such line.
    """
    found = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        if not (words := line.replace(",", " ").split()):
            continue
        try:
            box = Box(*(round(float(word)) for word in words[:4]))
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{path}, line {number}, must be left, top, width and height, not {line!r}") from None
        if min(box.width, box.height) < 1:
            raise ValueError(f"{path}, line {number}, must have a width and a height of at least 1, not {line!r}")
        found.append(box)
    return found


def _starts(length: int, side: int) -> list[int]:
    """Where windows of a side begin that cover a length and overlap by half at least."""
    steps = -(-2 * (length - side) // side)
    return [round(k * (length - side) / steps) for k in range(steps + 1)] if steps else [0]


def _margin(image: Tensor, boxes: Sequence[Box]) -> int:
    height, width = image.shape[-2:]
    ends = ((-b.left, -b.top, b.left + b.width - width, b.top + b.height - height) for b in boxes)
    return max(0, *(max(reach) for reach in ends))


def _cut(x: Tensor, box: Box, margin: int) -> Tensor:
    left, top = box.left + margin, box.top + margin
    return x[..., top : top + box.height, left : left + box.width]
