"""fastseg.swap_functions: the functional calls of eager code on fastseg's kernels, for as long as a block runs."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import dispatch, functional, torch_internals
from ..torch_internals import FakeTensor

NAMES = ("max_pool2d", "max_unpool2d", "conv_transpose2d", "cross_entropy")
PLAIN = (Tensor, nn.Parameter, FakeTensor)  # not their subclasses: what those mean by an operator is their own affair
LATER = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
HALVES = (torch.float16, torch.bfloat16)


def max_pool2d_with_indices(
    input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
    return_indices: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """torch.nn.functional's function of this name, which gives indices whatever return_indices says."""
    return functional.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, True)


def with_torch_dtype(loss: Tensor, logits: Tensor) -> Tensor:
    """A loss of fastseg's in the dtype that torch gives: half precision for such logits, outside of autocast."""
    if logits.dtype in HALVES and not torch.is_autocast_enabled(logits.device.type):
        return loss.to(logits.dtype)
    return loss


def cross_entropy(input: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """functional.cross_entropy with a loss of torch's dtype."""
    return with_torch_dtype(functional.cross_entropy(input, target, *args, **kwargs), input)


# What is replaced: torch's function, the name it is chosen and counted by, and the function in its place.
REPLACED: dict[Callable[..., Any], tuple[str, Callable[..., Any]]] = {
    F.max_pool2d: ("max_pool2d", functional.max_pool2d),
    F.max_pool2d_with_indices: ("max_pool2d", max_pool2d_with_indices),
    torch.max_pool2d: ("max_pool2d", functional.max_pool2d),
    F.max_unpool2d: ("max_unpool2d", functional.max_unpool2d),
    F.conv_transpose2d: ("conv_transpose2d", functional.conv_transpose2d),  # torch.conv_transpose2d is the same object
    F.cross_entropy: ("cross_entropy", cross_entropy),
}


def checked_names(ops: Iterable[str] | None) -> frozenset[str]:
    """The names of `ops`, or all; TypeError for a bare string, ValueError for a name that is none."""
    if ops is None:
        return frozenset(NAMES)
    if isinstance(ops, str):
        raise TypeError(f"ops must be a collection of names, but is the string {ops!r}")
    names = frozenset(ops)
    if not names <= frozenset(NAMES):
        wrong = ", ".join(sorted(map(repr, names - frozenset(NAMES))))
        raise ValueError(f"ops must be of {', '.join(map(repr, NAMES))}, but has {wrong}")
    return names


def _obstacle(name: str, args: Any) -> str | None:
    """Why a call stays torch's, in words, or None."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    if not tensors or tensors[0] is not args[0]:
        return "its input is no tensor"
    for tensor in tensors:
        if type(tensor) not in PLAIN:
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
        return "autocast on a CPU, which unpools in float32"
    if name == "cross_entropy" and tensors[0].dtype in HALVES and not _on_kernels(name, tensors[0]):
        return "half-precision logits that the kernels do not get: torch's rounding is kept"
    return None


def _on_kernels(name: str, tensor: Tensor) -> bool:
    return dispatch.choose(name, tensor, lambda backend: None, dry_run=True).backend != "torch"


class swap_functions(TorchFunctionMode):
    """Run the functional calls of a block, or of a function, on fastseg's kernels.

    A context manager, and a decorator of a function or module, which then runs under it each time that it is called.
    Meanwhile torch.nn.functional's max_pool2d (with indices and without), max_unpool2d, conv_transpose2d and
    cross_entropy, the functions of those names in torch, and modules that call them go to fastseg.functional. ops:
    names of those to replace (default: all).

    Arguments, results, dtypes and exceptions are torch's. Each call chooses its backend as every call of fastseg does
    (fastseg.explain lists it), so that on a CPU under "auto" the results are torch's to the bit. Tensor subclasses,
    tensors that are not dense, and calls inside torch.func's transforms, forward-mode differentiation or
    torch.jit.trace are passed to torch untouched.

    calls: how often each function was replaced; left: how often (function, reason) was not. Calls that torch.compile
    traces are replaced too, and not counted. May be nested, entered again, and used by several threads; as of any such
    mode of torch the effect is the thread's that entered it. A backward that computes a forward again (activation
    checkpointing) may run on another: decorate the function that is checkpointed. Raises TypeError and ValueError for
    ops that are no such names, and TypeError where what is decorated is a class, a generator or a coroutine function.

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
        if isinstance(function, type) or any(test(function) for test in LATER):
            raise TypeError(
                f"swap_functions must decorate a function that has run when its call returns, but {function.__name__} "
                "is a class, a generator or a coroutine function: decorate what these call"
            )

        @functools.wraps(function, updated=())  # a module's __dict__ is not for a function
        def swapped(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return swapped

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in REPLACED or REPLACED[func][0] not in self.ops:
            return func(*args, **kwargs)
        name, replacement = REPLACED[func]
        reason = _obstacle(name, [*args, *kwargs.values()])
        if torch.compiler.is_compiling():  # counters would be guarded on, and each call compiled anew
            return (replacement if reason is None else func)(*args, **kwargs)
        if reason is not None:
            self.left[name, reason] += 1
            return func(*args, **kwargs)
        self.calls[name] += 1
        # What fastseg calls of torch for it is not for a swap_functions further out.
        with torch_internals.disable_torch_function():
            return replacement(*args, **kwargs)
