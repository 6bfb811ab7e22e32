"""Batch norm + ReLU, alone or with max-pooling or max-unpooling, in Triton."""

from typing import TYPE_CHECKING

from ..lazy import submodules

if TYPE_CHECKING:
    from . import arguments, batch_norm, batch_norm_pool, batch_norm_unpool, common

__all__ = ["arguments", "batch_norm", "batch_norm_pool", "batch_norm_unpool", "common"]
__getattr__ = submodules(__name__, __all__)
