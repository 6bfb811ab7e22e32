"""Models, arguments and random inputs that a command line specifies as text."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..verification.swapped_model import describe_error

NEEDED = {"torch", "triton", "numpy", "rich", "fastseg"}
"""Packages that fastseg itself imports, now or later."""


def load(spec: str) -> Any:
    """Import the object that `spec` names.

    The current directory, or that of the file, is searched for modules first.

    Args:
        spec: MODULE:NAME or FILE.py:NAME.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the module cannot be imported, or has no such name.

    Example::

        >>> from fastseg.commands.model_spec import load
        >>> load("torch.nn:MaxPool2d").__name__
        'MaxPool2d'
    """
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise ValueError(f"{spec!r} must be MODULE:NAME, such as segnet:SegNet or path/segnet.py:SegNet")
    path = Path(where)
    is_file = path.suffix == ".py"
    _find_modules_in((path.parent if is_file else Path()).resolve())
    try:
        with _own_command_line(path):
            thing = _import_file(path) if is_file else importlib.import_module(where)
    except FileNotFoundError:
        raise
    except SystemExit as error:
        raise ValueError(
            f"{where} cannot be imported: it ends the program when it is imported ({describe_error(error)}), as a "
            "script does that reads its command line; put that behind if __name__ == '__main__'"
        ) from error
    except Exception as error:
        raise ValueError(f"{where} cannot be imported: {describe_error(error)}") from error
    for part in name.split("."):
        if not hasattr(thing, part):
            local = Path(f"{where}.py")
            hint = f"; did you mean the file {local}:{name}?" if not is_file and local.is_file() else ""
            raise ValueError(f"{where} has no {name}{hint}")
        thing = getattr(thing, part)
    return thing


def _find_modules_in(folder: Path) -> None:
    """Let modules be imported from a folder: before others, as for a script in it, unless one hides Python's own."""
    if str(folder) in sys.path:
        return
    own = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    hides = own & (sys.stdlib_module_names | NEEDED)
    sys.path.insert(len(sys.path) if hides else 0, str(folder))


@contextlib.contextmanager
def _own_command_line(path: Path) -> Iterator[None]:
    """A context in which the command line has no arguments: those of fastseg are not for the file."""
    before, sys.argv = sys.argv, [str(path)]
    try:
        yield
    finally:
        sys.argv = before


def _import_file(path: Path) -> Any:
    """Execute a file as the module of its stem, or under another name if a module of that name exists."""
    known = path.stem in sys.stdlib_module_names | NEEDED | sys.modules.keys()
    name = f"{path.stem} (the file {path})" if known else path.stem
    found = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def arguments(given: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    """Parse the arguments of a function.

    Args:
        given: texts KEY=VALUE or VALUE, where a value is read as JSON or Python, otherwise as a string; or a single
            JSON object or list.

    Returns:
        tuple: positional arguments and keyword arguments.

    Raises:
        ValueError: the text of a JSON object or list is not valid JSON.

    Example::

        >>> from fastseg.commands.model_spec import arguments
        >>> arguments(["resnet18", "5", "scale=0.5"])
        (['resnet18', 5], {'scale': 0.5})
    """
    if len(given) == 1 and given[0].lstrip()[:1] in ("{", "["):
        try:
            read = json.loads(given[0])
        except json.JSONDecodeError as error:
            raise ValueError(f"{given[0]!r} is not valid JSON: {error}") from error
        return ([], read) if isinstance(read, dict) else (read, {})
    positional, named = [], {}
    for text in given:
        key, equals, value = text.partition("=")
        if equals and key.isidentifier():
            named[key] = _value(value)
        else:
            positional.append(_value(text))
    return positional, named


def _value(text: str) -> Any:
    """`text` read as JSON, else as Python, else unchanged."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            pass
    return text


def model(spec: str, given: Sequence[str] = ()) -> nn.Module:
    """Return the module that `spec` names, or that it returns when called.

    Args:
        spec: MODULE:NAME or FILE.py:NAME of a torch.nn.Module, or of a class or function that makes one.
        given: its arguments, see :func:`arguments`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the name is not found, raises, or does not make a module.

    Example::

        >>> from fastseg.commands.model_spec import model
        >>> model("torch.nn:MaxPool2d", ["2"])
        MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False)
    """
    made = load(spec)
    if isinstance(made, nn.Module):
        if given:
            raise ValueError(f"{spec} is already a model and takes no arguments")
        return made
    if not callable(made):
        raise ValueError(f"{spec} must be a torch.nn.Module or make one, but is a {type(made).__name__}")
    positional, named = arguments(given)
    try:
        with _own_command_line(Path(spec.rpartition(":")[0])):
            made = made(*positional, **named)
    except (Exception, SystemExit) as error:
        call = f"called with {' '.join(given) or 'no arguments'}"
        raise ValueError(f"{spec} {call} raises {describe_error(error)}") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"{spec} must return a torch.nn.Module, but returns a {type(made).__name__}")
    return made


def tensor(text: str, dtype: torch.dtype) -> tuple[str | None, Tensor]:
    """Return a name and a random tensor.

    Args:
        text: [NAME=]SHAPE[:DTYPE[:LIMIT]], such as ``"1x3x64x64"`` or ``"labels=1x64x64:int64:19"``.
        dtype: the dtype if `text` has none.

    Returns:
        tuple: NAME or None; and the tensor. Floats are normally distributed, integers uniformly from 0 to LIMIT - 1
        (default LIMIT: 2).

    Raises:
        ValueError: `text` has another form.

    Example::

        >>> import torch
        >>> from fastseg.commands.model_spec import tensor
        >>> name, labels = tensor("labels=1x64x64:int64:19", torch.float32)
        >>> name, labels.shape, labels.dtype
        ('labels', torch.Size([1, 64, 64]), torch.int64)
    """
    name, equals, rest = text.rpartition("=")
    shape, *options = rest.split(":")
    sizes, found = shape.split("x"), getattr(torch, options[0], None) if options else dtype
    valid = isinstance(found, torch.dtype) and all(size.isdigit() for size in sizes) and len(options) < 3
    if valid and len(options) == 2:
        valid = options[1].isdigit() and int(options[1]) > 0 and not found.is_floating_point
    if not valid or (equals and not name.isidentifier()):
        raise ValueError(f"{text!r} must be [NAME=]SHAPE[:DTYPE[:LIMIT]], such as 1x3x64x64 or labels=1x64x64:int64:19")
    size = [int(n) for n in sizes]
    if found.is_floating_point:
        return name or None, torch.randn(size).to(found)
    return name or None, torch.randint(int(options[1]) if len(options) == 2 else 2, size).to(found)
