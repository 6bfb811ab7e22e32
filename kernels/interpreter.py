"""Triton's interpreter as it is, in less than half the time, most of which went into three things.

At each launch, and at each call of a function by a kernel, it looks through all of triton.language for builtins. For
each sum, difference and product of integers it computes, by ten operations that are interpreted themselves, whether it
overflows, and drops the answer unless asked to debug. And the table of NumPy's types is made anew at each look into it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from . import triton_internals
from .triton_internals import is_builtin


@functools.cache
def builtins(pkg: Any) -> list[str]:
    """Their names; asked before any is replaced."""
    return [name for name, member in inspect.getmembers(pkg) if is_builtin(member)]


def patch_builtins(pkg: Any, builder: Any, scope: Any) -> None:
    names = builtins(pkg)
    if not is_builtin(getattr(pkg, names[0])):
        return  # replaced already, for the kernel that calls this function: all at once
    for name in names:
        if is_builtin(member := getattr(pkg, name)):  # else somebody else's
            triton_internals.patch_builtin(pkg, name, member, builder, scope)


def kept(numpy_type: Callable[[Any], np.dtype]) -> Callable[[Any], np.dtype]:
    of_scalar = functools.cache(numpy_type)
    return lambda kind: np.dtype(np.uint64) if kind.scalar.is_ptr() else of_scalar(kind.scalar)


def where_asked(check: Callable[..., None]) -> Callable[..., None]:
    """Triton's check of overflow where its answer counts."""

    def checked(self: Any, *operation: Any) -> None:
        if self.builder.options.debug:
            check(self, *operation)

    return checked


def loops_with_numpy_2_4(patch: Callable[..., None]) -> Callable[..., None]:
    """Triton 3.6's interpreter makes a bound of a loop an int from an array of one element: NumPy 2.4 refuses that."""

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patched


def prepare() -> None:
    """Once, in a process whose kernels are interpreted. Another Triton than these is left as it is."""
    if triton_internals.VERSION not in triton_internals.SEEN_IN:
        return
    triton_internals.replace_patch_builtins(patch_builtins)
    triton_internals.replace_numpy_dtype(kept)
    triton_internals.replace_overflow_check(where_asked)
    if triton_internals.VERSION == (3, 6):
        triton_internals.replace_patch_tensor(loops_with_numpy_2_4)
