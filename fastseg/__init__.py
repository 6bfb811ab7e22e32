"""fastseg: fused Triton kernels for image segmentation in PyTorch."""

from .version import __version__  # first, since it raises ImportError if torch is too old

# isort: split

from . import crf, functional, models, nn, uncertainty
from .compiler import compile_backend
from .dispatch import backend, explain, get_backend, set_backend
from .swapping import swap, swap_functions

__all__ = [
    "__version__",
    "backend",
    "compile_backend",
    "crf",
    "explain",
    "functional",
    "get_backend",
    "models",
    "nn",
    "set_backend",
    "swap",
    "swap_functions",
    "uncertainty",
]
