"""Layouts of data folders: where the pictures of a split are, and which mask belongs to which picture.

A layout is one class. It says what it matched (`Pairing.rule`), so that a wrong pairing does not go unseen.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from .class_names import CAMVID_CLASSES, CITYSCAPES_CLASSES, CITYSCAPES_LABEL_IDS, VOC_CLASSES
from .masks import MASK_SUFFIXES
from .pictures import FRAME_SUFFIXES, find_files

IGNORED = 255
"""The label of ignored pixels in most data sets."""
SHOWN = 3
"""How many names a message lists."""


@dataclass(frozen=True)
class Pairing:
    """The pictures of a split and their masks.

    Args:
        files: (picture, mask), sorted by picture.
        rule: what was matched, in words.
        notes: what may be wrong: a sentence each.
    """

    files: list[tuple[Path, Path]]
    rule: str
    notes: tuple[str, ...] = ()


class Layout:
    """One way to arrange pictures and masks in a folder."""

    name: ClassVar[str]
    classes: ClassVar[tuple[str, ...] | None] = None
    """The classes, or None if the layout does not know their names."""
    num_classes: ClassVar[int]
    ignore_index: ClassVar[int] = IGNORED
    fixed: ClassVar[bool] = False
    """Whether the masks can have no other number of classes."""

    def recognises(self, root: Path) -> bool:
        """Whether the folders of `root` are those of this layout."""
        raise NotImplementedError

    def pairs(self, root: Path, split: str) -> Pairing:
        """Return the pictures and masks of a split. Raises FileNotFoundError, with what is missing."""
        raise NotImplementedError

    def numbers(self, num_classes: int, ignore_index: int) -> Mapping[int, int] | None:
        """The label of each number in the masks; None if the numbers are the labels."""
        return None


class CamVidLayout(Layout):
    """Two folders for each split, one with pictures and one with masks of the same names, as in CamVid."""

    name, classes, num_classes, ignore_index = "camvid", CAMVID_CLASSES, len(CAMVID_CLASSES), 11

    FRAMES = ("{}/images", "{}/imgs", "images/{}", "imgs/{}", "img_dir/{}", "{}")
    MASKS = (
        "{}annot", "{}_annot", "{}_labels", "{}_masks", "{}labels", "{}masks",
        "{}/labels", "{}/masks", "{}/annotations", "labels/{}", "masks/{}", "annotations/{}", "ann_dir/{}",
    )  # fmt: skip
    ENDINGS = ("", "_L", "_mask", "_masks", "_label", "_labels", "_gt", "_seg", "_segmentation", "_annotation")
    """What a mask may have after the stem of its picture."""

    def recognises(self, root: Path) -> bool:
        return True

    def pairs(self, root: Path, split: str) -> Pairing:
        candidates = [root / pattern.format(split) for pattern in self.MASKS]
        with_masks = [folder for folder in candidates if folder.is_dir() and find_files(folder, MASK_SUFFIXES)]
        frame_folder, frames = self._frames(root, split, with_masks)
        if not with_masks:
            raise FileNotFoundError(
                f"{root} must have a folder with the masks of {frame_folder.relative_to(root).as_posix()}/, one of "
                f"{_names(self.MASKS, split)}"
            )
        if len(with_masks) > 1:
            raise ValueError(
                f"{root} must have one folder with masks for {split!r}, but has "
                f"{' and '.join(str(folder) for folder in with_masks)}"
            )
        return _match_names(frame_folder, frames, with_masks[0], root, self.ENDINGS)

    def _frames(self, root: Path, split: str, with_masks: Sequence[Path]) -> tuple[Path, list[Path]]:
        """The folder with the pictures of a split, and the pictures."""
        for pattern in self.FRAMES:
            folder = root / pattern.format(split)
            if not folder.is_dir():
                continue
            inside = [other for other in with_masks if folder in other.parents]
            found = [p for p in find_files(folder, FRAME_SUFFIXES) if not any(other in p.parents for other in inside)]
            if found:
                return folder, found
        raise FileNotFoundError(
            f"{root} must have a folder with the pictures of {split!r}, one of {_names(self.FRAMES, split)}, with "
            f"{', '.join(FRAME_SUFFIXES)} files"
        )


class VocLayout(Layout):
    """Pascal VOC: all pictures in one folder, all masks in another, and the names of a split in a text file."""

    name, classes, num_classes = "voc", VOC_CLASSES, len(VOC_CLASSES)

    def recognises(self, root: Path) -> bool:
        return self._base(root) is not None

    def _base(self, root: Path) -> Path | None:
        """The folder that has JPEGImages."""
        for folder in (root, *sorted(root.glob("VOC20*")), *sorted(root.glob("VOCdevkit/VOC20*"))):
            if (folder / "JPEGImages").is_dir() and (folder / "ImageSets").is_dir():
                return folder
        return None

    def pairs(self, root: Path, split: str) -> Pairing:
        base = self._base(root)
        if base is None:
            raise FileNotFoundError(f"{root} must have the folders JPEGImages/, SegmentationClass/ and ImageSets/")
        lists = [base / "ImageSets" / "Segmentation" / f"{split}.txt", base / "ImageSets" / f"{split}.txt"]
        listing = next((path for path in lists if path.is_file()), None)
        if listing is None:
            raise FileNotFoundError(f"{lists[0]} or {lists[1]} must exist: it lists the pictures of {split!r}")
        names = [line.split()[0] for line in listing.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        if not names:
            raise FileNotFoundError(f"{listing} must list pictures, but is empty")
        frames = _by_stem(find_files(base / "JPEGImages", FRAME_SUFFIXES))
        masks = _by_stem(find_files(base / "SegmentationClass", MASK_SUFFIXES))
        files = []
        for name in names:
            for folder, found in (("JPEGImages", frames), ("SegmentationClass", masks)):
                if name not in found:
                    raise FileNotFoundError(f"{listing} lists {name}, but {base / folder} has no picture of that name")
            files.append((frames[name], masks[name]))
        rule = (
            f"{len(files)} pictures that {listing.relative_to(root).as_posix()} lists, with SegmentationClass/NAME.png"
        )
        return Pairing(files, rule)


class CityscapesLayout(Layout):
    """Cityscapes: a folder for each city, with the numbers of its label files mapped to the 19 evaluated classes."""

    name, classes, num_classes, fixed = "cityscapes", CITYSCAPES_CLASSES, len(CITYSCAPES_CLASSES), True
    FRAME, MASK = "_leftImg8bit", "_gtFine_labelIds"

    def recognises(self, root: Path) -> bool:
        return (root / "leftImg8bit").is_dir() and (root / "gtFine").is_dir()

    def pairs(self, root: Path, split: str) -> Pairing:
        pictures, masks = root / "leftImg8bit" / split, root / "gtFine" / split
        for folder in (pictures, masks):
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder} must be a folder: cities are in leftImg8bit/SPLIT and gtFine/SPLIT")
        frames = [path for path in find_files(pictures, FRAME_SUFFIXES) if path.stem.endswith(self.FRAME)]
        if not frames:
            raise FileNotFoundError(f"{pictures} must have pictures called CITY/NAME{self.FRAME}.png, but has none")
        files = []
        for frame in frames:
            name = frame.stem.removesuffix(self.FRAME) + f"{self.MASK}.png"
            mask = masks / frame.parent.relative_to(pictures) / name
            if not mask.is_file():
                raise FileNotFoundError(f"{frame} has no mask: {mask} must exist")
            files.append((frame, mask))
        cities = len({frame.parent for frame in frames})
        rule = f"{len(files)} pictures of {cities} cities in leftImg8bit/{split}/, with gtFine/{split}/*{self.MASK}.png"
        return Pairing(files, rule)

    def numbers(self, num_classes: int, ignore_index: int) -> Mapping[int, int]:
        evaluated = {number: label for label, number in enumerate(CITYSCAPES_LABEL_IDS)}
        # Number -1, a licence plate, is 255 in 8 bits.
        return {number: evaluated.get(number, ignore_index) for number in (*range(34), 255)}


class Ade20kLayout(Layout):
    """ADE20K as used for scene parsing: number 0 in a mask is unlabelled, and number k is class k - 1."""

    name, num_classes = "ade20k", 150
    SPLITS: ClassVar[dict[str, str]] = {"train": "training", "val": "validation"}
    ROOTS = (".", "ADEChallengeData2016")

    def recognises(self, root: Path) -> bool:
        return any((root / base / "annotations" / "training").is_dir() for base in self.ROOTS)

    def pairs(self, root: Path, split: str) -> Pairing:
        base = next((root / base for base in self.ROOTS if (root / base / "annotations").is_dir()), root)
        folder = self.SPLITS.get(split, split)
        pictures, masks = base / "images" / folder, base / "annotations" / folder
        for path in (pictures, masks):
            if not path.is_dir():
                raise FileNotFoundError(f"{path} must be a folder: ADE20K has images/{folder} and annotations/{folder}")
        frames = find_files(pictures, FRAME_SUFFIXES)
        if not frames:
            raise FileNotFoundError(f"{pictures} must have pictures, but has none")
        return _match_names(pictures, frames, masks, root, ("",))

    def numbers(self, num_classes: int, ignore_index: int) -> Mapping[int, int]:
        return {0: ignore_index} | {number: number - 1 for number in range(1, num_classes + 1)}


LAYOUTS: dict[str, Layout] = {
    layout.name: layout for layout in (CityscapesLayout(), Ade20kLayout(), VocLayout(), CamVidLayout())
}
"""The layouts by name, in the order in which `find_layout` asks whether they recognise a folder."""
AUTO = "auto"


def find_layout(root: Path, name: str = AUTO) -> Layout:
    """Return the layout of that name; for ``"auto"`` the first that recognises the folder.

    Raises:
        FileNotFoundError: `root` is not a folder.
        ValueError: there is no such layout.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} must be a folder with pictures and masks")
    if name != AUTO and name not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join((AUTO, *LAYOUTS))}, but is {name!r}")
    return LAYOUTS[name] if name != AUTO else next(one for one in LAYOUTS.values() if one.recognises(root))


def _names(patterns: Sequence[str], split: str) -> str:
    return ", ".join(f"{pattern.format(split)}/" for pattern in patterns)


def _by_stem(files: Sequence[Path]) -> dict[str, Path]:
    return {path.stem: path for path in files}


def masks_by_name(
    names: Sequence[Path], mask_folder: Path, endings: Sequence[str] = CamVidLayout.ENDINGS
) -> list[tuple[Path, str]]:
    """Return the mask of each picture, and the rule by which it was found.

    Args:
        names: the pictures, relative to their folder.
        mask_folder: the folder with the masks, in the same subfolders.
        endings: what a mask may have after the stem of its picture.

    Raises:
        FileNotFoundError: a picture has no mask.
        ValueError: it has two.
    """
    masks: dict[Path, list[Path]] = defaultdict(list)
    for mask in find_files(mask_folder, MASK_SUFFIXES):
        masks[mask.relative_to(mask_folder).with_suffix("")].append(mask)
    result = []
    for name in names:
        rules = {name.with_name(f"{name.stem}{ending}"): f"STEM{ending}" for ending in endings}
        rules[name] = "NAME"  # street.jpg.png, as some tools write
        found = [(mask, rule) for wanted, rule in rules.items() for mask in masks.get(wanted, ())]
        if not found:
            raise FileNotFoundError(
                f"{name} has no mask: {mask_folder / name.with_suffix('.png')} must exist"
                + (f", or with {', '.join(endings[1:])} after the name" if len(endings) > 1 else "")
            )
        if len(found) > 1:
            raise ValueError(f"{name} must have one mask, but has {' and '.join(str(mask) for mask, _ in found)}")
        result.append(found[0])
    return result


def _match_names(
    frame_folder: Path, frames: Sequence[Path], mask_folder: Path, root: Path, endings: Sequence[str]
) -> Pairing:
    """Match pictures with the masks of the same names and an ending, in the same subfolders."""
    found = masks_by_name([frame.relative_to(frame_folder) for frame in frames], mask_folder, endings)
    files = [(frame, mask) for frame, (mask, _) in zip(frames, found, strict=True)]
    used = Counter(f"{rule}{mask.suffix}" for mask, rule in found)
    here, there = (folder.relative_to(root).as_posix() for folder in (frame_folder, mask_folder))
    ways = ", ".join(f"{rule} ({count})" if len(used) > 1 else rule for rule, count in used.most_common())
    matched = {mask for _, mask in files}
    left = [mask.name for mask in find_files(mask_folder, MASK_SUFFIXES) if mask not in matched]
    notes = (f"{len(left)} masks in {there}/ have no picture: {listed(left)}",) if left else ()
    return Pairing(files, f"{len(files)} pictures in {here}/, with masks in {there}/ called {ways}", notes)


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
