"""fastseg.swap: put fastseg's layers into an existing model.

A layer is swapped by changing the class of the instance. So its parameters, buffers, state_dict keys, hooks and places
in the model stay, and optimizers keep its parameters. All changes are planned before the first one is made.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin

from .. import nn as fused
from .class_exchange import exchange, fused_class, without_injected
from .compact_indices import obstacle_to_offsets, returns_indices, with_offsets
from .fused_sequential import Sequential, group_names
from .report import ALREADY_SWAPPED, Candidate, SwapReport, displayed_name

FilterFn = Callable[[nn.Module, str], bool]

log = logging.getLogger("fastseg")


class Target(NamedTuple):
    """What a module may become.

    op: the operator's name in swap's `ops`. torch_class: the class of torch.nn that the module is of, or None if it
    only has the name of one. fused_class: the class from fastseg.
    """

    op: str
    torch_class: type[nn.Module] | None
    fused_class: type[nn.Module] | None


LAYERS: dict[str, Target] = {
    "MaxPool2d": Target("max_pool2d", nn.MaxPool2d, fused.MaxPool2d),
    "MaxUnpool2d": Target("max_unpool2d", nn.MaxUnpool2d, fused.MaxUnpool2d),
    "ConvTranspose2d": Target("conv_transpose2d", nn.ConvTranspose2d, fused.ConvTranspose2d),
    "CrossEntropyLoss": Target("cross_entropy", nn.CrossEntropyLoss, fused.CrossEntropyLoss),
}
SEQUENTIAL = Target("batch_norm_relu", nn.Sequential, Sequential)
OPS = (*(target.op for target in LAYERS.values()), SEQUENTIAL.op)


class Selection(NamedTuple):
    """Which candidates the caller of swap wants swapped."""

    ops: frozenset[str]
    filter_fn: FilterFn | None

    def exclusion(self, module: nn.Module, names: list[str], op: str) -> str | None:
        """Why a module is excluded, or None. The filter is called for each name, also after it has returned False."""
        if op not in self.ops:
            return "is not in ops"
        if self.filter_fn is not None and not all([self.filter_fn(module, name) for name in names]):
            return "is excluded by filter_fn"
        return None


def swap(
    model: nn.Module,
    *,
    ops: Iterable[str] | None = None,
    filter_fn: FilterFn | None = None,
    strict: bool = False,
    compact_indices: bool = False,
) -> SwapReport:
    """Put fastseg's kernels into a model, in place. ``report.undo()`` takes them out again.

    Layers of torch.nn.MaxPool2d, MaxUnpool2d, ConvTranspose2d and CrossEntropyLoss, and of subclasses that kept the
    forward of these, get the class of the same name from fastseg.nn. An nn.Sequential in which a batch norm follows a
    convolution with a bias, or is followed by a ReLU or a max-pooling, gets a class that runs these layers fused
    wherever nothing needs the tensors between them. Weights, hooks, parametrizations, shared modules, state_dict keys
    and optimizers are not affected. Scripted and quantized layers, and layers with their own forward, are not swapped.
    Swapping a model twice is harmless.

    Args:
        model: the model.
        ops: names of the operators to swap, out of "max_pool2d", "max_unpool2d", "conv_transpose2d", "cross_entropy"
            and "batch_norm_relu" (sequences). Default: all.
        filter_fn: called as filter_fn(module, name) for each candidate under each of its names ("" for `model`
            itself). A candidate is swapped only if all calls return True.
        strict: raise if anything that `ops` and `filter_fn` select would not be swapped.
        compact_indices: let pools with return_indices return uint8 offsets, which take an eighth of the memory of int64
            indices and which the unpools accept. This asserts that no other code reads the indices, and that each
            unpool restores the size of its pool's input. It is done if all these pools and unpools have the same
            kernel_size, stride and padding; otherwise the report gives the reason.

    Returns:
        A :class:`SwapReport`: what was swapped, and for every other candidate why it was not. Its summary is logged at
        level INFO of the logger "fastseg".

    Raises:
        TypeError: if `model` is not a torch.nn.Module, or `ops` or `filter_fn` is of the wrong kind.
        ValueError: if `ops` has an unknown name.
        RuntimeError: if fully_shard has sharded the model (swap first), or with `strict`.
            After an exception the model is unchanged.

    Example:
        >>> import fastseg
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2))
        >>> report = fastseg.swap(model)
        >>> report.summary
        'Sequential: 1 of 1 layers swapped (1 max_pool2d)'
        >>> type(model[1]) is fastseg.nn.MaxPool2d
        True
        >>> report.undo()
        >>> type(model[1]) is nn.MaxPool2d
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap: model must be a torch.nn.Module, but is of type {type(model).__name__}")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"swap: filter_fn must be callable as filter_fn(module, name), but is {filter_fn!r}")
    selection = Selection(_checked_ops(ops), filter_fn)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    _require_unsharded(names)

    candidates = [_layer(m, names[m], selection) for m in names if _layer_name(m) is not None]
    compact_reason = obstacle_to_offsets(candidates) if compact_indices else None
    compact = compact_indices and compact_reason is None
    if compact:
        candidates = [with_offsets(c) if returns_indices(c) else c for c in candidates]
    new_classes = {candidate.module: candidate.given for candidate in candidates}
    sequences = [_sequence(m, names[m], new_classes, selection) for m in names if isinstance(m, nn.Sequential)]
    candidates += [candidate for candidate in sequences if candidate is not None]
    order = {module: number for number, module in enumerate(names)}
    candidates.sort(key=lambda candidate: order[candidate.module])
    report = SwapReport(type(model).__name__, candidates, compact, compact_reason)

    if strict:
        _require_all_swapped(report)
    for candidate in report.swapped:
        exchange(candidate.module, candidate.found, candidate.given)
    log.info("%s", report.summary)
    return report


def _checked_ops(ops: Iterable[str] | None) -> frozenset[str]:
    """The names in `ops`, or all names if it is None."""
    if ops is None:
        return frozenset(OPS)
    if isinstance(ops, str) or not isinstance(ops, Iterable):
        raise TypeError(f"swap: ops must be an iterable of names, such as [{OPS[0]!r}], but is {ops!r}")
    ops = list(ops)
    for op in ops:
        if op not in OPS:
            raise ValueError(f"swap: ops must be names out of {', '.join(map(repr, OPS))}, but has {op!r}")
    return frozenset(ops)


def _require_unsharded(names: dict[nn.Module, list[str]]) -> None:
    """Raise RuntimeError if fully_shard was called on one of the modules."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule

    for module, (name, *_) in names.items():
        if isinstance(module, FSDPModule):
            raise RuntimeError(
                f"swap: {displayed_name(name)} is already sharded by fully_shard; call swap before fully_shard, which "
                "must see the final classes of the layers"
            )


def _require_all_swapped(report: SwapReport) -> None:
    """Raise RuntimeError, for strict=True, if a selected candidate is not swapped."""
    lines = [
        f"{', '.join(candidate.names)} ({candidate.class_name}): {candidate.reason}"
        for candidate in report.left
        if candidate.wanted and candidate.reason != ALREADY_SWAPPED
    ]
    if report.compact_reason:
        lines.append(f"compact indices: {report.compact_reason}")
    if lines:
        raise RuntimeError("swap: strict=True, but these would not be swapped:\n  " + "\n  ".join(lines))


# --- layers and sequences --------------------------------------------------------------------------------------------


def _layer_name(module: nn.Module) -> str | None:
    """The key of LAYERS that a module belongs to by the name of its class, also if it is scripted or quantized."""
    if isinstance(module, torch.jit.ScriptModule):
        names = [getattr(module, "original_name", None)]
    else:
        names = [base.__name__ for base in type(module).__mro__]
    return next((name for name in names if name in LAYERS), None)


def _layer(module: nn.Module, names: list[str], selection: Selection) -> Candidate:
    """The candidate of a single layer."""
    target = next((target for target in LAYERS.values() if isinstance(module, target.torch_class)), None)
    if target is None:
        target = Target(LAYERS[_layer_name(module)].op, None, None)
    return _candidate(module, names, target, _obstacle(module, target.torch_class), selection)


def _sequence(
    module: nn.Sequential, names: list[str], new_classes: dict[nn.Module, type], selection: Selection
) -> Candidate | None:
    """The candidate of a sequence, or None if it holds no layers that could run fused.

    new_classes: the classes that the swapped layers will have.
    """

    def class_of(layer: nn.Module) -> type:
        return new_classes.get(layer, type(layer))

    possible = group_names(module, class_of, ignore_hooks=True)
    if not possible:
        return None
    together = group_names(module, class_of, ignore_hooks=False)
    obstacle = _obstacle(module, nn.Sequential)
    if obstacle is None and not together:
        obstacle = f"has hooks on {' + '.join(possible[0])}, which need tensors that the fused kernel never creates"
    return _candidate(module, names, SEQUENTIAL, obstacle, selection, tuple(together))


def _candidate(
    module: nn.Module, names: list[str], target: Target, obstacle: str | None, selection: Selection,
    together: tuple[tuple[str, ...], ...] = (),
) -> Candidate:  # fmt: skip
    """A candidate with the class it gets, or the reason why it is not swapped."""
    found = given = type(module)
    exclusion = selection.exclusion(module, names, target.op)
    reason = exclusion or obstacle
    if reason is None:
        try:
            given = fused_class(found, target.torch_class, target.fused_class)
        except TypeError as error:
            reason = f"is of a class that cannot be extended: {error}"
    shown = tuple(map(displayed_name, names))
    return Candidate(
        module, shown, target.op, found, given, reason, exclusion is None, together if reason is None else ()
    )


def _obstacle(module: nn.Module, torch_class: type[nn.Module] | None) -> str | None:
    """Why a module cannot be swapped, or None. torch_class: the class of torch.nn that it is of, or None."""
    cls = without_injected(type(module))
    if any(base.__module__.partition(".")[0] == "fastseg" for base in cls.__mro__):
        return ALREADY_SWAPPED
    if isinstance(module, torch.jit.ScriptModule):
        return "is compiled by torch.jit; swap before scripting or tracing"
    if cls.__module__.startswith("torch.ao."):
        return "is quantized"
    if torch_class is None:
        return "is of a class with the name of torch.nn's that does not extend it"
    if cls.forward is not torch_class.forward:
        return "is a subclass with its own forward"
    if "forward" in vars(module):
        return "has its own forward, set on the instance"
    if torch_class is nn.Sequential:
        return None
    for parameter in module.parameters():
        if isinstance(parameter, UninitializedTensorMixin):
            return "is lazy; swap after the first call of the model"
        if type(parameter) is not nn.Parameter:
            return f"has a parameter of type {type(parameter).__name__}"
    return None
