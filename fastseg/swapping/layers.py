"""fastseg.swap: fused layers into a model that exists, and out again.

A layer is swapped by giving the instance another class. The instance stays: its parameters, buffers, state_dict keys,
hooks, its places in the model, and optimizers that hold its parameters.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .. import nn as fused

LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.MaxPool2d: fused.MaxPool2d,
    nn.MaxUnpool2d: fused.MaxUnpool2d,
    nn.ConvTranspose2d: fused.ConvTranspose2d,
    nn.CrossEntropyLoss: fused.CrossEntropyLoss,
}
NAMES = frozenset(layer.__name__ for layer in LAYERS)


@dataclass(frozen=True)
class Candidate:
    """A layer that swap looked at: all its names in the model, its class before, and why it was left, or None."""

    module: nn.Module
    names: tuple[str, ...]
    found: type[nn.Module]
    reason: str | None

    @property
    def swapped(self) -> bool:
        return self.reason is None

    @property
    def class_name(self) -> str:
        return f"{self.found.__module__}.{self.found.__qualname__}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "names": list(self.names),
            "class": self.class_name,
            "swapped": self.swapped,
            "reason": self.reason,
        }


class SwapReport:
    """What `swap` did, layer by layer, and the way back.

    candidates: all of them; swapped, left: the two kinds. Printed, it is a table.
    """

    def __init__(self, model: nn.Module, candidates: list[Candidate]) -> None:
        self.model = type(model).__name__
        self.candidates = candidates

    @property
    def swapped(self) -> list[Candidate]:
        return [candidate for candidate in self.candidates if candidate.swapped]

    @property
    def left(self) -> list[Candidate]:
        return [candidate for candidate in self.candidates if not candidate.swapped]

    def undo(self) -> None:
        """Give each swapped layer its old class back, unless it has another one by now. Trained weights stay."""
        for candidate in self.swapped:
            if type(candidate.module) is LAYERS[candidate.found]:
                candidate.module.__class__ = candidate.found

    def as_dict(self) -> dict[str, Any]:
        """The report as plain lists, strings and booleans, for json."""
        return {"model": self.model, "layers": [candidate.as_dict() for candidate in self.candidates]}

    def __rich__(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"{self.model}: {len(self.swapped)} of {len(self.candidates)} layers swapped")
        for column in ("layer", "class", "swapped"):
            table.add_column(column, overflow="fold")
        for layer in self.candidates:
            result = f"no: {layer.reason}" if layer.reason else "yes"
            table.add_row(*map(Text, ("\n".join(layer.names), layer.class_name, result)))
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=160, color_system=None)
        console.print(self)
        return console.file.getvalue().rstrip("\n")


def swap(model: nn.Module) -> SwapReport:
    """Replace MaxPool2d, MaxUnpool2d, ConvTranspose2d and CrossEntropyLoss in `model`, in place, by fastseg's.

    Instances of exactly these torch.nn classes get the class of the same name from fastseg.nn; nothing else about
    them changes, so that weights, hooks, shared modules and optimizers live on. Their subclasses, parametrized,
    scripted and quantised forms, and instances with a `forward` of their own are left alone. The report says what was
    swapped and, for every other candidate, why not; its `undo()` takes the swap back. `model` may itself be such a
    layer. Swapping twice is harmless. Raises TypeError if `model` is no torch.nn.Module.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2))
    >>> report = swap(model)
    >>> model[1].__class__.__module__
    'fastseg.nn.pool'
    >>> report.undo()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap: the model must be a torch.nn.Module, but is of type {type(model).__name__}")
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if _is_candidate(module):
            names.setdefault(module, []).append(name or "(the model)")
    candidates = [Candidate(module, tuple(where), type(module), _obstacle(module)) for module, where in names.items()]
    for candidate in candidates:
        if candidate.swapped:
            candidate.module.__class__ = LAYERS[candidate.found]
    return SwapReport(model, candidates)


def _is_candidate(module: nn.Module) -> bool:
    """Whether a module is one of the layers in any form: scripted and quantised ones share the name alone."""
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, "original_name", None) in NAMES
    return any(base.__name__ in NAMES for base in type(module).__mro__)


def _obstacle(module: nn.Module) -> str | None:
    """Why a candidate cannot be swapped, in words, or None."""
    found = type(module)
    if found in LAYERS.values():
        return "is fastseg's already"
    if isinstance(module, torch.jit.ScriptModule):
        return "is compiled by torch.jit; swap before scripting or tracing"
    if found.__module__.startswith("torch.ao."):
        return "is quantised"
    if is_parametrized(module):
        return "is parametrized, which gives it a class of its own; swap before parametrizing"
    if found not in LAYERS:
        return "is a subclass" if isinstance(module, tuple(LAYERS)) else "is not torch.nn's, though of its name"
    if "forward" in vars(module):
        return "has a forward of its own, set on the instance"
    special = [type(p).__name__ for p in module.parameters(recurse=False) if type(p) is not nn.Parameter]
    return f"has a parameter of type {special[0]}" if special else None
