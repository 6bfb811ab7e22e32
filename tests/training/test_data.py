import contextlib
import importlib.util
import sys
import warnings

import numpy as np
import pytest
import torch
from support.folders import write_folder

from fastseg.training import class_names, data, pictures

needs_digits = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn")

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    return write_folder(tmp_path / "set", rng.integers(0, 12, (6, 10, 14)))


@needs_digits
@pytest.mark.parametrize("size", [64, (40, 52)])
def test_a_scene_depends_only_on_seed_split_and_index(size):
    scenes = data.DigitScenes("train", size=size, seed=3, length=5)
    image, mask = scenes[2]
    height, width = (size, size) if isinstance(size, int) else size
    assert image.shape == (3, height, width) and image.dtype == torch.float32
    assert mask.shape == (height, width) and mask.dtype == torch.int64
    assert image.min() >= 0 and image.max() <= 1 and len(scenes) == 5
    again = data.DigitScenes("train", size=size, seed=3).sample(2, epoch=7)
    assert torch.equal(image, again[0]) and torch.equal(mask, again[1]) and torch.equal(mask, scenes.mask(2))
    others = (scenes[1], data.DigitScenes("train", size, seed=4)[2], data.DigitScenes("val", size, seed=3)[2])
    for other, _ in others:
        assert (image != other).float().mean() > 0.9  # the background differs too


@needs_digits
def test_no_digit_is_in_both_splits():
    (train, train_labels), (val, val_labels) = data._digits("train"), data._digits("val")
    assert len(train) + len(val) == len(train_labels) + len(val_labels) == 1797 and len(val) == 359
    assert not {digit.tobytes() for digit in train} & {digit.tobytes() for digit in val}
    assert set(train_labels) == set(val_labels) == set(range(10))


def test_the_mask_is_where_the_digits_are(monkeypatch):
    """With a square in place of a digit, on a black background: a pixel is labelled if the digit covers most of it."""
    digit = np.pad(np.ones((1, 4, 4), np.float32), ((0, 0), (2, 2), (2, 2)))
    monkeypatch.setattr(data, "_digits", lambda split: (digit, np.array([7])))
    monkeypatch.setattr(data, "_background", lambda rng, height, width: np.zeros((height, width, 3), np.float32))
    scenes = data.DigitScenes("train", length=20)
    for image, mask in scenes:
        assert set(mask.unique().tolist()) == {7, data.BACKGROUND}
        ink, noise = image.mean(0), 0.1  # colours are 0.5 to 1
        assert ink[mask == 7].min() > 0.5 * 0.5 - noise and ink[mask == data.BACKGROUND].max() < 0.5 * 1 + noise
        assert (mask == 7).sum() >= 8 * 8


@needs_digits
def test_invalid_scenes_raise(monkeypatch):
    with pytest.raises(ValueError, match="split must be one of train, val"):
        data.DigitScenes("test")
    with pytest.raises(ValueError, match="size must be at least 16 pixels"):
        data.DigitScenes("train", size=(64, 8))
    with pytest.raises(IndexError, match="index must be from -3 to 2, but is 3"):
        data.DigitScenes("train", length=3)[3]
    data._digits.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "fastseg-kernels\[demo\]"'):
        data.DigitScenes("train")


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_folder_is_read(tmp_path, suffix):
    mask = np.kron(np.arange(12).reshape(3, 4), np.ones((8, 8), int))
    dataset = data.FolderDataset(write_folder(tmp_path, [mask], suffix), "train")
    image, labels = dataset[0]
    assert len(dataset) == 1 and dataset.classes == class_names.CAMVID_CLASSES
    assert labels.dtype == torch.int64 and np.array_equal(labels.numpy(), mask) and torch.equal(dataset.mask(0), labels)
    assert image.shape == (3, 24, 32)
    torch.testing.assert_close(image, (labels * 20 / 255.0).expand(3, -1, -1), rtol=0, atol=0.02)


def test_frames_are_resized_bilinearly_and_masks_to_the_nearest_pixel(tmp_path):
    mask = np.zeros((8, 8), int)
    mask[:, 4:] = 10
    image, labels = data.FolderDataset(write_folder(tmp_path, [mask]), "train", size=(8, 20))[0]
    assert image.shape == (3, 8, 20) and labels.shape == (8, 20)
    assert set(labels.unique().tolist()) == {0, 10} and len(image.unique()) > 2


def test_palette_masks_are_read_as_indices(tmp_path):
    root = write_folder(tmp_path, [np.arange(12).reshape(3, 4)])
    mask = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    mask.putpalette(list(range(255, 255 - 36, -1)))
    mask.save(root / "trainannot" / "f0.png")
    assert Image.open(root / "trainannot" / "f0.png").mode == "P"
    assert data.FolderDataset(root, "train")[0][1].tolist() == np.arange(12).reshape(3, 4).tolist()


def test_augmentation_depends_only_on_seed_epoch_and_index(folder):
    dataset = data.FolderDataset(folder, "train", augment=True, crop=(6, 7), seed=1)
    shown = {}
    for epoch in range(8):
        for index in range(len(dataset)):
            image, mask = dataset.sample(index, epoch)
            assert image.shape == (3, 6, 7) and torch.equal(dataset.sample(index, epoch)[0], image)
            torch.testing.assert_close(image[0], mask * 20 / 255.0)  # frame and mask have the same flip and crop
            shown.setdefault(index, set()).add(mask.numpy().tobytes())
    assert all(len(masks) > 4 for masks in shown.values())
    other = data.FolderDataset(folder, "train", augment=True, crop=(6, 7), seed=2)
    assert any(not torch.equal(other.sample(index)[1], dataset.sample(index)[1]) for index in range(6))


def test_half_of_the_samples_are_flipped_horizontally(folder):
    plain, flipping = data.FolderDataset(folder, "train"), data.FolderDataset(folder, "train", augment=True)
    flipped = 0
    for epoch in range(20):
        for index in range(6):
            mask, same = flipping.sample(index, epoch)[1], plain[index][1]
            assert torch.equal(mask, same) or torch.equal(mask, same.flip(1))
            flipped += torch.equal(mask, same.flip(1))
    assert 40 < flipped < 80


def truncate(path):
    path.write_bytes(path.read_bytes()[:-30])


def save(path, array, **options):
    Image.fromarray(np.asarray(array, np.uint8)).save(path, **options)


BAD = {
    "no root": (lambda root: root.rename(root.with_name("gone")), FileNotFoundError, r"set must be a folder"),
    "no split": (lambda root: (root / "train").rename(root / "x"), FileNotFoundError, r"pictures of 'train', one of"),
    "no masks": (lambda root: (root / "trainannot").rename(root / "x"), FileNotFoundError, r"with the masks of train/"),
    "no frames": (
        lambda root: [f.unlink() for f in (root / "train").iterdir()],
        FileNotFoundError,
        r"pictures of 'train', one of .* with .png, .jpg",
    ),
    "no mask": (lambda root: (root / "trainannot/f3.png").unlink(), FileNotFoundError, r"f3.png has no mask: .*must"),
    "truncated frame": (
        lambda root: truncate(root / "train/f0.png"),
        ValueError,
        r"f0.png must be a PNG or JPEG image",
    ),
    "truncated mask": (
        lambda root: truncate(root / "trainannot/f0.png"),
        ValueError,
        r"f0.png must be a PNG or JPEG image",
    ),
    "text": (lambda root: (root / "train/f0.png").write_text("no image"), ValueError, r"f0.png must be a PNG"),
    "empty": (lambda root: (root / "train/f0.png").write_bytes(b""), ValueError, r"f0.png must be a PNG or JPEG image"),
    "size": (lambda root: save(root / "trainannot/f0.png", np.zeros((9, 14))), ValueError, r"14x10, but is 14x9"),
    "colour mask": (
        lambda root: save(root / "trainannot/f0.png", np.arange(420).reshape(10, 14, 3) % 9),
        ValueError,
        r"trainannot/f0.png must have a class number in each pixel, but is in colour: .*--palette FILE",
    ),
    "16-bit frame": (
        lambda root: Image.fromarray(np.zeros((10, 14), np.uint16)).save(root / "train/f0.png"),
        ValueError,
        r"train/f0.png must have 8 bits per channel",
    ),
    "label": (
        lambda root: save(root / "trainannot/f0.png", np.full((10, 14), 12)),
        ValueError,
        r"trainannot/f0.png has the label 12: labels must be 0 to 10, or 11",
    ),
}


@pytest.mark.parametrize("spoil, error, message", BAD.values(), ids=BAD)
def test_an_invalid_folder_raises(folder, spoil, error, message):
    assert len(data.FolderDataset(folder, "train")[0]) == 2
    spoil(folder)
    with pytest.raises(error, match=message):
        data.FolderDataset(folder, "train")[0]


def test_the_last_class_is_the_one_before_num_classes(tmp_path):
    root = write_folder(tmp_path, [[[10, 255]]])
    assert data.FolderDataset(root, "train", data.LabelOptions(num_classes=11, ignore_index=255))[0][1].tolist() == [
        [10, 255]
    ]
    with pytest.raises(ValueError, match="has the label 10: labels must be 0 to 9, or 255"):
        data.FolderDataset(root, "train", data.LabelOptions(num_classes=10, ignore_index=255))[0]


def test_a_picture_smaller_than_the_crop_is_filled_up(folder):
    dataset = data.FolderDataset(folder, "train", crop=(12, 9))
    image, mask = dataset.sample(2)
    assert image.shape == (3, 12, 9) and mask.shape == (12, 9)
    assert (mask[10:] == dataset.ignore_index).all() and (mask[:10] != dataset.ignore_index).any()
    normalised = data.normalise(image, dataset.mean, dataset.std)
    assert normalised[:, 10:].abs().max() < 1e-6  # the mean
    torch.testing.assert_close(image[0, :10], mask[:10] * 20 / 255.0)


def test_a_data_loader_draws_another_crop_in_every_epoch(folder):
    dataset = data.FolderDataset(folder, "train", augment=True, crop=(6, 7))
    for workers in (0, 1):
        loader = torch.utils.data.DataLoader(dataset, batch_size=6, num_workers=workers)
        epochs = [next(iter(loader))[1] for _ in range(3)]
        assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])
    torch.manual_seed(3)
    first = dataset[0][1]
    torch.manual_seed(3)
    assert torch.equal(dataset[0][1], first)  # torch's seed decides


@needs_digits
def test_negative_indices_count_from_the_end(folder):
    for dataset in (data.FolderDataset(folder, "train"), data.DigitScenes("val", length=6)):
        assert torch.equal(dataset[-1][1], dataset[5][1]) and torch.equal(dataset[-6][0], dataset[0][0])
        assert len(list(dataset)) == 6
        for index in (6, -7):
            with pytest.raises(IndexError, match=f"index must be from -6 to 5, but is {index}"):
                dataset[index]


def test_masks_are_resized_as_pillow_does():
    labels = np.random.default_rng(0).integers(0, 256, (37, 53)).astype(np.uint8)
    for size in ((37, 53), (20, 60), (100, 7), (1, 1)):
        want = Image.fromarray(labels).resize(size[::-1], Image.Resampling.NEAREST)
        assert np.array_equal(pictures.resize_labels(labels, size), np.asarray(want))


def test_without_pillow_the_error_says_how_to_install_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r'pip install "fastseg-kernels\[demo\]"'):
        data.FolderDataset(folder, "train")[0]


def test_photographs_are_rotated_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    Image.fromarray(np.zeros((4, 9, 3), np.uint8)).save(tmp_path / "photo.jpg", exif=exif)
    assert pictures.read_image(tmp_path / "photo.jpg").size == (4, 9)


@contextlib.contextmanager
def _every_warning():
    """Let torch give a warning each time. By default it gives each only once per process."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        yield
    finally:
        torch.set_warn_always(before)


def test_an_image_of_one_pixel_is_copied():
    with warnings.catch_warnings(), _every_warning():
        warnings.simplefilter("error")
        assert pictures.to_tensor(Image.new("RGB", (1, 1), (255, 0, 51))).flatten().tolist() == pytest.approx(
            [1, 0, 0.2]
        )


def test_channels_are_normalised():
    image = torch.rand(2, 3, 4, 5)
    result = data.normalise(image, (0.1, 0.2, 0.3), (1.0, 2.0, 4.0))
    for channel, (mean, std) in enumerate(((0.1, 1), (0.2, 2), (0.3, 4))):
        torch.testing.assert_close(result[:, channel], (image[:, channel] - mean) / std)
