"""CUDA C++ kernels, compiled through CuPy where Triton cannot go: a second implementation of some operators.

Modules are named as the Triton ones above and hold launchers of the same names and arguments, so that an operator
takes either. They are loaded at first use, CuPy at the first launch.
"""

from __future__ import annotations

import importlib
from types import ModuleType

FAMILIES = (
    "batch_norm", "batch_norm_pool", "cross_entropy", "cross_entropy_bwd", "launch", "pool", "unpool", "windows",
)  # fmt: skip


def __getattr__(name: str) -> ModuleType:
    if name in FAMILIES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
