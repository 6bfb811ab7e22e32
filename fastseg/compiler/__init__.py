"""The backend of torch.compile: fusion of fastseg's operators in a traced graph."""

from .backend import compile_backend

__all__ = ["compile_backend"]
