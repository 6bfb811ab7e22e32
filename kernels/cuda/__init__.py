"""CUDA C++ kernels, compiled through CuPy where Triton cannot run: a second implementation of some operators.

Folders, files and launchers are named as the Triton ones above and take the same arguments, so that an operator takes
either. They are loaded at first use, CuPy at the first launch.
"""

from typing import TYPE_CHECKING

from ..lazy import submodules

if TYPE_CHECKING:
    from . import batch_norm, launch, losses, pooling

__all__ = ["batch_norm", "launch", "losses", "pooling"]
__getattr__ = submodules(__name__, __all__)
