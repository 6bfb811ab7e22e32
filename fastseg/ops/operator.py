"""What every operator shares: its registration with torch, its memory format, and second derivatives."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch, torch_internals
from ..kernels.shared import Setting
from ..torch_internals import tree_leaves

LIB = torch.library.Library("fastseg", "DEF")  # module scope: dropping it would unregister the operators
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

_option_schemas: dict[str, tuple[type, str]] = {}


def register_options(options: type, schema: str) -> None:
    """Allow the NamedTuple class `options` as an argument type in the schemas of operators.

    torch's schemas know no objects: an argument of this type stands for the arguments in `schema`, one for each field.

    Example:
        >>> class Scale(NamedTuple):
        ...     factor: float
        >>> register_options(Scale, "float factor")
    """
    names = tuple(argument.split()[1] for argument in schema.split(", "))
    if names != options._fields:
        raise ValueError(f"schema must name the fields of {options.__name__}, {options._fields}, but names {names}")
    _option_schemas[options.__name__] = (options, schema)


class _Argument(NamedTuple):
    """One argument of an operator: `options` is its class if it is an object that the registered schema spells out."""

    options: type | None
    fields: int = 1
    optional: bool = False


def _flat_schema(schema: str) -> tuple[str, list[_Argument]]:
    """The schema as torch registers it, and how an operator's arguments are found in it.

    "Options? name" may be None, which is None for each of its fields. Where a type occurs twice, the names of its
    fields begin with the name of the argument.
    """
    name, arguments, result = re.fullmatch(r"(\w+)\((.*)\)( -> .*)", schema).groups()
    flat, found = [], []
    types = [argument.split()[0].rstrip("?") for argument in arguments.split(", ")]
    for argument in arguments.split(", "):
        kind, label, *_ = argument.split()
        if kind.rstrip("?") not in _option_schemas:
            flat.append(argument)
            found.append(_Argument(None))
            continue
        options, fields = _option_schemas[kind.rstrip("?")]
        for field in fields.split(", "):
            field_kind, field_name = field.split()
            if kind.endswith("?") and not field_kind.endswith("?"):
                field_kind += "?"
            prefix = f"{label}_" if types.count(kind.rstrip("?")) > 1 else ""
            flat.append(f"{field_kind} {prefix}{field_name}")
        found.append(_Argument(options, len(options._fields), kind.endswith("?")))
    return f"{name}({', '.join(flat)}){result}", found


class Implementation(NamedTuple):
    """The kernels of one backend for an operator.

    run: computes the operator from its arguments. unsupported: says in words what of a call these kernels do not
    support, or returns None. preferred, read for "cpu" alone: the better backend under "auto" for a call that they
    support, and why, or None for these kernels.
    """

    run: Callable[..., Any]
    unsupported: Callable[..., str | None]
    preferred: Callable[..., dispatch.Preference | None] = lambda *args: None


def for_backends(
    run: Callable[..., Any],
    unsupported: Callable[..., str | None],
    preferred: Callable[..., dispatch.Preference | None] = lambda *args: None,
    **kernels: ModuleType,
) -> dict[str, Implementation]:
    """The implementations of backends that support the same calls: `run` gets the backend's kernels first."""
    return {
        backend: Implementation(partial(run, module), unsupported, preferred) for backend, module in kernels.items()
    }


class Operator:
    """One operator ``torch.ops.fastseg.<name>``: calling this object calls the registered operator.

    Option objects (see register_options) are passed whole to this object and reach the implementations whole. Only
    this class flattens them for the registered schema, and builds them again.

    Args:
        schema: torch's function schema, which may name types of option objects.
        kernels: the implementation of each backend that has one.
        reference: the same in torch alone, which works in float64 too.
        fake: returns the result's shapes, dtypes and strides, for tracing.
        preferred: the better backend for a call on a GPU under "auto" and why; None for the kernels.
        gradient: whether the operator computes a part of a gradient.
    """

    def __init__(
        self,
        schema: str,
        *,
        kernels: Mapping[str, Implementation],
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        preferred: Callable[..., dispatch.Preference | None] = lambda *args: None,
        gradient: bool = False,
    ) -> None:
        flat, self._arguments = _flat_schema(schema)
        self.name = flat.partition("(")[0]
        self.kernels, self.fake, self.preferred, self.gradient = kernels, fake, preferred, gradient
        self.implementations = {name: found.run for name, found in kernels.items()} | {"torch": reference}
        if "cpu" in kernels:
            dispatch.CPU_OPERATORS.add(self.name)
        self._cpu_choice = dispatch.Choice(self.name, "cpu", dispatch.ON_CPU)
        LIB.define(flat, tags=TAGS)
        LIB.impl(self.name, self._run, "CompositeExplicitAutograd")  # for every device: _run chooses what it runs
        torch.library.register_fake(f"fastseg::{self.name}", self._trace, lib=LIB)
        self.op = getattr(torch.ops.fastseg, self.name).default

    def __call__(self, *args: Any) -> Any:
        # torch's dispatcher takes 30 us for an operator in Python, as long as a small kernel
        if args[0].is_cpu and torch_internals.nothing_watches(args):
            return self._compute(args)
        return self.op(*self.flatten(args))

    def flatten(self, args: Sequence[Any]) -> list[Any]:
        """The arguments as the registered schema takes them: the fields of option objects one by one."""
        flat: list[Any] = []
        for argument, value in zip(self._arguments, args, strict=False):  # those with defaults may be left out
            if argument.options is None:
                flat.append(value)
            else:
                flat.extend([None] * argument.fields if value is None else value)
        return flat

    def rebuild(self, flat: Sequence[Any]) -> list[Any]:
        """The inverse of flatten."""
        args: list[Any] = []
        at = 0
        for argument in self._arguments:
            if at == len(flat):  # torch leaves out arguments that have their default
                break
            values = flat[at : at + argument.fields]
            at += argument.fields
            if argument.options is None:
                args.append(values[0])
            else:
                absent = argument.optional and all(value is None for value in values)
                args.append(None if absent else argument.options(*values))
        return args

    def unsupported(self, backend: str, *args: Any) -> str | None:
        """What of a call the kernels of `backend` do not support, in words, or None."""
        if backend not in self.kernels:
            return dispatch.NO_KERNELS
        return self.kernels[backend].unsupported(*args)

    def choose(
        self, *args: Any, dry_run: bool = False, preferred: dispatch.Preference | None = None
    ) -> dispatch.Choice:
        """The backend for these arguments, the first of which is a tensor.

        dry_run: only ask; `explain` does not record it as a call. preferred: what a function that composes torch's own
        operators knows to be better under "auto" than this operator's kernels, and why.
        """
        if args[0].is_cpu and not dispatch.explaining() and dispatch.get_backend() == "auto":
            if preferred is not None:
                return dispatch.Choice(self.name, *preferred)  # as below: every other reason leads to torch as well
            if self._runs_on_cpu(args):
                return self._cpu_choice
        if dispatch.torch_alone(args[0]):
            return dispatch.choose(self.name, args[0], dry_run=dry_run)
        if preferred is None and dispatch.get_backend() == "auto":
            backend = "cpu" if args[0].device.type == "cpu" else "triton"
            if self.unsupported(backend, *args) is None:
                preferred = (self.kernels["cpu"] if backend == "cpu" else self).preferred(*args)
        return dispatch.choose(self.name, args[0], lambda backend: self.unsupported(backend, *args), preferred, dry_run)

    def _runs_on_cpu(self, args: Sequence[Any]) -> bool:
        """Whether "auto" takes the CPU kernels. Says no more, and takes a third of the time."""
        found = self.kernels.get("cpu")
        if found is None or torch_internals.exporting() or torch_internals.forward_mode_active():
            return False
        if dispatch.without_cpu_kernels() is not None:
            return False
        return found.unsupported(*args) is None and found.preferred(*args) is None

    def floor(self, *args: Any) -> int:
        """The fewest bytes a call can move: each tensor argument read once, each result written once."""
        tensors = [x for x in tree_leaves((args, self.fake(*args))) if isinstance(x, Tensor)]
        return sum(x.numel() * x.element_size() for x in tensors)

    def _run(self, *flat: Any) -> Any:
        return self._compute(self.rebuild(flat))

    def _compute(self, args: Sequence[Any]) -> Any:
        with torch.no_grad(), _no_autocast(args[0].device.type):
            result = self.implementations[self.choose(*args).backend](*args)
        if _observer.value is not None:
            _observer.value(self, args)
        return result

    def _trace(self, *flat: Any) -> Any:
        args = self.rebuild(flat)
        if _observer.value is None:
            return self.fake(*args)
        result = self.implementations[self.choose(*args).backend](*args)  # its launches are recorded, not run
        _observer.value(self, args)
        return result


def _no_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast off: an implementation chooses its dtypes itself, also in the torch functions that it calls."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


Observer = Callable[[Operator, tuple[Any, ...]], None]
_observer: Setting[Observer | None] = Setting(None)


def observing(observer: Observer) -> contextlib.AbstractContextManager[Any]:
    """Call ``observer(operator, args)`` after every operator that runs, on the meta device too.

    On the meta device the kernels' launchers run instead of the fakes, so launches must be recorded meanwhile.
    """
    return _observer.replaced(observer)


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format that an output keeps: channels_last for a 4-D tensor whose strides grow from C to W, H and N.

    The tensor need not be dense. This is torch's own rule, so that ambiguous sizes of 1 resolve as in torch.
    """
    least = 0
    for dim in (1, 3, 2, 0) if x.dim() == 4 else ():
        size, stride = x.shape[dim], x.stride(dim)
        if size == 0 or stride < least or stride == 0 or (dim == 0 and least == x.stride(1)):
            return torch.contiguous_format
        least = stride * size
    return torch.channels_last if x.dim() == 4 else torch.contiguous_format


MOST_THREADS = 16  # that count in few_elements


def few_elements(x: Tensor, least: Mapping[torch.memory_format, int]) -> dispatch.Preference | None:
    """torch, if it is as fast on a CPU: with fewer elements per thread calling the kernels costs more than they save.

    A traced call is not asked: it may run for other sizes.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    few = x.numel() < least[memory_format(x)] * min(torch.get_num_threads(), MOST_THREADS)
    return ("torch", "torch is as fast for few elements") if few else None


def dense(x: Tensor, layout: torch.memory_format) -> Tensor:
    """`x` in the given memory format, copied only if it has another."""
    return x.contiguous(memory_format=layout)


def empty(like: Tensor, shape: Sequence[int], layout: torch.memory_format, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialized tensor on the device of `like`: the one allocation rule that kernels and fakes share."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=layout)


def empty_like(input: Tensor) -> Tensor:
    """An uninitialized tensor of the input's shape, dtype and memory format."""
    return empty(input, input.shape, memory_format(input))


def placed(result: Tensor, layout: torch.memory_format) -> Tensor:
    """A copy of a reference's result with exactly the strides that `empty` gives."""
    return empty(result, result.shape, layout).copy_(result)


def double_backward(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of ``function(*inputs)`` by torch's own formulas, which can be differentiated again.

    For a backward with create_graph=True: the kernels' gradients have no derivative, torch's do.
    """
    with torch.enable_grad():
        # New views: if one input was computed from another, that step belongs to the caller's graph, not to this one.
        inputs = [x.view_as(x) if need else x for x, need in zip(inputs, needed, strict=True)]
        output = function(*inputs)
        wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
        found = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
    return [next(found) if need else None for need in needed]


def known_signature(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Mark the `forward` of an autograd.Function with its signature, which torch else finds out again at each call."""
    forward.__signature__ = inspect.signature(forward)
    return forward


def vmap_loops(info: Any, in_dims: tuple[Any, ...], function: type[torch.autograd.Function], *args: Any) -> Any:
    """The `vmap` of an autograd.Function whose operators take no further batch dimension: one call per entry."""
    calls = [
        function.apply(
            *(
                x.select(dim, entry) if isinstance(x, Tensor) and dim is not None else x
                for x, dim in zip(args, in_dims, strict=True)
            )
        )
        for entry in range(info.batch_size)
    ]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    return tuple(map(torch.stack, zip(*calls, strict=True))), (0,) * len(calls[0])


def wants_graph() -> bool:
    """Whether a backward must return differentiable gradients (create_graph=True)."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()
