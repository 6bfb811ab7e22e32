"""Datasets for training: generated digit scenes, and folders in CamVid's layout. Reading of images and masks.

Both datasets have a method ``sample(index, epoch)`` that returns (image float32 [3, H, W] from 0 to 1, mask int64
[H, W]). It is a pure function of (seed, split, index, epoch) without hidden state, so a resumed run sees the same data
as an uninterrupted one. Both also have what a network must know about them: `classes`, `ignore_index`, and the `mean`
and `std` (three floats, one per channel) that `normalise` uses. Checkpoints store these, so that prediction uses the
same values.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from PIL.Image import Image

SPLITS = ("train", "val")
FRAME_SUFFIXES = (".png", ".jpg", ".jpeg")
MISSING_PILLOW = 'reading images needs Pillow: pip install "fastseg-kernels[demo]"'
MISSING_DIGITS = 'digit scenes need scikit-learn: pip install "fastseg-kernels[demo]"'

CAMVID_CLASSES = (
    "Sky",
    "Building",
    "Pole",
    "Road",
    "Pavement",
    "Tree",
    "SignSymbol",
    "Fence",
    "Car",
    "Pedestrian",
    "Bicyclist",
)
CAMVID_CLASS_WEIGHTS = (0.2595, 0.1826, 4.5640, 0.1417, 0.9051, 0.3826, 9.6446, 1.8418, 0.6823, 6.2478, 7.3614)
"""The loss weights that SegNet's authors published, in the order of CAMVID_CLASSES."""

DIGIT_CLASSES = (*"0123456789", "ground")
"""The classes of digit scenes: class k is the digit k, class 10 the background."""
BACKGROUND = 10

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
        if not 0 <= index < self.length:
            raise IndexError(f"index must be from 0 to {self.length - 1}, but is {index}")
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


class FolderDataset(Dataset[tuple[Tensor, Tensor]]):
    """Frames and masks in a folder with CamVid's layout: train/, trainannot/, val/, valannot/.

    Frames are PNG or JPEG files. The mask of a frame is the PNG file of the same stem in the folder with the suffix
    "annot": 8 bits, a single channel or a palette, with a class number or `ignore_index` in each pixel.

    Args:
        root: the folder that contains the two folders of the split.
        split: ``"train"``, ``"val"``, or the name of another folder, such as ``"test"``.
        size: (height, width) to resize to, frames bilinearly and masks to the nearest pixel. None keeps each size.
        ignore_index: label of pixels without a class.
        num_classes: number of classes. Default: 11, with CamVid's class names.
        augment: flip half of the samples horizontally, chosen again in every epoch.
        crop: (height, width) of a random crop, taken after resizing, or None.
        seed: flips and crops are a pure function of (seed, epoch, index).

    Shape:
        - samples: image (3, H, W), float32 from 0 to 1, and mask (H, W), int64.

    Raises:
        FileNotFoundError: a folder is missing, contains no frames, or a frame has no mask.
        ValueError: on reading a sample: a file is not an image, the sizes of frame and mask differ, the mask does not
            have 8 bits or has a label that is not a class, or the frame is smaller than `crop`.
    """

    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(
        self,
        root: str | Path,
        split: str,
        size: tuple[int, int] | None = None,
        ignore_index: int = 11,
        num_classes: int | None = None,
        augment: bool = False,
        crop: tuple[int, int] | None = None,
        seed: int = 0,
    ) -> None:
        self.size, self.crop, self.augment, self.seed = size, crop, augment, seed
        self.ignore_index = ignore_index
        self.num_classes = len(CAMVID_CLASSES) if num_classes is None else num_classes
        has_camvid_classes = self.num_classes == len(CAMVID_CLASSES)
        self.classes = CAMVID_CLASSES if has_camvid_classes else tuple(f"class {k}" for k in range(self.num_classes))
        self.files = _frames_and_masks(Path(root), split)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.sample(index)

    def mask(self, index: int) -> Tensor:
        """Return the mask of frame `index` as it is in its file, without resizing or augmentation: int64 (H, W)."""
        mask = read_mask(self.files[index][1], self.num_classes, self.ignore_index)
        return torch.from_numpy(np.asarray(mask).astype(np.int64))

    def sample(self, index: int, epoch: int = 0) -> tuple[Tensor, Tensor]:
        """Return image and mask of frame `index`, with the flip and the crop of `epoch`."""
        frame_path, mask_path = self.files[index]
        frame = read_image(frame_path)
        mask = read_mask(mask_path, self.num_classes, self.ignore_index)
        check_same_size(mask, mask_path, frame)
        frame, mask = resize(frame, self.size), resize(mask, self.size, nearest=True)
        pixels, labels = np.asarray(frame), np.asarray(mask)
        rng = np.random.default_rng((self.seed, epoch, index))
        if self.augment and rng.random() < 0.5:
            pixels, labels = pixels[:, ::-1], labels[:, ::-1]
        if self.crop:
            height, width = self.crop
            if height > labels.shape[0] or width > labels.shape[1]:
                raise ValueError(f"{frame_path} is smaller than the crop of {height}x{width}")
            top = int(rng.integers(labels.shape[0] - height + 1))
            left = int(rng.integers(labels.shape[1] - width + 1))
            here = (slice(top, top + height), slice(left, left + width))
            pixels, labels = pixels[here], labels[here]
        return to_tensor(pixels), torch.from_numpy(labels.astype(np.int64))


SegmentationDataset = DigitScenes | FolderDataset


def _frames_and_masks(root: Path, split: str) -> list[tuple[Path, Path]]:
    """The frames of a split with their masks, sorted by name."""
    for folder in (root, root / split, root / f"{split}annot"):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} must be a folder: frames are in {split}/, their masks in {split}annot/")
    frames = sorted(path for path in (root / split).iterdir() if path.suffix.lower() in FRAME_SUFFIXES)
    if not frames:
        raise FileNotFoundError(f"{root / split} contains no {', '.join(FRAME_SUFFIXES)} frames")
    files = [(frame, root / f"{split}annot" / f"{frame.stem}.png") for frame in frames]
    for frame, mask in files:
        if not mask.is_file():
            raise FileNotFoundError(f"{frame} has no mask: {mask} must exist")
    return files


def _open(path: Path) -> Image:
    """Read the image at `path` completely."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(MISSING_PILLOW) from error
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    try:
        with Image.open(path) as image:
            image.load()
            return image
    # Pillow raises any of these for a damaged file.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} must be a PNG or JPEG image, but cannot be read: {error}") from error


def read_image(path: str | Path) -> Image:
    """Read an image as 8-bit RGB, rotated upright as its EXIF orientation says.

    Args:
        path: a PNG or JPEG file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an image, or has more than 8 bits per channel.
    """
    image = _open(Path(path))
    from PIL import ImageOps

    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{path} must have 8 bits per channel, but has Pillow's mode {image.mode}")
    return ImageOps.exif_transpose(image).convert("RGB")


def read_mask(path: str | Path, num_classes: int, ignore_index: int) -> Image:
    """Read an 8-bit mask with a single channel or a palette.

    Args:
        path: a PNG file.
        num_classes: number of classes; labels are 0 to ``num_classes - 1``.
        ignore_index: the one other label that is allowed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not such an image, or has another label.
    """
    mask = _open(Path(path))
    if mask.mode not in ("L", "P"):
        raise ValueError(f"{path} must be an 8-bit mask with one channel, but has Pillow's mode {mask.mode}")
    for label in np.flatnonzero(mask.histogram()):
        if label >= num_classes and label != ignore_index:
            raise ValueError(
                f"{path} has the label {label}: labels must be 0 to {num_classes - 1}, or {ignore_index} (ignored)"
            )
    return mask


def check_same_size(mask: Image, path: str | Path, image: Image) -> None:
    """Raise ValueError unless the mask read from `path` is as large as its image."""
    if mask.size != image.size:
        raise ValueError(
            f"{path} must be as large as its image, {image.width}x{image.height}, but is {mask.width}x{mask.height}"
        )


def resize(image: Image, size: tuple[int, int] | None, nearest: bool = False) -> Image:
    """Resize an image to `size`, (height, width), bilinearly or to the nearest pixel. None keeps its size."""
    from PIL import Image

    method = Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR
    return image if size is None else image.resize((size[1], size[0]), method)


def to_tensor(pixels: Any) -> Tensor:
    """Convert an RGB image, or an array uint8 [H, W, 3], to float32 (3, H, W) from 0 to 1."""
    return torch.from_numpy(np.array(np.asarray(pixels).transpose(2, 0, 1), order="C")).float() / 255
