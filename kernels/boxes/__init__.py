"""Maps of boxes pasted into one canvas, in Triton."""

from typing import TYPE_CHECKING

from ..lazy import submodules

if TYPE_CHECKING:
    from . import paste

__all__ = ["paste"]
__getattr__ = submodules(__name__, __all__)
