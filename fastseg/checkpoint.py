"""Files that are either whole or absent, and the checkpoint that training writes and prediction reads."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

FORMAT = "fastseg-checkpoint-1"
KEYS = {"format", "config", "model", "optimizer", "step", "rng", "mean", "std", "classes", "ignore_index"}


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """``with atomic_write(path) as temporary: ...`` puts what was written to `temporary` at `path` in one move.

    Until then, and for ever if the body raises, `path` stays what it was. Its folder is made where it is missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since a move is atomic only within one file system; same suffix, since writers go by it.
    temporary = path.with_name(f"~{os.getpid()}-{path.name}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write `state`, tensors and plain Python values under KEYS (without "format"), to `path`."""
    with atomic_write(path) as temporary:
        torch.save({"format": FORMAT, **state}, temporary)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, its tensors on the CPU; no code in the file is run.

    Raises FileNotFoundError, or ValueError for a file that is damaged or not such a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    # Which error a broken archive or a foreign pickle gives depends on where it is broken.
    except Exception as error:
        raise ValueError(f"{path} is not a fastseg checkpoint, or it is damaged ({type(error).__name__})") from error
    if damaged:
        raise ValueError(f"{path} is damaged: the checksum of its part {damaged} is wrong")
    if not isinstance(state, dict) or state.get("format") != FORMAT or not state.keys() >= KEYS:
        raise ValueError(f"{path} is not a fastseg checkpoint of the format {FORMAT}")
    return state


def build_model(name: str, num_classes: int, width: float) -> nn.Module:
    """The network of that name with fresh parameters; ValueError for a name that is none."""
    from .models import MODELS

    if name == "demo":
        from .demo import PlainSegNet  # its checkpoint is read as any other; the demo stands above this module

        return PlainSegNet(num_classes)
    if name not in MODELS:
        raise ValueError(f"there is no model {name!r}; choose one of {', '.join(MODELS)}")
    return MODELS[name](num_classes=num_classes, width=width)


def load_weights(model: nn.Module, state: dict[str, Any], path: str | Path) -> None:
    """Put the checkpoint's weights into `model`; ValueError where they do not fit."""
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise ValueError(f"the weights in {path} do not fit the model {state['config']['model']!r}: {error}") from error
