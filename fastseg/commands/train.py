"""`fastseg train`: train a network on a folder of images and masks, or on digit scenes."""

from __future__ import annotations

import argparse
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.table import Table

from ..models import MODELS
from ..training.config import CHOICES, TrainConfig
from ..training.interrupt import GracefulInterrupt
from ..training.runs import resume_run, start_run
from . import terminal
from .options import add_json, parse_size

EXAMPLES = """examples:
  fastseg train --model segnet-basic --width 0.25 --steps 800 --batch-size 16 --lr 5e-3 \\
      --class-weights median-frequency                              digit scenes, no data needed
  fastseg train --data CamVid --size 360x480 --class-weights camvid --optimizer sgd --momentum 0.9 \\
      --lr 0.001 --schedule constant --weight-decay 5e-4 --batch-size 4 --steps 40000   the SegNet paper's recipe
  fastseg train --data VOCdevkit --crop 320x320 --ema 0.999 --accumulate 4 --log csv    pictures of many sizes
  fastseg train --data mine --palette colours.txt --crop 256x256    colour-coded masks
  fastseg train --resume runs/train/checkpoint.pt                   continue after Ctrl-C

--data is a folder with pictures and masks. CamVid's train/ and trainannot/, images/train/ and masks/train/ and the
like, VOC's, Cityscapes' and ADE20K's folders are found by themselves; docs/data.md has the rules. All files are checked
before the first step. The run writes checkpoint.pt and metrics.jsonl to --out; Ctrl-C, SIGTERM and SIGHUP end it after
the step with a checkpoint.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastseg train`."""
    parser.epilog = EXAMPLES
    # An option that is not given is absent from the namespace, which --resume relies on. TrainConfig has the defaults.
    options: dict[str, dict[str, Any]] = {
        "data": {"metavar": "DIR", "help": "folder with pictures and masks (default: digit scenes)"},
        "layout": {"choices": CHOICES["layout"], "help": "where pictures and masks are in DIR"},
        "palette": {"metavar": "FILE", "help": "the class of each colour, a line each: R G B NAME"},
        "exif": {"choices": CHOICES["exif"], "help": "turn pictures as their EXIF tag says, or leave them as stored"},
        "model": {"choices": list(MODELS), "help": "the network"},
        "width": {"type": float, "help": "factor for the network's channel counts"},
        "size": {"type": parse_size, "metavar": "HxW", "help": "resize images (default: no; digit scenes are 64x64)"},
        "crop": {"type": parse_size, "metavar": "HxW", "help": "train on random crops of this size"},
        "num_classes": {"type": int, "help": "number of classes in the masks (default: the layout's)"},
        "ignore_index": {"type": int, "help": "label of pixels without a class (default: 11 for CamVid, else 255)"},
        "class_weights": {"metavar": "WHICH", "help": "none, median-frequency, camvid, or w0,w1,..."},
        "steps": {"type": int, "help": "number of training steps"},
        "batch_size": {"type": int, "help": "images that the network sees at once"},
        "accumulate": {"type": int, "help": "batches whose gradients are added up for one step"},
        "optimizer": {"choices": CHOICES["optimizer"], "help": "the optimizer"},
        "schedule": {"choices": CHOICES["schedule"], "help": "how the learning rate changes"},
        "ema": {"type": float, "help": "decay of averaged weights, such as 0.999; 0: none"},
        "lr": {"type": float, "help": "highest learning rate"},
        "momentum": {"type": float, "help": "momentum; for adamw the first beta"},
        "weight_decay": {"type": float, "help": "weight decay"},
        "seed": {"type": int, "help": "seed of the weights and of the data order"},
        "device": {"help": "cuda, cuda:1, cpu (default: cuda if available)"},
        "amp": {"choices": CHOICES["amp"], "help": "autocast to bfloat16 (default: on a GPU)"},
        "channels_last": {"action": argparse.BooleanOptionalAction, "help": "memory format (default: on a GPU)"},
        "backend": {"choices": CHOICES["backend"], "help": "fused kernels or torch's"},
        "eval_every": {"type": int, "metavar": "STEPS", "help": "steps between validations and checkpoints"},
        "workers": {"type": int, "help": "threads that prepare batches"},
        "log": {"metavar": "WHICH", "help": "further logs: csv, tensorboard, or both separated by a comma"},
        "out": {"metavar": "DIR", "help": "output folder of the run"},
    }
    for name, option in options.items():
        default = getattr(TrainConfig, name)
        if default not in (None, ""):
            option["help"] += f" (default: {default})"
        if option.get("type") in (int, float):
            option.setdefault("metavar", "N" if option["type"] is int else "X")
        parser.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS, **option)
    parser.add_argument("--resume", metavar="CHECKPOINT", help="continue the run that wrote this checkpoint")
    parser.add_argument("--schedule-start", type=int, default=argparse.SUPPRESS, metavar="STEP",
        help="with --resume and more --steps: begin the schedule again at this step")  # fmt: skip
    add_json(parser)


def main(args: argparse.Namespace) -> int:
    """Run `fastseg train`. Returns 0, or after a signal what a shell would: 130 for Ctrl-C."""
    given = {field.name: getattr(args, field.name) for field in fields(TrainConfig) if hasattr(args, field.name)}
    console = terminal.text_console(stderr=True)
    if args.resume:
        trainer = resume_run(Path(args.resume), given, terminal.bar)
    else:
        trainer = start_run(TrainConfig(**given), terminal.bar)
    for note in trainer.notes:
        console.print(note)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    config = trainer.config
    console.print(
        f"{config.model}, {parameters / 1e6:.3f} M parameters, on {trainer.device}: {len(trainer.train_set)} images "
        f"to train on, {len(trainer.val_set)} to validate on; steps {trainer.step} to {config.steps}"
    )
    began = time.perf_counter()
    try:
        with GracefulInterrupt() as stop, terminal.TrainingProgress(config.steps, trainer.step) as progress:
            scores = trainer.run(stop, progress.show)
    except Exception:
        if trainer.rescued:
            console.print(f"wrote step {trainer.step}; to continue: fastseg train --resume {trainer.path}")
        raise
    if scores is None:
        console.print(
            f"stopped at step {trainer.step} of {config.steps}; to continue: fastseg train --resume {trainer.path}"
        )
        return stop.exit_code
    result = {
        "model": config.model,
        "steps": trainer.step,
        "seconds": round(time.perf_counter() - began, 1),
        "loss": trainer.history[-1]["loss"] if trainer.history else None,
        **scores.as_dict(trainer.train_set.classes),
        "checkpoint": str(trainer.path),
    }
    if args.json:
        terminal.print_json(result)
    else:
        print_result(result)
    return 0


def print_result(result: dict[str, Any]) -> None:
    """Print the result of a run as a table on stdout."""
    console = terminal.text_console()
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
