"""The functions, with torch.nn.functional's names, arguments and errors."""

from .ops.conv_transpose import conv_transpose2d
from .ops.cross_entropy import cross_entropy, cross_entropy_with_predictions
from .ops.dice_cross_entropy import dice_cross_entropy
from .ops.pool import max_pool2d, max_pool2d_with_offsets
from .ops.unpool import max_unpool2d, max_unpool2d_with_offsets
from .ops.windows import indices_to_offsets, offsets_to_indices

__all__ = [
    "conv_transpose2d",
    "cross_entropy",
    "cross_entropy_with_predictions",
    "dice_cross_entropy",
    "indices_to_offsets",
    "max_pool2d",
    "max_pool2d_with_offsets",
    "max_unpool2d",
    "max_unpool2d_with_offsets",
    "offsets_to_indices",
]
