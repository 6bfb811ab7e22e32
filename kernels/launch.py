"""The one place where kernels are launched: the device guard, the grid, and a hook for the instruments."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .triton_internals import INTERPRETED

INT32_MAX = 2**31 - 1


if INTERPRETED:
    from . import interpreter

    interpreter.prepare()

Recorder = Callable[[Any, int, tuple[Any, ...], dict[str, Any]], None]
_recorder: Recorder | None = None


def launch(kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
    """Run `programs` programs of `kernel` on the device and stream of its first tensor.

    Grids are one-dimensional: axis 0 alone goes past 65,535. A launch of no programs does nothing.
    """
    if programs == 0:
        return
    if _recorder is not None:
        _recorder(kernel, programs, args, meta)
        return
    tensor = next(a for a in args if isinstance(a, Tensor))
    with on_device_of(tensor):
        kernel[(programs,)](*args, **meta)


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one, since Triton launches on the current one whatever its arguments."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Hand every launch to ``recorder(kernel, programs, args, meta)`` in place of running it."""
    global _recorder
    outer, _recorder = _recorder, recorder
    try:
        yield
    finally:
        _recorder = outer


_target: int | None = None


def capability(tensor: Tensor) -> int:
    """Compute capability (90 for 9.0) of the tensor's GPU, asked once; of an H100 for kernels that are interpreted."""
    if _target is not None:
        return _target
    return _capability(tensor.device.index) if tensor.is_cuda else 90


@functools.cache
def _capability(index: int) -> int:
    if torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def roomy(tensor: Tensor) -> bool:
    """Whether a program may take 227 KiB of shared memory there: since 9.0, but not on the 12.x, which have 99."""
    return 90 <= capability(tensor) < 120


@contextlib.contextmanager
def targeting(sm: int) -> Iterator[None]:
    """Launch as on a GPU of this compute capability, for those who record launches or interpret them."""
    global _target
    outer, _target = _target, sm
    try:
        yield
    finally:
        _target = outer


def vector_width(element_size: int, *lengths: int) -> int:
    """Elements of one 16-byte access that divide every one of `lengths`: a power of two."""
    width = 16 // element_size
    while any(length % width for length in lengths):
        width //= 2
    return width
