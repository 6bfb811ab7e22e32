"""Which implementation runs for a call, and why.

Four backends: ``"triton"`` (the fused kernels), ``"cuda"`` (some of them in CUDA C++, through CuPy), ``"torch"``
(torch's own functions, or the reference where torch has none) and ``"auto"``, which takes the Triton kernels, or the
CUDA C++ kernels where only CuPy is installed, for CUDA tensors that they cover, and torch for the rest. The setting
belongs to the process, as torch.backends' do, since autograd runs the backward on threads of its own. It is asked at
each call.
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

BACKENDS = ("auto", "triton", "cuda", "torch")
NAMES = {"triton": "Triton", "cuda": "CUDA C++"}  # of the backends that are kernels, best first
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
CUPY_INSTALLED = importlib.util.find_spec("cupy") is not None and torch.version.hip is None
OLDEST = (8, 0)  # compute capability: Triton has no older one
NO_KERNELS = "this operator"  # what CUDA C++ kernels do not cover where an operator has none


class NotSupported(NotImplementedError):
    """The kernels of a requested backend do not support a call."""


@dataclass(frozen=True)
class Choice:
    """The backend one operator call takes, and the reason in words."""

    operator: str
    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operator}: {self.backend} ({self.reason})"


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}; it must be one of {', '.join(map(repr, BACKENDS))}")
    return name


_setting = os.environ.get("FASTSEG_BACKEND", "auto")  # read once: it is asked for at each call
_watched: list[Choice] | None = None


def get_backend() -> str:
    """The backend of the process: what was set, else FASTSEG_BACKEND, else "auto". ValueError if that names none."""
    return _checked(_setting, "the environment variable FASTSEG_BACKEND")  # what is set later is checked then


def set_backend(name: str) -> None:
    """Set the backend for the process. Raises ValueError for a name that is none."""
    global _setting
    _setting = _checked(name, "backend")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """``with fastseg.backend("torch"): ...`` sets the process's backend and puts the old one back."""
    global _setting
    before = _setting
    set_backend(name)
    try:
        yield
    finally:
        _setting = before


def interpreted() -> bool:
    """Whether Triton kernels run on CPU tensors (TRITON_INTERPRET=1, set before triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")  # as triton reads it


def interpret_kernels() -> None:
    """Have this process's kernels interpreted. RuntimeError if triton is loaded already and would compile them."""
    if "triton" in sys.modules and not interpreted():
        raise RuntimeError("triton is imported already: set TRITON_INTERPRET=1 before")
    os.environ["TRITON_INTERPRET"] = "1"
    # numpy computes masked lanes as well, and says so
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter")


Preference = tuple[str, str]  # backend, reason in words


def choose(
    operator: str,
    tensor: Tensor,
    uncovered: str | None = None,
    preferred: Preference | None = None,
    asks: bool = False,
    cuda_uncovered: str | None = NO_KERNELS,
) -> Choice:
    """The backend for a call of `operator` on `tensor`.

    uncovered: why the Triton kernels cannot run this call (None: they can); preferred: which of both is the better
    choice under "auto" where they can, and why (None: the kernels); asks: the call may not follow, and explain does not
    list it; cuda_uncovered: why the CUDA C++ kernels cannot. Raises NotImplementedError or RuntimeError where "triton"
    or "cuda" is demanded in vain.
    """
    choice = _decide(operator, tensor.device, uncovered, preferred, cuda_uncovered)
    if _watched is not None and not asks:
        _watched.append(choice)
    return choice


def without_triton(device: torch.device) -> str | None:
    """Why no Triton kernel runs on a device, whatever the call; None where they do."""
    if not TRITON_INSTALLED:
        return "triton is not installed"
    if device.type != "cuda" or interpreted():
        return None
    found = (_capability if torch.compiler.is_compiling() else _capability_once)(device.index)
    if found >= OLDEST:
        return None
    return "triton needs a GPU of compute capability {}.{} or later, and this one has {}.{}".format(*OLDEST, *found)


def _capability(index: int | None) -> tuple[int, int]:
    if not torch.cuda.is_available() or torch.version.hip is not None:  # a traced device; one with other numbers
        return OLDEST
    properties = torch.cuda.get_device_properties(index)  # a constant for torch.compile
    return properties.major, properties.minor


_capability_once = functools.cache(_capability)


def torch_alone(tensor: Tensor) -> bool:
    """Whether torch runs every call on `tensor`, whatever the operator and its other arguments."""
    setting = get_backend()
    if setting == "auto":
        return tensor.device.type != "cuda" or not (CUPY_INSTALLED or without_triton(tensor.device) is None)
    return setting == "torch"


def explaining() -> bool:
    """Whether `explain` lists the choices: also those are to be made that are known to change nothing."""
    return _watched is not None


def left_to_torch(operator: str, tensor: Any) -> bool:
    """torch_alone for a module that calls torch's own forward then: `explain` lists the call. No tensor: False."""
    if not isinstance(tensor, Tensor) or not torch_alone(tensor):
        return False
    if _watched is not None:
        choose(operator, tensor)
    return True


def _decide(
    operator: str, device: torch.device, uncovered: str | None, preferred: Preference | None,
    cuda_uncovered: str | None = NO_KERNELS,
) -> Choice:  # fmt: skip
    setting = get_backend()
    if setting == "torch":
        return Choice(operator, "torch", "the backend is set to 'torch'")
    reasons = {"triton": uncovered, "cuda": cuda_uncovered}
    if setting in reasons:
        _refuse(operator, setting, device, reasons[setting])
        return Choice(operator, setting, f"the backend is set to '{setting}'")
    kind = device.type
    if kind != "cuda":
        return Choice(operator, "torch", "a CPU tensor" if kind == "cpu" else f"a tensor on device type '{kind}'")
    lacking = without_triton(device)
    if lacking is not None and not CUPY_INSTALLED:
        return Choice(operator, "torch", lacking)
    backend, missing = ("triton", "") if lacking is None else ("cuda", f"{lacking}; ")
    if reasons[backend] is not None:
        return Choice(operator, "torch", f"{missing}the {NAMES[backend]} kernels do not cover {reasons[backend]}")
    if torch_internals.forward_mode_active():
        return Choice(operator, "torch", "inside forward-mode differentiation, which the kernels have no rule for")
    if preferred is not None and backend == "triton":
        return Choice(operator, *preferred)
    return Choice(operator, backend, f"{missing}a CUDA tensor, covered by the {NAMES[backend]} kernels")


def _refuse(operator: str, backend: str, device: torch.device, uncovered: str | None) -> None:
    """Raise where a backend of kernels cannot run the call that demands it."""
    if uncovered is not None:
        raise NotSupported(
            f"{operator}: the {NAMES[backend]} kernels do not cover {uncovered}; backend 'auto' takes torch for it"
        )
    from .kernels.cuda import launch  # here, since no kernel is loaded before one is asked for

    if backend == "cuda" and launch.recorded():
        return
    demanded = f"{operator}: backend '{backend}'"
    if backend == "triton" and (lacking := without_triton(device)) is not None:
        raise RuntimeError(f"{demanded} cannot run: {lacking}")
    if backend == "cuda" and not CUPY_INSTALLED:
        raise RuntimeError(f"{demanded} needs {launch.CUPY}")
    if backend == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"{demanded} needs a CUDA GPU, and torch finds none on this machine")
    if device.type == "cpu" and not (backend == "triton" and interpreted()):
        if backend == "triton":
            raise RuntimeError(
                f"{demanded} on a CPU tensor needs TRITON_INTERPRET=1 in the environment "
                "before triton is imported; move the tensor to a CUDA device or use backend 'auto'"
            )
        raise RuntimeError(f"{demanded} runs on CUDA tensors; move the tensor to a CUDA device or use backend 'auto'")
    if device.type not in ("cpu", "cuda", "meta"):
        raise RuntimeError(f"{demanded} runs on CUDA tensors, not on device type '{device.type}'")


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Choice]:
    """What each fastseg operator in ``function(*args, **kwargs)`` would run on, and why; nothing is computed.

    `function` may be one of fastseg.functional's, a module, or any callable: it is called on fake tensors, which
    have shapes, dtypes and devices but no data. A module's parameters and buffers are replaced by fakes as well.

    >>> import torch, fastseg
    >>> print(*fastseg.explain(fastseg.functional.max_pool2d, torch.zeros(1, 8, 16, 16), 2))
    max_pool2d: torch (a CPU tensor)
    """
    global _watched
    with torch_internals.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake_args, fake_kwargs = torch_internals.tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
        outer, _watched = _watched, []
        try:
            if isinstance(function, torch.nn.Module):
                # Each module once, tied tensors under each module: functional_call's own tying would put a shared
                # module's fakes in twice, and leave them there.
                fakes = {
                    f"{path}.{name}" if path else name: mode.from_tensor(tensor)
                    for path, module in function.named_modules()
                    for own in (module.named_parameters, module.named_buffers)
                    for name, tensor in own(recurse=False, remove_duplicate=False)
                }
                torch.func.functional_call(function, fakes, fake_args, fake_kwargs, tie_weights=False)
            else:
                function(*fake_args, **fake_kwargs)
            return _watched
        finally:
            _watched = outer
