"""What the launchers of all languages share. Imports neither Triton nor CuPy."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
import threading
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import torch

INT32_MAX = 2**31 - 1

T = TypeVar("T")


class _Scope(threading.local):
    """What a ``with`` block has set in the current thread: None outside of such blocks.

    The value is set by __init__, which Python calls once per thread. torch.compile would read a class attribute as a
    constant, without a guard, whatever the thread has set.
    """

    def __init__(self) -> None:
        self.value: Any = None


class _Thread(threading.local):
    """of_python: whether Python started the current thread; autograd's own threads are others."""

    def __init__(self) -> None:
        self.of_python = type(threading.current_thread()) is not threading._DummyThread


_thread = _Thread()


def _carried(key: str) -> Any:
    """In one of autograd's threads, what the thread that called the backward had set; else None."""
    if _thread.of_python or not torch._C._is_key_in_tls(key):
        return None
    return torch._C._get_obj_in_tls(key)


_carried._dynamo_marked_constant = True  # as torch.compiler.assume_constant_result does, which imports torch._dynamo


def _carry(key: str, value: Any) -> None:
    """Give a value to the threads in which autograd runs a backward for the current thread."""
    if _releases_too_often():
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
    torch._C._stash_obj_in_tls(key, value)


@functools.cache
def _releases_too_often() -> bool:
    """Whether torch releases a reference to a value that it keeps without having taken one, as torch 2.11 does."""
    value = object()
    before = sys.getrefcount(value)
    torch._C._stash_obj_in_tls("fastseg.setting", value)
    released = sys.getrefcount(value) == before
    if released:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
    return released


@contextlib.contextmanager
def _carrying(key: str, value: Any) -> Iterator[None]:
    """Carry a value for the duration of a block."""
    before = torch._C._get_obj_in_tls(key) if torch._C._is_key_in_tls(key) else None
    _carry(key, value)
    try:
        yield
    finally:
        _carry(key, before)


class Setting(Generic[T]):
    """A value of the process, and values that ``with`` blocks set for themselves.

    A block sets the value for its own thread, and for autograd's threads while they run a backward that this thread
    called. Blocks that overlap in other threads do not see it.
    """

    def __init__(self, default: T) -> None:
        self.default = default
        self._scope = _Scope()
        self._key = f"fastseg.setting.{id(self)}"

    @property
    def value(self) -> T:
        """The value of the innermost block, else of the process."""
        value = self._scope.value
        if value is None:
            value = _carried(self._key)
        return self.default if value is None else value

    def set(self, value: T) -> None:
        """Set the value of the innermost block of this thread until it ends; outside of blocks, that of the process."""
        if self._scope.value is None:
            self.default = value
            return
        self._scope.value = value
        if not torch.compiler.is_compiling():
            _carry(self._key, value)

    @contextlib.contextmanager
    def replaced(self, value: T) -> Iterator[T]:
        """Set the value, which may not be None, for the duration of a block, and give it."""
        scope = self._scope
        before, scope.value = scope.value, value
        # While torch.compile traces, nothing runs yet that could call a backward.
        carrying = contextlib.nullcontext() if torch.compiler.is_compiling() else _carrying(self._key, value)
        try:
            with carrying:
                yield value
        finally:
            scope.value = before
