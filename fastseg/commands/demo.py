"""`fastseg demo`: swap fastseg into a plain SegNet, check it against PyTorch, and train it on digit scenes."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from ..dispatch import TRITON_INSTALLED
from ..training import comparison
from ..training.device import pick_device
from ..training.drawing import draw_history, draw_scenes, require_matplotlib, write_png
from ..training.runs import make_folder
from . import terminal
from .options import add_device, add_json

STEPS = 600

EXAMPLES = """examples:
  fastseg demo                          about three minutes on two CPU cores; writes demo/
  fastseg demo --seed 1 --json          the result as one JSON object
  fastseg segment demo/scene.png --checkpoint demo/segnet.pt     use what it learned
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastseg demo`."""
    parser.epilog = EXAMPLES
    parser.add_argument("--out", default="demo", metavar="DIR", help="output folder (default: demo)")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"training steps (default: {STEPS})")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of weights and scenes (default: 0)")
    add_device(parser)
    add_json(parser)


def main(args: argparse.Namespace) -> int:
    """Run `fastseg demo`. Returns 0, or 1 if a check failed."""
    if args.steps <= comparison.COMPARED_STEPS:
        raise ValueError(f"--steps must be above {comparison.COMPARED_STEPS}, the steps that are compared with torch")
    config = comparison.demo_config(args.steps, args.seed, args.device, args.out)
    require_matplotlib()  # now rather than after training
    pick_device(args.device)
    began = time.perf_counter()
    console = terminal.text_console(stderr=args.json)
    out = Path(args.out)
    # Leave a core to the threads that draw scenes: more threads than cores wait for each other.
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    pair = comparison.make_pair(config, out / "segnet.pt")
    make_folder(out)  # after what may raise, so that an error leaves no folder
    pair.swapped.log.clear()

    console.print(pair.report)
    difference = comparison.loss_difference(pair)
    console.print(
        f"plain and swapped, {comparison.COMPARED_STEPS} training steps from the same weights on the same batches: "
        f"losses differ by at most {difference:.1e} (allowed: {comparison.LOSS_TOLERANCE:.0e})"
    )
    interpreted = costs = None
    if pair.swapped.device.type == "cuda":
        costs = {name: cost._asdict() for name, cost in comparison.measure_steps(config).items()}
        height, width = comparison.TIMED_SIZE
        for name, cost in costs.items():
            console.print(
                f"{name}: {cost['ms']:.2f} ms per training step of {comparison.TIMED_BATCH} scenes of "
                f"{height}x{width}, peak memory {cost['mib']:.0f} MiB"
            )
    elif TRITON_INSTALLED:
        interpreted = comparison.interpreted_step_difference()
        console.print(
            "one small training step with the Triton kernels interpreted: "
            f"the loss differs from torch's by {interpreted.loss:.1e}, the gradients by at most "
            f"{interpreted.gradients:.1e} (allowed: {comparison.STEP_TOLERANCE:.0e})"
        )

    trainer = pair.swapped
    with terminal.TrainingProgress(config.steps, trainer.step) as progress:
        scores = trainer.run(on_record=progress.show)
    console.print(
        f"mIoU {scores.miou:.3f} on {len(trainer.val_set)} scenes of digits that it was not trained on "
        f"(required: {comparison.MIN_MIOU:.2f})"
    )
    scenes = comparison.validation_scenes(trainer, 4)
    draw_scenes(out / "prediction.png", scenes, trainer.val_set.classes, trainer.val_set.ignore_index)
    write_png(out / "scene.png", scenes[0].picture)
    draw_history(out / "loss.png", trainer.history)
    files = [str(out / name) for name in ("prediction.png", "loss.png", "scene.png", "segnet.pt")]
    seconds = round(time.perf_counter() - began, 1)
    console.print(f"wrote {', '.join(files)} in {seconds} s")
    failures = comparison.failures(difference, interpreted, scores.miou)
    for failure in failures:
        console.print(f"failed: {failure}")
    if args.json:
        result = {"seed": args.seed, "steps": trainer.step, "miou": scores.miou, "loss_difference": difference}
        result |= {"interpreted": interpreted and interpreted._asdict(), "gpu": costs}
        terminal.print_json(result | {"seconds": seconds, "files": files, "failures": failures})
    return 1 if failures else 0
