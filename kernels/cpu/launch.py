"""The one place where CPU kernels are called: C functions, through ctypes, which releases the GIL meanwhile.

A kernel is declared in its source file as ``EXPORT name(arguments)`` and returns an int64_t; its arguments are
pointers, int64_t and double. The types that ctypes converts to are read from that declaration.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from .build import Parameter, library, source

EXPORTED = re.compile(r"^EXPORT (\w+)\(([^)]*)\)", re.MULTILINE)
_functions: dict[tuple[Any, ...], tuple[Callable[..., int], tuple[int, ...]]] = {}
_recorded: list[Callable[[], int]] | None = None


def launch(name: str, function: str, parameters: Mapping[str, Parameter], *args: Tensor | int | float | None) -> int:
    """Call `function` of <name>.cpp, built with the macros `parameters`, and return its result.

    args: dense CPU tensors, which are passed by address, None for a null pointer, ints, bools and floats. Whether a
    tensor has the dtype and the size that the kernel takes is up to the caller.
    """
    key = (name, function, *parameters.items())
    found = _functions.get(key)
    if found is None:
        found = _functions[key] = _declared(name, function, parameters)
    if _recorded is not None:
        _recorded.append(functools.partial(launch, name, function, parameters, *args))
    call, pointers = found
    passed: list[Any] = list(args)
    for at in pointers:
        tensor = passed[at]
        if tensor is not None:
            passed[at] = tensor.data_ptr()
    return call(*passed)


@contextlib.contextmanager
def recording() -> Iterator[list[Callable[[], int]]]:
    """Collect the calls that are made meanwhile: each can be made again, on the same tensors, which it keeps alive."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def _declared(
    name: str, function: str, parameters: Mapping[str, Parameter]
) -> tuple[Callable[..., int], tuple[int, ...]]:
    """The function with the argument types that its source declares, and which of them are pointers."""
    declared = dict(EXPORTED.findall(source(name)))
    found = getattr(library(name, parameters), function)
    found.argtypes = [_type(argument) for argument in declared[function].split(",")]
    found.restype = ctypes.c_int64
    return found, tuple(at for at, kind in enumerate(found.argtypes) if kind is ctypes.c_void_p)


def _type(argument: str) -> Any:
    if "*" in argument:
        return ctypes.c_void_p
    return {"int64_t": ctypes.c_int64, "double": ctypes.c_double}[argument.split()[0]]
