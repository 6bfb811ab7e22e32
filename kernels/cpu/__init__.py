"""Native CPU kernels in C++: another implementation of some operators, backend ``"cpu"``.

Folders, files and launchers are named as the Triton ones above and take the same arguments where that makes sense.
The system's C++ compiler builds each source file at its first use (`build`); `launch` calls the result. Where no
compiler is found, `build.unavailable` says why. A kernel file imports torch alone.
"""

from typing import TYPE_CHECKING

from ..lazy import submodules

if TYPE_CHECKING:
    from . import batch_norm, build, crf, launch, losses, pooling, warm

__all__ = ["batch_norm", "build", "crf", "launch", "losses", "pooling", "warm"]
__getattr__ = submodules(__name__, __all__)
