"""The functions, with torch.nn.functional's names, arguments and errors."""

from .ops.batch_norm.functions import batch_norm_relu, batch_norm_relu_max_pool2d, batch_norm_relu_max_unpool2d
from .ops.boxes.paste import paste_boxes
from .ops.convolution.conv_transpose import conv_transpose2d, conv_transpose2d_affine_relu
from .ops.convolution.unpool_conv import max_unpool2d_conv2d
from .ops.crf.message import mean_field_message
from .ops.losses.confusion import confusion_matrix
from .ops.losses.cross_entropy import cross_entropy, cross_entropy_with_predictions
from .ops.losses.dice_cross_entropy import dice_cross_entropy
from .ops.losses.linear_cross_entropy import linear_cross_entropy
from .ops.losses.softmax_moments import softmax_moments
from .ops.losses.upsample import upsample_argmax
from .ops.losses.upsample_cross_entropy import upsample_cross_entropy, upsample_cross_entropy_with_predictions
from .ops.pooling.pool import max_pool2d, max_pool2d_with_offsets
from .ops.pooling.positions import indices_to_offsets, offsets_to_indices
from .ops.pooling.unpool import max_unpool2d, max_unpool2d_with_offsets

__all__ = [
    "batch_norm_relu",
    "batch_norm_relu_max_pool2d",
    "batch_norm_relu_max_unpool2d",
    "confusion_matrix",
    "conv_transpose2d",
    "conv_transpose2d_affine_relu",
    "cross_entropy",
    "cross_entropy_with_predictions",
    "dice_cross_entropy",
    "indices_to_offsets",
    "linear_cross_entropy",
    "max_pool2d",
    "max_pool2d_with_offsets",
    "max_unpool2d",
    "max_unpool2d_conv2d",
    "max_unpool2d_with_offsets",
    "mean_field_message",
    "offsets_to_indices",
    "paste_boxes",
    "softmax_moments",
    "upsample_argmax",
    "upsample_cross_entropy",
    "upsample_cross_entropy_with_predictions",
]
