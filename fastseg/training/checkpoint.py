"""Checkpoints: the file that training writes, and that resuming and segmentation read."""

from __future__ import annotations

import zipfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..atomic_write import atomic_write
from .config import BOUNDS, LATER_FIELDS, TrainConfig, has_type

FORMAT = "fastseg-checkpoint-1"
KEYS = {"format", "config", "model", "optimizer", "step", "rng", "mean", "std", "classes", "ignore_index"}
LATER_KEYS: dict[str, Any] = {"ema": None, "colours": ()}
"""What checkpoints of earlier versions lack: averaged weights, and (red, green, blue, class) of a colour table."""


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write a checkpoint. If writing fails, an existing file at `path` is kept.

    Args:
        path: the file to write.
        state: a value for each name in KEYS except ``"format"``, made of tensors and plain Python values, as
            :meth:`fastseg.training.trainer.Trainer.state` returns it.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic_write(path) as temporary:
        torch.save({"format": FORMAT, **state}, temporary)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint without executing any code in it.

    Args:
        path: a file written by :func:`save_checkpoint`.

    Returns:
        dict: a value for each name in KEYS and LATER_KEYS, each of the type that training writes; tensors are on the
        CPU. Whether the tensors fit a network and its optimizer is checked when they are loaded there.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or not a fastseg checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not verify checksums
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    # The exception type for a broken archive or a pickle of another program depends on where it is broken.
    except Exception as error:
        raise ValueError(f"{path} is not a fastseg checkpoint, or it is damaged ({type(error).__name__})") from error
    if damaged:
        raise ValueError(f"{path} is damaged: the checksum of its part {damaged} is wrong")
    if not isinstance(state, dict) or state.get("format") != FORMAT or not state.keys() >= KEYS:
        raise ValueError(f"{path} is not a fastseg checkpoint of the format {FORMAT}")
    state = LATER_KEYS | state
    try:
        _check_state(state)
    except ValueError as error:
        raise ValueError(f"{path} is not a valid fastseg checkpoint: its {error}") from error
    return state


def _check_state(state: dict[str, Any]) -> None:
    """Raise ValueError if a value is not of the type that training writes."""
    state["config"] = config = _current_config(state["config"])
    model, optimizer, rng, classes = (state[key] for key in ("model", "optimizer", "rng", "classes"))
    if not isinstance(model, dict) or not all(has_type(k, str) and isinstance(v, Tensor) for k, v in model.items()):
        raise ValueError("model must map parameter names to tensors")
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("state"), dict):
        raise ValueError("optimizer must be the state_dict of an optimizer")
    if (
        not isinstance(rng, dict)
        or "cpu" not in rng
        or not all(_is_bytes(rng[key]) for key in {"cpu", "cuda"} & {*rng})
    ):
        raise ValueError("rng must hold the state of the CPU's generator, and optionally of CUDA's, as bytes")
    if not has_type(state["step"], int) or state["step"] < 0:
        raise ValueError("step must be an integer of at least 0")
    for key in ("mean", "std"):
        if not has_type(state[key], tuple[float, float, float]) or not all(abs(v) < 1e6 for v in state[key]):
            raise ValueError(f"{key} must be three finite numbers")
    if not all(value > 0 for value in state["std"]):
        raise ValueError("std must be above 0")
    ema = state["ema"]
    if ema is not None and (not isinstance(ema, dict) or ema.keys() != model.keys()):
        raise ValueError("ema must be None, or have the names of model")
    is_names = isinstance(classes, tuple) and all(has_type(name, str) for name in classes)
    if not is_names or len(classes) != config["num_classes"]:
        raise ValueError(f"classes must be {config['num_classes']} names, the number of classes in its config")
    smallest, largest = BOUNDS["ignore_index"]
    if not has_type(state["ignore_index"], int) or not smallest <= state["ignore_index"] <= largest:
        raise ValueError(f"ignore_index must be an integer from {smallest} to {largest}")
    colours = state["colours"]
    if not isinstance(colours, tuple) or not all(_is_colour(row, len(classes)) for row in colours):
        raise ValueError("colours must be rows of red, green, blue and a class")


def _is_colour(row: Any, classes: int) -> bool:
    """Whether `row` is red, green, blue and a class, -1 for none."""
    valid = has_type(row, tuple[int, int, int, int])
    return valid and -1 <= row[3] < classes and 0 <= min(row[:3]) <= max(row[:3]) < 256


def _current_config(config: Any) -> dict[str, Any]:
    """The config of a checkpoint with the fields and values of this version. Raises ValueError if it is invalid."""
    known = {field.name for field in fields(TrainConfig)}
    if not isinstance(config, dict) or not known - LATER_FIELDS <= config.keys() <= known:
        raise ValueError("config must have exactly the fields of a TrainConfig")
    config = dict(config)
    if isinstance(config["amp"], bool):
        config["amp"] = "bf16" if config["amp"] else "none"
    if "layout" not in config and config["data"] is None:
        config["ignore_index"] = None  # it had CamVid's 11, which digit scenes do not use
    try:
        return asdict(TrainConfig(**config))
    except ValueError as error:
        raise ValueError(f"config is wrong: {error}") from error


def _is_bytes(value: Any) -> bool:
    """Whether `value` is the state of a random number generator: a uint8 vector."""
    return isinstance(value, Tensor) and value.dtype == torch.uint8 and value.dim() == 1
