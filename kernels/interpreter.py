"""Speed patches for Triton's interpreter: the same results in a third of the time.

Most of the interpreter's time goes into five things, which these patches avoid:

1. At each launch, and at each call from a kernel to a function, it searches all of triton.language for builtins.
2. For each integer sum, difference and product it checks for overflow, by ten operations that are interpreted
   themselves, and ignores the answer unless it debugs.
3. It builds the table from Triton's to NumPy's types again at each look-up.
4. It checks the shape of a block, and wraps it in constants, again for each tensor, and compares the shapes of the two
   operands of each operation size by size.
5. At each launch and call it looks through all globals of the kernel's module for triton.language.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from triton.language import constexpr

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


def cached_block_type(init: Callable[..., None]) -> Callable[..., None]:
    """Triton's constructor of a block type, with a cache: a type is never changed once it is made."""
    made: dict[tuple[Any, ...], dict[str, Any]] = {}
    shapes: dict[tuple[Any, ...], Any] = {}  # one object per shape, whatever the type: equal shapes are identical

    def construct(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = [size.value if isinstance(size, constexpr) else size for size in shape]
        # Pointer types have no hash: a name and, of pointers, the address space tell element types apart.
        kind = element_ty.name, getattr(element_ty, "address_space", None)
        key = (*kind, *sizes, *map(type, sizes))  # 4.0 equals 4, but is refused as a size
        attributes = made.get(key)
        if attributes is None:  # a shape that is refused raises here, each time
            init(self, element_ty, shape)
            self.shape = shapes.setdefault(tuple(sizes), self.shape)
            made[key] = dict(self.__dict__)
        else:
            self.__dict__.update(attributes)

    return construct


def cached_tensor(init: Callable[..., None]) -> Callable[..., None]:
    """Triton's constructor of a tensor, whose shape is made once per shape. Nothing writes into a tensor's shape."""
    made: dict[tuple[Any, ...], tuple[Any, Any]] = {}

    def construct(self: Any, handle: Any, kind: Any) -> None:
        sizes = tuple(kind.shape) if kind.is_block() else ()
        known = made.get(sizes)
        if known is None:
            init(self, handle, kind)
            made[sizes] = self.shape, self.numel
        else:
            self.handle, self.type, self.dtype = handle, kind, kind.scalar
            self.shape, self.numel = known

    return construct


def broadcast_if_shapes_differ(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    """Triton's broadcast of two operands, which returns them at once if cached_block_type gave both one shape."""

    def operands(self: Any, lhs: Any, rhs: Any) -> Any:
        left, right = lhs.type, rhs.type
        if left.is_block() and right.is_block() and left.shape is right.shape:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    return operands


def patch_known_modules(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Triton's function that patches the language in a kernel's globals, given the modules among them alone."""

    @functools.cache
    def modules(function: Any) -> Any:
        found = {name: value for name, value in function.__globals__.items() if isinstance(value, ModuleType)}
        return SimpleNamespace(__globals__=found)

    return lambda function: patch(modules(function))


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
    triton_internals.replace_constructors(cached_block_type, cached_tensor)
    triton_internals.replace_broadcast(broadcast_if_shapes_differ)
    triton_internals.replace_patch_language(patch_known_modules)
    if triton_internals.VERSION == (3, 6):
        triton_internals.replace_patch_tensor(loop_bounds_with_numpy_2_4)
