"""Prediction in overlapping tiles, for pictures whose scores do not fit into memory.

The scores of neighbouring tiles are blended where they overlap: a tile counts less towards its edges, where the network
sees only half of the surroundings. Tiles are computed row by row, and rows of pixels that no later tile covers are
finished at once, so that memory holds the scores of one row of tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .data_check import Progress, no_progress
from .pictures import to_tensor

DEFAULT_SIZE = (512, 512)


@dataclass(frozen=True)
class TileOptions:
    """How a picture is cut into tiles.

    Args:
        size: (height, width) of a tile; a smaller picture is one tile.
        overlap: the part of a tile that it shares with its neighbour, from 0 to 0.5.
        batch_size: tiles that the network sees at once.

    Raises:
        ValueError: a value is out of range.
    """

    size: tuple[int, int] = DEFAULT_SIZE
    overlap: float = 0.25
    batch_size: int = 4

    def __post_init__(self) -> None:
        if min(self.size) < 1 or self.batch_size < 1:
            raise ValueError(f"size and batch_size must be at least 1, but are {self.size} and {self.batch_size}")
        if not 0 <= self.overlap <= 0.5:
            raise ValueError(f"overlap must be from 0 to 0.5, but is {self.overlap}")


DEFAULT_TILES = TileOptions()


@torch.no_grad()
def tiled_labels(
    network: Callable[[Tensor], Tensor],
    pixels: np.ndarray,
    options: TileOptions = DEFAULT_TILES,
    device: torch.device | str = "cpu",
    progress: Progress = no_progress,
) -> np.ndarray:
    """Return the class of each pixel, the one with the largest blended score.

    Args:
        network: a function of a batch of images from 0 to 1; it must be in evaluation mode.
        pixels: the picture.
        options: see :class:`TileOptions`.
        device: of the network.
        progress: shows how many rows of tiles are done.

    Shape:
        - pixels: uint8 [H, W, 3].
        - network: (N, 3, h, w) to (N, K, h', w'), which are resized to (h, w) bilinearly.
        - output: uint8 [H, W].

    Example::

        >>> import numpy as np, torch
        >>> from fastseg.training.tiles import TileOptions, tiled_labels
        >>> pixels = np.zeros((40, 60, 3), np.uint8)
        >>> pixels[20:, :, 1] = 255
        >>> tiled_labels(lambda images: images, pixels, TileOptions((16, 16)))[[19, 20], 0]
        array([0, 1], dtype=uint8)
    """
    height, width = pixels.shape[:2]
    side, across = min(options.size[0], height), min(options.size[1], width)
    tops, lefts = tile_starts(height, side, options.overlap), tile_starts(width, across, options.overlap)
    window = _ramp(side, options.overlap, device)[:, None] * _ramp(across, options.overlap, device)
    labels = np.empty((height, width), np.uint8)
    scores: Tensor | None = None
    for top, following in progress(zip(tops, [*tops[1:], height], strict=True), len(tops), "rows of tiles"):
        for first in range(0, len(lefts), options.batch_size):
            columns = lefts[first : first + options.batch_size]
            tiles = [to_tensor(pixels[top : top + side, left : left + across]) for left in columns]
            found = network(torch.stack(tiles).to(device)).float()
            if found.shape[-2:] != (side, across):
                found = F.interpolate(found, (side, across), mode="bilinear")
            if scores is None:
                scores = found.new_zeros(found.shape[1], side, width)
            for left, one in zip(columns, found, strict=True):
                scores[:, :, left : left + across] += one * window
        # All scores of a pixel have the same sum of windows, so the largest needs no division by it.
        done = following - top
        labels[top:following] = scores[:, :done].argmax(0).to(torch.uint8).cpu().numpy()
        rest = scores[:, done:].clone()
        scores.zero_()
        scores[:, : rest.shape[1]] = rest
    return labels


def tile_starts(length: int, side: int, overlap: float) -> list[int]:
    """Return the first pixels of tiles of `side` pixels that cover `length` and overlap by at least that part.

    Example::

        >>> from fastseg.training.tiles import tile_starts
        >>> tile_starts(100, 40, 0.25)
        [0, 30, 60]
    """
    step = max(1, int(side * (1 - overlap)))
    steps = -(-(length - side) // step)
    return [round(k * (length - side) / steps) for k in range(steps + 1)] if steps else [0]


def _ramp(side: int, overlap: float, device: torch.device | str) -> Tensor:
    """Weights of the pixels along a tile: rising over the overlap, 1 in the middle, falling."""
    places = torch.arange(side, device=device)
    edge = torch.minimum(places, side - 1 - places) + 1
    return (edge / (side * overlap + 1)).clamp(max=1)
