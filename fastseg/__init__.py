"""fastseg: fused Triton kernels for image segmentation in PyTorch."""

from pathlib import Path as _Path

if not (_Path(__file__).parent / "kernels").is_dir():  # a checkout: device code lies beside the package, see setup.py
    __path__.append(str(_Path(__file__).parent.parent))

from . import functional, models, nn
from .dispatch import backend, explain, get_backend, set_backend
from .swapping import swap

__version__ = "0.1.0"
__all__ = ["backend", "explain", "functional", "get_backend", "models", "nn", "set_backend", "swap"]
