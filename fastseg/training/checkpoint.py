"""The checkpoint that training writes and prediction reads."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from ..atomic_write import atomic_write
from ..dispatch import BACKENDS
from ..models import MODELS, PlainSegNet

FORMAT = "fastseg-checkpoint-1"
KEYS = {"format", "config", "model", "optimizer", "step", "rng", "mean", "std", "classes", "ignore_index"}

CHOICES = {
    "optimizer": ("sgd", "adamw"),
    "schedule": ("constant", "cosine", "one-cycle"),
    "backend": tuple(BACKENDS),
}
BOUNDS = {
    "width": (0, 16),
    "num_classes": (1, 256),  # masks have 8 bits
    "ignore_index": (-(2**31), 2**31 - 1),
    "steps": (1, 2**31 - 1),
    "batch_size": (1, 2**31 - 1),
    "lr": (0, 1e6),
    "momentum": (0, 1),
    "weight_decay": (0, 1e6),
    "seed": (0, 2**63 - 1),
    "eval_every": (1, 2**31 - 1),
    "workers": (1, 256),
}
"""The least and the largest value of TrainConfig's numbers; width and lr must be above their least."""
LONGEST_SIDE = 65535


@dataclass
class TrainConfig:
    """Everything that a run depends on; a checkpoint keeps it. None: decided by the data or the device.

    Raises ValueError for a value of the wrong type or out of bounds.
    """

    data: str | None = None
    model: str = "segnet"
    width: float = 1.0
    size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    num_classes: int = 11
    ignore_index: int = 11
    class_weights: str = "none"
    steps: int = 1000
    batch_size: int = 8
    optimizer: str = "adamw"
    schedule: str = "one-cycle"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    seed: int = 0
    device: str | None = None
    amp: bool | None = None
    channels_last: bool | None = None
    backend: str = "auto"
    eval_every: int = 200
    workers: int = 4
    out: str = "runs/train"

    def __post_init__(self) -> None:
        hints = get_type_hints(TrainConfig)
        for field in fields(self):
            name, value = field.name.replace("_", "-"), getattr(self, field.name)
            if not _is(value, hints[field.name]):
                raise ValueError(f"{name} must be of the type {field.type}, not {value!r}")
            if field.name in CHOICES and value not in CHOICES[field.name]:
                raise ValueError(f"{name} must be one of {', '.join(CHOICES[field.name])}, not {value!r}")
            if field.name in BOUNDS:
                least, most = BOUNDS[field.name]
                if field.name in ("width", "lr") and value == least:
                    raise ValueError(f"{name} must be above {least}, not {value}")
                if not least <= value <= most:
                    raise ValueError(f"{name} must be from {least} to {most}, not {value}")
            if isinstance(value, tuple) and not all(1 <= side <= LONGEST_SIDE for side in value):
                raise ValueError(f"{name} must be from 1x1 to {LONGEST_SIDE}x{LONGEST_SIDE}, not {value}")


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of one of the types that TrainConfig's fields have; an int is a float too, a bool no int."""
    if isinstance(kind, UnionType):
        return any(_is(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_is, value, kinds))
    return type(value) is kind or (kind is float and type(value) is int)


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write `state`, tensors and plain Python values under KEYS (without "format"), to `path`."""
    with atomic_write(path) as temporary:
        torch.save({"format": FORMAT, **state}, temporary)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, its tensors on the CPU; no code in the file is run.

    Raises FileNotFoundError, or ValueError for a file that is damaged or not such a checkpoint. What it gives has all
    KEYS, each of the type that it is written with; that tensors fit the network and its optimizer is seen later.
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
    try:
        _check(state)
    except ValueError as error:
        raise ValueError(f"{path} is not a fastseg checkpoint, since its {error}") from error
    return state


def _check(state: dict[str, Any]) -> None:
    """ValueError where what is under KEYS is not of the types that training writes there."""
    config = state["config"]
    if not isinstance(config, dict) or config.keys() != {field.name for field in fields(TrainConfig)}:
        raise ValueError("config must have the fields of a TrainConfig and no others")
    try:
        TrainConfig(**config)
    except ValueError as error:
        raise ValueError(f"config is wrong: {error}") from error
    model, optimizer, rng, classes = (state[key] for key in ("model", "optimizer", "rng", "classes"))
    if not isinstance(model, dict) or not all(_is(k, str) and isinstance(v, Tensor) for k, v in model.items()):
        raise ValueError("model must be a dict of tensors by name")
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("state"), dict):
        raise ValueError("optimizer must be what an optimizer's state_dict gives")
    if (
        not isinstance(rng, dict)
        or "cpu" not in rng
        or not all(_is_bytes(rng[key]) for key in {"cpu", "cuda"} & {*rng})
    ):
        raise ValueError("rng must hold the state of the generator for the cpu, and maybe for cuda, as bytes")
    if not _is(state["step"], int) or state["step"] < 0:
        raise ValueError("step must be an integer of at least 0")
    for key in ("mean", "std"):
        if not _is(state[key], tuple[float, float, float]) or not all(abs(v) < 1e6 for v in state[key]):
            raise ValueError(f"{key} must be three finite numbers")
    if not all(value > 0 for value in state["std"]):
        raise ValueError("std must be above 0")
    if not isinstance(classes, tuple) or len(classes) != config["num_classes"] or not all(_is(c, str) for c in classes):
        raise ValueError(f"classes must be {config['num_classes']} names, as many as its config says")
    least, most = BOUNDS["ignore_index"]
    if not _is(state["ignore_index"], int) or not least <= state["ignore_index"] <= most:
        raise ValueError(f"ignore_index must be an integer from {least} to {most}")


def _is_bytes(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.uint8 and value.dim() == 1


def build_model(name: str, num_classes: int, width: float) -> nn.Module:
    """The network of that name with fresh parameters; ValueError for a name that is none."""
    if name == "demo":
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
