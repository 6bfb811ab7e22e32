"""All files are read once before training; what was found is remembered."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support.folders import write_folder

from fastseg.training import class_weights, data, data_check

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Six pictures, and a cache of checks of their own."""
    monkeypatch.setattr(data_check, "cache_folder", lambda: tmp_path / "cache")
    return write_folder(tmp_path / "set", np.random.default_rng(0).integers(0, 12, (6, 10, 14)))


@pytest.fixture
def read_masks(monkeypatch):
    """The names of the masks that are read."""
    names, decode = [], data_check.MaskFormat.decode
    monkeypatch.setattr(
        data_check.MaskFormat,
        "decode",
        lambda form, image, path: (names.append(path.name), decode(form, image, path))[1],
    )
    return names


def test_only_files_that_changed_are_read_again(folder, read_masks, tmp_path):
    def check(**options):
        read_masks.clear()
        return data.FolderDataset(folder, "train", data.LabelOptions(**options)).check()

    first = check()
    assert sorted(read_masks) == [f"f{n}.png" for n in range(6)]
    assert check() == first and read_masks == []
    Image.new("L", (14, 10), 3).save(folder / "trainannot" / "f2.png")
    assert check().files[2].counts == {3: 140} and read_masks == ["f2.png"]
    check(ignore_index=255, num_classes=12)  # another meaning of the same files
    assert len(read_masks) == 6
    (file,) = [path for path in (tmp_path / "cache").iterdir() if "11" not in path.name][:1]
    for path in (tmp_path / "cache").iterdir():
        path.write_text("no json")
    check()
    assert len(read_masks) == 6 and file.exists()


def test_broken_files_are_named_and_counted(folder):
    (folder / "train" / "f4.png").write_bytes((folder / "train" / "f4.png").read_bytes()[:-40])
    Image.new("L", (3, 3)).save(folder / "trainannot" / "f1.png")
    with pytest.raises(ValueError, match=r"f1.png must be as large as its image, .* \(and 1 more files are broken\)"):
        data.FolderDataset(folder, "train").check()


def test_masks_with_ignored_pixels_only_and_turned_pictures_are_said(folder):
    Image.new("L", (14, 10), 11).save(folder / "trainannot" / "f3.png")
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down, which no size shows
    Image.new("RGB", (14, 10)).save(folder / "train" / "f5.png", exif=exif)
    notes = data.FolderDataset(folder, "train").check().notes
    assert notes[0] == "1 masks have ignored pixels only and contribute nothing: f3.png"
    assert notes[1].startswith("1 pictures are turned as their EXIF tag says, and their masks have no tag")
    assert len(notes) == 2 and "f5.png" in notes[1]
    stored = data.FolderDataset(folder, "train", data.LabelOptions(exif="stored"))
    assert len(stored.check().notes) == 1


def test_a_class_in_the_last_mask_of_many_counts(tmp_path):
    """More masks than were once looked at, 1024; only one between two of those has class 2."""
    root = write_folder(tmp_path, [np.zeros((1, 2), int)] * 1200)
    Image.fromarray(np.array([[0, 2]], np.uint8)).save(root / "trainannot" / "f1101.png")
    dataset = data.FolderDataset(root, "train", data.LabelOptions(num_classes=3))
    weights = class_weights.class_weights("median-frequency", dataset)
    assert weights[2] > 0 and weights[1] == 0


def test_progress_is_shown_while_files_are_read(folder):
    seen = []

    def progress(items, total, what):
        for item in items:
            seen.append((total, what))
            yield item

    data.FolderDataset(folder, "train").check(progress)
    assert seen == [(6, "checking train")] * 6


def test_an_interrupted_check_stops_and_keeps_what_it_found(folder, read_masks, monkeypatch):
    """Masks are not decoded before the interrupt is handled."""
    handled, decode = threading.Event(), data_check.MaskFormat.decode

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            handled.set()
            super().shutdown(wait=wait)

    def waiting(form, image, path):
        assert handled.wait(60)
        return decode(form, image, path)

    def interrupted(items, total, what):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(data_check, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(data_check.MaskFormat, "decode", waiting)
    write_folder(folder / "many", [np.zeros((1, 1), int)] * 50)
    with pytest.raises(KeyboardInterrupt):
        data.FolderDataset(folder / "many", "train").check(interrupted)
    assert len(read_masks) <= data_check.CHECKERS
    data.FolderDataset(folder / "many", "train").check()
    assert sorted(read_masks) == sorted(f"f{n}.png" for n in range(50))
