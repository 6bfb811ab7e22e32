"""paste_boxes: the maps of many boxes, resized to their boxes, reduced into one canvas."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import boxes as triton_kernels
from ..arguments import FLOAT_DTYPES, accumulator, as_pair, require_tensor
from ..operator import Implementation, Operator, dense, empty, memory_format

NAME = "paste_boxes"
REDUCTIONS = ("max", "mean", "sum")
MOST = 2**20  # the largest coordinate of a box


def _empty_canvas(
    maps: Tensor, boxes: Tensor, size: Sequence[int], largest: bool, weights: Tensor | None, start: Tensor | None
) -> Tensor:
    return empty(maps, (maps.shape[1], *size), torch.contiguous_format, accumulator(maps.dtype))


def _kernel(
    maps: Tensor, boxes: Tensor, size: Sequence[int], largest: bool, weights: Tensor | None, start: Tensor | None
) -> Tensor:
    canvas = _empty_canvas(maps, boxes, size, largest, weights, start)
    if len(maps) == 0:
        return canvas.zero_() if start is None else canvas.copy_(start)
    start = None if start is None else start.contiguous()
    maps = dense(maps, memory_format(maps))
    triton_kernels.paste.paste_boxes(maps, boxes.contiguous(), largest, weights, start, canvas)
    return canvas


def _reference(
    maps: Tensor, boxes: Tensor, size: Sequence[int], largest: bool, weights: Tensor | None, start: Tensor | None
) -> Tensor:
    """One box at a time, by torch's interpolate."""
    canvas = _empty_canvas(maps, boxes, size, largest, weights, start)
    canvas.zero_() if start is None else canvas.copy_(start)
    height, width = size
    for number, (left, top, across, down) in enumerate(boxes.tolist()):
        rows, columns = (max(top, 0), min(top + down, height)), (max(left, 0), min(left + across, width))
        if across < 1 or down < 1 or rows[0] >= rows[1] or columns[0] >= columns[1]:
            continue
        large = F.interpolate(
            maps[number : number + 1].to(canvas.dtype), (down, across), mode="bilinear", antialias=True
        )
        value = large[0, :, rows[0] - top : rows[1] - top, columns[0] - left : columns[1] - left]
        if weights is not None:
            value = value * weights[number]
        part = canvas[:, slice(*rows), slice(*columns)]
        part.copy_(torch.maximum(part, value)) if largest else part.add_(value)
    return canvas


def _unsupported(maps: Tensor, boxes: Tensor, size: Sequence[int], *rest: object) -> str | None:
    return None if maps.dtype in FLOAT_DTYPES else f"maps of dtype {maps.dtype}"


PASTE_BOXES = Operator(
    "paste_boxes(Tensor maps, Tensor boxes, SymInt[] size, bool largest, Tensor? weights, Tensor? start) -> Tensor",
    kernels={"triton": Implementation(_kernel, _unsupported)},
    reference=_reference,
    fake=_empty_canvas,
)


def _checked_boxes(boxes: Tensor | Sequence[Sequence[int]], maps: Tensor) -> Tensor:
    """The boxes as int32 on the device of the maps. Values are checked where that needs no host sync."""
    given = isinstance(boxes, Tensor)
    table = boxes if given else torch.as_tensor([list(box) for box in boxes]).reshape(-1, 4)
    if table.is_floating_point() and (given or table.numel()):
        raise TypeError(f"{NAME}: boxes must be whole numbers of pixels, but is of {table.dtype}")
    if tuple(table.shape) != (len(maps), 4):
        raise ValueError(
            f"{NAME}: boxes must have shape ({len(maps)}, 4), one for each map, but has {tuple(table.shape)}"
        )
    if table.device.type == "cpu" and table.numel():
        flat = bool((table[:, 2:] < 1).any())
        if flat or bool((table.abs() > MOST).any()):
            wrong = ((table[:, 2:] < 1).any(1) | (table.abs() > MOST).any(1)).nonzero()[0, 0]
            raise ValueError(
                f"{NAME}: boxes must be (left, top, width, height), at least 1 wide and high and within {MOST}, but "
                f"box {wrong} is {tuple(table[wrong].tolist())}"
            )
    return table.to(maps.device, torch.int32)


def paste_boxes(
    maps: Tensor,
    boxes: Tensor | Sequence[Sequence[int]],
    size: int | Sequence[int],
    reduce: str = "max",
    weights: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Resize the map of each box to the box, and reduce all of them into one canvas.

    Instance-wise prediction and mask voting in one kernel: no resized map is stored.

    Args:
        maps: of any floating-point dtype.
        boxes: left, top, width and height of each map's box in whole pixels. Parts outside of the canvas are dropped.
            Boxes in a tensor on a GPU are not checked, and one without an area pastes nothing.
        size: (height, width) of the canvas.
        reduce: ``"max"``, ``"sum"``, or ``"mean"``: the sum divided by the number of boxes. A pixel in no box keeps
            the value it starts with.
        weights: a factor for each map; not for "max".
        start: what the canvas starts with, for instance an earlier canvas; not for "mean". Default: zeros, so that
            "max" gives at least 0.

    Shape:
        - maps: (B, K, h, w). boxes: (B, 4). weights: (B,). start and output: (K, H, W).

    Returns:
        The canvas in float32 (float64 for float64 maps). It has no gradient.

    Raises:
        TypeError: if an argument has another type, or boxes are not integers.
        ValueError: for other shapes, another reduction, and a box without an area or far outside.

    Note:
        Deterministic: the boxes are reduced in their order. Resizing is bilinear, and averages where it shrinks, as
        torch.nn.functional.interpolate(..., mode="bilinear", antialias=True). CPU tensors fall back to PyTorch.

    Example:
        >>> import torch, fastseg.functional as FS
        >>> maps = torch.tensor([[[[1.0]]], [[[2.0]]]])  # two maps of one class and one pixel
        >>> FS.paste_boxes(maps, [(0, 0, 3, 1), (2, 0, 2, 2)], size=(2, 4))
        tensor([[[1., 1., 2., 2.],
                 [0., 0., 2., 2.]]])
    """
    require_tensor(NAME, "maps", maps)
    if maps.dim() != 4 or not maps.is_floating_point() or 0 in maps.shape[1:]:
        raise ValueError(
            f"{NAME}: maps must be floating-point of shape (B, K, h, w), but is of {maps.dtype} and shape "
            f"{tuple(maps.shape)}"
        )
    if reduce not in REDUCTIONS:
        raise ValueError(f"{NAME}: reduce must be one of {', '.join(REDUCTIONS)}, but is {reduce!r}")
    sides, dtype, boxes = as_pair(size, NAME, "size", 1), accumulator(maps.dtype), _checked_boxes(boxes, maps)
    if weights is not None:
        require_tensor(NAME, "weights", weights)
        if reduce == "max" or tuple(weights.shape) != (len(maps),):
            raise ValueError(
                f"{NAME}: weights must have shape ({len(maps)},), for reduce 'sum' or 'mean', but has shape "
                f"{tuple(weights.shape)} for reduce {reduce!r}"
            )
        weights = weights.detach().to(maps.device, dtype).contiguous()
    if start is not None:
        require_tensor(NAME, "start", start)
        if reduce == "mean" or tuple(start.shape) != (maps.shape[1], *sides):
            raise ValueError(
                f"{NAME}: start must have shape {(maps.shape[1], *sides)}, for reduce 'max' or 'sum', but has shape "
                f"{tuple(start.shape)} for reduce {reduce!r}"
            )
        start = start.detach().to(maps.device, dtype)
    call = (maps.detach(), boxes, sides, reduce == "max", weights, start)
    PASTE_BOXES.choose(*call)  # only for `explain`: the operator chooses again when it runs
    canvas = PASTE_BOXES(*call)
    return canvas / max(len(maps), 1) if reduce == "mean" else canvas
