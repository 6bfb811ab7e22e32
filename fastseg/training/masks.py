"""Mask files: how the pixels of a picture become class numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .class_names import Colour
from .pictures import as_rgb, is_turned, open_picture, upright

if TYPE_CHECKING:
    from PIL.Image import Image

MASK_SUFFIXES = (".png", ".bmp", ".gif", ".tif", ".tiff")
LOSSY = ("JPEG", "MPO", "WEBP")
VOID_NAMES = ("void", "ignore", "ignored", "unlabelled", "unlabeled")
VOID = -1
"""The class of colours that a table names void."""
WHITE = 255
"""The second class in masks that are drawn in black and white."""


@dataclass(frozen=True)
class ColourTable:
    """Which class each colour stands for, in colour-coded masks.

    Args:
        classes: names of the classes.
        colours: for each colour (red, green, blue) the number of its class; VOID for pixels without a class.
    """

    classes: tuple[str, ...]
    colours: Mapping[Colour, int]

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        """The colours as single numbers in rising order, and their classes."""
        codes = np.array([red << 16 | green << 8 | blue for red, green, blue in self.colours])
        order = codes.argsort()
        return codes[order], np.array(list(self.colours.values()))[order]

    def labels(self, pixels: np.ndarray, path: str | Path) -> np.ndarray:
        """Return the class of each pixel, or VOID.

        Shape:
            - pixels: uint8 [H, W, 3].
            - output: int64 [H, W].

        Raises:
            ValueError: a colour is not in the table. The message names `path` and the pixel.
        """
        wide = pixels.astype(np.int64)
        codes = wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
        known, classes = self._sorted
        place = np.minimum(np.searchsorted(known, codes), len(known) - 1)
        strange = known[place] != codes
        if strange.any():
            row, column = np.argwhere(strange)[0].tolist()
            raise ValueError(
                f"{path} has the colour {tuple(pixels[row, column].tolist())} in row {row}, column {column}, which is "
                f"not among the {len(known)} colours of the palette"
            )
        return classes[place]


def read_colour_table(path: str | Path) -> ColourTable:
    """Read a table of colours and classes, such as CamVid's label_colors.txt.

    A line has the red, green and blue value of a colour, from 0 to 255, and the name of its class, before or after
    them, separated by spaces, tabs or commas. Classes are numbered in the order in which they are first named; several
    colours may have one class. The names void, ignore, ignored, unlabelled and unlabeled are those of pixels without a
    class. A first line without numbers is a heading; empty lines, and those that begin with #, are skipped.

    Args:
        path: a UTF-8 text file.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line has another form, or two lines disagree. The message has the line number.

    Example::

        >>> import pathlib, tempfile
        >>> from fastseg.training.masks import read_colour_table
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "colours.txt"
        >>> _ = path.write_text("128 128 128 Sky\\n0 0 0 Void\\n0 0 192 Pavement")
        >>> read_colour_table(path)
        ColourTable(classes=('Sky', 'Pavement'), colours={(128, 128, 128): 0, (0, 0, 0): -1, (0, 0, 192): 1})
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} must be a UTF-8 text file with colours and classes") from None
    classes: list[str] = []
    colours: dict[Colour, int] = {}
    heading_allowed = True
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        words = [word.strip() for word in line.split(",")] if "," in line else line.split()
        values = tuple(int(word) for word in words if word.isdecimal())
        name = " ".join(word for word in words if word and not word.isdecimal())
        if heading_allowed and not values:
            heading_allowed = False
            continue
        heading_allowed = False
        if len(values) != 3 or not name or max(values) > 255:
            raise ValueError(
                f"{path}, line {number}, must be a colour, three numbers from 0 to 255, and the name of a class, but "
                f"is {line!r}"
            )
        is_void = name.lower() in VOID_NAMES
        if not is_void and name not in classes:
            classes.append(name)
        label = VOID if is_void else classes.index(name)
        if colours.setdefault(values, label) != label:
            raise ValueError(f"{path}, line {number}, gives the colour {values} a second class, {name}")
    if not classes:
        raise ValueError(f"{path} must name at least one class, but names none")
    return ColourTable(tuple(classes), colours)


@dataclass(frozen=True)
class MaskFormat:
    """How the pixels of mask files become class numbers.

    Args:
        classes: names of the classes; class k is the k-th.
        ignore_index: label of pixels without a class.
        numbers: the label of each number in the files; a number that it lacks is an error. None: the numbers are the
            labels, and 255 is class 1 in masks in black and white, where there are two classes and `ignore_index` is
            another number.
        table: the classes of the colours, for colour-coded masks.
        exif: ``"upright"`` or ``"stored"``, see :func:`~fastseg.training.pictures.read_image`.
    """

    classes: tuple[str, ...]
    ignore_index: int
    numbers: Mapping[int, int] | None = field(default=None, hash=False)
    table: ColourTable | None = field(default=None, hash=False)
    exif: str = "upright"

    def read(self, path: str | Path) -> np.ndarray:
        """Read a mask.

        Args:
            path: a PNG, BMP, GIF or TIFF file: with a class number in each pixel (1 to 16 bits of grey, a palette,
                three equal colour channels, or floating-point numbers that are whole), or colour-coded where there is
                a colour table.

        Shape:
            - output: int64 [H, W].

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not such a picture, or has another label.
        """
        path = Path(path)
        return self.decode(open_picture(path), path)

    def decode(self, image: Image, path: Path) -> np.ndarray:
        """Convert the image read from `path`, as :meth:`read` does."""
        if image.format in LOSSY:
            raise ValueError(f"{path} must not be a {image.format} file, which changes labels: save masks as PNG files")
        bits = _bits_per_channel(path, image)
        if bits > 8 and not image.mode.startswith(("L;", "I", "F")):
            raise ValueError(
                f"{path} must have one channel, because it has {bits} bits per channel, of which Pillow reads 8: save "
                "the class numbers as a greyscale mask"
            )
        if image.format == "GIF":
            image = image.convert("RGB")  # writers of GIF number colours as they like, so only the colours tell
        if self.exif == "upright":
            image = upright(image)
        if self.table is not None:
            labels = self.table.labels(np.asarray(_opaque(image, path).convert("RGB")), path)
            return np.where(labels == VOID, self.ignore_index, labels)
        return self._labels(_numbers(image, bits, path), path)

    def _labels(self, numbers: np.ndarray, path: Path) -> np.ndarray:
        """The labels of the numbers in a mask. Raises ValueError for a number that is no label."""
        present = np.unique(numbers).tolist()
        count = len(self.classes)
        if self.numbers is not None:
            meaning = self.numbers
        else:
            meaning = {number: number for number in (*range(count), self.ignore_index)}
            if count == 2 and 1 not in present:
                meaning.setdefault(WHITE, 1)
        for number in present:
            if number not in meaning:
                expected = f"labels must be 0 to {count - 1}, or {self.ignore_index} (ignored)"
                if self.numbers is not None:
                    expected = f"numbers must be from {min(meaning)} to {max(meaning)} in this layout"
                raise ValueError(f"{path} has the label {number}: {expected}")
        if all(meaning[number] == number for number in present):
            return numbers.astype(np.int64)
        return np.array([meaning[number] for number in present])[np.searchsorted(present, numbers)]


def check_same_size(labels: np.ndarray, path: str | Path, image: Image, stored: bool = False) -> None:
    """Raise ValueError unless the mask read from `path` is as large as its image.

    Args:
        labels: the mask, [H, W].
        path: its file.
        image: the image.
        stored: whether the image was turned as its EXIF tag says, so that the mask may fit the stored image instead.
    """
    height, width = labels.shape
    if (width, height) == image.size:
        return
    message = f"{path} must be as large as its image, {image.width}x{image.height}, but is {width}x{height}"
    if stored and (height, width) == image.size:
        message += (
            ": it fits the image before its EXIF tag turns it; if masks were drawn on the stored images, choose exif "
            "stored, which turns none (fastseg train --exif stored)"
        )
    raise ValueError(message)


class Pair(NamedTuple):
    """A picture and its mask, int64 [H, W]. `turned`, `mask_turned`: whether an EXIF tag turns them."""

    image: Image
    labels: np.ndarray
    turned: bool
    mask_turned: bool


def read_pair(image_path: Path, mask_path: Path, masks: MaskFormat, huge: bool = False) -> Pair:
    """Read a picture and its mask; `huge`: also those with more pixels than Pillow takes for safe.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is invalid, or their sizes differ.
    """
    image, mask = open_picture(image_path, huge), open_picture(mask_path, huge)
    turned, mask_turned = is_turned(image), is_turned(mask)
    image, labels = as_rgb(image, image_path, masks.exif), masks.decode(mask, mask_path)
    check_same_size(labels, mask_path, image, turned and masks.exif == "upright")
    return Pair(image, labels, turned, mask_turned)


def _bits_per_channel(path: Path, image: Image) -> int:
    """The bits per channel in the file, which Pillow may have changed on reading."""
    if image.format == "PNG":
        with path.open("rb") as file:
            return file.read(25)[24]  # in the header, after the signature, the chunk's length and type, and both sides
    if image.format == "TIFF":
        return max(image.tag_v2.get(258, (1,)))
    return 8


def _opaque(image: Image, path: Path) -> Image:
    """The image. Raises ValueError if a pixel is transparent, which could mean any label."""
    if image.mode in ("LA", "RGBA", "PA", "La", "RGBa"):
        least, _most = image.getchannel(image.getbands()[-1]).getextrema()
        if least < 255:
            raise ValueError(f"{path} must be opaque, but has pixels with an alpha of {least}: which label is that?")
    return image


def _numbers(image: Image, bits: int, path: Path) -> np.ndarray:
    """The number in each pixel of a mask, [H, W]."""
    mode = _opaque(image, path).mode
    pixels = np.asarray(image)
    if mode in ("LA", "La", "PA"):
        pixels = pixels[..., 0]
    elif mode in ("RGB", "RGBA", "RGBa"):
        if (pixels[..., :1] != pixels[..., 1:3]).any():
            raise ValueError(
                f"{path} must have a class number in each pixel, but is in colour: name the class of each colour in a "
                "file (fastseg train --palette FILE)"
            )
        pixels = pixels[..., 0]
    elif mode == "1":
        pixels = pixels.astype(np.uint8)
    elif mode == "F":
        if (pixels != np.round(pixels)).any() or not np.isfinite(pixels).all():
            raise ValueError(f"{path} must have a class number in each pixel, but has numbers that are not whole")
        pixels = pixels.astype(np.int64)
    elif mode not in ("L", "P") and not mode.startswith("I"):
        raise ValueError(f"{path} must have a class number in each pixel, but has Pillow's mode {mode}")
    if mode == "L" and bits < 8:  # Pillow spreads 2 or 4 bits of grey over 0 to 255
        pixels = pixels // (255 // (2**bits - 1))
    return pixels
