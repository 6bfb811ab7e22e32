"""fastseg.swap and fastseg.swap_functions: put fastseg's kernels into an existing model or block of code."""

from .functions import swap_functions
from .modules import swap
from .report import Candidate, SwapReport

__all__ = ["Candidate", "SwapReport", "swap", "swap_functions"]
