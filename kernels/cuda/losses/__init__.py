"""Cross-entropy in CUDA C++."""

from typing import TYPE_CHECKING

from ...lazy import submodules

if TYPE_CHECKING:
    from . import cross_entropy, cross_entropy_bwd

__all__ = ["cross_entropy", "cross_entropy_bwd"]
__getattr__ = submodules(__name__, __all__)
