"""The machine code of the CUDA C++ kernels, compiled by NVRTC without a GPU: codegen.py for backend "cuda".

NVRTC is in the package nvidia-cuda-nvrtc, which CUDA builds of torch and of CuPy install too.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import dispatch
from ..kernels.cuda import launch
from ..ops.operator import observing
from .codegen import Compiled


def record(step: Callable[[], Any]) -> list[launch.Launch]:
    """The launches that `step` makes under backend "cuda"; its tensors may be on the meta device.

    Empty if one of its operators has no CUDA C++ kernels.
    """
    found: list[launch.Launch] = []
    with dispatch.backend("cuda"), launch.recording(found.append), observing(lambda operator, args: None):
        try:
            step()
        except NotImplementedError:
            return []
    return found


def compile_for(request: launch.Launch, sm: int) -> Compiled:
    """Compile for sm_<sm>. Raises RuntimeError if NVRTC is not installed."""
    ptx, cubin = compile_source(launch.source(request.file), request.instance, launch.OPTIONS, sm)
    return Compiled(request.kernel, sm, ptx, cubin, launch.THREADS // 32)


# --- NVRTC ---

PACKAGES = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu13", "nvidia-cuda-nvrtc-cu12")


def library_path() -> Path | None:
    """The NVRTC library, or None if no package contains it."""
    for package in PACKAGES:
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.name.startswith(("libnvrtc.so", "nvrtc64")):
                return Path(file.locate())
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    path = library_path()
    if path is None:
        raise RuntimeError("NVRTC is not installed: pip install nvidia-cuda-nvrtc")
    library = ctypes.CDLL(str(path))
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def supports(sm: int) -> bool:
    """Whether NVRTC is installed and compiles for sm_<sm>."""
    if library_path() is None:
        return False
    count = ctypes.c_int()
    _library().nvrtcGetNumSupportedArchs(ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    _library().nvrtcGetSupportedArchs(known)
    return sm in known


def compile_source(source: str, instance: str, options: Sequence[str], sm: int) -> tuple[str, bytes]:
    """(PTX, cubin) of one instance of a template for sm_<sm>. Raises RuntimeError with the compiler's log."""
    library, program = _library(), ctypes.c_void_p()

    def call(name: str, *args: Any) -> None:
        status = getattr(library, name)(*args)
        if status != 0:
            raise RuntimeError(f"{name}: {library.nvrtcGetErrorString(status).decode()}{_log(library, program)}")

    def made(size_of: str, get: str) -> bytes:
        size = ctypes.c_size_t()
        call(size_of, program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        call(get, program, buffer)
        return buffer.raw

    call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    try:
        call("nvrtcAddNameExpression", program, instance.encode())
        words = [option.encode() for option in (*options, f"-arch=sm_{sm}")]
        call("nvrtcCompileProgram", program, len(words), (ctypes.c_char_p * len(words))(*words))
        ptx = made("nvrtcGetPTXSize", "nvrtcGetPTX").rstrip(b"\0").decode()
        return ptx, made("nvrtcGetCUBINSize", "nvrtcGetCUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _log(library: ctypes.CDLL, program: ctypes.c_void_p) -> str:
    """The compiler's messages, after a newline; empty if there are none."""
    size = ctypes.c_size_t()
    if not program or library.nvrtcGetProgramLogSize(program, ctypes.byref(size)) != 0:
        return ""
    buffer = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, buffer)
    return "\n" + buffer.value.decode(errors="replace")
