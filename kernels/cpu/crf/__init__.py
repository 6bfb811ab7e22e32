"""Messages between all pixels of a fully connected CRF, in C++ for the CPU."""

from typing import TYPE_CHECKING

from ...lazy import submodules

if TYPE_CHECKING:
    from . import message

__all__ = ["message"]
__getattr__ = submodules(__name__, __all__)
