"""Triton's interpreter as it is, in less than half the time, most of which went into three things.

At each launch, and at each call of a function by a kernel, it looks through all of triton.language for builtins. For
each sum, difference and product of integers it computes, by ten operations that are interpreted themselves, whether it
overflows, and drops the answer: here NumPy says so, and what overflows is refused. And the table of NumPy's types is
made anew at each look into it.
"""

import functools
import inspect
from typing import Any

import numpy as np
from triton.language import core
from triton.runtime import interpreter

IN_NUMPY = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


@functools.cache
def builtins(pkg: Any) -> list[str]:
    """Their names; asked before any is replaced."""
    return [name for name, member in inspect.getmembers(pkg) if core.is_builtin(member)]


def patch_builtins(pkg: Any, builder: Any, scope: Any) -> None:
    names = builtins(pkg)
    if not core.is_builtin(getattr(pkg, names[0])):
        return  # replaced already, for the kernel that calls this function: all at once
    for name in names:
        if core.is_builtin(member := getattr(pkg, name)):  # else a test's own
            interpreter._patch_attr(pkg, name, member, builder, scope)


def check_overflow(self: Any, lhs: Any, rhs: Any, operation: Any) -> None:
    kind = lhs.type.scalar
    if kind.int_bitwidth >= 64:
        return
    assert kind == rhs.type.scalar and kind.is_int()
    exact = IN_NUMPY[operation.__name__](lhs.handle.data, rhs.handle.data, dtype=np.int64)
    fits = exact.min() >= kind.get_int_min_value() and exact.max() <= kind.get_int_max_value()
    assert fits, f"int{kind.int_bitwidth} overflow detected for operation {operation.__name__}"


scalar_type = functools.cache(interpreter._get_np_dtype)


def numpy_type(kind: Any) -> np.dtype:
    return np.dtype(np.uint64) if kind.scalar.is_ptr() else scalar_type(kind.scalar)


def hasten() -> None:
    interpreter._patch_builtin = patch_builtins
    interpreter._get_np_dtype = numpy_type
    interpreter.TritonSemantic.binary_op_sanitize_overflow_impl = check_overflow
