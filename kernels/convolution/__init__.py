"""Transposed convolution, and unpooling + convolution, in Triton."""

from typing import TYPE_CHECKING

from ..lazy import submodules

if TYPE_CHECKING:
    from . import (
        conv_transpose,
        conv_transpose_bwd,
        conv_transpose_bwd_shuffle,
        conv_transpose_depthwise,
        conv_transpose_tma,
        gemm,
        options,
        problem,
        unpool_conv,
    )

__all__ = [
    "conv_transpose",
    "conv_transpose_bwd",
    "conv_transpose_bwd_shuffle",
    "conv_transpose_depthwise",
    "conv_transpose_tma",
    "gemm",
    "options",
    "problem",
    "unpool_conv",
]
__getattr__ = submodules(__name__, __all__)
