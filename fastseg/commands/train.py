"""`fastseg train`: a network on a folder of pictures and masks, or on digit scenes."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import time
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..models import MODELS
from ..training.checkpoint import CHOICES, TrainConfig, build_model, load_checkpoint
from ..training.metrics import Scores
from ..training.trainer import MAY_CHANGE, Trainer, datasets, make_folder
from .options import parse_size

EXAMPLES = """examples:
  fastseg train --model segnet-basic --width 0.25 --steps 800 --batch-size 16 --lr 5e-3 \\
      --class-weights median-frequency                              digit scenes, no data needed
  fastseg train --data CamVid --size 360x480 --class-weights camvid --optimizer sgd --momentum 0.9 \\
      --lr 0.001 --schedule constant --weight-decay 5e-4 --batch-size 4 --steps 40000   the SegNet paper's recipe
  fastseg train --resume runs/train/checkpoint.pt                   go on after Ctrl-C

--data names a folder with train/ and val/ (PNG or JPEG frames), trainannot/ and valannot/ (8-bit PNG masks of the same
stem). The run writes checkpoint.pt and metrics.jsonl to --out.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastseg train`."""
    parser.epilog = EXAMPLES
    # Left out of the namespace unless given, so that --resume can tell; TrainConfig holds the defaults.
    options: dict[str, dict[str, Any]] = {
        "data": {"metavar": "DIR", "help": "folder in CamVid's layout (default: digit scenes)"},
        "model": {"choices": list(MODELS), "help": "the network"},
        "width": {"type": float, "help": "factor for the network's channel counts"},
        "size": {"type": parse_size, "metavar": "HxW", "help": "resize to this (default: as they are; scenes 64x64)"},
        "crop": {"type": parse_size, "metavar": "HxW", "help": "train on random cuts of this size"},
        "num_classes": {"type": int, "help": "classes in the masks"},
        "ignore_index": {"type": int, "help": "label that means no class"},
        "class_weights": {"metavar": "WHICH", "help": "none, median-frequency, camvid, or w0,w1,..."},
        "steps": {"type": int, "help": "how many batches to train on"},
        "batch_size": {"type": int, "help": "pictures in a batch"},
        "optimizer": {"choices": CHOICES["optimizer"], "help": "the optimizer"},
        "schedule": {"choices": CHOICES["schedule"], "help": "how the learning rate changes"},
        "lr": {"type": float, "help": "highest learning rate"},
        "momentum": {"type": float, "help": "momentum, of adamw the first beta"},
        "weight_decay": {"type": float, "help": "weight decay"},
        "seed": {"type": int, "help": "seed of the weights and of the data's order"},
        "device": {"help": "cuda, cuda:1, cpu (default: cuda where there is one)"},
        "amp": {"action": argparse.BooleanOptionalAction, "help": "bfloat16 autocast (default: on a GPU)"},
        "channels_last": {"action": argparse.BooleanOptionalAction, "help": "memory format (default: on a GPU)"},
        "backend": {"choices": CHOICES["backend"], "help": "fused kernels or torch"},
        "eval_every": {"type": int, "metavar": "STEPS", "help": "steps between validations and checkpoints"},
        "workers": {"type": int, "help": "threads that prepare batches"},
        "out": {"metavar": "DIR", "help": "folder of the run"},
    }
    for name, option in options.items():
        default = getattr(TrainConfig, name)
        if default is not None:
            option["help"] += f" (default: {default})"
        if option.get("type") in (int, float):
            option.setdefault("metavar", "N" if option["type"] is int else "X")
        parser.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS, **option)
    parser.add_argument("--resume", metavar="CHECKPOINT", help="go on with the run that wrote this checkpoint")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def main(args: argparse.Namespace) -> int:
    """Run `fastseg train`; 0, or 130 after Ctrl-C."""
    given = {field.name: getattr(args, field.name) for field in fields(TrainConfig) if hasattr(args, field.name)}
    trainer = resume(Path(args.resume), given) if args.resume else start(given)
    console = Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    config = trainer.config
    console.print(
        f"{config.model}, {parameters / 1e6:.3f} M parameters, on {trainer.device}: {len(trainer.train_set)} pictures "
        f"to train on, {len(trainer.val_set)} to validate on; steps {trainer.step} to {config.steps}"
    )
    began = time.perf_counter()
    with Interrupt() as interrupt:
        scores = trainer.run(interrupt)
    if scores is None:
        console.print(
            f"stopped at step {trainer.step} of {config.steps}; to go on: fastseg train --resume {trainer.path}"
        )
        return 130
    result = {
        "model": config.model,
        "steps": trainer.step,
        "seconds": round(time.perf_counter() - began, 1),
        "loss": trainer.history[-1]["loss"] if trainer.history else None,
        **summary(scores, trainer.train_set.classes),
        "checkpoint": str(trainer.path),
    }
    if args.json:
        print(json.dumps(result))
    else:
        print_result(result)
    return 0


def start(given: dict[str, Any]) -> Trainer:
    """A trainer for a new run; ValueError where its folder holds one already."""
    config = TrainConfig(**given)
    _refuse_taken(Path(config.out))
    train_set, val_set = datasets(config)
    torch.manual_seed(config.seed)
    trainer = Trainer(config, build_model(config.model, len(train_set.classes), config.width), train_set, val_set)
    make_folder(Path(config.out))  # after all that may be refused, so that nothing is left of what is
    (Path(config.out) / "metrics.jsonl").unlink(missing_ok=True)
    return trainer


def resume(path: Path, given: dict[str, Any]) -> Trainer:
    """A trainer that goes on where the one that wrote `path` stopped, in the same folder unless another is given."""
    state = load_checkpoint(path)
    for name, value in given.items():
        if name not in MAY_CHANGE and value != state["config"][name]:
            raise ValueError(
                f"--{name.replace('_', '-')} {value} is not what {path} was trained with, {state['config'][name]}; "
                "a resumed run cannot change it"
            )
    config = TrainConfig(**{**state["config"], "out": str(path.parent), **given})
    if Path(config.out) != path.parent:
        _refuse_taken(Path(config.out))
    if state["step"] > config.steps:
        raise ValueError(f"{path} is at step {state['step']} already, beyond --steps {config.steps}")
    train_set, val_set = datasets(config)
    trainer = Trainer(config, build_model(config.model, len(train_set.classes), config.width), train_set, val_set)
    make_folder(Path(config.out))
    trainer.restore(state, path)
    return trainer


def _refuse_taken(out: Path) -> None:
    if (found := out / "checkpoint.pt").exists():
        raise ValueError(f"{out} holds a run already: give another --out, or go on with it: --resume {found}")


class Interrupt:
    """``with Interrupt() as interrupt:`` after a Ctrl-C `interrupt()` is True; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> bool:
        return self.asked

    def __enter__(self) -> Interrupt:
        self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self.before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")


def summary(scores: Scores, classes: tuple[str, ...]) -> dict[str, Any]:
    """The scores as JSON can hold them: None for a class that does not occur."""
    values = {name: getattr(scores, name) for name in ("miou", "global_accuracy", "class_accuracy")}
    values["frequency_weighted_iou"] = scores.frequency_weighted_iou
    values["iou"] = {name: None if math.isnan(iou) else iou for name, iou in zip(classes, scores.iou, strict=True)}
    return values


def print_result(result: dict[str, Any]) -> None:
    """The result of a run as a table on stdout."""
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    console.print(f"validation after {result['steps']} steps, {result['seconds']} s")
    table = Table("class", "IoU")
    for name, iou in result["iou"].items():
        table.add_row(name, "-" if iou is None else f"{iou:.3f}")
    table.add_section()
    table.add_row("mean (mIoU)", f"{result['miou']:.3f}")
    table.add_row("global accuracy", f"{result['global_accuracy']:.3f}")
    table.add_row("class accuracy", f"{result['class_accuracy']:.3f}")
    console.print(table)
    console.print(f"checkpoint: {result['checkpoint']}")
