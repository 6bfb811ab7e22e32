"""fastseg.swap: fused kernels into a model that exists, and out again."""

from .layers import swap
from .report import Candidate, SwapReport

__all__ = ["Candidate", "SwapReport", "swap"]
