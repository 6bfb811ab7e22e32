import dataclasses
from pathlib import Path

import numpy as np
import pytest
from support.train_common import run, start

from fastseg.training import checkpoint, data
from fastseg.training.config import TrainConfig
from fastseg.training.runs import resume_run

pytest.importorskip("sklearn")


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    monkeypatch.setattr(data.DigitScenes, "__len__", lambda scenes: 5)


INVALID = {
    "device": ({"device": "tpu9"}, "device must be cpu, cuda or cuda:N, but is 'tpu9'"),
    "meta": ({"device": "meta"}, "device must be cpu, cuda or cuda:N, but is 'meta'"),
    "no such gpu": ({"device": "cuda:77"}, "device cuda:77 does not exist"),
    "amp": ({"amp": True}, "amp needs a CUDA device, but device is cpu"),
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
    with pytest.raises(ValueError, match="the images differ in size: set size to resize all of them"):
        run(**options | {"size": None}, out=str(tmp_path / "other"))


@pytest.mark.parametrize(
    "split, message",
    [("train", "look for images in which every pixel is ignored"), ("val", "no pixel of the validation masks")],
)
def test_masks_without_a_class_raise(split, message, tmp_path):
    root = Path(write_images(tmp_path / "set", [(20, 30)]))
    (root / f"{split}annot").rename(root / "old")
    write_images(root / "ignored", [(20, 30)], label=255)
    (root / "ignored" / f"{split}annot").rename(root / f"{split}annot")
    with pytest.raises(ValueError, match=message):
        run(data=str(root), steps=2, num_classes=4, ignore_index=255, out=str(tmp_path / "run"))
