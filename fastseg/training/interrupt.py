"""Stopping a training run at the end of a step."""

from __future__ import annotations

import os
import signal
from types import FrameType


class GracefulInterrupt:
    """A context in which the first Ctrl-C requests a stop after the current step; a second one stops at once.

    Inside the context the object is a function without arguments that returns whether Ctrl-C was pressed: the `stop`
    argument of :meth:`fastseg.training.trainer.Trainer.run`. On exit the previous handler of SIGINT is restored.
    It works in the main thread only, where Python handles signals.

    Example::

        >>> from fastseg.training.interrupt import GracefulInterrupt
        >>> with GracefulInterrupt() as stop:
        ...     stop()  # trainer.run(stop)
        False
    """

    def __init__(self) -> None:
        self.requested = False

    def __call__(self) -> bool:
        return self.requested

    def __enter__(self) -> GracefulInterrupt:
        self.previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self.previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # os.write instead of print, because the signal may have interrupted a print.
        os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")
