"""fastseg.swap: fused layers into a model that exists.

A layer is swapped by giving the instance another class. The instance stays: its parameters, buffers, state_dict keys,
hooks, its places in the model, and optimizers that hold its parameters. First everything is planned, then done.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin

from .. import nn as fused
from ..ops.pooling.positions import MAX_OFFSETS
from ..torch_internals import as_pair
from .class_exchange import bare, exchange, fused_class
from .fused_sequential import Sequential, groups
from .report import Candidate, SwapReport

LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.MaxPool2d: fused.MaxPool2d,
    nn.MaxUnpool2d: fused.MaxUnpool2d,
    nn.ConvTranspose2d: fused.ConvTranspose2d,
    nn.CrossEntropyLoss: fused.CrossEntropyLoss,
}
OPS = {
    "MaxPool2d": "max_pool2d",
    "MaxUnpool2d": "max_unpool2d",
    "ConvTranspose2d": "conv_transpose2d",
    "CrossEntropyLoss": "cross_entropy",
}
SEQUENCES = "batch_norm_relu"
ALREADY = "is fastseg's already"
log = logging.getLogger("fastseg")


def swap(
    model: nn.Module,
    *,
    ops: Iterable[str] | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    strict: bool = False,
    compact_indices: bool = False,
) -> SwapReport:
    """Put fastseg's kernels into `model`, in place; `report.undo()` takes them out again.

    MaxPool2d, MaxUnpool2d, ConvTranspose2d and CrossEntropyLoss of torch.nn, and subclasses that kept the forward of
    those, get the class of the same name from fastseg.nn. nn.Sequentials in which a batch norm has a convolution's bias
    before it, or a ReLU or a max-pooling behind it, get a class that runs these as one wherever nothing can see what is
    between them. Nothing else changes: weights, hooks, parametrizations, shared modules, state_dict and optimizers live
    on. Scripted and quantised layers, and those with a forward of their own, are left. Swapping twice is harmless.

    ops: which of "max_pool2d", "max_unpool2d", "conv_transpose2d", "cross_entropy", "batch_norm_relu" (the sequences);
    None for all. filter_fn(module, name): asked for each layer and sequence under each of its names ("" for `model`
    itself); it is left unless all are answered with True. strict: raise if anything that ops and filter_fn want
    would stay. compact_indices: pools with return_indices give uint8 offsets, which the unpools take, an eighth of
    int64's memory: for models where nothing else reads the indices, and whose unpools give the size that the pool had;
    done where all these pools and unpools have one kernel_size, stride and padding, else the report says why not.

    Returns the report: what was swapped and, for every other candidate, why not. Logs its summary to the logger
    "fastseg" (INFO). Raises, before anything is changed: TypeError if `model` is no torch.nn.Module, or for an ops or
    filter_fn of the wrong kind; ValueError for an unknown name in ops; RuntimeError for a model that fully_shard has
    sharded (swap before that), and with strict.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2))
    >>> report = swap(model)
    >>> model[1].__class__.__module__
    'fastseg.nn.pool'
    >>> report.undo()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap: the model must be a torch.nn.Module, but is of type {type(model).__name__}")
    wanted = _wanted(ops)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"swap: filter_fn must be callable as filter_fn(module, name), but is {filter_fn!r}")
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    _refuse_sharded(names)

    layers = [_layer(m, where, wanted, filter_fn) for m, where in names.items() if _is_layer(m)]
    compact, compact_reason = False, None
    if compact_indices:
        compact_reason = _incompatible(layers)
        compact = compact_reason is None
    if compact:
        layers = [_with_offsets(layer) if _gives_indices(layer) else layer for layer in layers]
    given = {layer.module: layer.given for layer in layers}
    sequences = [
        _sequence(m, where, given, wanted, filter_fn) for m, where in names.items() if isinstance(m, nn.Sequential)
    ]
    order = {module: place for place, module in enumerate(names)}
    candidates = sorted(layers + [s for s in sequences if s is not None], key=lambda c: order[c.module])
    report = SwapReport(type(model).__name__, candidates, compact, compact_reason)

    stays = [layer for layer in report.left if layer.wanted and layer.reason != ALREADY]
    if strict and (stays or compact_reason):
        said = [f"{', '.join(layer.names)} ({layer.class_name}): {layer.reason}" for layer in stays]
        said += [f"the indices, as int64: {compact_reason}"] if compact_reason else []
        raise RuntimeError("swap: with strict=True nothing may stay, but these would:\n  " + "\n  ".join(said))
    for candidate in report.swapped:
        exchange(candidate.module, candidate.found, candidate.given)
    log.info("%s", report.summary)
    return report


def _wanted(ops: Iterable[str] | None) -> frozenset[str]:
    known = (*OPS.values(), SEQUENCES)
    if ops is None:
        return frozenset(known)
    if isinstance(ops, str) or not isinstance(ops, Iterable):
        raise TypeError(f"swap: ops must be an iterable of names, such as [{known[0]!r}], but is {ops!r}")
    ops = list(ops)
    for op in ops:
        if op not in known:
            raise ValueError(f"swap: ops has {op!r}; it must be of {', '.join(map(repr, known))}")
    return frozenset(ops)


def _refuse_sharded(names: dict[nn.Module, list[str]]) -> None:
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule

    for module, (name, *_) in names.items():
        if isinstance(module, FSDPModule):
            raise RuntimeError(
                f"swap: {_shown(name)} is sharded by fully_shard already; swap before fully_shard, which must find the "
                "classes that the layers will have"
            )


# --- layers ----------------------------------------------------------------------------------------------------------


def _shown(name: str) -> str:
    return name or "(the model)"


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is one of the layers in any form: scripted and quantised ones share the name alone."""
    return _name_of(module) is not None


def _name_of(module: nn.Module) -> str | None:
    """The name of the class in LAYERS that a module is of in any form, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        names = [getattr(module, "original_name", None)]
    else:
        names = [base.__name__ for base in type(module).__mro__]
    return next((name for name in names if name in OPS), None)


def _layer(
    module: nn.Module, names: list[str], wanted: frozenset[str], filter_fn: Callable[[nn.Module, str], bool] | None
) -> Candidate:
    torchs = next((torchs for torchs in LAYERS if isinstance(module, torchs)), None)
    obstacle = _obstacle(module, torchs)
    return _candidate(module, names, OPS[_name_of(module)], torchs, LAYERS.get(torchs), obstacle, wanted, filter_fn)


def _candidate(
    module: nn.Module, names: list[str], op: str, torchs: type | None, ours: type | None, obstacle: str | None,
    wanted: frozenset[str], filter_fn: Callable[[nn.Module, str], bool] | None,
    together: tuple[tuple[str, ...], ...] = (),
) -> Candidate:  # fmt: skip
    found = given = type(module)
    unwanted = None
    if op not in wanted:
        unwanted = "is not in ops"
    elif filter_fn is not None and not all([filter_fn(module, name) for name in names]):
        unwanted = "filter_fn said no"
    reason = unwanted or obstacle
    if reason is None:
        try:
            given = fused_class(found, torchs, ours)
        except TypeError as error:
            reason = f"is of a class that cannot be extended: {error}"
    shown = tuple(map(_shown, names))
    return Candidate(module, shown, op, found, given, reason, unwanted is None, () if reason else together)


def _obstacle(module: nn.Module, torchs: type[nn.Module] | None) -> str | None:
    """Why a module cannot be swapped, in words, or None. torchs: the class of torch's that it is of, or None."""
    inner = bare(type(module))
    if any(base.__module__.partition(".")[0] == "fastseg" for base in inner.__mro__):
        return ALREADY
    if isinstance(module, torch.jit.ScriptModule):
        return "is compiled by torch.jit; swap before scripting or tracing"
    if inner.__module__.startswith("torch.ao."):
        return "is quantised"
    if torchs is None:
        return "is not torch.nn's, though of its name"
    if inner.forward is not torchs.forward:
        return "is a subclass with a forward of its own"
    if "forward" in vars(module):
        return "has a forward of its own, set on the instance"
    if torchs is nn.Sequential:
        return None
    for parameter in module.parameters():
        if isinstance(parameter, UninitializedTensorMixin):
            return "is lazy; swap after the model was called once"
        if type(parameter) is not nn.Parameter:
            return f"has a parameter of type {type(parameter).__name__}"
    return None


# --- compact indices -------------------------------------------------------------------------------------------------


def _gives_indices(layer: Candidate) -> bool:
    return layer.swapped and isinstance(layer.module, nn.MaxPool2d) and layer.module.return_indices


def _with_offsets(layer: Candidate) -> Candidate:
    given = fused_class(layer.found, nn.MaxPool2d, fused.MaxPool2dWithOffsets)
    return Candidate(layer.module, layer.names, layer.op, layer.found, given)


def _incompatible(layers: list[Candidate]) -> str | None:
    """Why offsets cannot take the place of indices in a model of these layers, in words, or None."""
    pools = [layer for layer in layers if _gives_indices(layer)]
    unpools = [layer for layer in layers if layer.op == "max_unpool2d"]
    if not pools:
        already = [layer for layer in layers if layer.reason == ALREADY and isinstance(layer.module, nn.MaxPool2d)]
        already = [layer for layer in already if layer.module.return_indices]
        if any(isinstance(layer.module, fused.MaxPool2dWithOffsets) for layer in already):
            return None  # by an earlier swap
        if already:
            return f"{already[0].names[0]} is fastseg's already; undo that swap first"
        return "no MaxPool2d that was swapped has return_indices"
    if not unpools:
        return "no MaxUnpool2d reads them"
    for layer in unpools:
        if not layer.swapped and layer.reason != ALREADY:
            return f"{layer.names[0]} is not swapped, and torch's MaxUnpool2d takes int64 alone"
    first = _geometry(pools[0].module)
    for layer in (*pools, *unpools):
        if _geometry(layer.module) != first:
            return (
                f"{pools[0].names[0]} and {layer.names[0]} differ in kernel_size, stride or padding, and an offset "
                "means nothing without its own"
            )
    for layer in pools:
        if as_pair(layer.module.dilation) != (1, 1):
            return f"{layer.names[0]} is dilated"
    kernel = first[0]
    if kernel[0] * kernel[1] > MAX_OFFSETS:
        return f"windows of {kernel[0]}x{kernel[1]} have more than {MAX_OFFSETS} elements"
    return None


def _geometry(module: nn.Module) -> tuple[tuple[int, ...], ...]:
    return as_pair(module.kernel_size), as_pair(module.stride), as_pair(module.padding)


# --- sequences -------------------------------------------------------------------------------------------------------


def _sequence(
    module: nn.Sequential, names: list[str], given: dict[nn.Module, type], wanted: frozenset[str],
    filter_fn: Callable[[nn.Module, str], bool] | None,
) -> Candidate | None:  # fmt: skip
    """The candidate of a sequence, if it holds layers that could run as one. given: the classes the layers get."""

    def kind(layer: nn.Module) -> type:
        return given.get(layer, type(layer))

    possible = groups(module, kind, watched=True)
    if not possible:
        return None
    together = groups(module, kind, watched=False)
    obstacle = _obstacle(module, nn.Sequential)
    if obstacle is None and not together:
        obstacle = f"has hooks on {' + '.join(possible[0])}, which see what would not be made"
    return _candidate(module, names, SEQUENCES, nn.Sequential, Sequential, obstacle, wanted, filter_fn, tuple(together))
