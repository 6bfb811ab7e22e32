"""The training loop of `fastseg train` and `fastseg demo`.

The batch and the learning rate of a step are pure functions of (config, step). A checkpoint therefore needs only the
weights, the state of the optimizer and of the random number generators, and the step, for a resumed run to continue
exactly as an uninterrupted one does: bit for bit on a CPU.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..atomic_write import atomic_write
from ..dispatch import backend
from ..functional import confusion_matrix
from ..nn import CrossEntropyLoss
from .batches import collate, prefetch, training_batch
from .checkpoint import save_checkpoint
from .class_weights import class_weights
from .config import TrainConfig
from .data import SegmentationDataset, normalise
from .device import pick_device
from .metrics import Scores, scores
from .networks import check_image_size, load_weights, min_image_side

LOG_EVERY = 10  # steps between records, because reading a loss synchronizes with the GPU
METRICS_FILE = "metrics.jsonl"

Record = dict[str, Any]
"""A line of metrics.jsonl: "step", "loss" (mean since the previous record), "lr", and "miou" after a validation."""


def learning_rate(config: TrainConfig, step: int) -> float:
    r"""Return the learning rate of a step.

    ``"constant"`` is `config.lr`. ``"cosine"`` falls from `config.lr` to 0 along half a cosine:
    :math:`\text{lr} \cdot (1 + \cos(\pi \cdot \text{step} / \text{steps})) / 2`. ``"one-cycle"`` first rises linearly
    from 4 % of `config.lr` during a fifth of the steps, then falls in the same way.

    Args:
        config: its `lr`, `schedule` and `steps` are used.
        step: 0 for the first step.

    Example::

        >>> from fastseg.training.config import TrainConfig
        >>> from fastseg.training.trainer import learning_rate
        >>> learning_rate(TrainConfig(schedule="cosine", lr=0.1, steps=100), 50)
        0.05
    """
    if config.schedule == "constant":
        return config.lr
    rise = 0.2 * config.steps if config.schedule == "one-cycle" else 0
    if step < rise:
        return config.lr * (0.04 + 0.96 * step / rise)
    return config.lr * (0.5 + 0.5 * math.cos(math.pi * (step - rise) / (config.steps - rise)))


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer that `config` names, for the parameters of `model`."""
    options = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=config.momentum, **options)
    return torch.optim.AdamW(model.parameters(), betas=(config.momentum, 0.999), **options)


class Trainer:
    """One training run: its model, optimizer, data, and the step it has reached.

    It appends a record to ``<config.out>/metrics.jsonl`` every LOG_EVERY steps, and writes a checkpoint after every
    validation.

    Args:
        config: the configuration.
        model: the network; it is moved to the device of the run.
        train_set: training data.
        val_set: validation data.
        path: file of the checkpoint. Default: ``<config.out>/checkpoint.pt``.

    Attributes:
        step: number of steps done.
        history: the records so far.
        criterion: the loss, :class:`fastseg.nn.CrossEntropyLoss`.

    Raises:
        ValueError: the images are too small for the network, or the device does not support what `config` requires.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        train_set: SegmentationDataset,
        val_set: SegmentationDataset,
        path: Path | None = None,
    ) -> None:
        self.config, self.train_set, self.val_set = config, train_set, val_set
        self.path = path or Path(config.out) / "checkpoint.pt"
        self.device = pick_device(config.device)
        on_gpu = self.device.type == "cuda"
        if config.amp and not on_gpu:
            raise ValueError(f"amp needs a CUDA device, but device is {self.device}")
        for dataset in (train_set, val_set) if min_image_side(model) > 1 else ():
            check_image_size(model, *dataset.sample(0)[0].shape[-2:])
        self.amp = on_gpu if config.amp is None else config.amp
        channels_last = on_gpu if config.channels_last is None else config.channels_last
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model = model.to(self.device, memory_format=self.layout)
        weight = class_weights(config.class_weights, train_set)
        self.criterion: nn.Module = CrossEntropyLoss(weight, ignore_index=train_set.ignore_index).to(self.device)
        self.optimizer = make_optimizer(config, model)
        self.step = 0
        self.history: list[Record] = []

    def logits(self, images: Tensor) -> Tensor:
        """Normalise images as the dataset provides them, and apply the model.

        Shape:
            - images: (N, 3, H, W), from 0 to 1.
            - output: (N, K, H, W) for K classes.
        """
        images = normalise(images.to(self.device), self.train_set.mean, self.train_set.std)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            return self.model(images.contiguous(memory_format=self.layout))

    def training_step(self, images: Tensor, masks: Tensor) -> Tensor:
        """Do one step of the optimizer.

        Returns:
            Tensor: the loss before the step, a scalar on the device.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        self.optimizer.zero_grad()
        loss = self.criterion(self.logits(images), masks.to(self.device))
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return loss.detach()

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return images and masks of a step; 0 is the first."""
        return training_batch(self.train_set, self.config.batch_size, self.config.seed, step)

    @torch.no_grad()
    def evaluate(self, stop: Callable[[], bool] = lambda: False) -> Scores | None:
        """Score the model on the validation data.

        Args:
            stop: called before every batch; evaluation ends early once it returns True.

        Returns:
            Scores or None: None if `stop` returned True.

        Raises:
            ValueError: all pixels of the validation masks are ignored.
        """

        def batch(first: int) -> tuple[Tensor, Tensor]:
            return collate([self.val_set.sample(index) for index in range(len(self.val_set))[first : first + size]])

        size, classes = self.config.batch_size, len(self.val_set.classes)
        matrix = torch.zeros(classes, classes, dtype=torch.int64, device=self.device)
        self.model.eval()
        for images, masks in prefetch(batch, range(0, len(self.val_set), size), self.config.workers):
            if stop():
                break
            predicted = self.logits(images).argmax(1)
            matrix += confusion_matrix(predicted, masks.to(self.device), classes, self.val_set.ignore_index)
        self.model.train()
        if stop():
            return None
        if not matrix.any():
            raise ValueError(f"no pixel of the validation masks has a class: all are {self.val_set.ignore_index}")
        return scores(matrix)

    def run(
        self, stop: Callable[[], bool] = lambda: False, on_record: Callable[[Record], None] = lambda record: None
    ) -> Scores | None:
        """Train until `config.steps`.

        Args:
            stop: called after every step; once it returns True, a checkpoint is written and training ends.
            on_record: called with each new record, for example to show progress.

        Returns:
            Scores or None: the scores of the last validation; None if `stop` returned True.

        Raises:
            ValueError: the loss or the weights are not finite. The checkpoint of the last validation is kept.
        """
        config, losses, result = self.config, [], None
        self.model.train()
        with backend(config.backend):
            for images, masks in prefetch(self.batch, range(self.step, config.steps), config.workers):
                losses.append(self.training_step(images, masks))
                validate = self.step % config.eval_every == 0 or self.step == config.steps
                if not (validate or stop() or self.step % LOG_EVERY == 0):
                    continue
                record = self._record(losses)
                losses.clear()
                result = self.evaluate(stop) if validate else None
                if result:
                    record["miou"] = result.miou
                self._log(record)
                on_record(record)
                stopping = stop()  # called once, so that the run never stops without a checkpoint
                if validate or stopping:
                    save_checkpoint(self.path, self.state())
                if stopping:
                    return None
            return result or self.evaluate(stop)

    def _record(self, losses: list[Tensor]) -> Record:
        """The record of the steps with these losses. Raises ValueError if a loss or a weight is not finite."""
        record = {"step": self.step, "loss": torch.stack(losses).mean().item()}
        record["lr"] = learning_rate(self.config, self.step - 1)
        if not math.isfinite(record["loss"]):
            raise ValueError(
                f"the loss was {record['loss']} in one of the {len(losses)} steps up to step {self.step}; "
                "try a lower lr, or look for images in which every pixel is ignored"
            )
        if not self._is_finite():
            raise ValueError(f"the weights are no longer finite after step {self.step}; try a lower lr")
        return record

    def _is_finite(self) -> bool:
        """Whether weights and running statistics are finite. The last loss cannot tell: it is from before the step."""
        tensors = [tensor for tensor in self.model.state_dict().values() if tensor.is_floating_point()]
        return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())

    def _log(self, record: Record) -> None:
        """Append a record to the history and to metrics.jsonl."""
        self.history.append(record)
        path = Path(self.config.out) / METRICS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def state(self) -> dict[str, Any]:
        """Return the content of a checkpoint, for :func:`fastseg.training.checkpoint.save_checkpoint`."""
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
        """Continue from a checkpoint, including its history up to its step.

        Args:
            state: the content of the checkpoint.
            path: its file; metrics.jsonl is read from the same folder.

        Raises:
            ValueError: the weights, or the state of the optimizer or of a generator, do not fit this run.
        """
        load_weights(self.model, state, path)
        if not self._fits_optimizer(state["optimizer"]["state"]):
            raise ValueError(f"the state of the optimizer in {path} does not fit {self.config.optimizer}")
        # The parameter groups follow from the config, so they are not read from the checkpoint.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        self.step = state["step"]
        try:
            torch.set_rng_state(state["rng"]["cpu"])
            if self.device.type == "cuda" and "cuda" in state["rng"]:
                torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        except RuntimeError as error:
            raise ValueError(f"the state of the random number generator in {path} is invalid: {error}") from error
        self.history = _read_records(path.with_name(METRICS_FILE), self.step)
        with atomic_write(Path(self.config.out) / METRICS_FILE) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in self.history), encoding="utf-8")

    def _fits_optimizer(self, state: dict[Any, Any]) -> bool:
        """Whether exactly the trainable parameters have state, and exactly the tensors that this optimizer keeps."""
        names = {"momentum_buffer"} if self.config.optimizer == "sgd" else {"step", "exp_avg", "exp_avg_sq"}
        if names == {"momentum_buffer"} and not self.config.momentum:
            return not any(state.values())  # SGD without momentum keeps nothing
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


def _read_records(path: Path, step: int) -> list[Record]:
    """The records up to `step` in a metrics.jsonl; an empty list if there is no such file."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # a run that was killed may leave an incomplete line
            break
        if not (isinstance(record, dict) and record.keys() >= {"step", "loss", "lr"}) or record["step"] > step:
            break
        records.append(record)
    return records
