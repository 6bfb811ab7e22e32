"""What a command line names: a model and its arguments, and random inputs."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def load(spec: str) -> Any:
    """The object that MODULE:NAME or FILE.py:NAME names; ValueError where there is none.

    The current directory, or the file's, is searched for modules first.
    """
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise ValueError(f"{spec!r} must be MODULE:NAME, such as segnet:SegNet or path/segnet.py:SegNet")
    path = Path(where)
    is_file = path.suffix == ".py"
    folder = str((path.parent if is_file else Path()).resolve())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        thing = _run(path) if is_file else importlib.import_module(where)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{where} cannot be imported: {said(error)}") from error
    for part in name.split("."):
        if not hasattr(thing, part):
            raise ValueError(f"{where} has no {name}")
        thing = getattr(thing, part)
    return thing


def _run(path: Path) -> Any:
    found = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def said(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def arguments(given: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    """(by position, by name) of KEY=VALUE and VALUE, or of one JSON object or list. ValueError for bad JSON."""
    if len(given) == 1 and given[0].lstrip()[:1] in ("{", "["):
        try:
            read = json.loads(given[0])
        except json.JSONDecodeError as error:
            raise ValueError(f"{given[0]!r} is no JSON: {error}") from error
        return ([], read) if isinstance(read, dict) else (read, {})
    by_place, by_name = [], {}
    for text in given:
        key, equals, value = text.partition("=")
        if equals and key.isidentifier():
            by_name[key] = _value(value)
        else:
            by_place.append(_value(text))
    return by_place, by_name


def _value(text: str) -> Any:
    """Read as JSON, else as Python, else the text itself."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            pass
    return text


def model(spec: str, given: Sequence[str] = ()) -> nn.Module:
    """The torch.nn.Module that MODULE:NAME is, or makes from the arguments `given`. ValueError for anything else."""
    made = load(spec)
    if isinstance(made, nn.Module):
        if given:
            raise ValueError(f"{spec} is a model already and takes no arguments")
        return made
    if not callable(made):
        raise ValueError(f"{spec} is of type {type(made).__name__}; it must be a torch.nn.Module or make one")
    by_place, by_name = arguments(given)
    try:
        made = made(*by_place, **by_name)
    except Exception as error:
        raise ValueError(f"{spec} called with {' '.join(given) or 'no arguments'} raises {said(error)}") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"{spec} gives a {type(made).__name__}; it must give a torch.nn.Module")
    return made


def tensor(text: str, dtype: torch.dtype) -> tuple[str | None, Tensor]:
    """(name, random tensor) of [NAME=]SHAPE[:DTYPE[:LIMIT]]; ValueError for anything else.

    Of `dtype` without a DTYPE. Floats are normally distributed; integers from 0 to LIMIT - 1, or 1 without a LIMIT.
    """
    name, equals, rest = text.rpartition("=")
    shape, *kind = rest.split(":")
    sizes, named = shape.split("x"), getattr(torch, kind[0], None) if kind else dtype
    fine = isinstance(named, torch.dtype) and all(size.isdigit() for size in sizes) and len(kind) < 3
    if fine and len(kind) == 2:
        fine = kind[1].isdigit() and int(kind[1]) > 0 and not named.is_floating_point
    if not fine or (equals and not name.isidentifier()):
        raise ValueError(f"{text!r} must be [NAME=]SHAPE[:DTYPE[:LIMIT]], such as 1x3x64x64 or labels=1x64x64:int64:19")
    size = [int(n) for n in sizes]
    if named.is_floating_point:
        return name or None, torch.randn(size).to(named)
    return name or None, torch.randint(int(kind[1]) if len(kind) == 2 else 2, size).to(named)
