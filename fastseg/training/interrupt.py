"""Stopping a training run at the end of a step."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Ctrl-C, what a cluster sends before it takes a machine away, and what a terminal sends when it is closed."""


class GracefulInterrupt:
    """A context in which Ctrl-C, SIGTERM or SIGHUP requests a stop after the current step.

    A second Ctrl-C stops at once; clusters repeat SIGTERM, which is ignored from then on. A signal that the process
    ignores, as SIGHUP under nohup, stays ignored. Inside the context the object is a function without arguments that
    returns whether a stop was requested: the `stop` argument of :meth:`fastseg.training.trainer.Trainer.run`. On exit
    the previous handlers are restored. It works in the main thread only, where Python handles signals.

    Args:
        unit: what is finished first, for the message.

    Attributes:
        number: the signal that requested the stop, or None.

    Example::

        >>> from fastseg.training.interrupt import GracefulInterrupt
        >>> with GracefulInterrupt() as stop:
        ...     stop()  # trainer.run(stop)
        False
    """

    def __init__(self, unit: str = "step") -> None:
        self._message = f"\nstopping after this {unit}; Ctrl-C again stops at once\n".encode()
        self.number: int | None = None
        self._previous: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self.number is not None

    @property
    def exit_code(self) -> int:
        """What a shell returns for a process that the signal ended: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + (self.number or signal.SIGINT)

    def __enter__(self) -> GracefulInterrupt:
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        # os.write instead of print, because the signal may have interrupted a print. A closed terminal cannot be
        # written to.
        with contextlib.suppress(OSError):
            os.write(2, self._message)
