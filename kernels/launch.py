"""The one place where Triton kernels are launched: the device guard, the grid, and a hook for the instruments."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .shared import INT32_MAX as INT32_MAX  # kernels import it from here
from .shared import Setting
from .triton_internals import INTERPRETED, VERSION

if INTERPRETED:
    from . import interpreter

    interpreter.prepare()

Recorder = Callable[[Any, int, tuple[Any, ...], dict[str, Any]], None]
_recorder: Setting[Recorder | None] = Setting(None)
# Every kernel is checked and measured with multiplications and additions fused. Triton 3.9 warns that 3.10 will no
# longer fuse them by default.
FUSED = {"enable_fp_fusion": True}
_target: Setting[int | None] = Setting(None)  # compute capability to launch for; None for that of the GPU


def launch(kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
    """Run `programs` programs of `kernel` on the device and current stream of its first tensor argument.

    Grids are one-dimensional, since only axis 0 can exceed 65,535. A launch of no programs does nothing.
    """
    if programs == 0:
        return
    meta = FUSED | meta
    if _recorder.value is not None:
        _recorder.value(kernel, programs, args, meta)
        return
    if torch.version.hip is not None:
        meta.pop("maxnreg", None)  # an option of NVIDIA's alone: AMD's backend raises KeyError
    tensor = next(a for a in args if isinstance(a, Tensor))
    with on_device_of(tensor):
        kernel[(programs,)](*args, **meta)


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's GPU the current one: Triton launches on the current GPU, wherever its arguments are."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def recording(recorder: Recorder) -> contextlib.AbstractContextManager[Any]:
    """Pass every launch to ``recorder(kernel, programs, args, meta)`` instead of running it."""
    return _recorder.replaced(recorder)


def capability(tensor: Tensor) -> int:
    """Compute capability of the tensor's GPU, such as 90 for 9.0; 90 for CPU tensors, whose kernels are interpreted."""
    if _target.value is not None:
        return _target.value
    return _capability(tensor.device.index) if tensor.is_cuda else 90


@functools.cache
def _capability(index: int) -> int:
    if torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def roomy(tensor: Tensor) -> bool:
    """Whether a program may use 227 KiB of shared memory: from 9.0 on, except on 12.x, where it may use 99 KiB."""
    return 90 <= capability(tensor) < 120


def has_tf32(tensor: Tensor) -> bool:
    """Whether the tensor's GPU may multiply float32 as TF32: NVIDIA's. Triton refuses it for most of AMD's."""
    return capability(tensor) > 0


def targeting(sm: int) -> contextlib.AbstractContextManager[Any]:
    """Launch as on a GPU of this compute capability, 0 for AMD's; for launches that are recorded or interpreted."""
    return _target.replaced(sm)


def registers(tensor: Tensor, most: dict[tuple[int, ...], int]) -> dict[str, int]:
    """The option that limits the registers of a thread, by (version of Triton, compute capability); else none.

    For kernels in half precision of which one version's assembler spills a value, so that one more program fits. With
    a limit of our own it does not.
    """
    here = (*VERSION, capability(tensor))
    return {"maxnreg": most[here]} if here in most and tensor.element_size() == 2 else {}


def vector_width(element_size: int, *lengths: int) -> int:
    """The most elements, a power of two, that fit 16 bytes and divide every one of `lengths`."""
    width = 16 // element_size
    while any(length % width for length in lengths):
        width //= 2
    return width
