"""Datasets for training: generated digit scenes, and folders with pictures and masks.

Both datasets have a method ``sample(index, epoch)`` that returns (image float32 [3, H, W] from 0 to 1, mask int64
[H, W]). It is a pure function of (seed, split, index, epoch) without hidden state, so a resumed run sees the same data
as an uninterrupted one. Both also have what a network must know about them: `classes`, `ignore_index`, and the `mean`
and `std` (three floats, one per channel) that `normalise` uses. Checkpoints store these, so that prediction uses the
same values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from .class_names import DIGIT_CLASSES
from .data_check import DataFacts, Progress, check_files, no_progress
from .layouts import AUTO, IGNORED, Layout, find_layout
from .masks import ColourTable, MaskFormat, read_colour_table, read_pair
from .pictures import resize, resize_labels, to_tensor

SPLITS = ("train", "val")
MISSING_DIGITS = 'digit scenes need scikit-learn: pip install "fastseg-kernels[demo]"'

BACKGROUND = 10
"""The class of pixels without a digit."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Subtract each channel's `mean` and divide by its `std`.

    Shape:
        - images: ``(*, 3, H, W)``.
        - mean, std: three numbers each.
        - output: ``(*, 3, H, W)``.

    Example::

        >>> import torch
        >>> from fastseg.training.data import normalise
        >>> normalise(torch.ones(3, 1, 1), (0.5, 0.5, 0.5), (0.25, 0.5, 1.0)).flatten()
        tensor([2.0000, 1.0000, 0.5000])
    """
    shape = (3, 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)


class DigitScenes(Dataset[tuple[Tensor, Tensor]]):
    """Generated scenes: handwritten digits of random size, position and colour on a textured background.

    The classes are DIGIT_CLASSES. The digits are the 1,797 images of 8x8 pixels in scikit-learn. A fixed fifth of them
    is reserved for the split ``"val"``, so that no digit in a validation scene occurs in a training scene, whatever the
    seeds. The side of a digit is between 1/4 and 5/8 of the shorter side of the scene (16 to 40 pixels of 64). Digits
    do not overlap.

    Args:
        split: ``"train"`` or ``"val"``.
        size: side of the scenes, or (height, width); at least 16.
        seed: a scene is a pure function of (seed, split, index). It is the same in every epoch.
        length: number of scenes. Default: 16384 for ``"train"`` and 256 for ``"val"``.

    Shape:
        - samples: image (3, H, W), float32 from 0 to 1, and mask (H, W), int64.

    Raises:
        ValueError: `split` is another name, or `size` is too small.
        ImportError: scikit-learn is not installed.

    Example::

        >>> from fastseg.training.data import DigitScenes
        >>> image, mask = DigitScenes("train", size=32)[0]
        >>> image.shape, mask.shape
        (torch.Size([3, 32, 32]), torch.Size([32, 32]))
    """

    classes = DIGIT_CLASSES
    ignore_index = -100
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(self, split: str, size: int | tuple[int, int] = 64, seed: int = 0, length: int | None = None) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, but is {split!r}")
        self.split, self.seed = split, seed
        self.size = (size, size) if isinstance(size, int) else size
        if min(self.size) < 16:
            raise ValueError(f"size must be at least 16 pixels high and wide for digit scenes, but is {self.size}")
        self.length = length if length is not None else {"train": 16384, "val": 256}[split]
        self.digits, self.labels = _digits(split)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.sample(index)

    def mask(self, index: int) -> Tensor:
        """Return the mask of scene `index`, int64 (H, W)."""
        return self.sample(index)[1]

    def sample(self, index: int, epoch: int = 0) -> tuple[Tensor, Tensor]:
        """Return image and mask of scene `index`, the same in every epoch. Raises IndexError if out of range."""
        index = _from_start(index, self.length)
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), index))
        height, width = self.size
        image = _background(rng, height, width)
        mask = np.full((height, width), BACKGROUND, np.int64)
        shorter = min(height, width)
        for _ in range(10):
            side = int(rng.integers(shorter // 4, shorter * 5 // 8 + 1))
            top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
            which = int(rng.integers(len(self.digits)))
            colours = 0.5 + 0.5 * rng.random((4, 3), np.float32)
            here = (slice(top, top + side), slice(left, left + side))
            matrix = _interpolation(8, side)
            ink = matrix @ self.digits[which] @ matrix.T
            drawn = ink > 0.45
            if (drawn & (mask[here] != BACKGROUND)).any():
                continue
            # Of four random colours, take the one with the highest contrast to the image, so that the digit is visible.
            surroundings = image[here].mean((0, 1))
            colour = colours[((colours - surroundings) ** 2).sum(1).argmax()]
            opacity = np.clip((ink - 0.3) / 0.3, 0, 1)[..., None]
            image[here] += opacity * (colour - image[here])
            mask[here][drawn] = self.labels[which]
        image += rng.normal(0, 0.04, image.shape).astype(np.float32)
        pixels = np.ascontiguousarray(image.clip(0, 1).transpose(2, 0, 1))
        return torch.from_numpy(pixels), torch.from_numpy(mask)


@lru_cache
def _digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The digits of a split, float32 [N, 8, 8] from 0 to 1, and their labels, int64 [N]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(MISSING_DIGITS) from error
    bunch = load_digits()
    # numpy guarantees RandomState's stream, so the split is the same with every version.
    order = np.random.RandomState(0).permutation(len(bunch.target))
    held_out = len(order) // 5
    chosen = np.sort(order[:held_out] if split == "val" else order[held_out:])
    return (bunch.images[chosen] / 16).astype(np.float32), bunch.target[chosen].astype(np.int64)


@lru_cache
def _interpolation(source: int, target: int) -> np.ndarray:
    """The matrix M [target, source] of linear interpolation: M @ image @ M.T resizes an image."""
    position = ((np.arange(target) + 0.5) * source / target - 0.5).clip(0, source - 1)
    distance = np.abs(position[:, None] - np.arange(source)[None])
    return np.maximum(0, 1 - distance).astype(np.float32)


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A textured background, float32 [H, W, 3]: one colour plus coloured noise at a coarse and at a fine scale."""
    image = np.broadcast_to(rng.uniform(0.05, 0.5, 3), (height, width, 3)).astype(np.float32)
    for cells, strength in ((3, 0.15), (13, 0.08)):
        noise = rng.normal(0, strength, (3, cells, cells)).astype(np.float32)
        image += (_interpolation(cells, height) @ noise @ _interpolation(cells, width).T).transpose(1, 2, 0)
    return image


@dataclass(frozen=True)
class LabelOptions:
    """What the masks of a folder mean.

    Args:
        layout: where pictures and masks are: ``"auto"``, or a key of ``fastseg.training.layouts.LAYOUTS``.
        palette: a file with the classes of colours, see :func:`~fastseg.training.masks.read_colour_table`, for
            colour-coded masks. None: the masks have class numbers.
        num_classes: number of classes. None: that of the palette, else of the layout.
        ignore_index: label of pixels without a class. None: 11 for CamVid's classes, else 255.
        exif: ``"upright"``: pictures are turned as their EXIF tags say, and masks as theirs do. ``"stored"``: neither.
    """

    layout: str = AUTO
    palette: str | Path | None = None
    num_classes: int | None = None
    ignore_index: int | None = None
    exif: str = "upright"


def mask_format(layout: Layout, options: LabelOptions, table: ColourTable | None = None) -> MaskFormat:
    """Return how masks of a layout are read.

    Args:
        layout: the layout.
        options: the rest.
        table: the colours, in place of those of the file `options.palette`.

    Raises:
        ValueError: `options.num_classes` contradicts the palette or the layout.
        OSError: the palette cannot be read.
    """
    if table is None and options.palette is not None:
        table = read_colour_table(options.palette)
    if table is not None:
        known, given_by = table.classes, "the palette"
    else:
        known, given_by = layout.classes, f"the layout {layout.name}" if layout.fixed else None
    default = layout.num_classes if known is None else len(known)
    count = default if options.num_classes is None else options.num_classes
    if given_by and count != default:
        raise ValueError(f"num_classes must be {default}, the classes of {given_by}, but is {count}")
    classes = known if known is not None and len(known) == count else tuple(f"class {k}" for k in range(count))
    default_ignored = layout.ignore_index if classes == layout.classes else IGNORED
    ignored = default_ignored if options.ignore_index is None else options.ignore_index
    numbers = layout.numbers(count, ignored) if table is None else None
    return MaskFormat(classes, ignored, numbers, table, options.exif)


class FolderDataset(Dataset[tuple[Tensor, Tensor]]):
    """Pictures and masks in a folder, in one of the layouts of :mod:`fastseg.training.layouts`.

    In a ``torch.utils.data.DataLoader`` each access ``dataset[index]`` draws another flip and crop, from torch's random
    numbers. ``sample(index, epoch)`` is a pure function instead.

    Args:
        root: the folder.
        split: ``"train"``, ``"val"``, or the name of another part, such as ``"test"``.
        labels: the layout, and what the masks mean.
        size: (height, width) to resize to, pictures bilinearly and masks to the nearest pixel. None keeps each size.
        augment: flip half of the samples horizontally, chosen again in every epoch.
        crop: (height, width) of a random crop, taken after resizing, or None. A smaller picture is filled up at the
            right and at the bottom with `mean` and, in the mask, `ignore_index`.
        seed: flips and crops of `sample` are a pure function of (seed, epoch, index).

    Attributes:
        classes: names of the classes.
        ignore_index: label of pixels without a class.
        labels, layout: the options as given, and the layout that was found.
        pairing: the files, and by what rule they were matched.
        masks: the format of the masks.

    Shape:
        - samples: image (3, H, W), float32 from 0 to 1, and mask (H, W), int64.

    Raises:
        FileNotFoundError: a folder is missing, contains no pictures, or a picture has no mask.
        ValueError: the layout or the palette is invalid; on reading a sample: a file is not an image, the sizes of
            picture and mask differ, or the mask has a label that is not a class.
    """

    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(
        self,
        root: str | Path,
        split: str,
        labels: LabelOptions = LabelOptions(),
        size: tuple[int, int] | None = None,
        augment: bool = False,
        crop: tuple[int, int] | None = None,
        seed: int = 0,
    ) -> None:
        self.split, self.size, self.crop, self.augment, self.seed = split, size, crop, augment, seed
        self.labels, self.layout = labels, find_layout(Path(root), labels.layout)
        self.masks = mask_format(self.layout, labels)
        self.classes, self.ignore_index = self.masks.classes, self.masks.ignore_index
        self.pairing = self.layout.pairs(Path(root), split)
        self.files = self.pairing.files
        self._facts: DataFacts | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        epoch = int(torch.randint(2**31, ())) if self.augment or self.crop else 0
        return self.sample(index, epoch)

    def check(self, progress: Progress = no_progress) -> DataFacts:
        """Read every file once, unless that was done before. Raises ValueError if one is broken."""
        if self._facts is None:
            self._facts = check_files(self.files, self.masks, progress, f"checking {self.split}")
        return self._facts

    def mask(self, index: int) -> Tensor:
        """Return the mask of picture `index` as it is in its file, without resizing or augmentation: int64 (H, W)."""
        return torch.from_numpy(self.masks.read(self.files[index][1]))

    def sample(self, index: int, epoch: int = 0) -> tuple[Tensor, Tensor]:
        """Return image and mask of picture `index`, with the flip and the crop of `epoch`."""
        index = _from_start(index, len(self.files))
        frame, labels, *_ = read_pair(*self.files[index], self.masks)
        pixels, labels = np.asarray(resize(frame, self.size)), resize_labels(labels, self.size)
        rng = np.random.default_rng((self.seed, epoch, index))
        if self.augment and rng.random() < 0.5:
            pixels, labels = pixels[:, ::-1], labels[:, ::-1]
        if self.crop is None:
            return to_tensor(pixels), torch.from_numpy(np.ascontiguousarray(labels))
        top, left = (
            int(rng.integers(max(have - want, 0) + 1)) for have, want in zip(labels.shape, self.crop, strict=True)
        )
        here = (slice(top, top + self.crop[0]), slice(left, left + self.crop[1]))
        return self._fill_up(to_tensor(pixels[here]), torch.from_numpy(np.ascontiguousarray(labels[here])))

    def _fill_up(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Image and mask in the size of the crop."""
        height, width = labels.shape
        if (height, width) == self.crop:
            return image, labels
        whole = torch.tensor(self.mean).view(3, 1, 1).repeat(1, *self.crop)
        whole[:, :height, :width] = image
        return whole, F.pad(labels, (0, self.crop[1] - width, 0, self.crop[0] - height), value=self.ignore_index)


def _from_start(index: int, length: int) -> int:
    """An index from 0; negative ones count from the end. Raises IndexError if it is out of range."""
    if not -length <= index < length:
        raise IndexError(f"index must be from {-length} to {length - 1}, but is {index}")
    return index + length if index < 0 else index


SegmentationDataset = DigitScenes | FolderDataset
