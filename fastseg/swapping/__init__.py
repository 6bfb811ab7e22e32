"""fastseg.swap: fused kernels into a model that exists, and out again."""

from .functions import swap_functions
from .modules import swap
from .report import Candidate, SwapReport

__all__ = ["Candidate", "SwapReport", "swap", "swap_functions"]
