import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from support.train_common import run, start

from fastseg.training import checkpoint, data
from fastseg.training.config import LATER_FIELDS, TrainConfig
from fastseg.training.runs import resume_run

pytest.importorskip("sklearn")


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    monkeypatch.setattr(data.DigitScenes, "__len__", lambda scenes: 5)


INVALID = {
    "device": ({"device": "tpu9"}, "device must be cpu, cuda or cuda:N, but is 'tpu9'"),
    "meta": ({"device": "meta"}, "device must be cpu, cuda or cuda:N, but is 'meta'"),
    "no such gpu": ({"device": "cuda:77"}, "device cuda:77 does not exist"),
    "amp": ({"amp": "fp8"}, "amp must be one of bf16, none, but is 'fp8'"),
    "steps": ({"steps": 0}, "steps must be from 1 to"),
    "infinite lr": ({"lr": float("inf")}, "lr must be from 0 to 1000000.0, but is inf"),
    "lr not a number": ({"lr": float("nan")}, "lr must be from 0 to 1000000.0, but is nan"),
    "no lr": ({"lr": 0.0}, "lr must be above 0"),
    "infinite momentum": ({"momentum": float("inf")}, "momentum must be from 0 to 1"),
    "infinite decay": ({"weight_decay": float("inf")}, "weight_decay must be from 0 to"),
    "negative seed": ({"seed": -5}, "seed must be from 0 to 9223372036854775807, but is -5"),
    "large seed": ({"seed": 10**23}, "seed must be from 0 to"),
    "width": ({"width": 1e30}, r"width must be from 0 to 16, but is 1e\+30"),
    "no width": ({"width": 0.0}, "width must be above 0"),
    "side": ({"size": (0, 10**23)}, "size must be from 1x1 to"),
    "type": ({"batch_size": "2"}, "batch_size must be of type int, but is '2'"),
    "size's type": ({"size": (32,)}, r"size must be of type tuple\[int, int\] | None"),
    "optimizer": ({"optimizer": "adam"}, "optimizer must be one of sgd, adamw, but is 'adam'"),
    "schedule": ({"schedule": "step"}, "schedule must be one of constant"),
    "ignored label": ({"ignore_index": 3}, "digit scenes have no ignored pixels; set data to change ignore_index"),
    "infinite weight": ({"class_weights": "inf,1,1,1,1,1,1,1,1,1,1"}, "class_weights must be 11 finite numbers"),
    "small for deconvnet": (
        {"model": "deconvnet", "width": 0.01},
        "DeconvNet needs images of at least 193x193, but gets 32x32; set a larger size",
    ),
    "classes": ({"num_classes": 3}, "digit scenes have 11 classes"),
    "crop": ({"crop": (8, 8)}, "digit scenes have 11 classes and no crops"),
    "model": ({"model": "u-net"}, "model must be one of segnet, .* but is 'u-net'"),
    "data": ({"data": "nowhere"}, "nowhere must be a folder"),
}


@pytest.mark.parametrize("options, message", INVALID.values(), ids=INVALID)
def test_an_invalid_configuration_raises_and_creates_nothing(options, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        start(out=str(tmp_path / "run"), **options)
    assert not list(tmp_path.iterdir())


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().steps = 5


@pytest.mark.parametrize("resumed", [False, True])
def test_an_output_folder_that_cannot_be_written_to_raises(resumed, tmp_path):
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "run")
    path = run(1, steps=2, out=str(tmp_path / "run")).path if resumed else None
    with pytest.raises(ValueError, match=r"out must be a writable folder, but .*run is not: Not a directory"):
        resume_run(path, {"out": out}) if resumed else start(out=out)


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    first = run(1, steps=2, out=str(tmp_path / "first"))
    second = run(1, steps=2, out=str(tmp_path / "second"))
    with pytest.raises(ValueError, match=r"first already contains a run: choose another out, or resume from"):
        start(out=str(tmp_path / "first"))
    with pytest.raises(ValueError, match="first already contains a run"):
        resume_run(second.path, {"out": str(tmp_path / "first")})
    assert resume_run(first.path, {"out": str(tmp_path / "third")}).path == tmp_path / "third" / "checkpoint.pt"


def write_images(root, sizes, label=2):
    """Write a folder in CamVid's layout with a constant image and mask of each size."""
    Image = pytest.importorskip("PIL.Image")
    for split in ("train", "val"):
        for folder in (split, f"{split}annot"):
            (root / folder).mkdir(parents=True)
        for number, size in enumerate(sizes):
            Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(root / split / f"{number}.png")
            Image.fromarray(np.full(size, label, np.uint8)).save(root / f"{split}annot" / f"{number}.png")
    return str(root)


def test_training_on_a_folder(tmp_path):
    options = {"data": write_images(tmp_path / "set", [(20, 30), (24, 18)]), "steps": 2, "num_classes": 4}
    made = run(**options, ignore_index=255, out=str(tmp_path / "run"), crop=(16, 16))
    state = checkpoint.load_checkpoint(made.path)
    assert state["classes"] == ("class 0", "class 1", "class 2", "class 3") and state["mean"] == data.IMAGENET_MEAN
    with pytest.raises(ValueError, match=r"0.png is 20x30 and 1.png 24x18 \(2 sizes in all\): set size"):
        run(**options | {"size": None}, out=str(tmp_path / "other"))


@pytest.mark.parametrize(
    "split, message",
    [("train", "no pixel of the training masks"), ("val", "no pixel of the validation masks")],
)
def test_masks_without_a_class_raise(split, message, tmp_path):
    root = Path(write_images(tmp_path / "set", [(20, 30)]))
    (root / f"{split}annot").rename(root / "old")
    write_images(root / "ignored", [(20, 30)], label=255)
    (root / "ignored" / f"{split}annot").rename(root / f"{split}annot")
    with pytest.raises(ValueError, match=message):
        run(data=str(root), steps=2, num_classes=4, ignore_index=255, out=str(tmp_path / "run"))


def test_validation_pictures_may_differ_in_size(tmp_path):
    root = Path(write_images(tmp_path / "set", [(20, 30), (20, 30)]))
    (root / "val").rename(root / "old")
    (root / "valannot").rename(root / "oldannot")
    write_images(tmp_path / "other", [(20, 30), (24, 18), (20, 30)])
    for name in ("val", "valannot"):
        (tmp_path / "other" / name).rename(root / name)
    options = {"data": str(root), "steps": 1, "num_classes": 4, "size": None}
    made = run(**options, out=str(tmp_path / "run"))
    one_by_one = run(**options, batch_size=1, out=str(tmp_path / "single"))
    one_by_one.model.load_state_dict(made.model.state_dict())
    assert made.evaluate() == one_by_one.evaluate()
    assert checkpoint.load_checkpoint(made.path)["step"] == 1


def test_training_pictures_may_differ_in_size_if_each_is_a_batch(tmp_path):
    root = write_images(tmp_path / "set", [(20, 30), (24, 18)])
    made = run(data=root, steps=2, num_classes=4, size=None, batch_size=1, out=str(tmp_path / "run"))
    assert made.step == 2


def test_what_is_wrong_with_the_data_is_said_before_the_first_step(tmp_path):
    root = Path(write_images(tmp_path / "set", [(20, 30)] * 3))
    made = start(data=str(root), steps=2, num_classes=4, out=str(tmp_path / "run"))
    assert made.notes[0] == "train: 3 pictures in train/, with masks in trainannot/ called STEM.png (layout camvid)"
    assert (
        made.notes[1] == "train: no mask has a pixel of 3 classes, which cannot be learned: class 0, class 1, class 3"
    )
    assert made.notes[2].startswith("val: 3 pictures in val/") and len(made.notes) == 3
    frame = root / "train" / "2.png"
    frame.write_bytes(frame.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"2.png must be a PNG or JPEG image, but cannot be read"):
        start(data=str(root), steps=2, num_classes=4, out=str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_a_file_that_breaks_later_leaves_a_checkpoint(tmp_path):
    root = Path(write_images(tmp_path / "set", [(20, 30)] * 4))
    made = start(data=str(root), steps=40, num_classes=4, workers=1, out=str(tmp_path / "run"))
    sample = made.train_set.sample

    def breaks(index, epoch):
        if made.step >= 3:
            (root / "train" / "1.png").write_bytes(b"")
        return sample(index, epoch)

    made.train_set.sample = breaks
    with pytest.raises(ValueError, match=r"1.png must be a PNG or JPEG image"):
        made.run()
    assert made.rescued
    state = checkpoint.load_checkpoint(made.path)
    assert state["step"] == made.step >= 3
    write_images(tmp_path / "again", [(20, 30)] * 4)
    resumed = resume_run(made.path, {"data": str(tmp_path / "again"), "steps": 40})
    assert resumed.step == made.step and len(resumed.train_set) == 4


@pytest.mark.parametrize("model, size, raises", [("segnet-basic", (16, 16), False), ("deconvnet", (224, 224), True)])
def test_maps_of_one_value_per_channel_are_refused_up_front(model, size, raises, tmp_path):
    options = {"model": model, "size": size, "width": 0.01, "batch_size": 1, "out": str(tmp_path / "run")}
    if not raises:
        assert start(**options).step == 0
        return
    with pytest.raises(ValueError, match="batch_size must be at least 2 for 224x224 pictures, because DeconvNet makes"):
        start(**options)
    assert start(**options | {"batch_size": 2}).step == 0


def test_a_palette_gives_the_classes_and_is_kept_in_the_checkpoint(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    root = Path(write_images(tmp_path / "set", [(16, 16)] * 2))
    for mask in root.glob("*annot/*.png"):
        drawn = np.zeros((16, 16, 3), np.uint8)
        drawn[:8] = 64, 0, 128
        Image.fromarray(drawn).save(mask)
    (tmp_path / "colours.txt").write_text("64 0 128 Car\n0 0 192 Road\n0 0 0 Void\n")
    made = run(data=str(root), palette=str(tmp_path / "colours.txt"), steps=2, out=str(tmp_path / "run"))
    state = checkpoint.load_checkpoint(made.path)
    assert state["classes"] == ("Car", "Road") and state["ignore_index"] == 255
    assert state["colours"] == ((64, 0, 128, 0), (0, 0, 192, 1), (0, 0, 0, -1))
    assert state["config"]["layout"] == "camvid" and state["config"]["num_classes"] == 2
    assert resume_run(made.path, {"steps": 3}).train_set.masks.table == made.train_set.masks.table
    (tmp_path / "colours.txt").write_text("0 0 192 Road\n64 0 128 Car\n0 0 0 Void\n")
    with pytest.raises(ValueError, match=r"classes must be \('Car', 'Road'\), because .* was trained with that"):
        resume_run(made.path, {"steps": 3})


def test_more_steps_change_the_learning_rate_only_with_a_word(tmp_path):
    path = run(4, steps=10, schedule="one-cycle", out=str(tmp_path)).path
    same = resume_run(path, {})
    assert same.notes == []
    stretched = resume_run(path, {"steps": 100})
    (note,) = stretched.notes
    assert note.startswith("the learning rate was 9.62e-04 in step 4 and goes on with 2.32e-04: the schedule one-cycle")
    assert "over 100 steps is stretched from the first step, where it was planned for 10" in note
    again = resume_run(path, {"steps": 100, "schedule_start": 4})
    (note,) = again.notes
    assert "goes on with 4.00e-05" in note and "begins again at step 4" in note
    constant = run(4, steps=10, schedule="constant", out=str(tmp_path / "constant"))
    assert resume_run(constant.path, {"steps": 20}).notes == []


def test_a_checkpoint_of_an_earlier_version_goes_on(tmp_path):
    path = run(1, steps=3, out=str(tmp_path)).path
    state = torch.load(path)
    for name in LATER_FIELDS:
        del state["config"][name]
    state["config"] |= {"amp": False, "ignore_index": 11}
    for name in ("ema", "colours"):
        del state[name]
    torch.save(state, path)
    resumed = resume_run(path, {})
    resumed.run()
    assert resumed.step == 3 and resumed.config.amp == "none"
