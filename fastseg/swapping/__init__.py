"""fastseg.swap: fused kernels into a model that exists, and out again."""

from .functions import swap_functions
from .graphs import compile_backend
from .layers import swap
from .report import Candidate, SwapReport

__all__ = ["Candidate", "SwapReport", "compile_backend", "swap", "swap_functions"]
