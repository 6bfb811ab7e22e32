"""What every operator shares: its registration with torch, its memory format, and derivatives of derivatives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..torch_internals import tree_leaves

LIB = torch.library.Library("fastseg", "DEF")  # module scope: dropping it would unregister the operators
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


class Operator:
    """One ``torch.ops.fastseg`` operator: calling it calls the registered operator.

    schema: torch's function schema. kernel, reference: the two implementations, called with the operator's
    arguments; the reference is written in torch alone and works in float64. cuda: a third in CUDA C++, of operators
    that have one. fake: shapes, dtypes and strides of the result, for tracing. uncovered: says in words what of a call
    the kernels do not cover, or None, and cuda_uncovered what those in CUDA C++ do not; preferred: the backend that is
    the better choice under "auto", and why, or None for the kernels. backward: whether it is part of a gradient, and so
    takes a tensor named grad_ and of what.
    """

    def __init__(
        self,
        schema: str,
        *,
        kernel: Callable[..., Any],
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        uncovered: Callable[..., str | None],
        preferred: Callable[..., dispatch.Preference | None] = lambda *args: None,
        cuda: Callable[..., Any] | None = None,
        cuda_uncovered: Callable[..., str | None] | None = None,
    ) -> None:
        self.name, _, arguments = schema.partition("(")
        self.fake, self.backward = fake, "Tensor grad_" in arguments
        self.uncovered, self.preferred = uncovered, preferred
        self.implementations = {"triton": kernel, "cuda": cuda, "torch": reference}
        if cuda is None:
            self.cuda_uncovered = lambda *args: dispatch.NO_KERNELS
        else:
            self.cuda_uncovered = cuda_uncovered or uncovered
        LIB.define(schema, tags=TAGS)
        for key in ("CPU", "CUDA"):
            LIB.impl(self.name, self._run, key)
        torch.library.register_fake(f"fastseg::{self.name}", self._trace, lib=LIB)
        self.op = getattr(torch.ops.fastseg, self.name).default

    def __call__(self, *args: Any) -> Any:
        return self.op(*args)

    def choose(self, *args: Any, asks: bool = False) -> dispatch.Choice:
        """The backend for these arguments, the first of which is a tensor. asks: a call may not follow."""
        if dispatch.torch_alone(args[0]):
            return dispatch.choose(self.name, args[0], asks=asks)
        uncovered = self.uncovered(*args)
        preferred = self.preferred(*args) if uncovered is None and dispatch.get_backend() == "auto" else None
        return dispatch.choose(self.name, args[0], uncovered, preferred, asks, self.cuda_uncovered(*args))

    def floor(self, *args: Any) -> int:
        """The fewest bytes a call can move: each tensor argument read once, each result written once."""
        tensors = [x for x in tree_leaves((args, self.fake(*args))) if isinstance(x, Tensor)]
        return sum(x.numel() * x.element_size() for x in tensors)

    def _run(self, *args: Any) -> Any:
        with torch.no_grad(), _no_autocast(args[0].device.type):
            result = self.implementations[self.choose(*args).backend](*args)
        if _observer is not None:
            _observer(self, args)
        return result

    def _trace(self, *args: Any) -> Any:
        if _observer is None:
            return self.fake(*args)
        result = self.implementations[self.choose(*args).backend](*args)  # its launches are recorded, not run
        _observer(self, args)
        return result


def _no_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """An implementation chooses its dtypes itself, also where it calls torch's functions."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


_observer: Callable[[Operator, tuple[Any, ...]], None] | None = None


@contextlib.contextmanager
def observing(observer: Callable[[Operator, tuple[Any, ...]], None]) -> Iterator[None]:
    """Call ``observer(operator, args)`` behind every operator that runs, on the meta device too.

    On the meta device the kernels' launchers run in place of the fakes, so launches must be recorded meanwhile.
    """
    global _observer
    outer, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = outer


def memory_format(x: Tensor) -> torch.memory_format:
    """The format an output keeps: channels_last for a 4-D tensor, dense or not, whose strides grow from C to N.

    The rule is torch's own, so that sizes of 1, which leave it open, fall as they do there.
    """
    least = 0
    for dim in (1, 3, 2, 0) if x.dim() == 4 else ():
        size, stride = x.shape[dim], x.stride(dim)
        if size == 0 or stride < least or stride == 0 or (dim == 0 and least == x.stride(1)):
            return torch.contiguous_format
        least = stride * size
    return torch.channels_last if x.dim() == 4 else torch.contiguous_format


def dense(x: Tensor, layout: torch.memory_format) -> Tensor:
    """`x` in the given memory format, copied only where it lies otherwise."""
    return x.contiguous(memory_format=layout)


def empty(like: Tensor, shape: Sequence[int], layout: torch.memory_format, dtype: torch.dtype | None = None) -> Tensor:
    """A new tensor on the device of `like`: the one allocation rule that kernels and fakes share."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=layout)


def placed(result: Tensor, layout: torch.memory_format) -> Tensor:
    """A reference's result with exactly the strides that `empty` gives, and memory of its own."""
    return empty(result, result.shape, layout).copy_(result)


def double_backward(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of ``function(*inputs)`` that can be differentiated again, by torch's own formulas.

    For backwards that run with create_graph=True: the kernels' gradients have no derivative, torch's do.
    """
    with torch.enable_grad():
        # Fresh views: where one input was made from another, its path to that belongs to the caller's graph.
        inputs = [x.view_as(x) if need else x for x, need in zip(inputs, needed, strict=True)]
        output = function(*inputs)
        wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
        found = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
    return [next(found) if need else None for need in needed]


def vmap_loops(info: Any, in_dims: tuple[Any, ...], function: type[torch.autograd.Function], *args: Any) -> Any:
    """The `vmap` of an autograd.Function whose operators have no dimension to spare: a call for each entry."""
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
    """Whether a backward is asked for gradients that are differentiated again (create_graph=True)."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()
