"""Messages between all pixels of a fully connected CRF, in Triton."""

from typing import TYPE_CHECKING

from ..lazy import submodules

if TYPE_CHECKING:
    from . import message, options

__all__ = ["message", "options"]
__getattr__ = submodules(__name__, __all__)
