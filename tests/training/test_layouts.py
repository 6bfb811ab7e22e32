"""Which mask belongs to which picture, in the folders of known data sets."""

import numpy as np
import pytest

from fastseg.training import class_names, data, layouts

Image = pytest.importorskip("PIL.Image")


def put(root, *names, mode="L", value=1):
    """Write pictures of 4x6 pixels."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, (6, 4), value if mode == "L" else (9, 9, 9)).save(root / name)


def paired(root, split="train", layout="auto"):
    """The names of pictures and masks, from `root`, and the rule."""
    found = layouts.find_layout(root, layout).pairs(root, split)
    return [tuple(path.relative_to(root).as_posix() for path in pair) for pair in found.files], found


NAMES = {  # pictures and masks of the split "train", and what the rule says
    "same": (["train/a.png"], ["trainannot/a.png"], "1 pictures in train/, with masks in trainannot/ called STEM.png"),
    "upper case": (["train/a.JPG"], ["trainannot/a.PNG"], "STEM.PNG"),
    "camvid's own": (["train/a.png"], ["train_labels/a_L.png"], "STEM_L.png"),
    "mask": (["train/a.jpg"], ["train_masks/a_mask.gif"], "STEM_mask.gif"),
    "whole name": (["train/a.jpg"], ["trainannot/a.jpg.png"], "NAME.png"),
    "images and labels": (["images/train/a.jpg"], ["labels/train/a.png"], "1 pictures in images/train/"),
    "inside the split": (["train/images/a.jpg"], ["train/masks/a.png"], "masks in train/masks/"),
    "beside the masks": (["train/a.jpg"], ["train/masks/a.png"], "1 pictures in train/"),
    "mmsegmentation": (["img_dir/train/a.jpg"], ["ann_dir/train/a.png"], "masks in ann_dir/train/"),
    "subfolders": (["train/x/a.jpg", "train/y/a.jpg"], ["trainannot/x/a.png", "trainannot/y/a.png"], "2 pictures"),
    "two endings": (["train/a.png", "train/b.png"], ["trainannot/a.png", "trainannot/b_L.png"], "STEM.png (1), STEM_L"),
}


@pytest.mark.parametrize("pictures, masks, rule", NAMES.values(), ids=NAMES)
def test_masks_are_found_by_name(pictures, masks, rule, tmp_path):
    put(tmp_path, *pictures, mode="RGB")
    put(tmp_path, *masks)
    files, found = paired(tmp_path)
    assert files == list(zip(pictures, masks, strict=True)) and rule in found.rule and not found.notes
    image, mask = data.FolderDataset(tmp_path, "train")[0]
    assert image.shape == (3, 4, 6) and mask.unique().tolist() == [1]


def test_hidden_files_are_no_data_and_masks_without_a_picture_are_said(tmp_path):
    put(tmp_path, "train/a.png", "train/._a.png", "train/.cache/b.png", "train/__MACOSX/c.png", mode="RGB")
    put(tmp_path, "trainannot/a.png", "trainannot/._a.png", "trainannot/old.png")
    files, found = paired(tmp_path)
    assert files == [("train/a.png", "trainannot/a.png")]
    assert found.notes == ("1 masks in trainannot/ have no picture: old.png",)


@pytest.mark.parametrize(
    "more, message",
    [
        (["trainannot/a_L.png"], "a.png must have one mask, but has .*a.png and .*a_L.png"),
        (["trainannot/a.gif"], "a.png must have one mask"),
        (["train_masks/a.png"], "must have one folder with masks for 'train', but has .*trainannot and .*train_masks"),
    ],
)
def test_two_masks_for_one_picture_raise(more, message, tmp_path):
    put(tmp_path, "train/a.png", mode="RGB")
    put(tmp_path, "trainannot/a.png", *more)
    with pytest.raises(ValueError, match=message):
        paired(tmp_path)


@pytest.mark.parametrize("base, folder", [("", "Segmentation/"), ("VOCdevkit/VOC2012/", "Segmentation/"), ("", "")])
def test_voc(base, folder, tmp_path):
    put(tmp_path, *(f"{base}JPEGImages/{name}.jpg" for name in "abc"), mode="RGB")
    put(tmp_path, *(f"{base}SegmentationClass/{name}.png" for name in "ac"), value=255)
    lists = tmp_path / f"{base}ImageSets/{folder}"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("c  1\na -1\n\n")
    files, found = paired(tmp_path)
    assert files == [(f"{base}JPEGImages/{n}.jpg", f"{base}SegmentationClass/{n}.png") for n in "ca"]
    assert f"2 pictures that {base}ImageSets/{folder}train.txt lists" in found.rule
    dataset = data.FolderDataset(tmp_path, "train")
    assert dataset.classes == class_names.VOC_CLASSES and len(dataset.classes) == 21
    assert dataset.ignore_index == 255 and (dataset[0][1] == 255).all()
    (lists / "val.txt").write_text("b\n")
    with pytest.raises(FileNotFoundError, match=r"val.txt lists b, but .*SegmentationClass has no picture"):
        paired(tmp_path, "val")
    with pytest.raises(FileNotFoundError, match=r"Segmentation/test.txt or .*test.txt must exist"):
        paired(tmp_path, "test")


def test_cityscapes(tmp_path):
    put(tmp_path, "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png", mode="RGB")
    mask = tmp_path / "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png"
    put(tmp_path, mask.relative_to(tmp_path), mask.relative_to(tmp_path).with_name("aachen_gtFine_color.png"))
    Image.fromarray(np.array([[0, 7, 8, 33, 29, 255], *[[11] * 6] * 3], np.uint8)).save(mask)
    files, found = paired(tmp_path)
    assert len(files) == 1 and "1 pictures of 1 cities" in found.rule
    dataset = data.FolderDataset(tmp_path, "train")
    assert dataset[0][1][0].tolist() == [255, 0, 1, 18, 255, 255] and dataset[0][1][1, 0] == 2
    assert len(dataset.classes) == 19 and dataset.classes[18] == "bicycle"
    with pytest.raises(ValueError, match="num_classes must be 19, the classes of the layout cityscapes, but is 34"):
        data.FolderDataset(tmp_path, "train", data.LabelOptions(num_classes=34))
    mask.unlink()
    with pytest.raises(FileNotFoundError, match=r"leftImg8bit.png has no mask: .*aachen.*labelIds.png must exist"):
        paired(tmp_path)


@pytest.mark.parametrize("base", ["", "ADEChallengeData2016/"])
def test_number_0_of_ade20k_is_unlabelled(base, tmp_path):
    for split in ("training", "validation"):
        put(tmp_path, f"{base}images/{split}/a.jpg", mode="RGB")
        put(tmp_path, f"{base}annotations/{split}/a.png")
    Image.fromarray(np.array([[0, 1, 150]], np.uint8).repeat(4, 0).repeat(2, 1)).save(
        tmp_path / f"{base}annotations/validation/a.png"
    )
    dataset = data.FolderDataset(tmp_path, "val")
    assert dataset.layout.name == "ade20k" and dataset[0][1][0].tolist() == [255, 255, 0, 0, 149, 149]
    with pytest.raises(ValueError, match=r"a.png has the label 150: numbers must be from 0 to 9 in this layout"):
        data.FolderDataset(tmp_path, "val", data.LabelOptions(num_classes=9))[0]


def test_a_layout_can_be_named(tmp_path):
    put(tmp_path, "train/a.png", mode="RGB")
    put(tmp_path, "trainannot/a.png")
    assert paired(tmp_path, layout="camvid")[0]
    for name, message in (("voc", "JPEGImages"), ("cityscapes", "gtFine"), ("ade20k", "annotations")):
        with pytest.raises(FileNotFoundError, match=message):
            paired(tmp_path, layout=name)
    with pytest.raises(ValueError, match="layout must be one of auto, cityscapes, ade20k, voc, camvid, but is 'coco'"):
        paired(tmp_path, layout="coco")
