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
    """A proposal in whole pixels; it may reach beyond the picture, where there are zeros."""

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

    scores: what a network in evaluation makes of pictures (N, C, *size): (N, K, *size). It takes off the mean itself:
    image is (C, H, W) as it was before, so that beyond the picture there is black. boxes, least, most: which are taken,
    see `taken`. combine: "max", the largest score of each pixel among its proposals and 0, as the authors' code has it,
    for scores that are comparable from one proposal to the next, as theirs are held to be, and probabilities are;
    "mean", which the paper speaks of too: the sum of the proposals' scores, 0 outside of each, by their number. So a
    pixel in no proposal has 0 for every class. watch: goes between the batches and who walks them, for a progress bar.

    Raises ValueError for arguments that are none of these, and where no box is left.
    """
    if combine not in COMBINE:
        raise ValueError(f"combine must be one of {', '.join(COMBINE)}, not {combine!r}")
    if image.dim() != 3 or image.numel() == 0:
        raise ValueError(f"image must be (C, H, W), but has shape {tuple(image.shape)}")
    for name, value in (("batch_size", batch_size), ("size", min(size))):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    height, width = image.shape[-2:]
    chosen = taken(boxes, height, width, least, most)
    total: Tensor | None = None
    for batch in watch([chosen[k : k + batch_size] for k in range(0, len(chosen), batch_size)]):
        seen = torch.cat([F.interpolate(_cut(image, box), size, mode="bilinear", antialias=True) for box in batch])
        found = scores(seen).float()
        if found.dim() != 4 or len(found) != len(batch):
            raise ValueError(f"scores must give ({len(batch)}, K, H, W), but gave shape {tuple(found.shape)}")
        for box, own in zip(batch, found, strict=True):
            if total is None:
                total = own.new_zeros(len(own), height, width)
            own = F.interpolate(own[None], (box.height, box.width), mode="bilinear")[0]
            (rows, columns), (own_rows, own_columns) = _shared(box, height, width)
            place, part = total[:, rows, columns], own[:, own_rows, own_columns]
            place.copy_(torch.maximum(place, part)) if combine == "max" else place.add_(part)
    assert total is not None  # `taken` has one box at least
    return total / len(chosen) if combine == "mean" else total


def taken(boxes: Iterable[Box], height: int, width: int, least: int = LEAST_SIDE, most: int = MOST_BOXES) -> list[Box]:
    """The first `most` boxes that lie over the picture and whose shorter side is `least` or more, in their order.

    In the paper that is of decreasing size. Raises ValueError where none is left, and for a box without pixels or one
    that reaches beyond the picture by more than the picture's own width or height.
    """
    for name, value in (("least", least), ("most", most)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    boxes, found = [Box(*box) for box in boxes], []
    for box in boxes:
        if min(box.width, box.height) < 1:
            raise ValueError(f"boxes must be at least 1 pixel wide and high, but there is {tuple(box)}")
        if min(box.width, box.height) < least or _beside(box, height, width):
            continue
        reach = max(-box.left, box.left + box.width - width), max(-box.top, box.top + box.height - height)
        if reach[0] > width or reach[1] > height:
            raise ValueError(
                f"boxes must not reach beyond the picture by more than its own {width}x{height}, but there is "
                f"{tuple(box)}"
            )
        found.append(box)
    if not found:
        raise ValueError(
            f"boxes must hold one over the picture with a shorter side of at least {least}, but of {len(boxes)} none is"
        )
    return found[:most]


def ensemble(fcn: Tensor, deconvnet: Tensor, mode: str = "code") -> Tensor:
    """EDeconvNet's scores from two networks' scores (K, H, W): "code", max(0, fcn) * deconvnet; "paper", their mean.

    Raises ValueError for another mode or scores of different shapes.
    """
    if mode not in ENSEMBLES:
        raise ValueError(f"mode must be one of {', '.join(ENSEMBLES)}, not {mode!r}")
    if fcn.shape != deconvnet.shape:
        raise ValueError(f"fcn and deconvnet must have one shape, not {tuple(fcn.shape)} and {tuple(deconvnet.shape)}")
    return fcn.clamp(min=0) * deconvnet if mode == "code" else (fcn + deconvnet) / 2


def windows(height: int, width: int, least: int = LEAST_SIDE, most: int = MOST_BOXES) -> list[Box]:
    """Proposals for who has none: the whole picture, then squares that overlap by half, each size half the last.

    The first squares are as high as the picture's shorter side, the last not below `least`; each size covers the
    picture, and the first that would make more than `most` boxes in all is left out with those below it. Raises
    ValueError for a number below 1.
    """
    for name, value in (("height", height), ("width", width), ("least", least), ("most", most)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    found, side = [Box(0, 0, width, height)], min(height, width)
    while side >= least:
        rows, columns = _starts(height, side), _starts(width, side)
        if len(found) + len(rows) * len(columns) > most:
            break
        found += [Box(x, y, side, side) for y in rows for x in columns]
        side //= 2
    return list(dict.fromkeys(found))


def read_boxes(path: str | Path) -> list[Box]:
    """Boxes of a text file, a line each: left, top, width and height in pixels, by commas or blanks; others ignored.

    Raises ValueError that names the file, and the line's number, for what is no such line, and where there is none.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} must be a text file of boxes, and is none in UTF-8") from None
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not (words := line.replace(",", " ").split()):
            continue
        try:
            box = Box(*(round(float(word)) for word in words[:4]))
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{path}, line {number}, must be left, top, width and height, not {line!r}") from None
        if min(box.width, box.height) < 1:
            raise ValueError(f"{path}, line {number}, must have a width and a height of at least 1, not {line!r}")
        found.append(box)
    if not found:
        raise ValueError(f"{path} must hold boxes, and holds none")
    return found


def _starts(length: int, side: int) -> list[int]:
    """Where windows of a side begin that cover a length and overlap by half at least."""
    steps = -(-2 * (length - side) // side)
    return [round(k * (length - side) / steps) for k in range(steps + 1)] if steps else [0]


def _beside(box: Box, height: int, width: int) -> bool:
    return box.left >= width or box.top >= height or box.left + box.width <= 0 or box.top + box.height <= 0


def _shared(box: Box, height: int, width: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """(rows, columns) that a box and the picture share, of the picture and of the box."""
    spans = ((box.top, box.height, height), (box.left, box.width, width))
    of_picture = tuple(slice(max(begin, 0), min(begin + side, length)) for begin, side, length in spans)
    of_box = tuple(
        slice(part.start - begin, part.stop - begin) for part, (begin, _, _) in zip(of_picture, spans, strict=True)
    )
    return of_picture, of_box


def _cut(image: Tensor, box: Box) -> Tensor:
    """What lies under a box, (1, C, *), with zeros beyond the picture."""
    (rows, columns), (own_rows, own_columns) = _shared(box, *image.shape[-2:])
    margins = (own_columns.start, box.width - own_columns.stop, own_rows.start, box.height - own_rows.stop)
    return F.pad(image[None, :, rows, columns].float(), margins)
