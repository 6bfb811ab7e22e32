"""Transposed convolution, and unpooling + convolution."""
