"""Writing files so that each is either complete or absent."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A context that yields a temporary path and, at its end, moves the file written there to `path` in one step.

    If the body raises, the temporary file is deleted and `path` is unchanged. The folder of `path` is created if it
    does not exist. The temporary file is in the same folder, because a move is atomic only within one file system, and
    has the same suffix, because some writers choose the format by it.

    Args:
        path: the file to create or replace.

    Example::

        >>> import tempfile
        >>> from pathlib import Path
        >>> from fastseg.atomic_write import atomic_write
        >>> path = Path(tempfile.mkdtemp()) / "result.txt"
        >>> with atomic_write(path) as temporary:
        ...     _ = temporary.write_text("complete")
        >>> path.read_text()
        'complete'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"~{os.getpid()}-{path.name}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
