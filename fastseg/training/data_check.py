"""A quick check of all files of a data set before training: can each be read, is it valid, does it fit its partner?

The result is kept in the folder that the environment variable FASTSEG_CACHE names, by default ~/.cache/fastseg, so that
only files that changed since are read again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic_write import atomic_write
from .layouts import listed
from .masks import MaskFormat, read_pair

CHECKERS = 4
"""Threads: Pillow decodes outside of Python's lock."""
VERSION = 1  # of the content of the files in the cache

Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]
"""Wraps what is iterated over: (items, how many, what is done). Yields the items and may show how far it is."""


def no_progress(items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
    """Show nothing."""
    return items


def cache_folder() -> Path:
    """Where the results of checks are kept."""
    return Path(os.environ.get("FASTSEG_CACHE") or Path.home() / ".cache" / "fastseg") / "data"


@dataclass(frozen=True)
class FileFacts:
    """What a check found in a picture and its mask.

    Args:
        width, height: of the picture.
        counts: number of pixels of each class that occurs, by class.
        turned: whether the picture has an EXIF tag that turns it.
        mask_turned: whether the mask has one.
    """

    width: int
    height: int
    counts: dict[int, int]
    turned: bool
    mask_turned: bool


@dataclass(frozen=True)
class DataFacts:
    """What the check of a data set found.

    Args:
        files: the facts of each picture and mask, in the order of the data set.
        notes: sentences that a user should read.
    """

    files: list[FileFacts]
    notes: tuple[str, ...]

    def counts(self, num_classes: int) -> np.ndarray:
        """Return the pixels of each class in each mask, int64 [N, K]; ignored pixels are not counted."""
        table = np.zeros((len(self.files), num_classes), np.int64)
        for row, facts in zip(table, self.files, strict=True):
            for label, count in facts.counts.items():
                row[label] = count
        return table


def check_files(
    files: Sequence[tuple[Path, Path]], masks: MaskFormat, progress: Progress = no_progress, what: str = "checking"
) -> DataFacts:
    """Read every picture and mask once.

    Args:
        files: pictures and masks.
        masks: the format of the masks.
        progress: shows how far it is.
        what: the name of the data for `progress`.

    Raises:
        ValueError: files are broken, or do not fit each other. The message names the first, and says how many more
            there are.
    """
    cache = _Cache(files, masks)
    pool = ThreadPoolExecutor(CHECKERS)
    try:
        found = list(progress(pool.map(lambda pair: _check_pair(pair, masks, cache), files), len(files), what))
    finally:
        pool.shutdown(cancel_futures=True)  # so that Ctrl-C does not wait for all files
        cache.save()
    broken = [message for message in found if isinstance(message, str)]
    if broken:
        more = f" (and {len(broken) - 1} more files are broken)" if len(broken) > 1 else ""
        raise ValueError(broken[0] + more)
    return DataFacts(found, tuple(_notes(files, found, masks)))


def _check_pair(pair: tuple[Path, Path], masks: MaskFormat, cache: _Cache) -> FileFacts | str:
    """The facts of a picture and its mask, or what is wrong with them."""
    known = cache.get(pair)
    if known is not None:
        return known
    try:
        image, labels, turned, mask_turned = read_pair(*pair, masks)
        values, counts = np.unique(labels[labels != masks.ignore_index], return_counts=True)
        occurring = dict(zip(values.tolist(), counts.tolist(), strict=True))
        facts = FileFacts(image.width, image.height, occurring, turned, mask_turned)
    except (OSError, ValueError) as error:
        return str(error)
    cache.put(pair, facts)
    return facts


def _notes(files: Sequence[tuple[Path, Path]], found: Sequence[FileFacts], masks: MaskFormat) -> Iterable[str]:
    """What a user should know about the files."""
    empty = [mask.name for (_, mask), facts in zip(files, found, strict=True) if not facts.counts]
    if empty:
        yield f"{len(empty)} masks have ignored pixels only and contribute nothing: {listed(empty)}"
    if masks.exif == "upright":
        unsure = [
            frame.name for (frame, _), facts in zip(files, found, strict=True) if facts.turned and not facts.mask_turned
        ]
        if unsure:
            yield (
                f"{len(unsure)} pictures are turned as their EXIF tag says, and their masks have no tag and are taken "
                f"as upright: {listed(unsure)}; exif stored turns neither"
            )


class _Cache:
    """The facts of files that did not change since they were checked."""

    def __init__(self, files: Sequence[tuple[Path, Path]], masks: MaskFormat) -> None:
        table = None if masks.table is None else sorted(masks.table.colours.items())
        numbers = None if masks.numbers is None else sorted(masks.numbers.items())
        described = repr((VERSION, len(masks.classes), masks.ignore_index, numbers, table, masks.exif))
        place = str(files[0][0].resolve().parent) if files else ""
        self.path = cache_folder() / f"{hashlib.sha256((described + place).encode()).hexdigest()[:24]}.json"
        self.known: dict[str, Any] = {}
        self.changed = False
        with suppress(OSError, ValueError):  # no cache, or one that cannot be read: all files are checked
            read = json.loads(self.path.read_text(encoding="utf-8"))
            self.known = read if isinstance(read, dict) else {}

    def _key(self, pair: tuple[Path, Path]) -> str:
        """The paths of a picture and its mask, with the times and sizes by which a change shows."""
        stats = [path.stat() for path in pair]
        return "|".join(f"{p.resolve()}:{s.st_mtime_ns}:{s.st_size}" for p, s in zip(pair, stats, strict=True))

    def get(self, pair: tuple[Path, Path]) -> FileFacts | None:
        """The facts that are known; None if the files changed or were never checked."""
        with suppress(OSError, TypeError, AttributeError, ValueError):
            entry = self.known.get(self._key(pair)) if self.known else None
            if entry is not None:
                return FileFacts(**entry | {"counts": {int(k): v for k, v in entry["counts"].items()}})
        return None

    def put(self, pair: tuple[Path, Path], facts: FileFacts) -> None:
        """Keep facts."""
        self.known[self._key(pair)] = asdict(facts)
        self.changed = True

    def save(self) -> None:
        """Write the file, if there is something new. A folder that cannot be written to is no error."""
        if self.changed:
            with suppress(OSError), atomic_write(self.path) as temporary:
                temporary.write_text(json.dumps(self.known), encoding="utf-8")
