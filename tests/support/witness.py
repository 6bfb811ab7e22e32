"""Triton kernels without a GPU, executed from the IR that Triton's compiler makes of them (package ttsem).

`session(capability)` makes this process look like one with a GPU of that compute capability. Every launch is compiled
to Triton's IR for it, executed element by element on the CPU, and stopped at the kernel's line for an access out of
bounds, a race between programs or an undefined value. docs/verification.md says what this shows and what it cannot.

What it pretends, and how:

- **A CPU tensor is on the device cuda:0.** ttsem does this while its torch function mode is on. torch turns the mode
  off inside operators and backward functions, so `_everywhere` turns it on again there. Tensors on the meta device, and
  fake tensors, stay where they are.
- **torch multiplies half precision into float32** (`torch.mm(..., out_dtype=...)`), which it does only on a GPU. Here
  the factors are converted first, which gives the exact products that a GPU sums.
- **The IR is that before layouts** (TTIR): ttsem asks for machine code too and drops it, which takes most of the time.
  Each version of a kernel is compiled once.
- **A tile that a descriptor loads has the shape that the IR says.** Triton folds a reshape into such a load, and ttsem
  0.1.0 returns the shape before the reshape, so that the next operation fails.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

REQUIREMENTS = Path(__file__).with_name("witness-requirements.txt")
CUDA = torch.device("cuda", 0)


@dataclass
class Witnessed:
    """What a session saw: launches by kernel, what stopped a launch, and launches too large to look for races in."""

    launches: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    unchecked: int = 0


_opened = False


def opened() -> bool:
    """Whether this process runs in a session."""
    return _opened


def missing() -> str | None:
    """Why no session can be opened here, or None."""
    for line in REQUIREMENTS.read_text().splitlines():
        name, _, version = line.partition("==")
        if name in ("ttsem", "torch", "triton"):
            if importlib.util.find_spec(name) is None:
                return f"{name} is not installed; `make witness` installs it"
            if (found := importlib.metadata.version(name).split("+")[0]) != version:
                return f"{name} is {found}, and the witness is made for {version}"
    return None


@contextlib.contextmanager
def session(capability: int) -> Iterator[Witnessed]:
    """Execute every launch of this process from its IR for a GPU of this compute capability, such as 90.

    Open it before fastseg is imported, and one per process: torch.cuda and Triton's driver keep the answers.
    """
    if "fastseg" in sys.modules:
        raise RuntimeError("open the session before fastseg is imported: its operators are registered with pretences")
    from torch.overrides import _get_current_function_mode_stack
    from triton.runtime.jit import JITFunction
    from ttsem import harness, sanitize

    seen = Witnessed()

    def stopped(error: Exception) -> None:
        seen.faults.append(f"{type(error).__name__}: {error}")

    with sanitize.session(capability, "<witness>", on_stop=stopped) as state, contextlib.ExitStack() as patches:
        execute = JITFunction.run

        def counted(self: Any, *args: Any, warmup: bool, **named: Any) -> Any:
            result = execute(self, *args, warmup=warmup, **named)
            if not warmup:
                seen.launches[self.fn.__name__] += 1
            return result

        patches.enter_context(mock.patch.object(JITFunction, "run", counted))
        patches.enter_context(mock.patch.object(harness, "ir_for_launch", _cached_ir(harness)))
        patches.enter_context(_tiles_of_descriptors())
        patches.enter_context(_everywhere(_get_current_function_mode_stack()[-1]))
        patches.enter_context(mock.patch.object(torch, "mm", _mm(torch.mm)))
        global _opened
        _opened = True
        try:
            yield seen
        finally:
            _opened = False
            seen.unchecked = state.races_unchecked


def _cached_ir(harness: Any) -> Callable[..., str]:
    """The IR of a launch, compiled no further, once for each version of a kernel."""
    harness.mlir.enable_generic_printing()
    texts: dict[Any, str] = {}

    def ir_for_launch(record: Any, stage: str, target: Any) -> str:
        version = harness._specialize(record.fn, record.args, record.kwargs, target)
        key = (record.fn.cache_key, stage, repr(version))
        if key not in texts:
            texts[key] = harness.mlir.to_generic(harness._stage_text(record, stage, target), None)
        return texts[key]

    return ir_for_launch


def _tiles_of_descriptors() -> Any:
    """Give the tile that a descriptor loads the shape that the IR says."""
    from ttsem import ops

    load = ops.OPS["tt.descriptor_load"]

    def in_its_shape(interp: Any, op: Any, args: Any) -> list[Any]:
        (tile,) = load(interp, op, args)
        return [tile.reshape(tuple(ops._rty(op).shape))]

    return mock.patch.dict(ops.OPS, {"tt.descriptor_load": in_its_shape})


@contextlib.contextmanager
def _everywhere(mode: Any) -> Iterator[None]:
    """Pretend inside operators and backward functions too, and for CPU tensors alone."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.autograd.function import BackwardCFunction
    from torch.library import Library

    real, pretended = torch._C.TensorBase.device.__get__, torch.Tensor.device.fget  # type: ignore[attr-defined]

    def device(self: torch.Tensor) -> torch.device:
        return pretended(self) if real(self).type == "cpu" else real(self)

    def is_cuda(self: torch.Tensor) -> bool:
        return real(self).type == "cpu" and not isinstance(self, FakeTensor)

    def is_cpu(self: torch.Tensor) -> bool:
        return real(self).type == "cpu" and isinstance(self, FakeTensor)

    def with_mode(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            with mode:
                return function(*args, **named)

        return call

    register = Library.impl

    def impl(self: Library, name: Any, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        return register(self, name, with_mode(function) if self.ns == "fastseg" else function, *args, **named)

    replaced = [
        (torch.Tensor, "device", property(device)),
        (torch.Tensor, "is_cuda", property(is_cuda)),
        (torch.Tensor, "is_cpu", property(is_cpu)),
        (Library, "impl", impl),
        (BackwardCFunction, "apply", with_mode(BackwardCFunction.apply)),
    ]
    with contextlib.ExitStack() as patches:
        for owner, name, new in replaced:
            patches.enter_context(mock.patch.object(owner, name, new))
        yield


def _mm(multiply: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """torch.mm with out_dtype, on a CPU."""

    def mm(a: torch.Tensor, b: torch.Tensor, *, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        return multiply(a, b) if out_dtype is None else multiply(a.to(out_dtype), b.to(out_dtype))

    return mm
