"""What the launchers of all languages share. Imports neither Triton nor CuPy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Generic, TypeVar

INT32_MAX = 2**31 - 1

T = TypeVar("T")


class Setting(Generic[T]):
    """A value of the process that a ``with`` block can replace."""

    def __init__(self, value: T) -> None:
        self.value = value

    @contextlib.contextmanager
    def replaced(self, value: T) -> Iterator[T]:
        """Set the value for the duration of a block, and give it; the old value comes back afterwards."""
        before, self.value = self.value, value
        try:
            yield value
        finally:
            self.value = before
