"""The torch.compile backend: fastseg's operators in a graph that Dynamo captured."""

from .backend import compile_backend

__all__ = ["compile_backend"]
