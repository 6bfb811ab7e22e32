"""The training loop that `fastseg train` and `fastseg demo` share.

The batch of a step and its learning rate are pure functions of (config, step). So a checkpoint needs no more than the
weights, the optimizer's state, the random number generators and the step for a resumed run to go on exactly as an
uninterrupted one, bit for bit on a CPU.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from ..atomic_write import atomic_write
from ..dispatch import backend
from ..nn import CrossEntropyLoss
from . import data, metrics
from .checkpoint import TrainConfig, load_weights, save_checkpoint
from .device import pick_device

LOG_EVERY = 10  # steps between records: reading a loss makes a GPU wait


MAY_CHANGE = {"data", "steps", "device", "amp", "channels_last", "backend", "eval_every", "workers", "out"}
"""What a resumed run may be given anew: where and how long it runs, but not what it learns."""


def make_folder(out: Path) -> None:
    """Make the folder `out` where it is missing; ValueError where no file can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"--out {out} must be a folder to write to: {error.strerror}") from error


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of step 0, 1, ...: constant; a half cosine to 0 ("cosine"); or the same after a rise ("one-cycle")."""
    if config.schedule == "constant":
        return config.lr
    rise = 0.2 * config.steps if config.schedule == "one-cycle" else 0
    if step < rise:
        return config.lr * (0.04 + 0.96 * step / rise)
    return config.lr * (0.5 + 0.5 * math.cos(math.pi * (step - rise) / (config.steps - rise)))


def datasets(
    config: TrainConfig,
) -> tuple[data.DigitScenes | data.FolderDataset, data.DigitScenes | data.FolderDataset]:
    """The data to train on and the data to validate on."""
    if config.data is None:
        if config.num_classes != len(data.DIGIT_CLASSES) or config.crop:
            raise ValueError(
                f"digit scenes have {len(data.DIGIT_CLASSES)} classes and no crops; give --data for others"
            )
        if config.ignore_index != TrainConfig.ignore_index:
            raise ValueError("digit scenes have no ignored pixels; --ignore-index needs --data")
        return tuple(data.DigitScenes(split, config.size or 64, config.seed) for split in data.SPLITS)
    shared = (config.size, config.ignore_index, config.num_classes)
    train = data.FolderDataset(config.data, "train", *shared, augment=True, crop=config.crop, seed=config.seed)
    return train, data.FolderDataset(config.data, "val", *shared)


def class_weights(text: str, dataset: data.DigitScenes | data.FolderDataset) -> Tensor | None:
    """The loss's weights, float32 [classes]: "none" (None), "median-frequency", "camvid" or "0.5,1,..."."""
    classes = len(dataset.classes)
    if text == "none":
        return None
    if text == "median-frequency":
        return data.median_frequency_weights(dataset, classes, dataset.ignore_index)
    try:
        weights = data.CAMVID_CLASS_WEIGHTS if text == "camvid" else [float(weight) for weight in text.split(",")]
    except ValueError:
        raise ValueError(f"class weights must be none, median-frequency, camvid or w0,w1,..., not {text!r}") from None
    if len(weights) != classes or not all(0 <= weight < math.inf for weight in weights):
        raise ValueError(
            f"class weights must be {classes} finite numbers of at least 0, one for each class, not {text}"
        )
    return torch.tensor(weights)


def collate(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Images float32 [N, 3, H, W] and masks int64 [N, H, W]. ValueError where the samples differ in size."""
    images, masks = zip(*samples, strict=True)
    if len({image.shape for image in images}) > 1:
        raise ValueError("the pictures differ in size: give one to resize them to, --size HxW")
    return torch.stack(images), torch.stack(masks)


def training_batch(
    dataset: data.DigitScenes | data.FolderDataset, batch_size: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """The batch of step 0, 1, ...: epochs follow each other, each in an order of its own drawn from (seed, epoch)."""
    samples = []
    for place in range(step * batch_size, (step + 1) * batch_size):
        epoch, position = divmod(place, len(dataset))
        if position == 0 or not samples:
            order = np.random.default_rng((seed, epoch)).permutation(len(dataset))
        samples.append(dataset.sample(int(order[position]), epoch))
    return collate(samples)


def prefetched(make: Callable[[int], Any], items: range, workers: int) -> Iterator[Any]:
    """``make(item) for item in items``, in order, made by threads up to `workers` items ahead."""
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[Future[Any]] = deque()
        for item in items:
            ahead.append(pool.submit(make, item))
            if len(ahead) > workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


class Trainer:
    """One run: the model, its optimizer, its data, and the step it has come to.

    Writes `<out>/metrics.jsonl`, a record every LOG_EVERY steps, and the checkpoint `path` (by default
    `<out>/checkpoint.pt`) after every validation. `history` holds the records: step, loss (mean since the record
    before), lr, and miou where there was a validation. Messages and progress go to stderr.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        train_set: data.DigitScenes | data.FolderDataset,
        val_set: data.DigitScenes | data.FolderDataset,
        path: Path | None = None,
    ) -> None:
        self.config, self.train_set, self.val_set = config, train_set, val_set
        self.path = path or Path(config.out) / "checkpoint.pt"
        self.device = pick_device(config.device)
        on_gpu = self.device.type == "cuda"
        if config.amp and not on_gpu:
            raise ValueError("--amp needs a CUDA device")
        if least := getattr(model, "LEAST", None):
            for dataset in (train_set, val_set):
                height, width = dataset.sample(0)[0].shape[-2:]
                if min(height, width) < least:
                    raise ValueError(
                        f"{config.model} needs pictures of at least {least}x{least}, not {height}x{width}; "
                        "give a larger --size"
                    )
        self.amp = on_gpu if config.amp is None else config.amp
        channels_last = on_gpu if config.channels_last is None else config.channels_last
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model = model.to(self.device, memory_format=self.layout)
        weight = class_weights(config.class_weights, train_set)
        self.criterion = CrossEntropyLoss(weight, ignore_index=train_set.ignore_index).to(self.device)
        if config.optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
                model.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay
            )
        else:
            betas = (config.momentum, 0.999)
            self.optimizer = torch.optim.AdamW(
                model.parameters(), config.lr, betas=betas, weight_decay=config.weight_decay
            )
        self.step = 0
        self.history: list[dict[str, Any]] = []

    def logits(self, images: Tensor) -> Tensor:
        """The model's answer to images as the data set gives them, [N, 3, H, W] in 0..1: [N, classes, H, W]."""
        images = data.normalise(images.to(self.device), self.train_set.mean, self.train_set.std)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            return self.model(images.contiguous(memory_format=self.layout))

    def training_step(self, images: Tensor, masks: Tensor) -> Tensor:
        """One step of the optimizer; the loss before it, a scalar on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        self.optimizer.zero_grad()
        loss = self.criterion(self.logits(images), masks.to(self.device))
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return loss.detach()

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images and masks of step 0, 1, ..."""
        return training_batch(self.train_set, self.config.batch_size, self.config.seed, step)

    @torch.no_grad()
    def evaluate(self, stop: Callable[[], bool] = lambda: False) -> metrics.Scores | None:
        """The scores on the validation data; None where `stop` asked to end earlier."""

        def batch(first: int) -> tuple[Tensor, Tensor]:
            return collate([self.val_set.sample(index) for index in range(len(self.val_set))[first : first + size]])

        size, classes = self.config.batch_size, len(self.val_set.classes)
        matrix = torch.zeros(classes, classes, dtype=torch.int64, device=self.device)
        self.model.eval()
        for images, masks in prefetched(batch, range(0, len(self.val_set), size), self.config.workers):
            if stop():
                break
            predicted = self.logits(images).argmax(1)
            matrix += metrics.confusion_matrix(predicted, masks.to(self.device), classes, self.val_set.ignore_index)
        self.model.train()
        if stop():
            return None
        if not matrix.any():
            raise ValueError(f"no pixel of the validation masks has a class: all are {self.val_set.ignore_index}")
        return metrics.scores(matrix)

    def run(self, stop: Callable[[], bool] = lambda: False) -> metrics.Scores | None:
        """Train up to config.steps, then give the last validation's scores.

        `stop` is asked after every step: where it says so, a checkpoint is written and None is given. Raises
        ValueError where the loss or the weights are not finite; the checkpoint before it stays.
        """
        config, losses, scores = self.config, [], None
        self.model.train()
        with backend(config.backend), _Display(config.steps, self.step) as display:
            for images, masks in prefetched(self.batch, range(self.step, config.steps), config.workers):
                losses.append(self.training_step(images, masks))
                validate = self.step % config.eval_every == 0 or self.step == config.steps
                if not (validate or stop() or self.step % LOG_EVERY == 0):
                    continue
                record = {"step": self.step, "loss": torch.stack(losses).mean().item()}
                record["lr"] = learning_rate(config, self.step - 1)
                if not math.isfinite(record["loss"]):
                    raise ValueError(
                        f"the loss was {record['loss']} in one of the {len(losses)} steps up to step {self.step}; "
                        "try a lower --lr, or look for pictures of ignored pixels alone"
                    )
                if not self._finite():
                    raise ValueError(f"the weights are no longer finite after step {self.step}; try a lower --lr")
                losses.clear()
                scores = self.evaluate(stop) if validate else None
                if scores:
                    record["miou"] = scores.miou
                self._log(record)
                display.show(record)
                stopping = stop()  # asked once, so that nothing stops without a checkpoint
                if validate or stopping:
                    save_checkpoint(self.path, self.state())
                if stopping:
                    return None
            return scores or self.evaluate(stop)

    def _finite(self) -> bool:
        """Whether the weights and running statistics are finite, which the loss before the last step does not tell."""
        tensors = [tensor for tensor in self.model.state_dict().values() if tensor.is_floating_point()]
        return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())

    def _log(self, record: dict[str, Any]) -> None:
        self.history.append(record)
        path = Path(self.config.out) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, see fastseg.training.checkpoint."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "rng": rng,
            "mean": self.train_set.mean,
            "std": self.train_set.std,
            "classes": self.train_set.classes,
            "ignore_index": self.train_set.ignore_index,
        }

    def restore(self, state: dict[str, Any], path: Path) -> None:
        """Go on from a checkpoint read from `path`: its history too, as far as the step it was written at.

        Raises ValueError where the weights, the optimizer's state or the generators' do not fit this run.
        """
        load_weights(self.model, state, path)
        if not self._fits_optimizer(state["optimizer"]["state"]):
            raise ValueError(f"the state of the optimizer in {path} does not fit {self.config.optimizer}")
        # The groups follow from the config.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        self.step = state["step"]
        try:
            torch.set_rng_state(state["rng"]["cpu"])
            if self.device.type == "cuda" and "cuda" in state["rng"]:
                torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        except RuntimeError as error:
            raise ValueError(f"the random number generator's state in {path} is not one: {error}") from error
        self.history = _records(path.with_name("metrics.jsonl"), self.step)
        with atomic_write(Path(self.config.out) / "metrics.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in self.history), encoding="utf-8")

    def _fits_optimizer(self, state: dict[Any, Any]) -> bool:
        """Whether every parameter that is trained has the state that this optimizer keeps for it, and no other has."""
        names = {"momentum_buffer"} if self.config.optimizer == "sgd" else {"step", "exp_avg", "exp_avg_sq"}
        if names == {"momentum_buffer"} and not self.config.momentum:
            return not any(state.values())  # none is kept
        trained = {index: p for index, p in enumerate(self.model.parameters()) if p.requires_grad}
        if state.keys() != trained.keys():
            return False
        for index, parameter in trained.items():
            entry = state[index]
            if not isinstance(entry, dict) or entry.keys() != names:
                return False
            for name, value in entry.items():
                shape = () if name == "step" else parameter.shape
                if not (isinstance(value, Tensor) and value.is_floating_point() and value.shape == shape):
                    return False
        return True


def _records(path: Path, step: int) -> list[dict[str, Any]]:
    """The records up to that step in a metrics.jsonl, none where there is no such file."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # a run that was killed left it half written
            break
        if not (isinstance(record, dict) and record.keys() >= {"step", "loss", "lr"}) or record["step"] > step:
            break
        records.append(record)
    return records


class _Display:
    """Steps, loss, rate and mIoU on stderr: a progress bar on a terminal, else some twenty lines a run."""

    def __init__(self, steps: int, step: int) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.steps, self.printed, self.miou = steps, step, ""
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self.progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.progress.add_task("", total=steps, completed=step)

    def __enter__(self) -> _Display:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def show(self, record: dict[str, Any]) -> None:
        if "miou" in record:
            self.miou = f"  mIoU {record['miou']:.3f}"
        text = f"loss {record['loss']:.4f}  lr {record['lr']:.2e}{self.miou}"
        self.progress.update(self.task, completed=record["step"], description=text)
        due = record["step"] - self.printed >= self.steps / 20 or "miou" in record or record["step"] == self.steps
        if due and not self.console.is_terminal:
            self.printed = record["step"]
            self.console.print(f"step {record['step']}/{self.steps}  {text}")
