"""Calls of the operators and the same calls in torch, to be verified, timed, counted or compiled.

Each function makes the cases of one operator at one size. `ours` and `theirs` take the same inputs and compute the
same, and autograd differentiates both. Inputs are random; on the meta device they have no data.
"""

from .boxes import paste_boxes
from .case import DTYPES, LAYOUTS, Case, Placement, random_gradients
from .crf import mean_field_message
from .layers import (
    batch_norm_relu,
    conv_transpose2d,
    conv_transpose2d_affine_relu,
    max_pool2d,
    max_unpool2d,
    max_unpool2d_anywhere,
    max_unpool2d_conv2d,
)
from .losses import (
    confusion_matrix,
    cross_entropy,
    dice_cross_entropy,
    linear_cross_entropy,
    softmax_moments,
    upsample_argmax,
    upsample_cross_entropy,
)
from .specs import ConvTransposeSpec, LossSpec, PoolSpec, ResizeSpec

__all__ = [
    "DTYPES",
    "LAYOUTS",
    "Case",
    "ConvTransposeSpec",
    "LossSpec",
    "Placement",
    "PoolSpec",
    "ResizeSpec",
    "batch_norm_relu",
    "confusion_matrix",
    "conv_transpose2d",
    "conv_transpose2d_affine_relu",
    "cross_entropy",
    "dice_cross_entropy",
    "linear_cross_entropy",
    "max_pool2d",
    "max_unpool2d",
    "max_unpool2d_anywhere",
    "max_unpool2d_conv2d",
    "mean_field_message",
    "paste_boxes",
    "random_gradients",
    "softmax_moments",
    "upsample_argmax",
    "upsample_cross_entropy",
]
