"""Modules: torch.nn's names, constructor arguments and state_dict keys, on fastseg.functional."""

from .conv import ConvTranspose2d
from .loss import CrossEntropyLoss, DiceCrossEntropyLoss
from .pool import MaxPool2d, MaxUnpool2d

__all__ = ["ConvTranspose2d", "CrossEntropyLoss", "DiceCrossEntropyLoss", "MaxPool2d", "MaxUnpool2d"]
