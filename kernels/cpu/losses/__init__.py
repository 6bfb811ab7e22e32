"""Losses over every pixel, and what reads logits as they do, in C++ for the CPU."""

from typing import TYPE_CHECKING

from ...lazy import submodules

if TYPE_CHECKING:
    from . import cross_entropy, cross_entropy_bwd, cross_entropy_one_pass

__all__ = ["cross_entropy", "cross_entropy_bwd", "cross_entropy_one_pass"]
__getattr__ = submodules(__name__, __all__)
