"""The training loop of `fastseg train` and `fastseg demo`.

The batch and the learning rate of a step are pure functions of (config, step). A checkpoint therefore needs only the
weights, the state of the optimizer and of the random number generators, and the step, for a resumed run to continue
exactly as an uninterrupted one does: bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..dispatch import backend
from ..functional import confusion_matrix
from ..nn import CrossEntropyLoss
from .batches import equal_sizes, prefetch, training_batch
from .checkpoint import save_checkpoint
from .class_weights import class_weights
from .config import TrainConfig
from .data import DigitScenes, SegmentationDataset, normalise
from .device import pick_device
from .logs import Record, RunLog
from .metrics import Scores, scores
from .networks import load_weights
from .optimizers import fits_optimizer, learning_rate, make_optimizer, restore_optimizer

LOG_EVERY = 10  # steps between records, because reading a loss synchronizes with the GPU


class NotFiniteError(ValueError):
    """The loss or the weights of a run are no longer finite."""


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
        averaged: the network that is scored: `model`, or with `config.ema` one with its averaged weights.
        notes: sentences about the data and the schedule that a user should read.
        rescued: whether an error in :meth:`run` was followed by a checkpoint of the last complete step.

    Raises:
        ValueError: the device does not support what `config` requires, or the class weights are invalid.
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
        self.amp = on_gpu if config.amp is None else config.amp == "bf16"
        channels_last = on_gpu if config.channels_last is None else config.channels_last
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model = model.to(self.device, memory_format=self.layout)
        self.weight = class_weights(config.class_weights, train_set)
        self.criterion: nn.Module = CrossEntropyLoss(self.weight, ignore_index=train_set.ignore_index).to(self.device)
        self.optimizer = make_optimizer(config, model)
        self._average = AveragedModel(self.model, use_buffers=True) if config.ema else None
        self.averaged: nn.Module = self._average.module if self._average else self.model
        self.step = 0
        self.log = RunLog(Path(config.out), tuple(filter(None, config.log.split(","))))
        self.notes: list[str] = []
        self.rescued, self._updating, self._saved = False, False, 0

    @property
    def history(self) -> list[Record]:
        """The records so far."""
        return self.log.history

    def logits(self, images: Tensor) -> Tensor:
        """Normalise images as the dataset provides them, and apply the model; in evaluation mode the averaged one.

        Shape:
            - images: (N, 3, H, W), from 0 to 1.
            - output: (N, K, H, W) for K classes.
        """
        images = normalise(images.to(self.device), self.train_set.mean, self.train_set.std)
        model = self.model if self.model.training else self.averaged
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            return model(images.contiguous(memory_format=self.layout))

    def training_step(self, images: Tensor, masks: Tensor) -> Tensor | None:
        """Do one step of the optimizer, on `config.accumulate` equal parts of a batch one after another.

        The gradients are those of the mean over all pixels of all parts. A batch in which no pixel counts changes
        nothing. That is only looked for in masks on the CPU, so that nothing waits for a GPU.

        Returns:
            Tensor or None: the loss before the step, a scalar on the device; None if no pixel counts.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        self.optimizer.zero_grad()
        parts = list(zip(images.chunk(self.config.accumulate), masks.chunk(self.config.accumulate), strict=True))
        shares = self._shares([mask for _, mask in parts])
        losses = []
        for (image, mask), share in zip(parts, shares, strict=True):
            if share == 0:
                continue
            loss = self.criterion(self.logits(image), mask.to(self.device))
            loss = loss if share == 1 else loss * share
            loss.backward()
            losses.append(loss.detach())
        if losses:
            self._updating = True  # an error from here on leaves weights that are neither old nor new
            self.optimizer.step()
            if self._average:
                self._update_average()
            self._updating = False
        self.step += 1
        return torch.stack(losses).sum() if losses else None

    def _shares(self, masks: list[Tensor]) -> list[float]:
        """The share of each mask in the mean over the pixels of all; 0 if none of its pixels counts."""
        if masks[0].device.type != "cpu":
            return [1 / len(masks)] * len(masks)
        totals = []
        for mask in masks:
            valid = mask != self.train_set.ignore_index
            if self.weight is None:
                totals.append(valid.sum().item())
            else:
                totals.append(self.weight.double()[mask[valid]].sum().item())
        return [total / sum(totals) if total else 0.0 for total in totals]

    def _update_average(self) -> None:
        """Move the average towards the weights: faster in the first steps, so that it forgets the random ones."""
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        self._average.multi_avg_fn = get_ema_multi_avg_fn(decay)
        self._average.update_parameters(self.model)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return images and masks of a step; 0 is the first."""
        size = self.config.batch_size * self.config.accumulate
        return training_batch(self.train_set, size, self.config.seed, step)

    @torch.no_grad()
    def evaluate(self, stop: Callable[[], bool] = lambda: False) -> Scores | None:
        """Score the model on the validation data. Images of different sizes do not share a batch.

        Args:
            stop: called before every batch; evaluation ends early once it returns True.

        Returns:
            Scores or None: None if `stop` returned True.

        Raises:
            ValueError: all pixels of the validation masks are ignored.
        """

        def batch(first: int) -> list[tuple[Tensor, Tensor]]:
            return equal_sizes([self.val_set.sample(index) for index in range(len(self.val_set))[first : first + size]])

        size, classes = self.config.batch_size, len(self.val_set.classes)
        matrix = torch.zeros(classes, classes, dtype=torch.int64, device=self.device)
        with self._evaluating():
            for groups in prefetch(batch, range(0, len(self.val_set), size), self.config.workers):
                if stop():
                    return None
                for images, masks in groups:
                    predicted = self.logits(images).argmax(1)
                    matrix += confusion_matrix(predicted, masks.to(self.device), classes, self.val_set.ignore_index)
        if stop():
            return None
        if not matrix.any():
            raise ValueError(f"no pixel of the validation masks has a class: all are {self.val_set.ignore_index}")
        return scores(matrix)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """A context in which the model is in evaluation mode."""
        self.model.eval()
        self.averaged.eval()
        try:
            yield
        finally:
            self.model.train()

    def run(
        self, stop: Callable[[], bool] = lambda: False, on_record: Callable[[Record], None] = lambda record: None
    ) -> Scores | None:
        """Train until `config.steps`.

        Whatever error ends it, a checkpoint of the last complete step is written first, if the weights are finite.

        Args:
            stop: called after every step; once it returns True, a checkpoint is written and training ends.
            on_record: called with each new record, for example to show progress.

        Returns:
            Scores or None: the scores of the last validation; None if `stop` returned True.

        Raises:
            NotFiniteError: the loss or the weights are not finite. The checkpoint of the last validation is kept.
        """
        self.rescued, self._updating, self._saved = False, False, self.step
        try:
            with backend(self.config.backend):
                return self._run(stop, on_record)
        except NotFiniteError:
            raise
        except Exception:
            self._rescue()
            raise
        finally:
            self.log.close()

    def _run(self, stop: Callable[[], bool], on_record: Callable[[Record], None]) -> Scores | None:
        config, losses, result = self.config, [], None
        self.model.train()
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
            self.log.append(record)
            stopping = stop()  # called once, so that the run never stops without a checkpoint
            if validate or stopping:
                save_checkpoint(self.path, self.state())
                self._saved = self.step
            on_record(record)
            if stopping:
                return None
        return result or self.evaluate(stop)

    def _rescue(self) -> None:
        """Write a checkpoint of the last complete step, unless there is one or the weights are not usable."""
        if self.step == self._saved or self._updating:
            return
        with contextlib.suppress(Exception):  # on a broken GPU or a full disk the error that led here says more
            if self._is_finite():
                save_checkpoint(self.path, self.state())
                self.rescued = True

    def _record(self, losses: list[Tensor | None]) -> Record:
        """The record of the steps with these losses. Raises NotFiniteError if a loss or a weight is not finite."""
        found = [loss for loss in losses if loss is not None]
        record: Record = {"step": self.step, "loss": torch.stack(found).mean().item() if found else None}
        record["lr"] = learning_rate(self.config, self.step - 1)
        if found and not math.isfinite(record["loss"]):
            raise NotFiniteError(
                f"the loss was {record['loss']} in one of the {len(losses)} steps up to step {self.step}; "
                "try a lower lr"
            )
        if not self._is_finite():
            raise NotFiniteError(f"the weights are no longer finite after step {self.step}; try a lower lr")
        return record

    def _is_finite(self) -> bool:
        """Whether weights and running statistics are finite. The last loss cannot tell: it is from before the step."""
        tensors = [tensor for tensor in self.model.state_dict().values() if tensor.is_floating_point()]
        return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())

    def state(self) -> dict[str, Any]:
        """Return the content of a checkpoint, for :func:`fastseg.training.checkpoint.save_checkpoint`."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        config = asdict(self.config) | {"num_classes": len(self.train_set.classes)}
        table = None
        if not isinstance(self.train_set, DigitScenes):
            config |= {"ignore_index": self.train_set.ignore_index, "layout": self.train_set.layout.name}
            table = self.train_set.masks.table
        return {
            "config": config,
            "model": self.model.state_dict(),
            "ema": self.averaged.state_dict() if self._average else None,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "rng": rng,
            "mean": self.train_set.mean,
            "std": self.train_set.std,
            "classes": self.train_set.classes,
            "ignore_index": self.train_set.ignore_index,
            "colours": () if table is None else tuple((*colour, label) for colour, label in table.colours.items()),
        }

    def restore(self, state: dict[str, Any], path: Path) -> None:
        """Continue from a checkpoint, including its history up to its step.

        Args:
            state: the content of the checkpoint.
            path: its file; metrics.jsonl is read from the same folder.

        Raises:
            ValueError: the weights, or the state of the optimizer or of a generator, do not fit this run, or its
                classes are others.
        """
        for name in ("classes", "ignore_index"):
            ours = getattr(self.train_set, name)
            if ours != state[name]:
                raise ValueError(f"{name} must be {state[name]}, because {path} was trained with that, but is {ours}")
        load_weights(self.model, state, path)
        if self._average:
            load_weights(self.averaged, state, path, averaged=True)
            self._average.n_averaged.fill_(state["step"])  # only whether it is 0 matters
        if not fits_optimizer(state["optimizer"]["state"], self.config, self.model):
            raise ValueError(f"the state of the optimizer in {path} does not fit {self.config.optimizer}")
        restore_optimizer(self.optimizer, state["optimizer"]["state"])
        self.step = state["step"]
        try:
            torch.set_rng_state(state["rng"]["cpu"])
            if self.device.type == "cuda" and "cuda" in state["rng"]:
                torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        except RuntimeError as error:
            raise ValueError(f"the state of the random number generator in {path} is invalid: {error}") from error
        self.log.restore(path.parent, self.step)
