"""Pooling and unpooling in CUDA C++."""

from typing import TYPE_CHECKING

from ...lazy import submodules

if TYPE_CHECKING:
    from . import pool, tiling, unpool

__all__ = ["pool", "tiling", "unpool"]
__getattr__ = submodules(__name__, __all__)
