"""Networks by name, with the weights of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..models import MODELS, PlainSegNet


def build_model(name: str, num_classes: int, width: float) -> nn.Module:
    """Build a network with fresh parameters.

    Args:
        name: a key of ``fastseg.models.MODELS``, or ``"demo"`` for :class:`fastseg.models.PlainSegNet`, which has one
            fixed width.
        num_classes: number of output channels.
        width: factor for the network's channel counts.

    Raises:
        ValueError: there is no network of that name.

    Example::

        >>> from fastseg.training.networks import build_model
        >>> type(build_model("segnet-basic", num_classes=11, width=0.125)).__name__
        'SegNetBasic'
    """
    if name == "demo":
        return PlainSegNet(num_classes)
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, but is {name!r}")
    return MODELS[name](num_classes=num_classes, width=width)


def load_weights(model: nn.Module, state: dict[str, Any], path: str | Path, averaged: bool = False) -> None:
    """Load the weights of a checkpoint into `model`.

    Args:
        model: the network that the checkpoint was written for.
        state: the checkpoint, as :func:`~fastseg.training.checkpoint.load_checkpoint` returns it.
        path: the checkpoint's file, for error messages.
        averaged: load the averaged weights, which a run with `ema` keeps, if the checkpoint has some.

    Raises:
        ValueError: the weights do not fit the network.
    """
    try:
        model.load_state_dict(state["ema"] if averaged and state["ema"] is not None else state["model"])
    except RuntimeError as error:
        raise ValueError(f"the weights in {path} do not fit the model {state['config']['model']!r}: {error}") from error


def min_image_side(model: nn.Module) -> int:
    """Return the smallest height or width of an image that the network can process."""
    return getattr(model, "MIN_SIZE", 1)


def check_image_size(model: nn.Module, height: int, width: int) -> None:
    """Raise ValueError if images of this size are too small for the network."""
    smallest = min_image_side(model)
    if min(height, width) < smallest:
        raise ValueError(
            f"{type(model).__name__} needs images of at least {smallest}x{smallest}, but gets {height}x{width}; "
            "set a larger size"
        )
