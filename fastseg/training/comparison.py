"""A plain network compared with its swapped copy in training: what `fastseg demo` checks."""

from __future__ import annotations

import copy
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ..dispatch import backend
from ..models import PlainSegNet
from ..nn import CrossEntropyLoss
from ..swapping import SwapReport, swap
from .config import TrainConfig
from .data import DigitScenes
from .device import pick_device
from .drawing import Scene
from .trainer import Trainer

COMPARED_STEPS = 5
LOSS_TOLERANCE = 1e-3
"""For the losses over COMPARED_STEPS steps. They differ by rounding, which grows with every step."""
STEP_TOLERANCE = 1e-4
"""For the loss and the gradients of one step with interpreted kernels, in float32."""
MIN_MIOU = 0.5
"""The mIoU that the swapped network must reach on digits it was not trained on."""
TIMED_BATCH, TIMED_SIZE = 8, (360, 480)


@dataclass(frozen=True)
class TrainerPair:
    """Two runs from the same weights: plain PyTorch, and with fastseg swapped in. `report` is the swap's report."""

    plain: Trainer
    swapped: Trainer
    report: SwapReport


class StepDifference(NamedTuple):
    """The largest absolute differences from plain PyTorch in one training step."""

    loss: float
    gradients: float


class StepCost(NamedTuple):
    """Median milliseconds of a training step, and its peak memory in MiB."""

    ms: float
    mib: float


def demo_config(steps: int, seed: int, device: str | None, out: str) -> TrainConfig:
    """Return the configuration of `fastseg demo`: PlainSegNet on digit scenes.

    Raises:
        ValueError: a value is out of range.
    """
    return TrainConfig(
        model="demo",
        class_weights="1,1,1,1,1,1,1,1,1,1,0.25",  # most pixels are background
        steps=steps,
        batch_size=16,
        lr=4e-3,
        weight_decay=1e-2,
        amp="none",
        channels_last=True,
        eval_every=100,
        seed=seed,
        device=device,
        out=out,
    )


def make_pair(config: TrainConfig, path: Path) -> TrainerPair:
    """Prepare both runs of PlainSegNet on digit scenes.

    Args:
        config: the configuration of both.
        path: the checkpoint of the swapped run.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    train_set, val_set = (DigitScenes(split, seed=config.seed) for split in ("train", "val"))
    torch.manual_seed(config.seed)
    model = PlainSegNet()
    swapped_model = copy.deepcopy(model)
    report = swap(swapped_model)
    swapped = Trainer(config, swapped_model, train_set, val_set, path)
    plain = Trainer(config, model, train_set, val_set)
    _use_plain_loss(plain)
    return TrainerPair(plain, swapped, report)


def _use_plain_loss(trainer: Trainer) -> None:
    """Replace fastseg's loss by PyTorch's."""
    trainer.criterion = nn.CrossEntropyLoss(trainer.criterion.weight, ignore_index=trainer.train_set.ignore_index)


def loss_difference(pair: TrainerPair, steps: int = COMPARED_STEPS) -> float:
    """Train both for some steps on the same batches, and return the largest difference of their losses."""
    differences = []
    for step in range(steps):
        batch = pair.swapped.batch(step)
        differences.append((pair.swapped.training_step(*batch) - pair.plain.training_step(*batch)).abs())
    return torch.stack(differences).max().item()


def interpreted_step_difference() -> StepDifference:
    """Compare one training step on interpreted Triton kernels with plain PyTorch, in float32 on the CPU.

    It runs in its own process, because TRITON_INTERPRET must be set before triton is imported.

    Raises:
        RuntimeError: the process failed.
    """
    root = str(Path(__file__).parents[2])  # the folder that contains the package
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import print_step_difference; print_step_difference()"],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"the step with interpreted kernels failed: {done.stderr.strip()}")
    return StepDifference(**json.loads(done.stdout))


def print_step_difference() -> None:
    """Print the StepDifference of the backends "triton" and "torch" as JSON."""
    torch.manual_seed(0)
    plain = PlainSegNet()
    swapped = copy.deepcopy(plain)
    swap(swapped)
    image, mask = DigitScenes("train", size=32).sample(0)
    losses = []
    for model, loss, name in ((plain, nn.CrossEntropyLoss(), "torch"), (swapped, CrossEntropyLoss(), "triton")):
        with backend(name):
            losses.append(loss(model(image[None]), mask[None]))
            losses[-1].backward()
    parameters = zip(plain.parameters(), swapped.parameters(), strict=True)
    gradients = torch.stack([(a.grad - b.grad).abs().max() for a, b in parameters])
    difference = StepDifference((losses[0] - losses[1]).abs().item(), gradients.max().item())
    print(json.dumps(difference._asdict()))


def measure_steps(config: TrainConfig) -> dict[str, StepCost]:
    """Measure a training step of the plain and of the swapped network on a CUDA GPU.

    Args:
        config: its `device`, `seed` and `channels_last` are used.

    Returns:
        dict: the costs of ``"plain"`` and ``"swapped"``, for TIMED_BATCH scenes of TIMED_SIZE pixels.
    """
    scenes = DigitScenes("train", size=TIMED_SIZE, length=TIMED_BATCH)
    device = pick_device(config.device)
    images, masks = (torch.stack(tensors).to(device) for tensors in zip(*scenes, strict=True))
    costs = {}
    for name in ("plain", "swapped"):
        before = torch.cuda.memory_allocated(device)
        torch.manual_seed(config.seed)
        model = PlainSegNet()
        trainer = Trainer(config, model, scenes, scenes)
        if name == "plain":
            _use_plain_loss(trainer)
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
        costs[name] = StepCost(statistics.median(times), peak / 2**20)
        del model, trainer
    return costs


def failures(difference: float, interpreted: StepDifference | None, miou: float) -> list[str]:
    """Return a sentence for each check that failed.

    Args:
        difference: of the losses, see :func:`loss_difference`.
        interpreted: see :func:`interpreted_step_difference`; None if that step was not done.
        miou: the mIoU after training.

    Example::

        >>> from fastseg.training.comparison import StepDifference, failures
        >>> failures(1e-5, StepDifference(loss=1e-7, gradients=1e-6), miou=0.4)
        ['the mIoU is below 0.50']
    """
    # Each comparison is False for NaN, so that NaN fails.
    found = [] if difference <= LOSS_TOLERANCE else ["the losses of plain and swapped differ"]
    if interpreted is not None and not all(value <= STEP_TOLERANCE for value in interpreted):
        found.append("the interpreted kernels differ from torch")
    if not miou >= MIN_MIOU:
        found.append(f"the mIoU is below {MIN_MIOU:.2f}")
    return found


@torch.no_grad()
def validation_scenes(trainer: Trainer, count: int) -> list[Scene]:
    """Return the first `count` validation images with ground truth and prediction."""
    trainer.model.eval()
    scenes = []
    for index in range(count):
        image, mask = trainer.val_set.sample(index)
        prediction = trainer.logits(image[None])[0].argmax(0).cpu().numpy()
        picture = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        scenes.append(Scene(picture, mask.numpy(), prediction))
    return scenes
