"""Facts about the machine code of every kernel, compiled once per test run."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fastseg.atomic_write import atomic_write


def compiled(*arguments):
    """The output of Python with these arguments, in a process whose kernels are compiled instead of interpreted."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    return run.stdout


def table(folder: Path) -> list[dict[str, Any]]:
    """The rows of `fastseg inspect codegen`: all configurations for sm_90; one per layout for sm_80 and sm_100.

    The first test process that calls this compiles, on all cores; the others wait for its result.
    """
    found, failed = folder / "codegen.json", folder / "codegen.failed"
    try:
        (folder / "codegen.begun").touch(exist_ok=False)
    except FileExistsError:
        while not found.exists():
            assert not failed.exists(), "another process could not compile the kernels"
            time.sleep(0.5)
        return json.loads(found.read_text())
    rows = []
    try:
        for words in ("--sm 90", "--sm 80 --sm 100 --first"):
            rows += json.loads(compiled("-m", "fastseg.commands.cli", "inspect", "codegen", "--json", *words.split()))[
                "rows"
            ]
    except BaseException:
        failed.touch()
        raise
    with atomic_write(found) as temporary:
        temporary.write_text(json.dumps(rows))
    return rows
