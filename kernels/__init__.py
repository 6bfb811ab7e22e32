"""Device code of fastseg, installed as ``fastseg.kernels``: one file per operator family, loaded at first use.

A kernel file imports torch and triton alone; those under cuda/, CUDA C++ that needs no triton, import torch and, at
their first launch, CuPy. It holds the ``@triton.jit`` kernels and, beside each, the function that
launches it on tensors that are already allocated: what is computed, in which layout, how many programs. What an
operator means, its shapes, errors, gradients and fallbacks stand in ``fastseg/ops`` under the same name.
"""

from __future__ import annotations

import importlib
from types import ModuleType

FAMILIES = (
    "batch_norm",
    "batch_norm_pool",
    "batch_norm_unpool",
    "confusion",
    "conv_transpose",
    "conv_transpose_bwd",
    "conv_transpose_bwd_shuffle",
    "conv_transpose_depthwise",
    "conv_transpose_geometry",
    "conv_transpose_tma",
    "cross_entropy",
    "cross_entropy_bwd",
    "cross_entropy_one_pass",
    "cross_entropy_parts",
    "cuda",
    "dice_cross_entropy",
    "geometry",
    "norm",
    "overlap",
    "pool",
    "products",
    "unpool",
    "unpool_conv",
    "upsample",
    "upsample_cross_entropy",
    "windows",
)


def __getattr__(name: str) -> ModuleType:
    # Not at the import, which is harmless: transformers looks for a package of this name.
    if name in FAMILIES and __name__ == "kernels":
        raise ImportError("fastseg's device code is imported as fastseg.kernels: put the folder above on sys.path")
    if name in FAMILIES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
