"""The functions, with torch.nn.functional's names, arguments and errors."""

from .ops.confusion import confusion_matrix
from .ops.conv_transpose import conv_transpose2d
from .ops.cross_entropy import cross_entropy, cross_entropy_with_predictions
from .ops.linear_cross_entropy import linear_cross_entropy
from .ops.pool import max_pool2d, max_pool2d_with_offsets
from .ops.unpool import max_unpool2d, max_unpool2d_with_offsets
from .ops.upsample import upsample_argmax
from .ops.upsample_cross_entropy import upsample_cross_entropy
from .ops.windows import indices_to_offsets, offsets_to_indices

__all__ = [
    "confusion_matrix",
    "conv_transpose2d",
    "cross_entropy",
    "cross_entropy_with_predictions",
    "indices_to_offsets",
    "linear_cross_entropy",
    "max_pool2d",
    "max_pool2d_with_offsets",
    "max_unpool2d",
    "max_unpool2d_with_offsets",
    "offsets_to_indices",
    "upsample_argmax",
    "upsample_cross_entropy",
]
