"""Pictures in files: finding them, reading them, resizing them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

FRAME_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
EXIF = ("upright", "stored")
"""What is done about the EXIF tag by which a camera says how to turn a picture: turn it, or leave it as stored."""
MISSING_PILLOW = 'reading images needs Pillow: pip install "fastseg-kernels[demo]"'
ORIENTATION = 0x0112


def find_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Return the files with these suffixes, in upper or lower case, in a folder and its subfolders, sorted.

    Files and folders whose names begin with a dot, and ``__MACOSX``, are not data: systems and archives leave them
    beside it.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith((".", "__MACOSX")) for part in path.relative_to(folder).parts)
        if path.suffix.lower() in suffixes and not hidden and path.is_file():
            found.append(path)
    return found


def open_picture(path: Path, huge: bool = False) -> Image:
    """Read the picture at `path` completely.

    Args:
        path: the file.
        huge: also a picture with more pixels than Pillow takes for safe.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no picture, or damaged.
        ImportError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(MISSING_PILLOW) from error
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    limit = Image.MAX_IMAGE_PIXELS
    try:
        if huge:
            Image.MAX_IMAGE_PIXELS = None
        with Image.open(path) as image:
            image.load()
            return image
    # Pillow raises any of these for a damaged file.
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{path} has more pixels than Pillow reads by itself; fastseg segment --tile reads it all the same: {error}"
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} must be a PNG or JPEG image, but cannot be read: {error}") from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def is_turned(image: Image) -> bool:
    """Whether an EXIF tag says that the picture must be turned or mirrored to stand upright."""
    return image.getexif().get(ORIENTATION, 1) in range(2, 9)


def upright(image: Image) -> Image:
    """Return the picture turned as its EXIF tag says."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(image) if is_turned(image) else image


def read_image(path: str | Path, exif: str = "upright", huge: bool = False) -> Image:
    """Read a picture as 8-bit RGB.

    Args:
        path: a PNG, JPEG, BMP, TIFF or WebP file.
        exif: ``"upright"`` turns the picture as its EXIF tag says, ``"stored"`` does not.
        huge: also a picture with more pixels than Pillow takes for safe.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an image, or has more than 8 bits per channel.
    """
    path = Path(path)
    return as_rgb(open_picture(path, huge), path, exif)


def as_rgb(image: Image, path: Path, exif: str = "upright") -> Image:
    """Convert the image read from `path`, as :func:`read_image` does."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{path} must have 8 bits per channel, but has Pillow's mode {image.mode}")
    return (upright(image) if exif == "upright" else image).convert("RGB")


def resize(image: Image, size: tuple[int, int] | None) -> Image:
    """Resize an image to `size`, (height, width), bilinearly. None keeps its size."""
    from PIL import Image

    return image if size is None else image.resize((size[1], size[0]), Image.Resampling.BILINEAR)


def resize_labels(labels: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """Resize labels [H, W] to `size`, (height, width), to the nearest pixel. None keeps their size."""
    if size is None:
        return labels
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64) for new, old in zip(size, labels.shape, strict=True)
    )
    return labels[rows[:, None], columns]


def to_tensor(pixels: Any) -> Tensor:
    """Convert an RGB image, or an array uint8 [H, W, 3], to float32 (3, H, W) from 0 to 1."""
    return torch.from_numpy(np.array(np.asarray(pixels).transpose(2, 0, 1), order="C")).float() / 255
