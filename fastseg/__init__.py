"""fastseg: fused Triton kernels for image segmentation in PyTorch."""

from . import functional, models, nn
from .compiler import compile_backend
from .dispatch import backend, explain, get_backend, set_backend
from .swapping import swap, swap_functions
from .version import __version__

__all__ = [
    "__version__",
    "backend",
    "compile_backend",
    "explain",
    "functional",
    "get_backend",
    "models",
    "nn",
    "set_backend",
    "swap",
    "swap_functions",
]
