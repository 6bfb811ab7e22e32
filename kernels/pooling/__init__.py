"""Pooling and unpooling in Triton."""

from typing import TYPE_CHECKING

from ..lazy import submodules

if TYPE_CHECKING:
    from . import geometry, overlapping, pool, tiling, unpool, window_cells

__all__ = ["geometry", "overlapping", "pool", "tiling", "unpool", "window_cells"]
__getattr__ = submodules(__name__, __all__)
