"""fastseg: fused Triton kernels for image segmentation in PyTorch."""

import importlib.util as _util
import sys as _sys
from pathlib import Path as _Path

if not (_Path(__file__).parent / "kernels").is_dir():  # a checkout: device code lies beside the package, see setup.py
    _spec = _util.spec_from_file_location("fastseg.kernels", _Path(__file__).parent.parent / "kernels" / "__init__.py")
    kernels = _sys.modules["fastseg.kernels"] = _util.module_from_spec(_spec)
    _spec.loader.exec_module(kernels)

from . import functional, models, nn
from .dispatch import backend, explain, get_backend, set_backend
from .swapping import compile_backend, swap, swap_functions

__version__ = "0.1.0"
__all__ = [
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
