"""The configuration of a training run."""

from __future__ import annotations

from dataclasses import dataclass, fields
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from ..dispatch import BACKENDS
from .layouts import AUTO, LAYOUTS
from .logs import FORMATS
from .pictures import EXIF

CHOICES = {
    "layout": (AUTO, *LAYOUTS),
    "exif": EXIF,
    "amp": ("bf16", "none"),
    "optimizer": ("sgd", "adamw"),
    "schedule": ("constant", "cosine", "one-cycle"),
    "backend": tuple(BACKENDS),
}
BOUNDS = {
    "width": (0, 16),
    "num_classes": (1, 256),  # masks have 8 bits
    "ignore_index": (-(2**31), 2**31 - 1),
    "steps": (1, 2**31 - 1),
    "schedule_start": (0, 2**31 - 1),
    "batch_size": (1, 2**31 - 1),
    "accumulate": (1, 2**31 - 1),
    "ema": (0, 1),
    "lr": (0, 1e6),
    "momentum": (0, 1),
    "weight_decay": (0, 1e6),
    "seed": (0, 2**63 - 1),
    "eval_every": (1, 2**31 - 1),
    "workers": (1, 256),
}
"""The smallest and largest value of each number in TrainConfig. For EXCLUSIVE names the smallest is not allowed."""
EXCLUSIVE = {"width", "lr"}
MAX_SIDE = 65535
"""The largest height or width in pixels."""
RESUME_MAY_CHANGE = {
    "data", "layout", "palette", "steps", "schedule_start", "device", "amp", "channels_last", "backend", "eval_every",
    "workers", "log", "out",
}  # fmt: skip
"""The fields that a resumed run may override: they decide where and how long it trains, not what it learns."""
LATER_FIELDS = {"layout", "palette", "exif", "schedule_start", "accumulate", "ema", "log"}
"""The fields that checkpoints of earlier versions lack."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything a training run depends on. Checkpoints store it.

    Args:
        data: folder with pictures and masks, or None for generated digit scenes.
        layout, palette, exif: see :class:`~fastseg.training.data.LabelOptions`.
        model: a key of ``fastseg.models.MODELS``, or ``"demo"`` for the network of ``fastseg demo``.
        width: factor for the network's channel counts.
        size: (height, width) to resize images and masks to. None keeps the size of each image (digit scenes: 64x64).
        crop: (height, width) of random training crops, or None.
        num_classes: number of classes in the masks. None: that of the palette or the layout.
        ignore_index: label of pixels that belong to no class. None: 11 for CamVid's classes, else 255.
        class_weights: ``"none"``, ``"median-frequency"``, ``"camvid"``, or comma-separated numbers.
        steps: number of optimizer steps.
        batch_size: images that the network sees at once.
        accumulate: batches whose gradients are added up for one step.
        optimizer: ``"sgd"`` or ``"adamw"``.
        schedule: ``"constant"``, ``"cosine"`` or ``"one-cycle"``.
        schedule_start: step at which the schedule begins; the learning rate before it no longer matters.
        ema: decay of an exponential moving average of the weights, such as 0.999; 0 keeps none. Validation and
            `fastseg segment` use the averaged weights.
        lr: highest learning rate.
        momentum: SGD's momentum, or AdamW's first beta.
        weight_decay: weight decay.
        seed: seed of the initial weights and of the data order.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``. None selects CUDA if available.
        amp: ``"bf16"`` for autocast to bfloat16, or ``"none"``. None is ``"bf16"`` on CUDA.
        channels_last: channels_last memory format. None enables it on CUDA.
        backend: fastseg's backend, see :func:`fastseg.set_backend`.
        eval_every: steps between validations.
        workers: threads that prepare batches.
        log: further logs beside metrics.jsonl, separated by commas: ``"csv"``, ``"tensorboard"``.
        out: output folder of the run.

    Raises:
        ValueError: a value has the wrong type or is out of range.

    Example::

        >>> from fastseg.training.config import TrainConfig
        >>> TrainConfig(model="segnet-basic", steps=100).batch_size
        8
        >>> TrainConfig(momentum=2.0)
        Traceback (most recent call last):
        ValueError: momentum must be from 0 to 1, but is 2.0
    """

    data: str | None = None
    layout: str = AUTO
    palette: str | None = None
    exif: str = "upright"
    model: str = "segnet"
    width: float = 1.0
    size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    num_classes: int | None = None
    ignore_index: int | None = None
    class_weights: str = "none"
    steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    optimizer: str = "adamw"
    schedule: str = "one-cycle"
    schedule_start: int = 0
    ema: float = 0.0
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    seed: int = 0
    device: str | None = None
    amp: str | None = None
    channels_last: bool | None = None
    backend: str = "auto"
    eval_every: int = 200
    workers: int = 4
    log: str = ""
    out: str = "runs/train"

    def __post_init__(self) -> None:
        hints = get_type_hints(TrainConfig)
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if not has_type(value, hints[name]):
                raise ValueError(f"{name} must be of type {field.type}, but is {value!r}")
            if value is None:
                continue
            if name in CHOICES and value not in CHOICES[name]:
                raise ValueError(f"{name} must be one of {', '.join(CHOICES[name])}, but is {value!r}")
            if name in BOUNDS:
                smallest, largest = BOUNDS[name]
                if name in EXCLUSIVE and value == smallest:
                    raise ValueError(f"{name} must be above {smallest}, but is {value}")
                if not smallest <= value <= largest:
                    raise ValueError(f"{name} must be from {smallest} to {largest}, but is {value}")
            if isinstance(value, tuple) and not all(1 <= side <= MAX_SIDE for side in value):
                raise ValueError(f"{name} must be from 1x1 to {MAX_SIDE}x{MAX_SIDE}, but is {value}")
        if strange := [name for name in self.log.split(",") if name and name not in FORMATS]:
            raise ValueError(f"log must be made of {', '.join(FORMATS)}, but has {strange[0]!r}")


def has_type(value: Any, hint: Any) -> bool:
    """Whether `value` matches a type hint: a class, a tuple or a union. An int matches float; a bool is no int."""
    if isinstance(hint, UnionType):
        return any(has_type(value, option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        hints = get_args(hint)
        return isinstance(value, tuple) and len(value) == len(hints) and all(map(has_type, value, hints))
    return type(value) is hint or (hint is float and type(value) is int)
