"""Changing the class of an existing module in place, and back.

A module of a torch.nn class gets the class from fastseg.nn. A module of a user's subclass gets a class that combines
the subclass and fastseg's. Where torch has wrapped either in a class made for one module (parametrizations, FSDP2), the
wrapper stays.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import nn


def is_injected(cls: type) -> bool:
    """Whether torch made this class for one module, as a subclass of the module's own: Parametrized..., FSDP..."""
    return cls.__module__ == "torch.nn.utils.parametrize" or (
        cls.__module__.startswith("torch.distributed.") and len(cls.__bases__) > 1
    )


def without_injected(cls: type) -> type:
    """The class of a module without the classes that torch injected."""
    while is_injected(cls):
        cls = cls.__bases__[-1]
    return cls


def rebased(cls: type, old: type, new: type) -> type:
    """`cls` with `old` replaced by `new` below all injected classes; `cls` itself if it does not contain `old`."""
    if cls is old:
        return new
    if not is_injected(cls):
        return cls
    bases = tuple(rebased(base, old, new) for base in cls.__bases__)
    return cls if bases == cls.__bases__ else type(cls)(cls.__name__, bases, _namespace(cls))


def _namespace(cls: type) -> dict[str, Any]:
    """The attributes of a class that a copy of the class needs."""
    set_by_python = ("__dict__", "__weakref__", "__slotnames__")
    return {name: value for name, value in vars(cls).items() if name not in set_by_python}


def exchange(module: nn.Module, old: type, new: type) -> None:
    """Change the class of a module from `old` to `new`. Classes that torch has injected since `old` are kept."""
    cls = rebased(type(module), without_injected(old), without_injected(new))
    if cls.__bases__ == new.__bases__ and _namespace(cls) == _namespace(new):
        cls = new
    object.__setattr__(module, "__class__", cls)  # not `module.__class__ =`: the user's class may define __setattr__
    # torch 2.11 checks the classes in a compiled model again only if a dictionary of the model has changed.
    vars(module)["_fastseg_swapped"] = True
    del vars(module)["_fastseg_swapped"]


class _Combined:
    """Base of the classes that combine a user's class with fastseg's. Copies and pickles name these two classes."""

    _combines: tuple[type, type]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Do nothing: a base class of the user's that registers its subclasses must not see this one."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        make, args, *rest = super().__reduce_ex__(protocol)
        found, fused = self._combines
        return _rebuild, (found, fused, make, *(found if arg is type(self) else arg for arg in args)), *rest


def _rebuild(found: type, fused: type, make: Any, *args: Any) -> Any:
    """Unpickle or copy a module of a combined class."""
    module = make(*args)
    object.__setattr__(module, "__class__", combined_class(found, fused))
    return module


@functools.cache
def combined_class(found: type, fused: type) -> type:
    """A subclass of `found` and `fused` with the name and documentation of `found` and the forward of `fused`."""
    contents = {
        "__module__": found.__module__,
        "__qualname__": found.__qualname__,
        "__doc__": found.__doc__,
        "_combines": (found, fused),
        "forward": fused.forward,
    }
    return types.new_class(found.__name__, (_Combined, found, fused), {}, lambda namespace: namespace.update(contents))


def to_picklable(cls: type) -> Any:
    """A class in a form that can be pickled: a combined class, which cannot be imported, as its two parts."""
    return vars(cls).get("_combines", cls)


def from_picklable(value: Any) -> type:
    """The class that `to_picklable` was called with."""
    return combined_class(*value) if isinstance(value, tuple) else value


def fused_class(cls: type, torch_class: type, fused: type) -> type:
    """The class for a module of class `cls`, which is or extends `torch_class`, with the forward of `fused`."""
    inner = without_injected(cls)
    return rebased(cls, inner, fused if inner is torch_class else combined_class(inner, fused))
