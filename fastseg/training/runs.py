"""Starting a training run in a new folder, and resuming one from its checkpoint."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from .checkpoint import load_checkpoint
from .class_names import DIGIT_CLASSES
from .config import RESUME_MAY_CHANGE, TrainConfig
from .data import SPLITS, DigitScenes, FolderDataset, LabelOptions, SegmentationDataset
from .data_check import Progress, no_progress
from .layouts import listed
from .networks import build_model, check_image_size
from .optimizers import learning_rate
from .trainer import Trainer


def start_run(config: TrainConfig, progress: Progress = no_progress) -> Trainer:
    """Prepare a new run.

    Args:
        config: the configuration; the folder `config.out` is created.
        progress: shows how far the check of the data is.

    Returns:
        Trainer: at step 0.

    Raises:
        ValueError: the folder already contains a run, cannot be written to, or `config` does not fit the data, the
            network or the device. Nothing is created in that case.
        FileNotFoundError: a folder or a mask of the data is missing.
    """
    out = Path(config.out)
    _check_unused(out)
    trainer = _make_trainer(config, progress)
    make_folder(out)
    trainer.log.clear()
    return trainer


def resume_run(path: Path, overrides: dict[str, Any], progress: Progress = no_progress) -> Trainer:
    """Prepare to continue the run that wrote a checkpoint, in the same folder unless `overrides` has another.

    Args:
        path: the checkpoint.
        overrides: fields of :class:`~fastseg.training.config.TrainConfig` to change. A field that is not in
            RESUME_MAY_CHANGE must have the value in the checkpoint.
        progress: shows how far the check of the data is.

    Returns:
        Trainer: at the step of the checkpoint.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: the checkpoint is invalid, or cannot be continued with these values.
    """
    state = load_checkpoint(path)
    for name, value in overrides.items():
        if name not in RESUME_MAY_CHANGE and value != state["config"][name]:
            raise ValueError(
                f"{name} must be {state['config'][name]}, because {path} was trained with that, but is {value}"
            )
    config = TrainConfig(**{**state["config"], "out": str(path.parent), **overrides})
    if Path(config.out) != path.parent:
        _check_unused(Path(config.out))
    if state["step"] > config.steps:
        raise ValueError(f"steps must be at least {state['step']}, the step of {path}, but is {config.steps}")
    trainer = _make_trainer(config, progress)
    make_folder(Path(config.out))
    trainer.restore(state, path)
    trainer.notes += schedule_notes(TrainConfig(**state["config"]), trainer)
    return trainer


def schedule_notes(before: TrainConfig, trainer: Trainer) -> list[str]:
    """Return a sentence if the learning rate jumps at the step from which a run goes on, because its steps changed.

    Args:
        before: the configuration in its checkpoint.
        trainer: the run that goes on.
    """
    now, step = trainer.config, trainer.step
    if (before.steps, before.schedule_start) == (now.steps, now.schedule_start) or step == 0 or step == now.steps:
        return []
    old, new = learning_rate(before, step - 1), learning_rate(now, step)
    if now.schedule == "constant":
        return []
    how = f"begins again at step {now.schedule_start}" if now.schedule_start else "is stretched from the first step"
    return [
        f"the learning rate was {old:.2e} in step {step} and goes on with {new:.2e}: the schedule {now.schedule} over "
        f"{now.steps} steps {how}, where it was planned for {before.steps}"
    ]


def load_datasets(config: TrainConfig) -> tuple[SegmentationDataset, SegmentationDataset]:
    """Return the training data and the validation data.

    Args:
        config: the configuration.

    Raises:
        ValueError: `config` has values that digit scenes do not support.
        FileNotFoundError: a folder or a mask of `config.data` is missing.
    """
    if config.data is None:
        if config.num_classes not in (None, len(DIGIT_CLASSES)) or config.crop or config.palette:
            raise ValueError(
                f"digit scenes have {len(DIGIT_CLASSES)} classes and no crops or palette; set data to change "
                "num_classes, crop or palette"
            )
        if config.ignore_index is not None:
            raise ValueError("digit scenes have no ignored pixels; set data to change ignore_index")
        train_set, val_set = (DigitScenes(split, config.size or 64, config.seed) for split in SPLITS)
        return train_set, val_set
    labels = LabelOptions(config.layout, config.palette, config.num_classes, config.ignore_index, config.exif)
    train_set = FolderDataset(config.data, "train", labels, config.size, True, config.crop, config.seed)
    return train_set, FolderDataset(config.data, "val", labels, config.size)


def check_data(config: TrainConfig, dataset: FolderDataset, progress: Progress = no_progress) -> list[str]:
    """Read all files of a split once, and say what a user should know about them.

    Args:
        config: the configuration.
        dataset: the training data or the validation data.
        progress: shows how far it is.

    Raises:
        ValueError: a file is broken, no pixel has a class, or the pictures cannot be put into batches.
    """
    facts = dataset.check(progress)
    counted = facts.counts(len(dataset.classes)).sum(0)
    words = {"train": "training", "val": "validation"}
    if not counted.any():
        raise ValueError(
            f"no pixel of the {words.get(dataset.split, dataset.split)} masks has a class: all are "
            f"{dataset.ignore_index}"
        )
    if dataset.split == "train" and config.batch_size * config.accumulate > 1 and not (config.size or config.crop):
        sizes: dict[tuple[int, int], str] = {}
        for (frame, _), file in zip(dataset.files, facts.files, strict=True):
            sizes.setdefault((file.height, file.width), frame.name)
        if len(sizes) > 1:
            (first, name), (second, other) = list(sizes.items())[:2]
            raise ValueError(
                f"the training pictures must have one size, but {name} is {first[0]}x{first[1]} and {other} "
                f"{second[0]}x{second[1]} ({len(sizes)} sizes in all): set size to resize all to one height and "
                "width, or crop to train on parts of one size, or batch_size 1"
            )
    missing = [name for name, count in zip(dataset.classes, counted, strict=True) if not count]
    found = [f"{dataset.split}: {dataset.pairing.rule} (layout {dataset.layout.name})"]
    found += [f"{dataset.split}: {note}" for note in (*dataset.pairing.notes, *facts.notes)]
    if missing and dataset.split == "train":
        found.append(
            f"train: no mask has a pixel of {len(missing)} classes, which cannot be learned: {listed(missing)}"
        )
    return found


def check_network(config: TrainConfig, train_set: SegmentationDataset, val_set: SegmentationDataset) -> None:
    """Raise ValueError if the pictures are too small for the network, or for its batch norms in training.

    Nothing is computed: the network is built without memory for its parameters.
    """
    with torch.device("meta"):
        probe = build_model(config.model, len(train_set.classes), config.width).train()
    train_sizes = _sizes(config.crop or config.size, train_set)
    for height, width in (*train_sizes, *_sizes(config.size, val_set)):
        check_image_size(probe, height, width)
    if config.batch_size > 1:
        return  # then every channel has two values
    height, width = min(train_sizes, key=lambda size: size[0] * size[1])
    try:
        probe(torch.empty(1, 3, height, width, device="meta"))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            f"batch_size must be at least 2 for {height}x{width} pictures, because {type(probe).__name__} makes maps "
            "of one pixel of them, and batch norm needs more than one value per channel; or set a larger size or crop"
        ) from None


def _sizes(fixed: tuple[int, int] | None, dataset: SegmentationDataset) -> list[tuple[int, int]]:
    """The (height, width) of the pictures that the network sees."""
    if fixed is not None:
        return [fixed]
    if isinstance(dataset, DigitScenes):
        return [dataset.size]
    return sorted({(file.height, file.width) for file in dataset.check().files})


def make_folder(out: Path) -> None:
    """Create the folder `out` if it does not exist. Raises ValueError if no file can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"out must be a writable folder, but {out} is not: {error.strerror}") from error


def _make_trainer(config: TrainConfig, progress: Progress) -> Trainer:
    """A trainer with fresh weights."""
    train_set, val_set = load_datasets(config)
    notes = []
    for dataset in (train_set, val_set):
        if not isinstance(dataset, DigitScenes):
            notes += check_data(config, dataset, progress)
    check_network(config, train_set, val_set)
    torch.manual_seed(config.seed)
    trainer = Trainer(config, build_model(config.model, len(train_set.classes), config.width), train_set, val_set)
    trainer.notes = notes
    return trainer


def _check_unused(out: Path) -> None:
    """Raise ValueError if the folder contains a run."""
    if (found := out / "checkpoint.pt").exists():
        raise ValueError(f"{out} already contains a run: choose another out, or resume from {found}")
