"""Device code, imported as ``fastseg.kernels`` through a link: one folder per family, one file per operator.

A kernel file imports torch and triton alone; those under cuda/, CUDA C++ that needs no triton, import torch and, at
their first launch, CuPy. Each file holds the ``@triton.jit`` kernels and, beside each, the function that launches it on
tensors that are already allocated. What an operator means, its shapes, errors, gradients and fallbacks are in the
folder of the same name in ``fastseg/ops``. Nothing here is loaded before its first use.
"""

from typing import TYPE_CHECKING

from .lazy import submodules

if TYPE_CHECKING:
    from . import batch_norm, boxes, convolution, cpu, crf, cuda, interpreter, launch, losses, pooling

__all__ = ["batch_norm", "boxes", "convolution", "cpu", "crf", "cuda", "interpreter", "launch", "losses", "pooling"]
__getattr__ = submodules(__name__, __all__)
