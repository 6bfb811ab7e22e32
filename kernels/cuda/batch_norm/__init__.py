"""Batch norm + ReLU, alone or with max-pooling, in CUDA C++."""

from typing import TYPE_CHECKING

from ...lazy import submodules

if TYPE_CHECKING:
    from . import batch_norm, batch_norm_pool, common

__all__ = ["batch_norm", "batch_norm_pool", "common"]
__getattr__ = submodules(__name__, __all__)
