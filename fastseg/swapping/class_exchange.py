"""Another class for a module that exists: the class it gets, and the way back.

Three kinds of class are given: fastseg's for torch's; for a user's subclass of torch's a class of both; and where torch
has put a class of its own around either (parametrizations, FSDP2), the same around the other.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import nn


def injected(cls: type) -> bool:
    """Whether torch made this class around another, for one module: Parametrized..., FSDP..."""
    return cls.__module__ == "torch.nn.utils.parametrize" or (
        cls.__module__.startswith("torch.distributed.") and len(cls.__bases__) > 1
    )


def bare(cls: type) -> type:
    """The class inside those that torch put around it."""
    while injected(cls):
        cls = cls.__bases__[-1]
    return cls


def rebased(cls: type, old: type, new: type) -> type:
    """`cls` with `new` in the place of `old`, whatever torch put around it in between; itself where it has no `old`."""
    if cls is old:
        return new
    if not injected(cls):
        return cls
    bases = tuple(rebased(base, old, new) for base in cls.__bases__)
    return cls if bases == cls.__bases__ else type(cls)(cls.__name__, bases, _contents(cls))


def _contents(cls: type) -> dict[str, Any]:
    kept_by_python = ("__dict__", "__weakref__", "__slotnames__")
    return {name: value for name, value in vars(cls).items() if name not in kept_by_python}


def exchange(module: nn.Module, old: type, new: type) -> None:
    """Give a module of class `old` the class `new`; parametrizations and sharding may have come or gone since `old`."""
    given = rebased(type(module), bare(old), bare(new))
    if given.__bases__ == new.__bases__ and _contents(given) == _contents(new):
        given = new
    object.__setattr__(module, "__class__", given)  # past a __setattr__ of the user's
    # torch 2.11 asks for the classes in a compiled model again only where a dictionary in it has changed since.
    vars(module)["_fastseg_swapped"] = True
    del vars(module)["_fastseg_swapped"]


class _OfBoth:
    """In front of a user's class and fastseg's: copies and pickles name those two, not the class made of them."""

    _made_of: tuple[type, type]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Nothing: a user's registry of subclasses is not to hear of this one."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        make, args, *rest = super().__reduce_ex__(protocol)
        found, fused = self._made_of
        return _rebuilt, (found, fused, make, *(found if arg is type(self) else arg for arg in args)), *rest


def _rebuilt(found: type, fused: type, make: Any, *args: Any) -> Any:
    module = make(*args)
    object.__setattr__(module, "__class__", of_both(found, fused))
    return module


@functools.cache
def of_both(found: type, fused: type) -> type:
    """A class that is `found` in all but its forward, which is that of `fused`."""
    contents = {
        "__module__": found.__module__,
        "__qualname__": found.__qualname__,
        "__doc__": found.__doc__,
        "_made_of": (found, fused),
        "forward": fused.forward,
    }
    return types.new_class(found.__name__, (_OfBoth, found, fused), {}, lambda namespace: namespace.update(contents))


def named(cls: type) -> Any:
    """What stands for a class in a pickle: `of_both`'s cannot be imported, those it is made of can."""
    return vars(cls).get("_made_of", cls)


def of_name(name: Any) -> type:
    return of_both(*name) if isinstance(name, tuple) else name


def fused_class(cls: type, torchs: type, fused: type) -> type:
    """The class for a module of class `cls`, which is or extends `torchs`: `fused` in the place of that."""
    inner = bare(cls)
    return rebased(cls, inner, fused if inner is torchs else of_both(inner, fused))
