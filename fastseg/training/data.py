"""What the networks are trained on: digit scenes drawn as they are asked for, and folders laid out as CamVid is.

Both data sets answer `sample(index, epoch)` with (image float32 [3, H, W] in 0..1, mask int64 [H, W]), a pure function
of (seed, split, index, epoch): no hidden state, so a run that is resumed sees what an uninterrupted one sees. They also
carry what a network needs to be told about them: `classes`, `ignore_index`, and the `mean` and `std` (three floats, one
per channel) that `normalise` takes off the pictures. A checkpoint keeps these, so prediction uses the same.
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
"""The SegNet authors' published loss weights, in the order of CAMVID_CLASSES."""

DIGIT_CLASSES = (*"0123456789", "ground")
"""Class k is the digit k; class 10 is the ground."""
GROUND = 10

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images [..., 3, H, W] in 0..1 with the channels' `mean` taken off and divided by their `std`."""
    shape = (3, 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)


class DigitScenes(Dataset[tuple[Tensor, Tensor]]):
    """Handwritten digits of random size, place and colour on a textured ground; 11 classes, see DIGIT_CLASSES.

    The digits are scikit-learn's 1,797 (8x8 pixels). A fixed fifth of them is kept for `val`: whatever the seeds, no
    digit of a validation scene has been in a training scene. Their sides are a quarter to five eighths of the scene's
    shorter side (16 to 40 pixels of 64), and no two overlap.

    Args:
        split: "train" or "val".
        size: the scene's side, or (height, width); at least 16.
        seed: scene `index` is a pure function of (seed, split, index), and the same in every epoch.
        length: how many scenes there are; by default 16384 to train and 256 to validate.

    Raises ValueError for another split or a smaller size, ImportError where scikit-learn is missing.
    """

    classes = DIGIT_CLASSES
    ignore_index = -100
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(self, split: str, size: int | tuple[int, int] = 64, seed: int = 0, length: int | None = None) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
        self.split, self.seed = split, seed
        self.size = (size, size) if isinstance(size, int) else size
        if min(self.size) < 16:
            raise ValueError(f"a digit scene must be at least 16 pixels high and wide, not {self.size}")
        self.length = length if length is not None else {"train": 16384, "val": 256}[split]
        self.digits, self.labels = _digits(split)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.sample(index)

    def mask(self, index: int) -> Tensor:
        """The mask of scene `index`: int64 [H, W]."""
        return self.sample(index)[1]

    def sample(self, index: int, epoch: int = 0) -> tuple[Tensor, Tensor]:
        """Scene `index`: image float32 [3, H, W] in 0..1, mask int64 [H, W]. IndexError outside 0..len-1."""
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), index))
        height, width = self.size
        image = _ground(rng, height, width)
        mask = np.full((height, width), GROUND, np.int64)
        shorter = min(height, width)
        for _ in range(10):
            side = int(rng.integers(shorter // 4, shorter * 5 // 8 + 1))
            top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
            which = int(rng.integers(len(self.digits)))
            colours = 0.5 + 0.5 * rng.random((4, 3), np.float32)
            here = (slice(top, top + side), slice(left, left + side))
            stretch = _stretch(8, side)
            ink = stretch @ self.digits[which] @ stretch.T
            drawn = ink > 0.45
            if (drawn & (mask[here] != GROUND)).any():
                continue
            # Of four colours the one that stands out most, so that no digit is invisible.
            beneath = image[here].mean((0, 1))
            colour = colours[((colours - beneath) ** 2).sum(1).argmax()]
            opacity = np.clip((ink - 0.3) / 0.3, 0, 1)[..., None]
            image[here] += opacity * (colour - image[here])
            mask[here][drawn] = self.labels[which]
        image += rng.normal(0, 0.04, image.shape).astype(np.float32)
        pixels = np.ascontiguousarray(image.clip(0, 1).transpose(2, 0, 1))
        return torch.from_numpy(pixels), torch.from_numpy(mask)


@lru_cache
def _digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The split's digits, float32 [N, 8, 8] in 0..1, and their labels, int64 [N]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('digit scenes need scikit-learn: pip install "fastseg-kernels[demo]"') from error
    bunch = load_digits()
    # RandomState's stream is frozen by numpy, so the split is the same with every version.
    order = np.random.RandomState(0).permutation(len(bunch.target))
    held_out = len(order) // 5
    chosen = np.sort(order[:held_out] if split == "val" else order[held_out:])
    return (bunch.images[chosen] / 16).astype(np.float32), bunch.target[chosen].astype(np.int64)


@lru_cache
def _stretch(source: int, target: int) -> np.ndarray:
    """The matrix [target, source] that stretches a signal linearly; S @ picture @ S.T stretches a picture."""
    position = ((np.arange(target) + 0.5) * source / target - 0.5).clip(0, source - 1)
    distance = np.abs(position[:, None] - np.arange(source)[None])
    return np.maximum(0, 1 - distance).astype(np.float32)


def _ground(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A textured ground, float32 [H, W, 3]: coloured noise at a coarse and at a finer scale around one colour."""
    ground = np.broadcast_to(rng.uniform(0.05, 0.5, 3), (height, width, 3)).astype(np.float32)
    for cells, strength in ((3, 0.15), (13, 0.08)):
        noise = rng.normal(0, strength, (3, cells, cells)).astype(np.float32)
        ground += (_stretch(cells, height) @ noise @ _stretch(cells, width).T).transpose(1, 2, 0)
    return ground


class FolderDataset(Dataset[tuple[Tensor, Tensor]]):
    """Frames and masks from a folder laid out as CamVid is: train/, trainannot/, val/, valannot/.

    Frames are PNG or JPEG; the mask of a frame is the 8-bit single-channel (or palette) PNG of the same stem, its
    pixels class numbers or `ignore_index`.

    Args:
        root: the folder that holds the split's two folders.
        split: "train", "val" or whatever else the folders are called.
        size: (height, width) to resize to (frames bilinear, masks nearest); by default each picture keeps its own.
        ignore_index: the label that means "no class".
        num_classes: labels must be below it; by default 11. With 11 the classes are named as CamVid's.
        augment: flip half of the samples from left to right, anew in every epoch.
        crop: (height, width) to cut out at a random place after resizing.
        seed: the flips and crops are a pure function of (seed, epoch, index).

    Raises FileNotFoundError or ValueError, in a sentence that names the file, for a missing folder, a frame without a
    mask, and on reading for a file that is no picture, a mask of another size than its frame or of another kind than
    8-bit, and a label outside the classes.
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
        named = self.num_classes == len(CAMVID_CLASSES)
        self.classes = CAMVID_CLASSES if named else tuple(f"class {k}" for k in range(self.num_classes))
        self.pairs = _pairs(Path(root), split)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.sample(index)

    def mask(self, index: int) -> Tensor:
        """The mask of frame `index` as it is in its file: int64 [H, W]."""
        mask = read_mask(self.pairs[index][1], self.num_classes, self.ignore_index)
        return torch.from_numpy(np.asarray(mask).astype(np.int64))

    def sample(self, index: int, epoch: int = 0) -> tuple[Tensor, Tensor]:
        """Frame `index` as `epoch` shows it: image float32 [3, H, W] in 0..1, mask int64 [H, W]."""
        frame_path, mask_path = self.pairs[index]
        frame = read_image(frame_path)
        mask = read_mask(mask_path, self.num_classes, self.ignore_index)
        if mask.size != frame.size:
            raise ValueError(
                f"{mask_path} must be as large as its frame {frame_path.name}, "
                f"{frame.width}x{frame.height}, but is {mask.width}x{mask.height}"
            )
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


def _pairs(root: Path, split: str) -> list[tuple[Path, Path]]:
    """Each frame of the split with its mask, sorted by name."""
    for folder in (root, root / split, root / f"{split}annot"):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} must be a folder: frames are in {split}/, their masks in {split}annot/")
    frames = sorted(path for path in (root / split).iterdir() if path.suffix.lower() in FRAME_SUFFIXES)
    if not frames:
        raise FileNotFoundError(f"{root / split} holds no {', '.join(FRAME_SUFFIXES)} frames")
    pairs = [(frame, root / f"{split}annot" / f"{frame.stem}.png") for frame in frames]
    for frame, mask in pairs:
        if not mask.is_file():
            raise FileNotFoundError(f"{frame} has no mask: {mask} must exist")
    return pairs


def _open(path: Path) -> Image:
    """The picture at `path`, fully read."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('pictures need Pillow: pip install "fastseg-kernels[demo]"') from error
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    try:
        with Image.open(path) as image:
            image.load()
            return image
    # Pillow reports a broken file in any of these ways, SyntaxError and DecompressionBombError among them.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} must be a PNG or JPEG picture, but cannot be read: {error}") from error


def read_image(path: str | Path) -> Image:
    """The picture at `path` as 8-bit RGB, turned upright where its camera says so. ValueError where it is none."""
    image = _open(Path(path))
    from PIL import ImageOps

    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{path} must have 8 bits per channel, but is of Pillow's mode {image.mode}")
    return ImageOps.exif_transpose(image).convert("RGB")


def read_mask(path: str | Path, num_classes: int, ignore_index: int) -> Image:
    """The mask at `path`, 8-bit single-channel or palette; every pixel a class or `ignore_index`, else ValueError."""
    mask = _open(Path(path))
    if mask.mode not in ("L", "P"):
        raise ValueError(f"{path} must be an 8-bit mask with one channel, but is of Pillow's mode {mask.mode}")
    for label in np.flatnonzero(mask.histogram()):
        if label >= num_classes and label != ignore_index:
            raise ValueError(
                f"{path} holds the label {label}: labels must be 0 to {num_classes - 1}, or {ignore_index} (ignored)"
            )
    return mask


def resize(image: Image, size: tuple[int, int] | None, nearest: bool = False) -> Image:
    """The picture at (height, width) `size`, bilinear or nearest; unchanged where `size` is None."""
    from PIL import Image

    kind = Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR
    return image if size is None else image.resize((size[1], size[0]), kind)


def to_tensor(pixels: Any) -> Tensor:
    """A picture, or uint8 [H, W, 3], as float32 [3, H, W] in 0..1."""
    return torch.from_numpy(np.array(np.asarray(pixels).transpose(2, 0, 1), order="C")).float() / 255


def class_frequencies(
    dataset: DigitScenes | FolderDataset, num_classes: int, ignore_index: int, limit: int = 1024
) -> Tensor:
    """Each class's pixels over all pixels of the masks that hold it (void left out): float64 [num_classes].

    NaN for a class that occurs in no mask. A longer data set is sampled evenly, `limit` masks of it.
    """
    pixels = torch.zeros(num_classes, dtype=torch.float64)
    of_holders = torch.zeros_like(pixels)
    length = len(dataset)
    for index in np.linspace(0, length - 1, min(length, limit)).astype(int).tolist():
        labels = dataset.mask(index)
        counts = torch.bincount(labels[labels != ignore_index], minlength=num_classes).double()
        pixels += counts
        of_holders += (counts > 0) * counts.sum()
    return pixels / of_holders


def median_frequency_weights(
    dataset: DigitScenes | FolderDataset, num_classes: int, ignore_index: int, limit: int = 1024
) -> Tensor:
    """Median frequency balancing (Eigen & Fergus 2015): the median class frequency over each class's own.

    float32 [num_classes]; a class that occurs in no mask weighs 0. The arguments are `class_frequencies`'s.
    """
    frequencies = class_frequencies(dataset, num_classes, ignore_index, limit)
    median = torch.from_numpy(np.asarray(np.nanmedian(frequencies.numpy())))
    return (median / frequencies).nan_to_num(0).float()
