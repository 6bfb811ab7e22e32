"""fastseg.swap_functions: run the functional calls of eager code on fastseg's kernels while a block runs."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import dispatch, functional, torch_internals
from ..torch_internals import FakeTensor

NAMES = ("max_pool2d", "max_unpool2d", "conv_transpose2d", "cross_entropy")
# Calls with other subclasses of Tensor are not replaced: such a subclass defines itself what an operator does.
TENSOR_CLASSES = (Tensor, nn.Parameter, FakeTensor)
HALF_DTYPES = (torch.float16, torch.bfloat16)
# Functions of these kinds run after their call has returned, when a decorator would no longer be active.
RUNS_LATER = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)


def max_pool2d_with_indices(
    input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
    return_indices: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """torch.nn.functional.max_pool2d_with_indices, which ignores return_indices and always returns the indices."""
    return functional.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, True)


def with_torch_dtype(loss: Tensor, logits: Tensor) -> Tensor:
    """A loss of fastseg's in the dtype that torch returns: that of half-precision logits, except under autocast."""
    if logits.dtype in HALF_DTYPES and not torch.is_autocast_enabled(logits.device.type):
        return loss.to(logits.dtype)
    return loss


def cross_entropy(input: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """functional.cross_entropy with a loss of torch's dtype."""
    return with_torch_dtype(functional.cross_entropy(input, target, *args, **kwargs), input)


class Replacement(NamedTuple):
    """What replaces a function of torch: the operator's name, as dispatched and counted, and the function."""

    name: str
    function: Callable[..., Any]


REPLACEMENTS: dict[Callable[..., Any], Replacement] = {
    F.max_pool2d: Replacement("max_pool2d", functional.max_pool2d),
    F.max_pool2d_with_indices: Replacement("max_pool2d", max_pool2d_with_indices),
    torch.max_pool2d: Replacement("max_pool2d", functional.max_pool2d),
    F.max_unpool2d: Replacement("max_unpool2d", functional.max_unpool2d),
    # torch.conv_transpose2d is the same object as F.conv_transpose2d.
    F.conv_transpose2d: Replacement("conv_transpose2d", functional.conv_transpose2d),
    F.cross_entropy: Replacement("cross_entropy", cross_entropy),
}


def checked_names(ops: Iterable[str] | None) -> frozenset[str]:
    """The names in `ops`, or all names if it is None. TypeError for a string, ValueError for an unknown name."""
    if ops is None:
        return frozenset(NAMES)
    if isinstance(ops, str):
        raise TypeError(f"ops must be a collection of names, but is the string {ops!r}")
    names = frozenset(ops)
    if not names <= frozenset(NAMES):
        wrong = ", ".join(sorted(map(repr, names - frozenset(NAMES))))
        raise ValueError(f"ops must be names out of {', '.join(map(repr, NAMES))}, but has {wrong}")
    return names


def _obstacle(name: str, args: Any) -> str | None:
    """Why a call is not replaced, or None if it is."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    if not tensors or tensors[0] is not args[0]:
        return "its input is not a tensor"
    for tensor in tensors:
        if type(tensor) not in TENSOR_CLASSES:
            return f"a tensor of type {type(tensor).__name__}"
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
            return "a tensor that is not dense"
    if torch.compiler.is_compiling():
        return None
    if torch_internals.functorch_transforms_active() or torch_internals.forward_mode_active():
        return "inside a torch.func transform or forward-mode differentiation"
    if torch.jit.is_tracing():
        return "inside torch.jit.trace"
    if name == "max_unpool2d" and tensors[0].device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return "autocast on a CPU, where torch unpools in float32"
    if name == "cross_entropy" and tensors[0].dtype in HALF_DTYPES and not _runs_on_kernels(name, tensors[0]):
        return "half-precision logits that fall back to PyTorch, whose rounding is kept"
    return None


def _runs_on_kernels(name: str, tensor: Tensor) -> bool:
    def unsupported(backend: str) -> str | None:
        return dispatch.NO_KERNELS if backend == "cpu" and name not in dispatch.CPU_OPERATORS else None

    return dispatch.choose(name, tensor, unsupported, dry_run=True).backend != "torch"


class swap_functions(TorchFunctionMode):
    """Run the functional calls of a block, or of a function, on fastseg's kernels.

    A context manager, and a decorator for functions and modules. While it is active, these calls go to
    fastseg.functional, from modules too: torch.nn.functional.max_pool2d (with and without indices), max_unpool2d,
    conv_transpose2d and cross_entropy, and torch.max_pool2d and torch.conv_transpose2d.

    Arguments, dtypes and exceptions are torch's, and results up to rounding: each call chooses its backend like every
    call of fastseg, also on a CPU. Calls with tensor subclasses or tensors that
    are not dense, and calls inside torch.func transforms, forward-mode differentiation or torch.jit.trace, go to torch
    unchanged. Calls traced by torch.compile are replaced too, but not counted.

    The mode may be nested and entered again. As any torch function mode it is active in the thread that entered it. A
    backward that recomputes a forward (activation checkpointing) may run in another thread: decorate the function that
    is checkpointed.

    Args:
        ops: the names of the functions to replace. Default: "max_pool2d", "max_unpool2d", "conv_transpose2d" and
            "cross_entropy".

    Attributes:
        calls: a Counter of the replaced calls, by name.
        left: a Counter of the calls that were not replaced, by (name, reason).

    Returns:
        As a decorator: the function or module wrapped in a function that runs it under this mode.

    Raises:
        TypeError: if `ops` is a string, or if what is decorated is a class, a generator or a coroutine function.
        ValueError: if `ops` has an unknown name.

    Example:
        >>> import torch, fastseg
        >>> with fastseg.swap_functions() as swapped:
        ...     y = torch.nn.functional.max_pool2d(torch.zeros(1, 2, 4, 4), 2)
        >>> dict(swapped.calls)
        {'max_pool2d': 1}
    """

    def __init__(self, ops: Iterable[str] | None = None) -> None:
        super().__init__()
        self.ops = checked_names(ops)
        self.calls: Counter[str] = Counter()
        self.left: Counter[tuple[str, str]] = Counter()

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if isinstance(function, type) or any(test(function) for test in RUNS_LATER):
            raise TypeError(
                f"swap_functions must decorate a function that is done when its call returns, but {function.__name__} "
                "is a class, a generator or a coroutine function; decorate the functions that it calls"
            )

        @functools.wraps(function, updated=())  # do not copy a module's __dict__
        def swapped(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return swapped

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in REPLACEMENTS or REPLACEMENTS[func].name not in self.ops:
            return func(*args, **kwargs)
        name, replacement = REPLACEMENTS[func]
        reason = _obstacle(name, [*args, *kwargs.values()])
        if torch.compiler.is_compiling():  # a counter would become a guard, and each call would recompile
            return (replacement if reason is None else func)(*args, **kwargs)
        if reason is not None:
            self.left[name, reason] += 1
            return func(*args, **kwargs)
        self.calls[name] += 1
        # An outer swap_functions must not replace the calls to torch that fastseg makes for this one.
        with torch_internals.disable_torch_function():
            return replacement(*args, **kwargs)
