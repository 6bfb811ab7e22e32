"""Speed patches for Triton's interpreter: the same results in less than half the time.

Most of the interpreter's time goes into three things, which these patches avoid:

1. At each launch, and at each call from a kernel to a function, it searches all of triton.language for builtins.
2. For each integer sum, difference and product it checks for overflow, by ten operations that are interpreted
   themselves, and ignores the answer unless it debugs.
3. It builds the table from Triton's to NumPy's types again at each look-up.
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
    """The names of a package's builtins. The first call must come before any of them is replaced."""
    return [name for name, member in inspect.getmembers(pkg) if is_builtin(member)]


def patch_builtins(pkg: Any, builder: Any, scope: Any) -> None:
    """Replace all builtins of a package by the interpreter's, until the scope ends."""
    names = builtins(pkg)
    if not is_builtin(getattr(pkg, names[0])):
        return  # the kernel that calls this function has already replaced all of them
    for name in names:
        if is_builtin(member := getattr(pkg, name)):  # something else may have replaced a single one
            triton_internals.patch_builtin(pkg, name, member, builder, scope)


def cached_numpy_type(numpy_type: Callable[[Any], np.dtype]) -> Callable[[Any], np.dtype]:
    """Triton's function from a Triton type to a NumPy type, with a cache."""
    of_scalar = functools.cache(numpy_type)
    return lambda kind: np.dtype(np.uint64) if kind.scalar.is_ptr() else of_scalar(kind.scalar)


def check_if_debugging(check: Callable[..., None]) -> Callable[..., None]:
    """Triton's check for overflow, only where its answer is used."""

    def checked(self: Any, *operation: Any) -> None:
        if self.builder.options.debug:
            check(self, *operation)

    return checked


def loop_bounds_with_numpy_2_4(patch: Callable[..., None]) -> Callable[..., None]:
    """Triton 3.6's interpreter makes a loop bound an int from an array of one element, which NumPy 2.4 refuses."""

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patched


def prepare() -> None:
    """Patch the interpreter, once per process. A Triton version that is not in SEEN_IN is left unchanged."""
    if triton_internals.VERSION not in triton_internals.SEEN_IN:
        return
    triton_internals.replace_patch_builtins(patch_builtins)
    triton_internals.replace_numpy_dtype(cached_numpy_type)
    triton_internals.replace_overflow_check(check_if_debugging)
    if triton_internals.VERSION == (3, 6):
        triton_internals.replace_patch_tensor(loop_bounds_with_numpy_2_4)
