"""`fastseg demo`: fused layers put into a hand-written SegNet, checked against torch, trained on digit scenes."""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ..atomic_write import atomic_write
from ..dispatch import TRITON_INSTALLED, backend
from ..models import PlainSegNet
from ..nn import CrossEntropyLoss
from ..swapping import swap
from ..training.checkpoint import TrainConfig
from ..training.data import DigitScenes
from ..training.device import pick_device
from ..training.drawing import Scene, draw_scenes, need_matplotlib
from ..training.trainer import Trainer, make_folder

STEPS = 600
COMPARED = 5
LOSS_TOLERANCE = 1e-3
"""For the losses of plain and swapped over COMPARED steps: rounding, which grows with every step."""
STEP_TOLERANCE = 1e-4
"""For the loss and the gradients of one step with interpreted kernels, in float32."""
LEAST_MIOU = 0.5
TIMED_BATCH, TIMED_SIZE = 8, (360, 480)

EXAMPLES = """examples:
  fastseg demo                          about three minutes on two CPU cores; writes demo/
  fastseg demo --seed 1 --json          the result as one JSON object
  fastseg segment demo/scene.png --checkpoint demo/segnet.pt     what it learned, used
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastseg demo`."""
    parser.epilog = EXAMPLES
    parser.add_argument("--out", default="demo", metavar="DIR", help="folder for what it writes (default: demo)")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"training steps (default: {STEPS})")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the weights and the scenes (default: 0)")
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda where there is one)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def main(args: argparse.Namespace) -> int:
    """Run `fastseg demo`; 0, or 1 where a check failed."""
    if args.steps <= COMPARED:
        raise ValueError(f"--steps must be above {COMPARED}, the steps of the comparison with torch")
    need_matplotlib()  # now, not when everything is trained
    began = time.perf_counter()
    console = Console(stderr=args.json, markup=False, emoji=False, highlight=False, soft_wrap=True)
    out = Path(args.out)
    config = TrainConfig(
        model="demo",
        class_weights="1,1,1,1,1,1,1,1,1,1,0.25",  # most pixels are ground
        steps=args.steps,
        batch_size=16,
        lr=4e-3,
        weight_decay=1e-2,
        amp=False,
        channels_last=True,
        eval_every=100,
        seed=args.seed,
        device=args.device,
        out=args.out,
    )
    # A core for the threads that draw scenes: where torch's threads outnumber the free cores, they wait for each other.
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    pick_device(args.device)
    train_set, val_set = DigitScenes("train", seed=args.seed), DigitScenes("val", seed=args.seed)
    make_folder(out)
    (out / "metrics.jsonl").unlink(missing_ok=True)

    torch.manual_seed(args.seed)
    plain = PlainSegNet()
    swapped = copy.deepcopy(plain)
    console.print(swap(swapped))

    ours = Trainer(config, swapped, train_set, val_set, out / "segnet.pt")
    theirs = Trainer(config, plain, train_set, val_set)
    theirs.criterion = nn.CrossEntropyLoss(ours.criterion.weight, ignore_index=train_set.ignore_index)
    difference = loss_difference(ours, theirs)
    console.print(
        f"plain and swapped, {COMPARED} training steps from the same weights on the same batches: "
        f"losses differ by at most {difference:.1e} (allowed: {LOSS_TOLERANCE:.0e})"
    )
    failures = [] if difference <= LOSS_TOLERANCE else ["the losses of plain and swapped differ"]

    interpreted = gpu = None
    if ours.device.type == "cuda":
        gpu = compare_speed(config)
        for name, figures in gpu.items():
            console.print(
                f"{name}: {figures['ms']:.2f} ms a training step of {TIMED_BATCH} scenes of "
                f"{TIMED_SIZE[0]}x{TIMED_SIZE[1]}, {figures['mib']:.0f} MiB at its peak"
            )
    elif TRITON_INSTALLED:
        interpreted = run_interpreted_step()
        console.print(
            "one small training step with the Triton kernels interpreted: "
            f"the loss differs from torch's by {interpreted['loss']:.1e}, the gradients by at most "
            f"{interpreted['gradients']:.1e} (allowed: {STEP_TOLERANCE:.0e})"
        )
        if not all(value <= STEP_TOLERANCE for value in interpreted.values()):
            failures.append("the interpreted kernels differ from torch")

    scores = ours.run()
    if not scores.miou >= LEAST_MIOU:
        failures.append(f"the mIoU is below {LEAST_MIOU:.2f}")
    console.print(
        f"mIoU {scores.miou:.3f} on {len(val_set)} scenes of digits that were never trained on "
        f"(least: {LEAST_MIOU:.2f})"
    )
    draw_predictions(out, ours)
    draw_losses(out / "loss.png", ours.history)
    written = [str(out / name) for name in ("prediction.png", "loss.png", "scene.png", "segnet.pt")]
    seconds = round(time.perf_counter() - began, 1)
    console.print(f"wrote {', '.join(written)} in {seconds} s")
    for failure in failures:
        console.print(f"failed: {failure}")
    if args.json:
        result = {"seed": args.seed, "steps": ours.step, "miou": scores.miou, "loss_difference": difference}
        result |= {"interpreted": interpreted, "gpu": gpu, "seconds": seconds, "files": written, "failures": failures}
        print(json.dumps(result))
    return 1 if failures else 0


def loss_difference(ours: Trainer, theirs: Trainer) -> float:
    """The largest difference of the two's losses over COMPARED training steps on the same batches."""
    differences = []
    for step in range(COMPARED):
        batch = ours.batch(step)
        differences.append((ours.training_step(*batch) - theirs.training_step(*batch)).abs())
    return torch.stack(differences).max().item()


def run_interpreted_step() -> dict[str, float]:
    """`interpreted_step` in a process of its own, since TRITON_INTERPRET must be set before triton is imported."""
    package = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", "from fastseg.commands.demo import interpreted_step; interpreted_step()"],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"the step with interpreted kernels failed: {done.stderr.strip()}")
    return json.loads(done.stdout)


def interpreted_step() -> None:
    """Print, as JSON, how much loss and gradients of the fused layers on Triton kernels differ from plain torch's."""
    torch.manual_seed(0)
    plain = PlainSegNet()
    swapped = copy.deepcopy(plain)
    swap(swapped)
    image, mask = DigitScenes("train", size=32).sample(0)
    losses = []
    for model, kind, name in ((plain, nn.CrossEntropyLoss, "torch"), (swapped, CrossEntropyLoss, "triton")):
        with backend(name):
            losses.append(kind()(model(image[None]), mask[None]))
            losses[-1].backward()
    pairs = zip(plain.parameters(), swapped.parameters(), strict=True)
    gradients = torch.stack([(a.grad - b.grad).abs().max() for a, b in pairs])
    print(json.dumps({"loss": (losses[0] - losses[1]).abs().item(), "gradients": gradients.max().item()}))


def compare_speed(config: TrainConfig) -> dict[str, dict[str, float]]:
    """Median ms and peak MiB of a training step for "plain" and "swapped", on the GPU, both in channels_last."""
    scenes = DigitScenes("train", size=TIMED_SIZE, length=TIMED_BATCH)
    device = pick_device(config.device)
    images, masks = (torch.stack(tensors).to(device) for tensors in zip(*scenes, strict=True))
    figures = {}
    for name in ("plain", "swapped"):
        before = torch.cuda.memory_allocated(device)
        torch.manual_seed(config.seed)
        model = PlainSegNet()
        trainer = Trainer(config, model, scenes, scenes)
        if name == "plain":
            trainer.criterion = nn.CrossEntropyLoss(trainer.criterion.weight, ignore_index=scenes.ignore_index)
        else:
            swap(model)
        for _ in range(10):
            trainer.training_step(images, masks)
        torch.cuda.reset_peak_memory_stats(device)
        times = []
        for _ in range(30):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            trainer.training_step(images, masks)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        peak = torch.cuda.max_memory_allocated(device) - before
        figures[name] = {"ms": statistics.median(times), "mib": peak / 2**20}
        del model, trainer
    return figures


def draw_predictions(out: Path, trainer: Trainer) -> None:
    """Write prediction.png, four validation scenes with truth and prediction, and scene.png, the first's picture."""
    from PIL import Image

    trainer.model.eval()
    scenes = []
    for index in range(4):
        image, mask = trainer.val_set.sample(index)
        with torch.no_grad():
            prediction = trainer.logits(image[None])[0].argmax(0).cpu().numpy()
        picture = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        scenes.append(Scene(picture, mask.numpy(), prediction))
    draw_scenes(out / "prediction.png", scenes, trainer.val_set.classes, trainer.val_set.ignore_index)
    with atomic_write(out / "scene.png") as temporary:
        Image.fromarray(scenes[0].picture).save(temporary, format="PNG")


def draw_losses(path: Path, history: list[dict[str, Any]]) -> None:
    """Write a plot of the records' training loss and validation mIoU over the steps."""
    from matplotlib.figure import Figure

    figure = Figure((7, 4), layout="constrained")
    loss = figure.subplots()
    (loss_line,) = loss.plot([r["step"] for r in history], [r["loss"] for r in history], label="training loss")
    validated = [r for r in history if "miou" in r]
    miou = loss.twinx()
    (miou_line,) = miou.plot(
        [r["step"] for r in validated],
        [r["miou"] for r in validated],
        "o-",
        color="tab:orange",
        label="validation mIoU",
    )
    loss.set(xlabel="step", ylabel="training loss", ylim=(0, None))
    miou.set(ylabel="validation mIoU", ylim=(0, 1))
    loss.legend(handles=[loss_line, miou_line], loc="center right", frameon=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
