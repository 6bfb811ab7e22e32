"""Modules with torch.nn's names, constructor arguments and state_dict keys, on the functions of fastseg.functional."""

from .batch_norm import BatchNormReLU2d, BatchNormReLUMaxPool2d, BatchNormReLUMaxUnpool2d, convert_sync_batchnorm
from .conv import ConvTranspose2d, ConvTransposeBatchNormReLU2d
from .loss import CrossEntropyLoss, DiceCrossEntropyLoss, LinearCrossEntropyLoss, UpsampleCrossEntropyLoss
from .pool import MaxPool2d, MaxPool2dWithOffsets, MaxUnpool2d

__all__ = [
    "BatchNormReLU2d",
    "BatchNormReLUMaxPool2d",
    "BatchNormReLUMaxUnpool2d",
    "ConvTranspose2d",
    "ConvTransposeBatchNormReLU2d",
    "CrossEntropyLoss",
    "DiceCrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "MaxPool2d",
    "MaxPool2dWithOffsets",
    "MaxUnpool2d",
    "UpsampleCrossEntropyLoss",
    "convert_sync_batchnorm",
]
