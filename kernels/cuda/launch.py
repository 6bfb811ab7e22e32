"""The one place where CUDA C++ kernels are launched, through CuPy.

A kernel is a template in a .cu file; an instance of it is compiled at its first launch on each device, by NVRTC, and
kept by CuPy (newer versions keep it on disk too). Tensors go in by address: CuPy and torch share the device's memory
and context, nothing is copied. Launches go to torch's current stream of the tensors' device.
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

THREADS = 256  # of a block
OPTIONS = ("-std=c++17", "-ftz=true")  # the second CuPy adds whatever is asked for: others are to compile the same
FOLDER = Path(__file__).parent
CUPY = "the package CuPy, which is not installed: pip install 'fastseg-kernels[cuda12]' (or [cuda13])"
TYPES = {
    torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat16", torch.float64: "double",
    torch.uint8: "uint8", torch.int16: "short", torch.int32: "int", torch.int64: "int64", None: "nothing",
}  # fmt: skip


class Launch(NamedTuple):
    """One launch: `instance` of a template in <family>.cu, by as many threads as `threads`, in whole blocks."""

    family: str
    instance: str
    threads: int
    args: tuple[Any, ...]  # tensors, None for no tensor, and scalars of numpy types

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


def launch(family: str, kernel: str, parameters: Sequence[Any], threads: int, *args: Any) -> None:
    """Run `threads` threads of ``kernel<parameters>`` of <family>.cu on the device and stream of its first tensor.

    parameters: dtypes, bools, ints, or C++ as it stands. args: tensors, None for a null pointer, ints and floats, which
    go as int and float, and numpy scalars, which keep their type. A launch of no threads does nothing.
    """
    if threads == 0:
        return
    python = {int: np.int32, float: np.float32}  # by their very type: numpy's float64 is a float too
    typed = tuple(python[type(a)](a) if type(a) in python else a for a in args)
    request = Launch(family, f"{kernel}<{', '.join(map(spelled, parameters))}>", threads, typed)
    if _recorder.value is not None:
        _recorder.value(request)
        return
    _run(request)


def spelled(parameter: Any) -> str:
    """A template's parameter in C++."""
    if isinstance(parameter, bool):
        return str(parameter).lower()
    return TYPES[parameter] if parameter is None or isinstance(parameter, torch.dtype) else str(parameter)


def source(family: str) -> str:
    """The text of <family>.cu with its headers in place: CuPy's caches know a kernel by its text alone."""
    file = FOLDER / f"{family}.cu"
    parts = [
        (file.parent / line.split('"')[1]).read_text(encoding="utf-8") if line.startswith("#include") else line
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    return "\n".join(parts) + "\n"


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError(f"backend 'cuda' needs {CUPY}") from error
    return cupy


@functools.cache
def _compiled(family: str, instance: str, device: int) -> Any:
    """The kernel, loaded on `device`, which is current."""
    module = _cupy().RawModule(code=source(family), options=OPTIONS, name_expressions=(instance,))
    return module.get_function(instance)


def _on(cupy: Any, stream: Any, device: int) -> Any:
    """Makes torch's stream CuPy's: by the protocol that both know from CuPy 14 on, which warns of the way before."""
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
        _compiled(request.family, request.instance, device.index)((request.blocks,), (THREADS,), args)


def index_type(*tensors: Tensor) -> str:
    """The type of offsets into the tensors: "int64" where one could pass 2^31."""
    return "int64" if max(tensor.numel() for tensor in tensors) > INT32_MAX - THREADS * 32 else "int"


def vector_width(length: int, *tensors: Tensor) -> int:
    """Elements of a group that divide `length`, at most 16 bytes of the first tensor, and align in every one."""
    width = 16 // tensors[0].element_size()

    def fits() -> bool:
        return length % width == 0 and all(t.data_ptr() % min(16, width * t.element_size()) == 0 for t in tensors)

    while width > 1 and not fits():
        width //= 2
    return width
