"""CUDA C++ kernels, compiled through CuPy: a second implementation of some operators, for GPUs without Triton.

Folders, files and launchers have the names and arguments of the Triton ones, so that an operator can call either. They
are imported at first use, and CuPy at the first launch.
"""

from typing import TYPE_CHECKING

from ..lazy import submodules

if TYPE_CHECKING:
    from . import batch_norm, launch, losses, pooling

__all__ = ["batch_norm", "launch", "losses", "pooling"]
__getattr__ = submodules(__name__, __all__)
