"""The same training in plain torch and with fastseg, on a folder in CamVid's layout with a test split.

    python3 benchmarks/training.py --data CamVid --out build/training
    python3 benchmarks/training.py --data CamVid --out build/training --variant "fastseg swap"   only this one

SegNet at 360x480 with the authors' class weights, from the same initial weights, on the same batches in the same order.
`torch` uses nn.MaxPool2d with indices, nn.MaxUnpool2d, nn.BatchNorm2d and torch's loss; `fastseg swap` is that model
after fastseg.swap; `fastseg` is the network of fastseg.models. Each writes <out>/<variant>.json when it is done: the
loss of each step, validation mIoU, scores on test/, seconds of training and peak memory. At the end training.png is
drawn from all results in <out>. Ctrl-C stops and keeps the finished results.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastseg
from fastseg import models, swap
from fastseg.atomic_write import atomic_write
from fastseg.bench.networks import PlainTwin
from fastseg.commands.options import parse_size
from fastseg.commands.terminal import TrainingProgress
from fastseg.training import data
from fastseg.training.config import TrainConfig
from fastseg.training.interrupt import GracefulInterrupt
from fastseg.training.runs import load_datasets
from fastseg.training.trainer import Trainer

VARIANTS = ("torch", "fastseg swap", "fastseg")
PUBLISHED = {"global_accuracy": 0.904, "class_accuracy": 0.712, "miou": 0.601}
"""SegNet on CamVid's test split: Badrinarayanan, Kendall and Cipolla, 2017, table 3."""


def build(variant: str, config: TrainConfig, classes: int) -> nn.Module:
    """The network of a variant. All variants start from the same weights."""
    torch.manual_seed(config.seed)
    native = models.MODELS[config.model](classes, width=config.width)
    if variant == "fastseg":
        return native
    plain = PlainTwin(copy.deepcopy(native))
    if variant == "fastseg swap":
        swap(plain)
    return plain


def train(variant: str, config: TrainConfig, stop: GracefulInterrupt) -> dict[str, Any] | None:
    """Train one variant and score it on the test split; None if interrupted."""
    train_set, val_set = load_datasets(config)
    test_set = data.FolderDataset(config.data, "test", train_set.labels, config.size)
    trainer = Trainer(config, build(variant, config, len(train_set.classes)), train_set, val_set)
    on_gpu = trainer.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(trainer.device)
    began = time.perf_counter()
    with TrainingProgress(config.steps, trainer.step) as progress:
        scores = trainer.run(stop, progress.show)
    if scores is None:
        return None
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated(trainer.device) if on_gpu else None
    trainer.val_set = test_set
    with fastseg.backend(config.backend):
        scores = trainer.evaluate(stop)
    if scores is None:
        return None
    return {
        "variant": variant,
        "device": torch.cuda.get_device_name(trainer.device) if on_gpu else "cpu",
        "torch": torch.__version__,
        "fastseg": fastseg.__version__,
        "config": asdict(config) | {"data": Path(config.data).name, "out": None},
        "seconds": round(seconds, 1),
        "peak_bytes": peak,
        "test": scores.as_dict(test_set.classes),
        "history": trainer.history,
    }


def chart(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw training loss and validation mIoU of all variants."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for result in found:
        steps = [record["step"] for record in result["history"]]
        axes[0].plot(steps, [record["loss"] for record in result["history"]], lw=0.8, label=result["variant"])
        scored = [record for record in result["history"] if "miou" in record]
        axes[1].plot([r["step"] for r in scored], [r["miou"] for r in scored], marker=".", label=result["variant"])
    for ax, label in zip(axes, ("training loss", "validation mIoU"), strict=True):
        ax.set_xlabel("step")
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
        ax.legend()
    figure.suptitle(", ".join(sorted({result["device"] for result in found})), fontsize=9)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def row(result: dict[str, Any]) -> str:
    """A result in one line."""
    scores = "  ".join(f"{name.replace('_', ' ')} {result['test'][name]:.3f}" for name in PUBLISHED)
    memory = "" if result["peak_bytes"] is None else f"  peak {result['peak_bytes'] / 2**20:.0f} MiB"
    return f"{result['variant']:13} {result['seconds']:8.1f} s{memory}  test: {scores}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="DIR", help="folder with train/, val/, test/ and their masks")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="only this variant (may be repeated)")
    parser.add_argument("--steps", type=int, default=6000, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--size", type=parse_size, default=(360, 480), metavar="HxW", help="(default: 360x480)")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate of AdamW (default: %(default)s)")
    parser.add_argument("--width", type=float, default=1.0, help="factor of the channels (default: %(default)s)")
    parser.add_argument("--eval-every", type=int, default=500, metavar="STEPS", help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=12, help="threads that read images (default: %(default)s)")
    parser.add_argument("--device", help="(default: cuda if available)")
    args = parser.parse_args(arguments)
    shared = {
        name: getattr(args, name)
        for name in ("data", "steps", "batch_size", "size", "lr", "width", "eval_every", "workers", "device")
    }
    args.out.mkdir(parents=True, exist_ok=True)
    with GracefulInterrupt() as stop:
        for variant in args.variant or VARIANTS:
            backend = "torch" if variant == "torch" else "auto"
            print(f"{variant}: {args.steps} steps", file=sys.stderr)
            with tempfile.TemporaryDirectory() as folder:  # for checkpoints, which take hundreds of MB
                config = TrainConfig(**shared, class_weights="camvid", out=folder, backend=backend)
                result = train(variant, config, stop)
            if result is None:
                return 130
            with atomic_write(args.out / f"{variant.replace(' ', '-')}.json") as temporary:
                temporary.write_text(json.dumps(result) + "\n")
    found = [json.loads(path.read_text()) for path in sorted(args.out.glob("*.json"))]
    chart(found, args.out / "training.png")
    for result in found:
        print(row(result))
    print("published (SegNet, 2017): " + "  ".join(f"{k.replace('_', ' ')} {v:.3f}" for k, v in PUBLISHED.items()))
    return 0 if all(math.isfinite(result["history"][-1]["loss"]) for result in found) else 1


if __name__ == "__main__":
    sys.exit(main())
