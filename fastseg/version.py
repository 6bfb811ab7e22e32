"""The version of the distribution `fastseg-kernels`."""

__version__ = "0.1.0"
