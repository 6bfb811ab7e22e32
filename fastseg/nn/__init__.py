"""Modules: torch.nn's names, constructor arguments and state_dict keys, on fastseg.functional."""

from .conv import ConvTranspose2d
from .head_loss import LinearCrossEntropyLoss, UpsampleCrossEntropyLoss
from .loss import CrossEntropyLoss
from .pool import MaxPool2d, MaxUnpool2d

__all__ = [
    "ConvTranspose2d",
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "MaxPool2d",
    "MaxUnpool2d",
    "UpsampleCrossEntropyLoss",
]
