"""Batch norm + ReLU, alone or with max-pooling or max-unpooling, in C++ for CPUs."""

from typing import TYPE_CHECKING

from ...lazy import submodules

if TYPE_CHECKING:
    from . import batch_norm, batch_norm_pool, batch_norm_unpool

__all__ = ["batch_norm", "batch_norm_pool", "batch_norm_unpool"]
__getattr__ = submodules(__name__, __all__)
