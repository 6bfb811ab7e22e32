"""Batches of a training run, prepared ahead by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from .data import SegmentationDataset

Item = TypeVar("Item")


def collate(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Stack (image, mask) samples into a batch.

    Shape:
        - samples: images (3, H, W) and masks (H, W).
        - output: images (N, 3, H, W) and masks (N, H, W).

    Raises:
        ValueError: the images differ in size.
    """
    images, masks = zip(*samples, strict=True)
    if len({image.shape for image in images}) > 1:
        raise ValueError("the images differ in size: set size to resize all of them to one height and width, or crop")
    return torch.stack(images), torch.stack(masks)


def equal_sizes(samples: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Stack (image, mask) samples into one batch for each size, in the order in which the sizes first occur.

    Shape:
        - samples: images (3, H, W) and masks (H, W).
        - output: for each size images (N, 3, H, W) and masks (N, H, W).
    """
    groups: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
    for sample in samples:
        groups.setdefault(sample[0].shape, []).append(sample)
    return [collate(group) for group in groups.values()]


def training_batch(dataset: SegmentationDataset, batch_size: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Return the batch of a training step, a pure function of the arguments.

    Epochs follow each other without a gap: a batch may contain the end of one and the start of the next. The order of
    the samples in an epoch is a random permutation drawn from (seed, epoch).

    Args:
        dataset: the training data.
        batch_size: N.
        seed: seed of the order.
        step: 0 for the first batch.

    Shape:
        - output: images (N, 3, H, W), float32, and masks (N, H, W), int64.
    """
    samples = []
    for place in range(step * batch_size, (step + 1) * batch_size):
        epoch, position = divmod(place, len(dataset))
        if position == 0 or not samples:
            order = np.random.default_rng((seed, epoch)).permutation(len(dataset))
        samples.append(dataset.sample(int(order[position]), epoch))
    return collate(samples)


def prefetch(make: Callable[[int], Item], indices: range, workers: int) -> Iterator[Item]:
    """Yield ``make(index)`` for each index, in order, computed by threads that run up to `workers` items ahead.

    An exception in `make` is raised to the consumer at the position of its item.

    Example::

        >>> from fastseg.training.batches import prefetch
        >>> list(prefetch(lambda index: index**2, range(4), workers=2))
        [0, 1, 4, 9]
    """
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[Future[Item]] = deque()
        for index in indices:
            ahead.append(pool.submit(make, index))
            if len(ahead) > workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
