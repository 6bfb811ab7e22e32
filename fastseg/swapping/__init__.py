"""fastseg.swap: fused kernels into a model that exists, and out again."""

from .layers import Candidate, SwapReport, swap

__all__ = ["Candidate", "SwapReport", "swap"]
