"""Instruments that need no GPU: the bytes that kernels move, and the machine code they compile to."""
