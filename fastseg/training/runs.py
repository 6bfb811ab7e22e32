"""Starting a training run in a new folder, and resuming one from its checkpoint."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from .checkpoint import load_checkpoint
from .config import RESUME_MAY_CHANGE, TrainConfig
from .data import DIGIT_CLASSES, SPLITS, DigitScenes, FolderDataset, SegmentationDataset
from .networks import build_model
from .trainer import METRICS_FILE, Trainer


def start_run(config: TrainConfig) -> Trainer:
    """Prepare a new run.

    Args:
        config: the configuration; the folder `config.out` is created.

    Returns:
        Trainer: at step 0.

    Raises:
        ValueError: the folder already contains a run, cannot be written to, or `config` does not fit the data, the
            network or the device. Nothing is created in that case.
        FileNotFoundError: a folder or a mask of the data is missing.
    """
    out = Path(config.out)
    _check_unused(out)
    trainer = _make_trainer(config)
    make_folder(out)
    (out / METRICS_FILE).unlink(missing_ok=True)
    return trainer


def resume_run(path: Path, overrides: dict[str, Any]) -> Trainer:
    """Prepare to continue the run that wrote a checkpoint, in the same folder unless `overrides` has another.

    Args:
        path: the checkpoint.
        overrides: fields of :class:`~fastseg.training.config.TrainConfig` to change. A field that is not in
            RESUME_MAY_CHANGE must have the value in the checkpoint.

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
    trainer = _make_trainer(config)
    make_folder(Path(config.out))
    trainer.restore(state, path)
    return trainer


def load_datasets(config: TrainConfig) -> tuple[SegmentationDataset, SegmentationDataset]:
    """Return the training data and the validation data.

    Args:
        config: the configuration.

    Raises:
        ValueError: `config` has values that digit scenes do not support.
        FileNotFoundError: a folder or a mask of `config.data` is missing.
    """
    if config.data is None:
        if config.num_classes != len(DIGIT_CLASSES) or config.crop:
            raise ValueError(
                f"digit scenes have {len(DIGIT_CLASSES)} classes and no crops; set data to change num_classes or crop"
            )
        if config.ignore_index != TrainConfig.ignore_index:
            raise ValueError("digit scenes have no ignored pixels; set data to change ignore_index")
        train_set, val_set = (DigitScenes(split, config.size or 64, config.seed) for split in SPLITS)
        return train_set, val_set
    shared = (config.size, config.ignore_index, config.num_classes)
    train_set = FolderDataset(config.data, "train", *shared, augment=True, crop=config.crop, seed=config.seed)
    return train_set, FolderDataset(config.data, "val", *shared)


def make_folder(out: Path) -> None:
    """Create the folder `out` if it does not exist. Raises ValueError if no file can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"out must be a writable folder, but {out} is not: {error.strerror}") from error


def _make_trainer(config: TrainConfig) -> Trainer:
    """A trainer with fresh weights."""
    train_set, val_set = load_datasets(config)
    torch.manual_seed(config.seed)
    return Trainer(config, build_model(config.model, len(train_set.classes), config.width), train_set, val_set)


def _check_unused(out: Path) -> None:
    """Raise ValueError if the folder contains a run."""
    if (found := out / "checkpoint.pt").exists():
        raise ValueError(f"{out} already contains a run: choose another out, or resume from {found}")
