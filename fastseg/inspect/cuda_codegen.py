"""What the CUDA C++ kernels compile to, by NVRTC, on a machine without a GPU: codegen.py for backend "cuda"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import dispatch
from ..kernels.cuda import launch
from ..ops.library import observing
from . import nvrtc
from .codegen import Compiled


def record(step: Callable[[], Any]) -> list[launch.Launch]:
    """The launches that `step` would make under backend "cuda"; its tensors may be on the meta device.

    None where an operator of it has no CUDA C++ kernels.
    """
    found: list[launch.Launch] = []
    with dispatch.backend("cuda"), launch.recording(found.append), observing(lambda operator, args: None):
        try:
            step()
        except NotImplementedError:
            return []
    return found


def compile_for(request: launch.Launch, sm: int) -> Compiled:
    """Compile for sm_<sm>. Raises RuntimeError where there is no NVRTC."""
    ptx, cubin = nvrtc.compile(launch.source(request.family), request.instance, launch.OPTIONS, sm)
    return Compiled(request.kernel, sm, ptx, cubin, launch.THREADS // 32)
