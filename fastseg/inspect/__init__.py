"""Instruments that need no GPU: bytes that kernels move, and the machine code that they compile to.

Imports of this package load nothing. `traffic` and its report need Triton's interpreter, `codegen` and its report need
Triton's compiler, and a process has one of the two.
"""
