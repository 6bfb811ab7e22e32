"""Which implementation runs for a call, and why.

Backends: ``"triton"`` (the fused kernels), ``"cuda"`` (some of them in CUDA C++, through CuPy), ``"cpu"`` (some of them
in C++, compiled by the system's compiler at first use), ``"torch"`` (torch's own functions, or the reference if torch
has none) and ``"auto"``. For a CUDA tensor "auto" takes the Triton kernels, or the CUDA C++ kernels if only CuPy is
installed; for a CPU tensor the CPU kernels if they can be compiled and torch is not measured to be faster at that size.
For calls that the kernels do not support, and for other devices, it falls back to PyTorch. The setting is read at each
call. A ``with`` block sets it for its own thread, set_backend for all threads outside of such blocks.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import torch_internals
from .kernels.shared import Setting

BACKENDS = ("auto", "triton", "cuda", "cpu", "torch")
NAMES = {"triton": "Triton", "cuda": "CUDA C++", "cpu": "CPU"}  # the backends that are kernels, best first
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
CUPY_INSTALLED = importlib.util.find_spec("cupy") is not None and torch.version.hip is None
OLDEST = (8, 0)  # the oldest compute capability that Triton supports
NO_KERNELS = "this operator"  # what the kernels of a backend do not support if an operator has none there
CPU_OPERATORS: set[str] = set()  # the operators that have CPU kernels


@dataclass(frozen=True)
class Choice:
    """The backend that one operator call takes, and the reason in words."""

    operator: str
    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operator}: {self.backend} ({self.reason})"


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}; it must be one of {', '.join(map(repr, BACKENDS))}")
    return name


_setting = Setting(
    os.environ.get("FASTSEG_BACKEND", "auto")
)  # the environment is read once: each call needs the setting
_watched: Setting[list[Choice] | None] = Setting(None)  # what `explain` lists


def get_backend() -> str:
    """The backend of the current thread.

    It is that of the innermost ``with fastseg.backend(...)``, else that of set_backend, else that of the environment
    variable FASTSEG_BACKEND, else "auto".

    Raises:
        ValueError: if FASTSEG_BACKEND is not the name of a backend.
    """
    return _checked(_setting.value, "the environment variable FASTSEG_BACKEND")  # set_backend checks its own argument


def set_backend(name: str) -> None:
    """Set the backend of the process: "auto", "triton", "cuda", "cpu" or "torch".

    All threads read it, outside of ``with fastseg.backend(...)``. Called inside such a block, it sets the backend of
    the block in place of that of the process.

    Raises:
        ValueError: for another name.
    """
    _setting.set(_checked(name, "backend"))


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Set the backend of the current thread for the duration of a ``with`` block.

    It is also the backend of a backward that is called inside the block, which PyTorch runs on threads of its own.
    Blocks in other threads may overlap with this one: each thread has its own backend. Threads that are started inside
    the block, such as those of nn.DataParallel, have the backend of the process: use set_backend for them. Like
    torch.no_grad, the block belongs to the thread, not to an asyncio task.

    Example:
        >>> import torch, fastseg
        >>> with fastseg.backend("torch"):
        ...     y = fastseg.functional.max_pool2d(torch.ones(1, 1, 4, 4), 2)

    Raises:
        ValueError: if `name` is not the name of a backend.
    """
    with _setting.replaced(_checked(name, "backend")):
        yield


def interpreted() -> bool:
    """Whether Triton kernels run on CPU tensors (TRITON_INTERPRET=1, set before triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")  # as triton reads it


def interpret_kernels() -> None:
    """Run this process's Triton kernels in the interpreter, on CPU tensors.

    Raises:
        RuntimeError: if triton is already imported, and so would compile them.
    """
    if "triton" in sys.modules and not interpreted():
        raise RuntimeError("triton is imported already: set TRITON_INTERPRET=1 before")
    os.environ["TRITON_INTERPRET"] = "1"
    # numpy also computes the masked lanes, and warns about their values
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter")


Preference = tuple[str, str]  # backend, reason in words
Unsupported = Callable[[str], str | None]  # of a backend: what of a call its kernels do not support, or None


class NotSupported(NotImplementedError):
    """A backend was requested whose kernels do not support the call."""


def only_triton(missing: str | None) -> Unsupported:
    """For an operator with Triton kernels alone: `missing` is what of the call they do not support, or None."""
    return lambda backend: missing if backend == "triton" else NO_KERNELS


def choose(
    operator: str,
    tensor: Tensor,
    unsupported: Unsupported = only_triton(None),  # noqa: B008
    preferred: Preference | None = None,
    dry_run: bool = False,
) -> Choice:
    """The backend for a call of `operator` on `tensor`.

    Args:
        operator: its name.
        tensor: an argument whose device decides.
        unsupported: what of the call the kernels of a backend do not support.
        preferred: the better backend under "auto" if the device's kernels support the call, and why.
        dry_run: only ask; `explain` does not record it as a call.

    Raises:
        NotSupported: if the backend that is set does not support the call.
        RuntimeError: if it cannot run on this machine.
    """
    choice = _decide(operator, tensor.device, unsupported, preferred)
    if _watched.value is not None and not dry_run:
        _watched.value.append(choice)
    return choice


def without_triton(device: torch.device) -> str | None:
    """Why no Triton kernel can run on a device, or None if they can."""
    if not TRITON_INSTALLED:
        return "triton is not installed"
    if device.type != "cuda" or interpreted():
        return None
    found = (_capability if torch.compiler.is_compiling() else _capability_once)(device.index)
    if found >= OLDEST:
        return None
    return "triton needs a GPU of compute capability {}.{} or later, and this one has {}.{}".format(*OLDEST, *found)


def _capability(index: int | None) -> tuple[int, int]:
    if not torch.cuda.is_available() or torch.version.hip is not None:  # fake, or AMD's
        return OLDEST
    properties = torch.cuda.get_device_properties(index)  # a constant for torch.compile
    return properties.major, properties.minor


_capability_once = functools.cache(_capability)


@torch_internals.constant_when_compiled
def without_cpu_kernels() -> str | None:
    """Why no CPU kernel can run on this machine, or None if they can. The first call may run the C++ compiler."""
    return _without_cpu_kernels()


@functools.cache
def _without_cpu_kernels() -> str | None:
    from .kernels.cpu import build  # imported here: no kernel file is loaded before it is needed

    return build.unavailable()


def torch_alone(tensor: Tensor) -> bool:
    """Whether every operator falls back to PyTorch for `tensor`, whatever its other arguments."""
    setting = get_backend()
    if setting == "auto":
        if tensor.device.type == "cpu":
            return without_cpu_kernels() is not None
        return tensor.device.type != "cuda" or not (CUPY_INSTALLED or without_triton(tensor.device) is None)
    return setting == "torch"


def explaining() -> bool:
    """Whether `explain` is recording, so that choices with a known result must be made too."""
    return _watched.value is not None


def left_to_torch(operator: str, tensor: Any) -> bool:
    """Whether `operator` falls back to PyTorch for `tensor`, whatever its other arguments, recorded for `explain`.

    For a module that then calls torch's own forward. False if `tensor` is not a tensor.
    """
    if not isinstance(tensor, Tensor):
        return False
    no_cpu_kernels = tensor.device.type == "cpu" and get_backend() == "auto" and operator not in CPU_OPERATORS
    if not no_cpu_kernels and not torch_alone(tensor):
        return False
    if _watched.value is not None:
        choose(operator, tensor)
    return True


def _decide(operator: str, device: torch.device, unsupported: Unsupported, preferred: Preference | None) -> Choice:
    setting = get_backend()
    if setting == "torch":
        return Choice(operator, "torch", "the backend is set to 'torch'")
    if setting != "auto":
        _require(operator, setting, device, unsupported(setting))
        return Choice(operator, setting, f"the backend is set to '{setting}'")
    if device.type == "cpu":
        return _decide_on_cpu(operator, unsupported, preferred)
    if device.type != "cuda":
        return Choice(operator, "torch", f"a tensor on device type '{device.type}'")
    no_triton = without_triton(device)
    if no_triton is not None and not CUPY_INSTALLED:
        return Choice(operator, "torch", no_triton)
    backend, why = ("triton", "") if no_triton is None else ("cuda", f"{no_triton}; ")
    if (missing := unsupported(backend)) is not None:
        return Choice(operator, "torch", f"{why}the {NAMES[backend]} kernels do not support {missing}")
    if torch_internals.forward_mode_active():
        return Choice(operator, "torch", "inside forward-mode differentiation, for which the kernels have no rule")
    if preferred is not None and backend == "triton":
        return Choice(operator, *preferred)
    return Choice(operator, backend, f"{why}a CUDA tensor, supported by the {NAMES[backend]} kernels")


def _decide_on_cpu(operator: str, unsupported: Unsupported, preferred: Preference | None) -> Choice:
    """The choice under "auto" for a CPU tensor."""
    missing = unsupported("cpu")
    if missing == NO_KERNELS:
        return Choice(operator, "torch", "a CPU tensor")
    if torch_internals.exporting():
        return Choice(operator, "torch", "a CPU tensor in an exported program, which must run without fastseg")
    if (no_cpu_kernels := without_cpu_kernels()) is not None:
        return Choice(operator, "torch", f"a CPU tensor, and {no_cpu_kernels}")
    if missing is not None:
        return Choice(operator, "torch", f"the CPU kernels do not support {missing}")
    if torch_internals.forward_mode_active():
        return Choice(operator, "torch", "inside forward-mode differentiation, for which the kernels have no rule")
    if preferred is not None:
        return Choice(operator, *preferred)
    return Choice(operator, "cpu", "a CPU tensor, supported by the CPU kernels")


def _require(operator: str, backend: str, device: torch.device, missing: str | None) -> None:
    """Raise if the requested kernels cannot run the call; `missing` is what of it they do not support."""
    if missing is not None:
        raise NotSupported(
            f"{operator}: the {NAMES[backend]} kernels do not support {missing}; backend 'auto' falls back to PyTorch"
        )
    requested = f"{operator}: backend '{backend}'"
    if backend == "cpu":
        if device.type != "cpu":
            raise RuntimeError(f"{requested} runs on CPU tensors, not on device type '{device.type}'")
        if (no_cpu_kernels := without_cpu_kernels()) is not None:
            raise RuntimeError(f"{requested} cannot run: {no_cpu_kernels}")
        return
    from .kernels.cuda import launch  # imported here: no kernel file is loaded before it is needed

    if backend == "cuda" and launch.recorded():
        return
    if backend == "triton" and (no_triton := without_triton(device)) is not None:
        raise RuntimeError(f"{requested} cannot run: {no_triton}")
    if backend == "cuda" and not CUPY_INSTALLED:
        raise RuntimeError(f"{requested} needs {launch.CUPY}")
    if backend == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"{requested} needs a CUDA GPU, and torch finds none on this machine")
    if device.type == "cpu" and not (backend == "triton" and interpreted()):
        if backend == "triton":
            raise RuntimeError(
                f"{requested} on a CPU tensor needs TRITON_INTERPRET=1 in the environment "
                "before triton is imported; move the tensor to a CUDA device or use backend 'auto'"
            )
        raise RuntimeError(f"{requested} runs on CUDA tensors; move the tensor to a CUDA device or use backend 'auto'")
    if device.type not in ("cpu", "cuda", "meta"):
        raise RuntimeError(f"{requested} runs on CUDA tensors, not on device type '{device.type}'")


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Choice]:
    """Which backend each fastseg operator in ``function(*args, **kwargs)`` would take, and why.

    Nothing is computed: `function` is called on fake tensors, which have shapes, dtypes and devices but no data. The
    parameters and buffers of a module are replaced by fake tensors too.

    Args:
        function: one of fastseg.functional's functions, a module, or any callable.
        args, kwargs: its arguments.

    Returns:
        One Choice (operator, backend, reason) per operator call, in order.

    Example:
        >>> import torch, fastseg
        >>> weight = torch.zeros(8, 4, 2, 2)
        >>> print(*fastseg.explain(fastseg.functional.conv_transpose2d, torch.zeros(1, 8, 16, 16), weight))
        conv_transpose2d: torch (a CPU tensor)
    """
    with torch_internals.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake_args, fake_kwargs = torch_internals.tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
        with _watched.replaced([]) as choices:
            if isinstance(function, torch.nn.Module):
                # Each module once, tied tensors once per module: with functional_call's own tying a shared module would
                # be given its fake tensors twice and keep them.
                fakes = {
                    f"{path}.{name}" if path else name: mode.from_tensor(tensor)
                    for path, module in function.named_modules()
                    for own in (module.named_parameters, module.named_buffers)
                    for name, tensor in own(recurse=False, remove_duplicate=False)
                }
                torch.func.functional_call(function, fakes, fake_args, fake_kwargs, tie_weights=False)
            else:
                function(*fake_args, **fake_kwargs)
            return choices
