"""The one place where CUDA C++ kernels are launched, through CuPy.

A kernel is a template in a .cu file. NVRTC compiles an instance of it at its first launch on each device, and CuPy
caches the result, in newer versions on disk too. Tensors are passed by address, without a copy, because CuPy and torch
share the device's context. A launch runs on torch's current stream of the tensors' device.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..shared import INT32_MAX, Setting

THREADS = 256  # per block
OPTIONS = ("-std=c++17", "-ftz=true")  # CuPy always adds -ftz; other compilers of these kernels use the same options
FOLDER = Path(__file__).parent
CUPY = "the package CuPy, which is not installed: pip install 'fastseg-kernels[cuda12]' (or [cuda13])"
TYPES = {
    torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat16", torch.float64: "double",
    torch.uint8: "uint8", torch.int16: "short", torch.int32: "int", torch.int64: "int64", None: "nothing",
}  # fmt: skip


class Launch(NamedTuple):
    """One launch: `instance` of a template in <file>.cu, with at least `threads` threads, in whole blocks."""

    file: str  # the path below this folder, without its suffix
    instance: str
    threads: int
    args: tuple[Any, ...]  # tensors, None for a null pointer, and scalars of numpy types

    @property
    def kernel(self) -> str:
        return self.instance.partition("<")[0]

    @property
    def blocks(self) -> int:
        return -(-self.threads // THREADS)


Recorder = Callable[[Launch], None]
_recorder: Setting[Recorder | None] = Setting(None)


def recording(recorder: Recorder) -> contextlib.AbstractContextManager[Any]:
    """Hand every launch to ``recorder(launch)`` in place of running it."""
    return _recorder.replaced(recorder)


def recorded() -> bool:
    """Whether launches go to a recorder, so that their tensors need not be on a GPU."""
    return _recorder.value is not None


def launch(file: str, kernel: str, parameters: Sequence[Any], threads: int, *args: Any) -> None:
    """Run `threads` threads of ``kernel<parameters>`` in <file>.cu on the device and stream of its first tensor.

    Args:
        file: the path of the source file below this folder, without its suffix.
        kernel: the name of the template.
        parameters: its template arguments: dtypes, bools, ints, or strings of C++.
        threads: their number. With 0 nothing is launched.
        args: tensors, None for a null pointer, Python numbers, which are passed as int and float, and numpy scalars,
            which keep their type.
    """
    if threads == 0:
        return
    numbers = {int: np.int32, float: np.float32}  # by exact type, because numpy's float64 is a float too
    typed = tuple(numbers[type(a)](a) if type(a) in numbers else a for a in args)
    request = Launch(file, f"{kernel}<{', '.join(map(template_argument, parameters))}>", threads, typed)
    if _recorder.value is not None:
        _recorder.value(request)
        return
    _run(request)


def template_argument(parameter: Any) -> str:
    """A template argument as C++ source text."""
    if isinstance(parameter, bool):
        return str(parameter).lower()
    return TYPES[parameter] if parameter is None or isinstance(parameter, torch.dtype) else str(parameter)


def source(file: str) -> str:
    """The text of <file>.cu with its headers pasted in, because CuPy's caches identify a kernel by this text alone."""
    path = FOLDER / f"{file}.cu"
    parts = [
        (path.parent / line.split('"')[1]).read_text(encoding="utf-8") if line.startswith("#include") else line
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    return "\n".join(parts) + "\n"


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError(f"backend 'cuda' needs {CUPY}") from error
    return cupy


@functools.cache
def _compiled(file: str, instance: str, device: int) -> Any:
    """The kernel, loaded on `device`, which must be the current one."""
    module = _cupy().RawModule(code=source(file), options=OPTIONS, name_expressions=(instance,))
    return module.get_function(instance)


def _on(cupy: Any, stream: Any, device: int) -> Any:
    """A context in which CuPy launches on torch's stream. CuPy 14 has from_external and deprecates ExternalStream."""
    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(stream)
    return cupy.cuda.ExternalStream(stream.cuda_stream, device)


def _run(request: Launch) -> None:
    device = next(a for a in request.args if isinstance(a, Tensor)).device
    if device.type != "cuda":
        raise RuntimeError(f"backend 'cuda' runs on CUDA tensors, not on device type '{device.type}'")
    cupy, stream = _cupy(), torch.cuda.current_stream(device)
    args = tuple(np.intp(0 if a is None else a.data_ptr()) if a is None or isinstance(a, Tensor) else a
                 for a in request.args)  # fmt: skip
    with cupy.cuda.Device(device.index), _on(cupy, stream, device.index):
        _compiled(request.file, request.instance, device.index)((request.blocks,), (THREADS,), args)


def index_type(*tensors: Tensor) -> str:
    """The C++ type of offsets into the tensors: "int64" if one could exceed 31 bits, else "int"."""
    return "int64" if max(tensor.numel() for tensor in tensors) > INT32_MAX - THREADS * 32 else "int"


def vector_width(length: int, *tensors: Tensor) -> int:
    """The number of elements of a group: a power of two that divides `length`, at most 16 bytes of the first tensor.

    Groups are aligned in all the tensors.
    """
    width = 16 // tensors[0].element_size()

    def fits() -> bool:
        return length % width == 0 and all(t.data_ptr() % min(16, width * t.element_size()) == 0 for t in tensors)

    while width > 1 and not fits():
        width //= 2
    return width
