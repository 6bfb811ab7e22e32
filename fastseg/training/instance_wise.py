"""Instance-wise prediction: a network sees one object proposal at a time, and the scores of all are combined.

Each proposal is cropped, resized to the network's input size and scored. Its scores are resized back to the proposal,
and each pixel takes the largest score among the proposals that contain it. The network thus sees objects of all sizes
at one size.

Source: Noh, Hong and Han, "Learning Deconvolution Network for Semantic Segmentation", ICCV 2015, and the authors'
inference code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import paste_boxes

COMBINE = ("max", "mean")
ORDERS = ("given", "size")
ENSEMBLES = ("code", "paper")
PROPOSAL_SIZE = (224, 224)
"""The size that proposals are resized to for a network that was not trained at one fixed size."""
MIN_SIDE, MAX_BOXES = 112, 50  # the authors' values, for images of about 500 pixels


class Box(NamedTuple):
    """A proposal in whole pixels. Parts outside the image are black."""

    left: int
    top: int
    width: int
    height: int


def _check_positive(**values: int) -> None:
    """Raise ValueError for an argument below 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, but is {value}")


@dataclass(frozen=True)
class InstanceOptions:
    """How proposals are selected, scored and combined.

    Args:
        size: (height, width) that proposals are resized to. None selects the network's training size, else 224x224.
        combine: ``"max"`` or ``"mean"``, see :func:`instance_scores`.
        min_side: proposals with a shorter side below this are ignored.
        max_boxes: only the first so many of the others are used.
        batch_size: proposals per call of the network.
        order: ``"given"``, as the authors' code walks through its file, or ``"size"``: the largest first, as the paper
            says. It matters where there are more than `max_boxes`.

    Raises:
        ValueError: `combine` or `order` is another word, or a number is below 1.
    """

    size: tuple[int, int] | None = None
    combine: str = "max"
    min_side: int = MIN_SIDE
    max_boxes: int = MAX_BOXES
    batch_size: int = 8
    order: str = "given"

    def __post_init__(self) -> None:
        if self.combine not in COMBINE:
            raise ValueError(f"combine must be one of {', '.join(COMBINE)}, but is {self.combine!r}")
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, but is {self.order!r}")
        _check_positive(
            size=1 if self.size is None else min(self.size),
            min_side=self.min_side,
            max_boxes=self.max_boxes,
            batch_size=self.batch_size,
        )


DEFAULT_OPTIONS = InstanceOptions()


@torch.no_grad()
def instance_scores(
    network: Callable[[Tensor], Tensor],
    image: Tensor,
    boxes: Sequence[Box],
    options: InstanceOptions = DEFAULT_OPTIONS,
    progress: Callable[[Sequence[Sequence[Box]]], Iterable[Sequence[Box]]] = iter,
    watch: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Compute the class scores of an image from the scores of its proposals.

    With ``combine="max"``, as in the authors' code, a pixel's score is the largest among the proposals that contain
    it, and at least 0. This assumes that scores of different proposals are comparable, as probabilities are. With
    ``combine="mean"``, which the paper mentions, it is the sum of the scores divided by the number of proposals; a
    proposal that does not contain the pixel counts as 0. In both cases a pixel in no proposal has the score 0 for every
    class.

    Args:
        network: a function of a batch of images; the network must be in evaluation mode. It normalises the images
            itself, so that the area outside the image is black.
        image: the image, without normalisation.
        boxes: the proposals; :func:`select_boxes` says which are used.
        options: see :class:`InstanceOptions`.
        progress: wraps the list of batches that is iterated over, for example in a progress bar.
        watch: called after each batch with the number of proposals so far and their scores (K, H, W), before a mean is
            divided.

    Shape:
        - image: (C, H, W).
        - network: (N, C, h, w) to (N, K, h', w') for K classes, where (h, w) is `options.size`.
        - output: (K, H, W), float32.

    Raises:
        ValueError: the image or the output of the network has another shape, or no box is left.

    Example::

        >>> import torch
        >>> from fastseg.training.instance_wise import Box, InstanceOptions, instance_scores
        >>> network = torch.nn.Conv2d(3, 5, 1)
        >>> options = InstanceOptions(size=(16, 16), min_side=8)
        >>> instance_scores(network, torch.rand(3, 24, 32), [Box(4, 4, 12, 8)], options).shape
        torch.Size([5, 24, 32])
    """
    if image.dim() != 3 or image.numel() == 0:
        raise ValueError(f"image must be (C, H, W), but has shape {tuple(image.shape)}")
    height, width = image.shape[-2:]
    if options.order == "size":
        boxes = sorted((Box(*box) for box in boxes), key=lambda box: -box.width * box.height)
    selected = select_boxes(boxes, height, width, options.min_side, options.max_boxes)
    size = options.size or PROPOSAL_SIZE
    step = options.batch_size
    total, done, reduce = None, 0, "max" if options.combine == "max" else "sum"
    for batch in progress([selected[k : k + step] for k in range(0, len(selected), step)]):
        inputs = torch.cat([F.interpolate(_crop(image, box), size, mode="bilinear", antialias=True) for box in batch])
        outputs = network(inputs).float()
        if outputs.dim() != 4 or len(outputs) != len(batch):
            raise ValueError(f"network must return ({len(batch)}, K, H, W), but returned {tuple(outputs.shape)}")
        total, done = paste_boxes(outputs, batch, (height, width), reduce, start=total), done + len(batch)
        if watch is not None:
            watch(done, total)
    assert total is not None  # select_boxes returns at least one box
    return total / len(selected) if options.combine == "mean" else total


def select_boxes(
    boxes: Iterable[Box], height: int, width: int, min_side: int = MIN_SIDE, max_boxes: int = MAX_BOXES
) -> list[Box]:
    """Return the proposals to use: the first `max_boxes` that overlap the image and are large enough, in their order.

    The paper orders proposals by decreasing size.

    Args:
        boxes: the proposals.
        height, width: size of the image.
        min_side: boxes with a shorter side below this are left out.
        max_boxes: the largest number of boxes to return.

    Raises:
        ValueError: no box is left, a box is empty, or a box extends beyond an edge of the image by more than the
            image's own width or height.

    Example::

        >>> from fastseg.training.instance_wise import Box, select_boxes
        >>> select_boxes([Box(0, 0, 4, 4), Box(2, 2, 40, 30)], height=48, width=64, min_side=16)
        [Box(left=2, top=2, width=40, height=30)]
    """
    _check_positive(min_side=min_side, max_boxes=max_boxes)
    boxes, selected = [Box(*box) for box in boxes], []
    for box in boxes:
        if min(box.width, box.height) < 1:
            raise ValueError(f"boxes must be at least 1 pixel wide and high, but one is {tuple(box)}")
        if min(box.width, box.height) < min_side or _is_outside(box, height, width):
            continue
        beyond_x = max(-box.left, box.left + box.width - width)
        beyond_y = max(-box.top, box.top + box.height - height)
        if beyond_x > width or beyond_y > height:
            raise ValueError(
                f"boxes must not extend beyond the image by more than its own {width}x{height}, but one is {tuple(box)}"
            )
        selected.append(box)
    if not selected:
        raise ValueError(
            f"boxes must contain one that overlaps the image and has a shorter side of at least {min_side}, but none "
            f"of {len(boxes)} does"
        )
    return selected[:max_boxes]


def ensemble(fcn: Tensor, deconvnet: Tensor, mode: str = "code") -> Tensor:
    """Combine the scores of an FCN and of a DeconvNet, as EDeconvNet does.

    Args:
        fcn: scores of the FCN.
        deconvnet: scores of the DeconvNet.
        mode: ``"code"`` for the authors' code, max(0, fcn) * deconvnet; ``"paper"`` for the mean of both.

    Shape:
        - fcn, deconvnet, output: (K, H, W) for K classes.

    Raises:
        ValueError: `mode` is another word, or the shapes differ.

    Example::

        >>> import torch
        >>> from fastseg.training.instance_wise import ensemble
        >>> ensemble(torch.tensor([-1.0, 2.0]), torch.tensor([3.0, -4.0]), "paper")
        tensor([ 1., -1.])
    """
    if mode not in ENSEMBLES:
        raise ValueError(f"mode must be one of {', '.join(ENSEMBLES)}, but is {mode!r}")
    if fcn.shape != deconvnet.shape:
        raise ValueError(
            f"fcn and deconvnet must have the same shape, but have {tuple(fcn.shape)} and {tuple(deconvnet.shape)}"
        )
    return fcn.clamp(min=0) * deconvnet if mode == "code" else (fcn + deconvnet) / 2


def sliding_windows(height: int, width: int, min_side: int = MIN_SIDE, max_boxes: int = MAX_BOXES) -> list[Box]:
    """Return proposals for an image that has none: the whole image, then grids of overlapping squares.

    The squares of the first grid are as high as the shorter side of the image; those of each further grid are half as
    large. Neighbours overlap by at least half, and each grid covers the image. Grids end before the squares are smaller
    than `min_side`, or before there are more than `max_boxes` boxes.

    Args:
        height, width: size of the image.
        min_side: smallest side of a square.
        max_boxes: largest number of boxes.

    Raises:
        ValueError: a number is below 1.

    Example::

        >>> from fastseg.training.instance_wise import sliding_windows
        >>> sliding_windows(120, 180)
        [Box(left=0, top=0, width=180, height=120), Box(left=0, top=0, width=120, height=120), \
Box(left=60, top=0, width=120, height=120)]
    """
    _check_positive(height=height, width=width, min_side=min_side, max_boxes=max_boxes)
    boxes, side = [Box(0, 0, width, height)], min(height, width)
    while side >= min_side:
        rows, columns = _starts(height, side), _starts(width, side)
        if len(boxes) + len(rows) * len(columns) > max_boxes:
            break
        boxes += [Box(x, y, side, side) for y in rows for x in columns]
        side //= 2
    return list(dict.fromkeys(boxes))


def read_boxes(path: str | Path) -> list[Box]:
    """Read proposals from a text file.

    Args:
        path: a UTF-8 file with a line per box: left, top, width and height in pixels, separated by commas or spaces.
            Further columns are ignored.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line has another form, or there is none. The message has the file and the line number.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} must be a UTF-8 text file with boxes") from None
    boxes = []
    for number, line in enumerate(text.splitlines(), 1):
        if not (words := line.replace(",", " ").split()):
            continue
        try:
            box = Box(*(round(float(word)) for word in words[:4]))
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{path}, line {number}, must be left, top, width and height, but is {line!r}") from None
        if min(box.width, box.height) < 1:
            raise ValueError(f"{path}, line {number}, must have a width and a height of at least 1, but is {line!r}")
        boxes.append(box)
    if not boxes:
        raise ValueError(f"{path} must contain boxes, but is empty")
    return boxes


def _starts(length: int, side: int) -> list[int]:
    """The first pixels of intervals of length `side` that cover `length` and overlap by at least half."""
    steps = -(-2 * (length - side) // side)
    return [round(k * (length - side) / steps) for k in range(steps + 1)] if steps else [0]


def _is_outside(box: Box, height: int, width: int) -> bool:
    """Whether a box has no pixel in common with the image."""
    return box.left >= width or box.top >= height or box.left + box.width <= 0 or box.top + box.height <= 0


def _overlap(box: Box, height: int, width: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """(rows, columns) of the area that box and image have in common, in the image and in the box."""
    extents = ((box.top, box.height, height), (box.left, box.width, width))
    in_image = tuple(slice(max(start, 0), min(start + side, length)) for start, side, length in extents)
    in_box = tuple(
        slice(part.start - start, part.stop - start) for part, (start, _, _) in zip(in_image, extents, strict=True)
    )
    return in_image, in_box


def _crop(image: Tensor, box: Box) -> Tensor:
    """The part of the image under a box, (1, C, *), with zeros outside the image."""
    (rows, columns), (box_rows, box_columns) = _overlap(box, *image.shape[-2:])
    padding = (box_columns.start, box.width - box_columns.stop, box_rows.start, box.height - box_rows.stop)
    return F.pad(image[None, :, rows, columns].float(), padding)
