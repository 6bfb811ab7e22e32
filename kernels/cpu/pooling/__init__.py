"""Pooling and unpooling in C++ for CPUs."""

from typing import TYPE_CHECKING

from ...lazy import submodules

if TYPE_CHECKING:
    from . import pool, unpool

__all__ = ["pool", "unpool"]
__getattr__ = submodules(__name__, __all__)
